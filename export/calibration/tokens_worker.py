"""Encodes a text, in the child process of ``plugins.child``."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer


def answer(request: dict[str, Any]) -> list[int]:
    """The ids of a text, as many as are asked for."""
    if request["file"] is not None:
        tokenizer = Tokenizer.from_file(request["file"])
    else:
        tokenizer = Tokenizer.from_str(request["tokenizer"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: list[int] = tokenizer.encode(request["text"]).ids
    return ids[: request["most"]]
