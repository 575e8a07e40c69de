"""Makes a ``tokenizer.json`` whole, in the child process of ``plugins.child``.

Source: transformers' ``TokenizersBackend.__init__``, by whose calls of ``tokenizers`` a token that
is new gets its id, and one that is there its properties.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

# Of several scripts and kinds: whatever fails on every text fails here.
SAMPLE = "The quick brown fox, 12.5 %;\n\tcafé 漢字 😀 \u0915\u094d\u0937 e\u0301"


def answer(request: dict[str, Any]) -> str | None:
    """What ``tokenizer.json`` must hold, or None where it does already."""
    file = request["sources"].get("tokenizer.json")
    if file is not None:
        tokenizer = Tokenizer.from_file(file)
        # Written by the library once, so that a difference is one of content.
        before = tokenizer.to_str()
        written = json.loads(Path(file).read_text(encoding="utf-8"))["added_tokens"]
    else:
        tokenizer, before, written = _byte_level(request), "", []
    _add(tokenizer, request, written)
    if file is None:
        _begin_and_end(tokenizer, request)
    after = tokenizer.to_str()
    whole: str | None = None if after == before else tokenizer.to_str(pretty=True)
    # The runtime encodes so, too.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if whole is None:
        _ids(tokenizer, SAMPLE)
    else:
        _compare(whole, tokenizer)
    return whole


def _byte_level(request: dict[str, Any]) -> Tokenizer:
    """GPT-2's: ``vocab.json`` and ``merges.txt`` hold its pieces, and its class the rest."""
    model = BPE.from_file(
        request["sources"]["vocab.json"],
        request["sources"]["merges.txt"],
        continuing_subword_prefix="",
        end_of_word_suffix="",
        fuse_unk=False,
    )
    tokenizer = Tokenizer(model)
    if request["nfc"]:
        tokenizer.normalizer = normalizers.NFC()
    space = request["add_prefix_space"]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add(tokenizer: Tokenizer, request: dict[str, Any], written: list[dict[str, Any]]) -> None:
    there = list(tokenizer.get_added_tokens_decoder().values())
    named = {name: _read(token) for name, token in request["named"].items()}
    padding = tokenizer.padding
    if padding is not None and request["pads"]:
        named.setdefault("pad_token", padding["pad_token"])
    order = [*(name for name in request["names"] if name in named), *named]
    tokens = _listed(request, written)
    known = {token.content for token in (*there, *tokens)}
    new: list[str | AddedToken] = []
    for special in (*(named[name] for name in order), *map(_read, request["extra"])):
        # Of two with one text the latter's properties count, unless both are objects.
        if _content(special) not in known and special not in new:
            new.append(special)
    tokens += [AddedToken(each, special=True) if isinstance(each, str) else each for each in new]
    called = {_content(token) for token in named.values()}
    for token in tokens:
        if token.content in called:
            token.special = True
    # One that was special stays so in transformers, whatever a later file says of it.
    sticky = {token.content for token in (*there, *tokens) if token.special}
    tokenizer.add_tokens([_as_special(t) if t.content in sticky else t for t in tokens])


def _listed(request: dict[str, Any], written: list[dict[str, Any]]) -> list[AddedToken]:
    """The tokens that files list by id, in the order of their ids."""
    by_id = {int(number): AddedToken(**token) for number, token in request["added"].items()}
    if not request["complete"]:
        for token in written:
            by_id[token["id"]] = AddedToken(**{k: v for k, v in token.items() if k != "id"})
    return [by_id[number] for number in sorted(by_id)]


def _as_special(token: AddedToken) -> AddedToken:
    """The same, special; all is said, since what is not said would follow from that."""
    return AddedToken(
        token.content,
        special=True,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        single_word=token.single_word,
    )


def _read(value: str | dict[str, Any]) -> str | AddedToken:
    return value if isinstance(value, str) else AddedToken(**value)


def _content(token: str | AddedToken) -> str:
    return token if isinstance(token, str) else token.content


def _begin_and_end(tokenizer: Tokenizer, request: dict[str, Any]) -> None:
    """What stands around every text, where no ``tokenizer.json`` says it."""
    named = {name: _content(_read(token)) for name, token in request["named"].items()}
    begin, end = (
        named.get(f"{side}_token") if request[f"add_{side}_token"] else None
        for side in ("bos", "eos")
    )

    def around(sequence: str) -> list[str]:
        kind = 0 if sequence == "$A" else 1
        return [f"{each}:{kind}" for each in (begin, sequence, end) if each]

    special = [(token, tokenizer.token_to_id(token)) for token in (begin, end) if token]
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around("$A"), pair=around("$A") + around("$B"), special_tokens=special
        )


def _ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """The ids of a text, which must survive a decoding; a panic passes."""
    try:
        ids: list[int] = tokenizer.encode(text).ids
        tokenizer.decode(ids)
    # A vocabulary may have no token for what it does not know; the user of such a text is told.
    except Exception:
        return None
    return ids


def _compare(whole: str, made: Tokenizer) -> None:
    """What is written must be read as what was made: the ids of added tokens are given anew."""
    read = Tokenizer.from_str(whole)
    read.no_truncation()
    read.no_padding()
    contents = [token.content for token in made.get_added_tokens_decoder().values()]
    for text in (SAMPLE, *(f"a{content}b {content} c" for content in contents)):
        if _ids(read, text) != _ids(made, text):
            raise ValueError(f"written in one file, it would encode {text!r} otherwise")
