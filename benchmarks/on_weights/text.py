"""From a text to windows of token ids, which every program is fed alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.on_weights.figures import Ids
from ingot.plugins.errors import IngotError


def windows_of(text: str, tokenizer: Path, length: int, most: int) -> Ids:
    """Cut a text into windows that do not overlap.

    Args:
        text: to be encoded in one piece, without special tokens.
        tokenizer: a ``tokenizer.json``.
        length: tokens of a window.
        most: windows to take; they are spread over the whole text.

    Returns:
        ``[W, length]``, with at most ``most`` windows.

    Raises:
        IngotError: a text of fewer than two windows, of which no error can be told.
    """
    ids = Tokenizer.from_file(str(tokenizer)).encode(text, add_special_tokens=False).ids
    whole = len(ids) // length
    if whole < 2:
        raise IngotError(
            f"The text has {len(ids)} tokens, and two windows of {length} are the least; "
            "give a longer text or shorter windows."
        )
    windows = np.array(ids[: whole * length], np.int64).reshape(whole, length)
    if whole <= most:
        return windows
    return windows[np.linspace(0, whole - 1, most).round().astype(int)]
