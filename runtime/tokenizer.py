"""The tokenizer of an ingot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ingot.plugins.errors import IngotError

# Imported when text is to be encoded: token ids need no tokenizer, and neither does --help.
if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"


class TokenizerError(IngotError):
    """An ingot without a tokenizer, or with one that cannot be read."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an ingot, which encodes all of a text and nothing more.

    Raises:
        TokenizerError: there is none, or it is damaged.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise TokenizerError(
            f"{folder} holds no {TOKENIZER}, so text cannot be encoded; give token ids: "
            "--prompt-ids 1,2,3."
        )
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The library raises nothing narrower.
    except Exception as error:
        raise TokenizerError(f"{path} is no tokenizer ({error}); export again.") from error
    # It may have been saved with the length it was trained at, and would drop the rest.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
