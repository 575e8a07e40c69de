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
        changes: counts the calls that changed the state, each ``reset`` and each ``step``; by it
            who goes on over a state finds out whether anybody else has been there.
        fed: the token inputs that the last call gave the graph, by name.
        tapped: values inside of the graph after the last call, by name; empty without taps.
    """

    manifest: Manifest
    fed: dict[str, Ids]
    tapped: dict[str, Floats]

    @property
    def changes(self) -> int: ...

    def reset(self, batch: int, capacity: int) -> None:
        """Forget all state and make room for ``batch`` sequences of ``capacity`` tokens.

        Raises:
            SessionError: a batch below 1, a capacity below 0, what is no whole number below 2^31,
                or no memory. The session takes no step until a reset that succeeds.
        """

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        """Feed T new tokens of every sequence; without state, each call stands alone.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]``, 1 for tokens, 0 for padding, which stands anywhere where
                all states grow, and before the first token of its row where one is recurrent.
            logits_to_keep: of how many of the last columns the logits are wanted; 0 for all. A
                graph with an input of that name computes no others; of another, such as an
                engine, they are cut.

        Returns:
            The main output: ``logits [B, T, V]``, or ``[B, min(K, T), V]`` of the last K;
            ``last_hidden_state [B, T, H]``, or of a classifier ``logits [B, num_labels]``.

        Raises:
            SessionError: another batch, ids outside the vocabulary, padding that the state does
                not take, no room left, a ``logits_to_keep`` that is no number or of an ingot that
                does not generate, or a call in another thread that is not done.
        """

    def state(self) -> dict[str, Floats]:
        """A copy of every state, by output name, cut to the tokens seen so far."""

    def fork(self) -> Session:
        """A session of its own, with no state, over the same weights; each may have a thread."""
