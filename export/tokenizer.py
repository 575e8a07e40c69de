"""The tokenizer of an ingot: one ``tokenizer.json`` of all that a checkpoint says in several files.

Who serves an ingot from C++ or Triton has the library ``tokenizers`` and that file, and the runtime
has no more.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingot.export.tokenizer_files import NAMES, Token, TokenizerFiles, read_tokenizer_files
from ingot.graphs.checkpoint import Checkpoint
from ingot.plugins.child import ChildError, ask
from ingot.plugins.errors import IngotError
from ingot.plugins.links import require_inside

Find = Callable[[str], Path]

TOKENIZER = "tokenizer.json"
TEMPLATES = "additional_chat_templates"
COPIED = (
    TOKENIZER,
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
WORKER = Path(__file__).with_name("tokenizer_worker.py")
# The largest released have 35 MB; making one whole takes seconds, and 20 times its size of memory.
MOST_BYTES = 64 << 20
SECONDS = 60
MEGABYTES = 2048


class TokenizerError(IngotError):
    """A tokenizer that cannot be read, or that does not survive a text."""


@dataclass(frozen=True)
class _Class:
    """What a class of transformers' gives a folder of ``vocab.json`` and ``merges.txt``."""

    tokens: Mapping[str, str]
    nfc: bool = False


_END = "<|endoftext|>"
_ENDS = {f"{name}_token": _END for name in ("bos", "eos", "unk")}
CLASSES = {
    "GPT2Tokenizer": _Class(_ENDS),
    "GPTNeoXTokenizer": _Class({**_ENDS, "pad_token": "<|padding|>"}, nfc=True),
}
# They say no more than that there is a tokenizer.
GENERAL = ("", "PreTrainedTokenizer", "TokenizersBackend")


def find_beside(checkpoint: Checkpoint) -> Find:
    """The path of a file beside the weights, by its name; whether it is there is another matter.

    Raises (when called):
        LinkError: it is a link out of its folder.
    """

    def find(name: str) -> Path:
        return require_inside(checkpoint.side_folder(name), name, hub=True)

    return find


def make_tokenizer(find: Find, family_class: str) -> str | None:
    """The ``tokenizer.json`` that makes the ids of transformers' ``AutoTokenizer``.

    Args:
        find: the path of a file of the checkpoint, by its name.
        family_class: transformers' tokenizer of the family, for a folder without ``tokenizer.json``
            that names none.

    Returns:
        What the file must hold; None where the checkpoint's is whole, or where there is none and
        none can be made.

    Raises:
        IngotError: a file that is damaged or too large, or a tokenizer that fails on a text.
    """
    sources: tuple[str, ...]
    files = read_tokenizer_files(find)
    request = _request(files)
    if find(TOKENIZER).is_file():
        sources = (TOKENIZER,)
    elif find("vocab.json").is_file() and find("merges.txt").is_file():
        sources = ("vocab.json", "merges.txt")
        named = str(files.config.get("tokenizer_class") or "").removesuffix("Fast")
        chosen = CLASSES.get(family_class if named in GENERAL else named)
        if chosen is None:
            return None
        given = {name: value for name, value in chosen.tokens.items() if name not in files.config}
        request["named"] = {**given, **request["named"]}
        request["nfc"] = chosen.nfc
    else:
        return None
    for name in sources:
        path = find(name)
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise TokenizerError(
                f"{path} has {size:,} bytes, and a tokenizer has at most {MOST_BYTES:,}; "
                "remove the file to export without a tokenizer."
            )
    request["sources"] = {name: str(find(name).absolute()) for name in sources}
    try:
        whole: str | None = ask(WORKER, request, seconds=SECONDS, megabytes=MEGABYTES)
    except ChildError as error:
        raise TokenizerError(
            f"{' and '.join(str(find(name)) for name in sources)} cannot be used ({error}); put a "
            "whole tokenizer there, or remove it to export without one."
        ) from error
    return whole


def copy_tokenizer(find: Find, whole: str | None, folder: Path) -> None:
    """Put what belongs to text into an ingot.

    Args:
        find: as of ``make_tokenizer``.
        whole: of ``make_tokenizer``.
        folder: the ingot.
    """
    for name in COPIED:
        path = find(name)
        if path.is_file():
            shutil.copyfile(path, folder / name)
    for path in sorted(find(TEMPLATES).glob("*.jinja")):
        (folder / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / TEMPLATES / path.name)
    if whole is not None:
        (folder / TOKENIZER).write_text(whole, encoding="utf-8")


def _request(files: TokenizerFiles) -> dict[str, Any]:
    return {
        "named": {name: _plain(token) for name, token in files.named.items()},
        "extra": [_plain(token) for token in files.extra],
        "added": {number: _plain(token) for number, token in files.added.items()},
        "complete": files.complete,
        "names": NAMES,
        "pads": "pad_token" not in files.config,
        "add_prefix_space": files.config.get("add_prefix_space") is True,
        "add_bos_token": files.config.get("add_bos_token") is True,
        "add_eos_token": files.config.get("add_eos_token") is True,
        "nfc": False,
    }


def _plain(token: str | Token) -> str | dict[str, Any]:
    return token if isinstance(token, str) else {"content": token.content, **token.flags}
