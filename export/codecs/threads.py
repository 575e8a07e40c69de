"""Independent pieces of work, by as many threads as there are processors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor


def in_threads(work: Callable[[int], None], pieces: Sequence[int]) -> None:
    """Call ``work`` with each piece; numpy gives way to other threads in its longer calls."""
    threads = min(processors(), len(pieces))
    if threads < 2:
        for piece in pieces:
            work(piece)
        return
    with ThreadPoolExecutor(threads) as pool:
        # Whatever one of them raises is raised here.
        list(pool.map(work, pieces))


def processors() -> int:
    """How many this process may use, OpenMP's limit, by which people share a machine, included."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, int(limit) if limit.isdigit() and int(limit) > 0 else allowed or 1)
