"""What a session was asked: every call that it was given, and how much of each was compared.

The recorder stands around a session, so a call that was planned and not made is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ingot.runtime.session import Floats, Ids
from ingot.validate.truth.recording import Stepper

# Why a call was made: to be compared, to see the same numbers again, with other threads, or for the
# last logits alone.
Purpose = Literal["compare", "repeat", "threads", "kept"]


@dataclass
class Fed:
    """One call.

    Attributes:
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``.
        past: ``[B, P]``, the mask of the columns before, of the same sequences.
        turns: the number of columns of each call before, of the same sequences.
        purpose: of the call.
        recorded: tokens of which the truth is known.
        free: tokens that were compared as the session computed them.
        replayed: tokens that were compared with the truth's experts.
    """

    input_ids: Ids
    attention_mask: Ids
    past: Ids
    turns: tuple[int, ...] = ()
    purpose: Purpose = "compare"
    recorded: int = 0
    free: int = 0
    replayed: int = 0

    @property
    def rows(self) -> int:
        """B."""
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.input_ids.shape[1])

    @property
    def mask(self) -> Ids:
        """``[B, S]``, of the columns so far."""
        return np.hstack((self.past, self.attention_mask))

    @property
    def paddings(self) -> list[int]:
        """By row, how many of the columns so far are padding."""
        return [int(count) for count in (self.mask == 0).sum(1)]

    @property
    def positions(self) -> int:
        """Tokens of the longest row so far."""
        return int(self.mask.sum(1).max())

    @property
    def began_padded(self) -> bool:
        """Whether a call before was all padding in some row that has tokens by now."""
        stops = np.cumsum(self.turns, dtype=np.int64).tolist()
        starts = [0, *stops][: len(stops)]
        now = self.attention_mask.any(1)
        return any(
            bool((now & ~self.past[:, start:stop].any(1)).any())
            for start, stop in zip(starts, stops, strict=True)
        )

    @property
    def padded_behind(self) -> bool:
        """Whether padding stands behind the last token of some row."""
        return bool((self.mask[:, -1] == 0).any() and self.mask.any(1).all())

    @property
    def padded_within(self) -> bool:
        """Whether padding stands between two tokens of some row."""
        began = np.logical_or.accumulate(self.mask != 0, axis=1)
        ends = np.logical_or.accumulate(self.mask[:, ::-1] != 0, axis=1)[:, ::-1]
        return bool((began & ends & (self.mask == 0)).any())


@dataclass
class Recorder:
    """A session, and the calls that it was given.

    Attributes:
        session: does the work.
        stateful: whether calls follow one another.
        calls: one after the other.
        purpose: of the calls that come.
        handed: the main output of the last call, as the session handed it out.
    """

    session: Stepper
    stateful: bool = True
    calls: list[Fed] = field(default_factory=list)
    purpose: Purpose = "compare"

    @property
    def tapped(self) -> dict[str, Floats]:
        """See ``runtime.session.Session``."""
        return self.session.tapped

    @tapped.setter
    def tapped(self, value: dict[str, Floats]) -> None:
        self.session.tapped = value

    def reset(self, batch: int, capacity: int) -> None:
        """See ``runtime.session.Session.reset``."""
        self._past: Ids = np.zeros((batch, 0), dtype=np.int64)
        self._turns: tuple[int, ...] = ()
        self.session.reset(batch, capacity)

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        """See ``runtime.session.Session.step``."""
        main = self.session.step(input_ids, attention_mask, logits_to_keep)
        self.handed = main
        call = Fed(input_ids, attention_mask, self._past, self._turns, self.purpose)
        self.calls.append(call)
        if self.stateful:
            self._past, self._turns = call.mask, (*self._turns, call.tokens)
        return main

    def state(self) -> dict[str, Floats]:
        """See ``runtime.session.Session.state``."""
        return self.session.state()
