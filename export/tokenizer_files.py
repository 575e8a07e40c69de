"""What a folder says of its tokens beside ``tokenizer.json``, as transformers reads it.

Source: transformers' ``PreTrainedTokenizerBase``, ``_from_pretrained`` and ``__init__``: what wins,
and in which order tokens that are new get their ids. ``runtime/`` reads an ingot by it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingot.plugins.errors import IngotError, shown
from ingot.plugins.json_file import JsonError, read_object

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
# In this order those that are new get their ids.
NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


class TokenizerFilesError(IngotError):
    """A file about tokens that cannot be read, or that is not of the shape it must have."""


@dataclass(frozen=True)
class Token:
    """A token with its properties, by the names of ``tokenizers.AddedToken``.

    Attributes:
        content: its text.
        flags: of ``FLAGS``, those that are said.
    """

    content: str
    flags: Mapping[str, bool] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.content


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files say, in the order in which tokens are added.

    Attributes:
        config: ``tokenizer_config.json``; empty where there is none.
        named: ``bos_token`` and so on, and tokens under names of the model's own.
        extra: special tokens without a name.
        added: tokens by the ids they had.
        complete: ``added`` is all of the added tokens, so those of ``tokenizer.json`` do not count
            where a class makes its tokenizer anew.
    """

    config: Mapping[str, Any]
    named: Mapping[str, str | Token]
    extra: tuple[str | Token, ...]
    added: Mapping[int, Token]
    complete: bool


def read_tokenizer_files(find: Callable[[str], Path]) -> TokenizerFiles:
    """Read what is there of the three files in a checkpoint or an ingot.

    Args:
        find: the path of each by its name, such as ``folder.joinpath``.

    Raises:
        TokenizerFilesError: one is no JSON object, or a token in it is none.
    """
    config = _object(find(CONFIG))
    said = {name: value for name, value in config.items() if value is not None}
    # Two names of one list, which counts before that of the map also where it is empty.
    new, old = "extra_special_tokens", "additional_special_tokens"
    for name in (old, new):
        if name in config and not said.get(new):
            said[new] = said.pop(name, None)
    own = {
        name: said.pop(name)
        for name in list(said)
        if name.endswith("_token") and name not in NAMES and isinstance(said[name], str)
    }
    if isinstance(said.get("extra_special_tokens"), dict):
        own.update(said.pop("extra_special_tokens"))
    added: dict[int, Token] = {}
    complete = "added_tokens_decoder" in config
    if complete:
        added = _by_id(said.get("added_tokens_decoder", {}))
    else:
        _merge_map(said, own, _object(find(SPECIAL_TOKENS_MAP)))
        added = _added_tokens(find(ADDED_TOKENS), said)
    extra = said.get(new, said.get(old)) or []
    if not isinstance(extra, list):
        raise TokenizerFilesError(
            f"{find(CONFIG)}: extra_special_tokens is {shown(extra)}, no list of tokens."
        )
    named = {name: _token(said[name], name) for name in NAMES if name in said}
    for name, value in said.items():
        # Other fields end so, too: add_bos_token is true or false.
        typed = isinstance(value, dict) and value.get("__type") == "AddedToken"
        if (
            name.endswith("_token")
            and name not in NAMES
            and (isinstance(value, str | Token) or typed)
        ):
            named[name] = _token(value, name)
    named |= {name: _token(value, name) for name, value in own.items()}
    return TokenizerFiles(
        config,
        named,
        tuple(_token(each, "extra_special_tokens") for each in extra),
        added,
        complete,
    )


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except JsonError as error:
        raise TokenizerFilesError(f"{error}; mend the file or remove it.") from error


def _token(value: Any, name: str, **flags: bool) -> str | Token:
    """A token as the files write it: its text, or an object with its properties."""
    if isinstance(value, str | Token):
        return value
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str):
        raise TokenizerFilesError(
            f"{name} is {shown(value)}; a token is its text, or an object with its content."
        )
    found = {flag: value[flag] for flag in FLAGS if flag in value} | flags
    for flag, on in found.items():
        if not isinstance(on, bool):
            raise TokenizerFilesError(
                f"{name}: {flag} of {shown(content)} is {shown(on)}; it must be true or false."
            )
    return Token(content, found)


def _by_id(tokens: Any) -> dict[int, Token]:
    if not isinstance(tokens, dict):
        raise TokenizerFilesError(f"added_tokens_decoder is {shown(tokens)}, which is no object.")
    found = {}
    for number, value in tokens.items():
        token = _token(value, f"token {shown(number)} of added_tokens_decoder")
        # Sixteen digits are more than any vocabulary has.
        if not (isinstance(token, Token) and number.isdecimal() and len(number) <= 16):
            raise TokenizerFilesError(
                f"added_tokens_decoder has {shown(value)} as {shown(number)}; it must hold objects "
                "with the properties of tokens, by their ids."
            )
        found[int(number)] = token
    return found


def _merge_map(said: dict[str, Any], own: dict[str, Any], tokens: dict[str, Any]) -> None:
    """What ``special_tokens_map.json`` says wins, but for its list of further tokens."""
    for name, value in tokens.items():
        if name == "extra_special_tokens":
            if isinstance(value, dict):
                own.update(value)
                said.pop(name, None)
            elif isinstance(value, list):
                given = [_token(each, name, special=True) for each in value]
                before = said.get(name) or []
                said[name] = [*before, *(each for each in given if each not in before)]
        elif isinstance(value, dict):
            said[name] = _token(value, name, special=True)
        elif value is not None:
            said[name] = value
    listed = said.get("additional_special_tokens")
    if isinstance(listed, list):
        said["additional_special_tokens"] = [
            _token(each, "additional_special_tokens", special=True) for each in listed
        ]


def _added_tokens(path: Path, said: Mapping[str, Any]) -> dict[int, Token]:
    special = {str(said[name]) for name in NAMES if name in said}
    extra = said.get("extra_special_tokens")
    special |= {str(each) for each in extra} if isinstance(extra, list) else set()
    found = {}
    for content, number in _object(path).items():
        if type(number) is not int or number < 0:
            raise TokenizerFilesError(
                f"{path}: {shown(content)} has the id {shown(number)}; mend the file or remove it."
            )
        known = content in special
        found[number] = Token(content, {"special": known, "normalized": not known})
    return found
