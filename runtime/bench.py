"""How fast an ingot is here: prefill and decode at several lengths and batch sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ingot.runtime.prompt import pieces
from ingot.runtime.session import Ids, Session, SessionError

# Calls before the measured ones: the first allocates, and a second one settles.
WARM_UP = 2
LENGTHS = (16, 128, 1024)


@dataclass(frozen=True)
class Speed:
    """One row.

    Attributes:
        what: ``prefill`` or ``decode``.
        batch: sequences.
        length: tokens of the prefill, or before the decode step.
        tokens_per_second: median over the repetitions, all sequences together.
        spread: half of the distance between the quartiles, as a share of the median.
    """

    what: str
    batch: int
    length: int
    tokens_per_second: float
    spread: float


def usual_lengths(session: Session, repetitions: int) -> tuple[int, ...]:
    """``LENGTHS``, cut to what the model's context leaves beside the measured steps."""
    context = session.manifest.generation.get("context_length")
    if context is None:
        return LENGTHS
    most = context - WARM_UP - repetitions
    return tuple(sorted({min(length, most) for length in LENGTHS})) if most > 0 else LENGTHS


def bench(
    session: Session,
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    repetitions: int,
    advance: Callable[[int], None] = lambda _rows: None,
) -> Iterator[Speed]:
    """Measure every batch and length: a prefill of the length, then decode steps behind it.

    Both as ``generate`` has them: a prompt's last logits alone, and a long one in pieces.

    Raises:
        SessionError: no generating ingot, or more tokens than its context.
    """
    manifest = session.manifest
    if manifest.task != "generate":
        raise SessionError(f"the ingot is for {manifest.task}; bench takes one that generates.")
    most = manifest.generation["context_length"]
    for batch in batches:
        for length in lengths:
            total = length + WARM_UP + repetitions
            if most is not None and total > most:
                raise SessionError(
                    f"{length} tokens and {WARM_UP + repetitions} steps exceed this model's "
                    f"context of {most}; give a smaller --length or --repetitions."
                )
            random = np.random.default_rng(0)
            ids = random.integers(0, manifest.vocab_size, (batch, total), dtype=np.int64)
            yield _prefill(session, ids[:, :length], total, repetitions)
            advance(1)
            yield _decode(session, ids, length)
            advance(1)


def _prefill(session: Session, ids: Ids, capacity: int, repetitions: int) -> Speed:
    times = []
    parts = [ids[:, part] for part in pieces(session.manifest, len(ids), ids.shape[1])]
    for _ in range(WARM_UP + repetitions):
        session.reset(len(ids), capacity)
        times.append(_seconds(session, parts))
    return _speed("prefill", ids.shape[1], ids.size, len(ids), times[WARM_UP:])


def _decode(session: Session, ids: Ids, length: int) -> Speed:
    """The state is that of the last prefill."""
    times = [_seconds(session, [ids[:, at : at + 1]]) for at in range(length, ids.shape[1])]
    return _speed("decode", length, len(ids), len(ids), times[WARM_UP:])


def _seconds(session: Session, parts: list[Ids]) -> float:
    begin = time.perf_counter()
    for ids in parts:
        session.step(ids, np.ones_like(ids), 1)
    return time.perf_counter() - begin


def _speed(what: str, length: int, tokens: int, batch: int, times: list[float]) -> Speed:
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (median,) * 3
    return Speed(what, batch, length, tokens / median, (high - low) / 2 / median)
