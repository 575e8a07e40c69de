"""What every backend offers: one call from tokens to logits, with the state kept inside.

Shape letters: B batch, T new tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ingot.export.ingot import Manifest
from ingot.plugins.errors import IngotError

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class SessionError(IngotError):
    """A call the session refuses: what was given, and what the graph takes."""


class Session(Protocol):
    """A loaded ingot and the state of one batch of sequences.

    Attributes:
        manifest: of the ingot.
        fed: the token inputs that the last call gave the graph, by name.
        tapped: values inside of the graph after the last call, by name; empty without taps.
    """

    manifest: Manifest
    fed: dict[str, Ids]
    tapped: dict[str, Floats]

    def reset(self, batch: int, capacity: int) -> None:
        """Forget all state and make room for ``batch`` sequences of ``capacity`` tokens."""

    def step(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        """Feed T new tokens of every sequence; without state, each call stands alone.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]``, 1 for tokens, 0 for left padding.

        Returns:
            The main output: ``logits [B, T, V]``, ``last_hidden_state [B, T, H]``, or of a
            classifier ``logits [B, num_labels]``.

        Raises:
            SessionError: another batch, ids outside the vocabulary, or no room left.
        """

    def state(self) -> dict[str, Floats]:
        """A copy of every state, by output name, cut to the tokens seen so far."""

    def fork(self) -> Session:
        """A session of its own, with no state, over the same weights; each may have a thread."""
