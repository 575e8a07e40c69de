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
    last = [run_prompt(program, ids[:prompt])[1], run_decode(program, ids, past, new)[1]]
    if given.get("logits"):
        np.save(given["logits"], np.stack(last).astype(np.float32))
    found = {
        "prefill": rate(prompt, least, lambda: run_prompt(program, ids[:prompt])[0]),
        "decode": rate(new, least, lambda: run_decode(program, ids, past, new)[0]),
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


def rate(tokens: int, least: float, run: Callable[[], float]) -> float:
    """Tokens a second: the median of as many runs as ``least`` seconds take."""
    times: list[float] = []
    while not times or sum(times) < least:
        times.append(run())
    return tokens / statistics.median(times)


def largest_memory() -> int:
    """Bytes of the largest resident memory of this process since it began.

    What ``getrusage`` says would begin with the memory of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
