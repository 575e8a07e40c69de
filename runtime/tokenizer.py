"""The tokenizer of an ingot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ingot.export.tokenizer_files import TokenizerFilesError, read_tokenizer_files
from ingot.plugins.errors import IngotError

# Imported when text is to be encoded: token ids need no tokenizer, and neither does --help.
if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
# The largest released have 35 MB.
MOST_BYTES = 64 << 20


class TokenizerError(IngotError):
    """An ingot without a tokenizer, or with one that cannot be read or fails on a text."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an ingot, which encodes all of a text and nothing more.

    Its own ``encode`` and ``decode`` may panic, which is no ``Exception``; ``encode_text`` and
    ``decode_ids`` raise.

    Raises:
        TokenizerError: there is none, or it is damaged.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise TokenizerError(
            f"{folder} holds no {TOKENIZER}, so text cannot be encoded; give token ids: "
            f"--prompt-ids 1,2,3.{_how_to_make_one(folder)}"
        )
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise TokenizerError(
            f"{path} has {size:,} bytes, and a tokenizer has at most {MOST_BYTES:,}; export again."
        )
    from tokenizers import Tokenizer

    with _refused(f"{path} is no tokenizer", "export again"):
        tokenizer = Tokenizer.from_file(str(path))
        # It may have been saved with the length it was trained at, and would drop the rest.
        tokenizer.no_truncation()
        tokenizer.no_padding()
    # No part of tokenizer.json: the text of a special token is text like any other.
    try:
        config = read_tokenizer_files(folder.joinpath).config
    except TokenizerFilesError as error:
        raise TokenizerError(str(error)) from error
    tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
    return tokenizer


def encode_text(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The token ids of a text.

    Args:
        tokenizer: of ``load_tokenizer``.
        text: what to encode.
        add_special_tokens: put what the tokenizer puts around every text, such as a first token.

    Raises:
        TokenizerError: the tokenizer fails on this text.
    """
    with _refused("the text cannot be encoded", "give token ids, or mend the tokenizer"):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    return ids


def decode_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens.

    Raises:
        TokenizerError: the tokenizer fails on these ids.
    """
    with _refused("the ids cannot be decoded", "give --prompt-ids, or mend the tokenizer"):
        text: str = tokenizer.decode(ids)
    return text


@contextmanager
def _refused(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    # The library raises nothing narrower, and a panic in Rust is not even an Exception.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error)[:200].split())
        raise TokenizerError(f"{what} ({said}); {remedy}.") from error


def _how_to_make_one(folder: Path) -> str:
    if not (folder / SENTENCEPIECE).is_file():
        return ""
    return (
        " To have one, pip install transformers sentencepiece protobuf, and in the checkpoint's "
        'folder run: python -c "from transformers import AutoTokenizer as A; '
        "A.from_pretrained('.').save_pretrained('.')\"; then export again."
    )
