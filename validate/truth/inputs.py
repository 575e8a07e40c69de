"""Seeded token inputs that would show a mistake: three rows, padded by different lengths."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ingot.runtime.session import Ids

Mask = npt.NDArray[np.bool_]

# With which the names of calls begin whose experts are forced.
EXPERTS_FORCED = "experts forced"
PADDING = 7
# One without padding, one that is padded, and one in whose prefill all but one token is padding;
# the states of the last are known after one token, two, three and so on.
ROWS = 3
# A multiple of every chunk size up to it; the other split is off it, and behind the padding.
SPLIT = 16
# A graph without state computes each length from its first token, so it is asked for fewer.
MOST_LENGTHS = 8


@dataclass(frozen=True)
class Plan:
    """How much one validation feeds.

    Attributes:
        prefill: tokens of the first call, at least; odd, so that a kernel's tail is used too.
        decode: calls of one token after it.
        seeds: sets of token ids.
        whole: whether one sequence as long as the model's context is fed too, in pieces.
        length: how long that sequence is, whether or not ``whole`` asks for one.
    """

    prefill: int = 19
    decode: int = 32
    seeds: int = 1
    whole: bool = False
    length: int | None = None


STANDARD = Plan()
QUICK = Plan(decode=8)
THOROUGH = Plan(prefill=131, decode=128, seeds=3, whole=True)


@dataclass(frozen=True)
class Inputs:
    """Calls from an empty state, whose tokens are all given (teacher forcing).

    Attributes:
        input_ids: ``[B, C]``, the columns of all calls.
        attention_mask: ``[B, C]``; 0 is padding.
        prefill: tokens of the first call.
        stateful: where not, every call begins at the first token.
        calls: name and last column, exclusive, of every call; by default a prefill and decode
            steps of one token each, and without state calls that are one token longer each.
        kept: ``[B, C]``, the tokens of which more than the routers' logits is recorded; None for
            all. Of a long sequence all outputs would not fit into memory.
        forced: of each call, the experts ``[B*T, E]`` that are given to each router, on every side;
            where there are none, the truth chooses.
        room: how many tokens more than these a session is to have room for.
    """

    input_ids: Ids
    attention_mask: Ids
    prefill: int
    stateful: bool = True
    calls: tuple[tuple[str, int], ...] = ()
    kept: Mask | None = None
    forced: tuple[tuple[Mask, ...], ...] = ()
    room: int = 0

    @property
    def capacity(self) -> int:
        """For how many tokens a session is to have room."""
        return int(self.input_ids.shape[1]) + self.room

    @property
    def splits(self) -> tuple[int, ...]:
        """Where the prefill is also cut in two: at the end of a chunk, and off it."""
        return (SPLIT, SPLIT - 5)

    @cached_property
    def steps(self) -> list[tuple[str, slice]]:
        """Name and columns of every call."""
        if self.calls:
            stops = [stop for _, stop in self.calls]
            starts = [0, *stops[:-1]] if self.stateful else [0] * len(stops)
            columns = [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
            return [(name, each) for (name, _), each in zip(self.calls, columns, strict=True)]
        total = self.input_ids.shape[1]
        decode = range(self.prefill, total)
        if not self.stateful:
            lengths = range(self.prefill, total + 1)
            return [(f"{length} tokens", slice(0, length)) for length in lengths]
        return [("prefill", slice(0, self.prefill))] + [
            (f"decode {column - self.prefill + 1}", slice(column, column + 1)) for column in decode
        ]

    @cached_property
    def wanted(self) -> Mask:
        """``[B, C]``, the real tokens that are recorded."""
        real: Mask = self.attention_mask != 0
        return real if self.kept is None else real & self.kept

    def feeds(self, columns: slice, *, cached: bool) -> dict[str, Ids]:
        """A graph's token inputs of one call, by their definition.

        A token's position is the number of real tokens before it, so it shares no code with the
        sessions, which count on from call to call.

        Args:
            columns: of the call.
            cached: whether a cache holds the past, which the mask then covers too.

        Returns:
            Ids and positions ``[B, T]``, and the mask ``[B, T]`` or ``[B, S]``.
        """
        so_far = self.attention_mask[:, : columns.stop]
        return {
            "input_ids": self.input_ids[:, columns],
            "attention_mask": so_far if cached else self.attention_mask[:, columns],
            "position_ids": (so_far.cumsum(axis=1) - so_far)[:, columns],
        }


def make_inputs(
    vocab_size: int,
    seed: int = 0,
    plan: Plan = STANDARD,
    *,
    chunk_size: int = 0,
    stateful: bool = True,
    longest: int | None = None,
    rows: int = 2,
) -> Inputs:
    """Inputs for any vocabulary: some rows, a prefill and the plan's decode steps.

    Args:
        vocab_size: ids are below it.
        seed: of the ids.
        plan: how much.
        chunk_size: of a chunked scan, whose prefill must carry its state over a boundary.
        stateful: see ``Inputs``.
        longest: most tokens of a sequence that the target takes, if it has a limit.
        rows: the first so many of ``ROWS``.
    """
    random = np.random.default_rng(seed)
    decode = plan.decode if stateful else min(plan.decode, MOST_LENGTHS)
    prefill = max(plan.prefill, chunk_size + 3)
    if longest is not None:
        prefill = min(prefill, longest - 1)
        decode = min(decode, longest - prefill)
    ids = random.integers(0, vocab_size, size=(rows, prefill + decode), dtype=np.int64)
    mask = np.ones_like(ids)
    mask[1:2, :PADDING] = 0
    mask[2:3, : prefill - 1] = 0
    return Inputs(ids, mask, prefill, stateful)
