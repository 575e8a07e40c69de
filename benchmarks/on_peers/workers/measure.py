"""One measurement, alike for every program: load, run, say what came out. Needs numpy alone.

A worker's one argument is JSON with what ``serve`` and its program take; the last line that it
prints is JSON as well.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# Seconds of a run to which a first one adds little.
SLOW = 8.0
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Program(Protocol):
    """A loaded model and the state of one sequence."""

    def reset(self) -> None:
        """Forget the sequence."""

    def step(self, ids: Ids) -> Floats:
        """Feed ``[T]`` tokens in one call and return the last one's logits ``[V]``."""


def serve(load: Callable[[dict[str, Any]], Program]) -> None:
    """Measure one program as the command line says, and print what was found.

    Args:
        load: from what was given to a program that is ready to run. ``made`` is what to load,
            ``threads`` how many it may use, ``room`` the most tokens of a sequence.
    """
    given = json.loads(sys.argv[1])
    ids = np.load(given["ids"])
    prompt, past, new, least = (given[name] for name in ("prompt", "past", "new", "seconds"))
    begin = time.perf_counter()
    program = load({**given, "room": max(prompt, past + new)})
    loaded = time.perf_counter() - begin
    # Both runs warm up, and show whether this is the same model as the others'.
    first_prompt, after_prompt = run_prompt(program, ids[:prompt])
    first_decode, after_decode = run_decode(program, ids, past, new)
    np.save(given["logits"], np.stack([after_prompt, after_decode]))
    found = {
        "prefill": rate(prompt, least, first_prompt, lambda: run_prompt(program, ids[:prompt])[0]),
        "decode": rate(new, least, first_decode, lambda: run_decode(program, ids, past, new)[0]),
        "load": loaded,
        "memory": largest_memory(),
    }
    print(json.dumps(found), flush=True)


def run_prompt(program: Program, ids: Ids) -> tuple[float, Floats]:
    """Seconds of one call with a whole prompt, and the last token's logits."""
    program.reset()
    begin = time.perf_counter()
    logits = program.step(ids)
    passed = time.perf_counter() - begin
    # What a program returns it may write over in its next call.
    return passed, np.array(logits, np.float32).reshape(-1)


def run_decode(program: Program, ids: Ids, past: int, new: int) -> tuple[float, Floats]:
    """Seconds of ``new`` calls of one token each, behind ``past``, and the last one's logits.

    The tokens are given and not chosen, so that every program computes the same.
    """
    program.reset()
    program.step(ids[:past])
    begin = time.perf_counter()
    for at in range(past, past + new):
        logits = program.step(ids[at : at + 1])
    passed = time.perf_counter() - begin
    return passed, np.array(logits, np.float32).reshape(-1)


def rate(tokens: int, least: float, first: float, run: Callable[[], float]) -> float:
    """Tokens a second: the median of as many runs as ``least`` seconds take.

    Args:
        tokens: of one run.
        least: seconds to run for.
        first: of the run that warmed up; one of ``SLOW`` seconds counts, and is not repeated.
        run: gives its seconds.
    """
    times = [first] if first >= SLOW else []
    while not times or (first < SLOW and sum(times) < least):
        times.append(run())
    return tokens / statistics.median(times)


def largest_memory() -> int:
    """Bytes of the largest resident memory of this process since it began.

    What ``getrusage`` says would begin with the memory of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
