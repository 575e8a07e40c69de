"""The token side of a session: its checks, the running attention mask and the positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ingot.graphs.state import State
from ingot.runtime.session import Ids, SessionError


class TokenInputs:
    """Turns each call's tokens into the graph's three token inputs.

    Args:
        vocab_size: ids must be below it.
        states: the graph's states. Where one grows, the attention mask covers its past as well;
            a graph without any takes each call for itself.

    Attributes:
        batch: B, rows of every call.
        capacity: most tokens of a sequence, padding included.
        mask: ``[B, P]``, the attention mask of the tokens seen.
        lost: set by the session while the graph runs. A run that failed, or was interrupted, leaves
            states of which some have the new tokens and some have not.
    """

    def __init__(self, vocab_size: int, states: Sequence[State]) -> None:
        self.vocab_size = vocab_size
        self.stateful = bool(states)
        self.cached = any(state.axis is not None for state in states)
        self.reset(1, 0)

    def reset(self, batch: int, capacity: int) -> None:
        """Forget the tokens seen."""
        self.batch = batch
        self.capacity = capacity
        self.mask: Ids = np.zeros((batch, 0), dtype=np.int64)
        self.lost = False

    @property
    def seen(self) -> int:
        """P, the tokens of every row so far, padding included; 0 without state."""
        return int(self.mask.shape[1]) if self.stateful else 0

    def append(self, input_ids: Ids, attention_mask: Ids) -> dict[str, Ids]:
        """The graph's inputs for T more tokens, ``[B, T]`` each; call ``check`` first."""
        past = self.mask[:, : self.seen]
        self.mask = np.concatenate((past, attention_mask), axis=1)
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)
        return {
            "input_ids": input_ids,
            "attention_mask": self.mask if self.cached else attention_mask,
            "position_ids": positions[:, -input_ids.shape[1] :],
        }

    def check(self, input_ids: Ids, attention_mask: Ids) -> None:
        """Refuse tokens that the graph would misread.

        Raises:
            SessionError: dtype, shape, batch, capacity or an id outside the vocabulary, or a state
                that was lost.
        """
        if self.lost:
            raise SessionError("the last call failed and the state is lost; call reset first.")
        for name, array in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            if array.dtype != np.int64 or array.ndim != 2:
                raise SessionError(
                    f"{name} is {array.dtype} of shape {list(array.shape)}; it must be int64 "
                    "[batch, tokens]."
                )
        if input_ids.shape != attention_mask.shape or input_ids.shape[0] != self.batch:
            raise SessionError(
                f"input_ids {list(input_ids.shape)} and attention_mask "
                f"{list(attention_mask.shape)} must both be [{self.batch}, tokens]."
            )
        if input_ids.shape[1] < 1:
            raise SessionError("input_ids holds no tokens; give at least one.")
        if not np.isin(attention_mask, (0, 1)).all():
            raise SessionError("attention_mask must hold only 1 (token) and 0 (padding).")
        total = self.seen + input_ids.shape[1]
        if total > self.capacity:
            raise SessionError(
                f"{total} tokens do not fit the session's capacity of {self.capacity}."
            )
        outside = (input_ids < 0) | (input_ids >= self.vocab_size)
        if outside.any():
            raise SessionError(
                f"token id {input_ids[outside][0]} is outside the vocabulary of {self.vocab_size}."
            )
