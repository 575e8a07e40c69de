"""How a prompt enters a session, for generations and for what measures them."""

from __future__ import annotations

from typing import Any

from ingot.export.ingot import Manifest
from ingot.graphs.state import LOGITS_TO_KEEP
from ingot.plugins.errors import shown
from ingot.runtime.session import SessionError
from ingot.runtime.tokens import whole

# Tokens of a piece. What a call needs beside the states, such as scores and masks, is that of one
# piece. Products are as fast as over more from some hundreds on, and a scan's chunks stay whole.
PREFILL_CHUNK = 512


def chunk_of(given: Any) -> int:
    """The tokens of a piece as a caller gave them; 0 for a prompt in one call.

    Raises:
        SessionError: what is no number of tokens.
    """
    count = whole(given)
    if count is None or count < 0:
        raise SessionError(
            f"prefill_chunk is {shown(given)}; it must be a whole number, 0 for no pieces."
        )
    return count


def pieces(
    manifest: Manifest, rows: int, tokens: int, chunk: int = PREFILL_CHUNK
) -> tuple[slice, ...]:
    """The columns of each call in which a prompt is fed, in order.

    One call takes the whole prompt where pieces would give something else, or be slow: of an ingot
    from before there was ``logits_to_keep``, and of an engine; where the prompt is longer than the
    length at which the model turns all its positions; and of several rows over shared buffers,
    which a session feeds token by token after a past.

    Args:
        manifest: of the ingot.
        rows: of the prompt.
        tokens: of the prompt, padding included.
        chunk: tokens of a piece; 0 for a prompt in one call.
    """
    # The length of one row may be less, so that this keeps more prompts whole than have to be.
    turned = tokens > manifest.generation.get("switch_length", tokens)
    by_token = rows > 1 and manifest.by_token
    asked = any(each.name == LOGITS_TO_KEEP for each in manifest.inputs)
    size = chunk if chunk and asked and not (turned or by_token) else tokens
    return tuple(slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size))
