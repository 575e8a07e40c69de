"""Runs numbered attempts in children with limits, so that a crash, a hang or a bomb is counted."""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ingot.plugins.errors import IngotError

# What an attempt may come to; anything else is a fault.
RIGHT, REFUSED = "right", "refused"
# A child makes so many, and the next one goes on.
CHUNK = 100
CPU_SECONDS = 5.0
# On a full machine; what waits takes no processor.
WALL_SECONDS = 120.0
MEMORY = 2 << 30
# Of a sentence.
LETTERS = 2000

# From a number and an empty folder to what was tried there and what came of it.
Attempt = Callable[[int, Path], tuple[str, str]]


@dataclass
class Found:
    """What came of all attempts.

    Attributes:
        counts: by outcome.
        faults: kind -> the numbers and labels of what had it.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[str]] = field(default_factory=dict)

    def add(self, number: int, label: str, outcome: str) -> None:
        kind = outcome.partition(":")[0]
        self.counts[kind] += 1
        if kind not in (RIGHT, REFUSED):
            self.faults.setdefault(outcome[:100], []).append(f"{number} ({label[:100]})")

    def __str__(self) -> str:
        lines = [f"{len(n):6} {kind}\n       such as {n[0]}" for kind, n in self.faults.items()]
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        return "\n".join([*lines, f"{counts}; {sum(map(len, self.faults.values()))} faults"])


def outcome_of(opened: Callable[[], bool]) -> str:
    """What comes of opening something that may be wrong; ``opened`` says whether it was right."""
    try:
        return RIGHT if opened() else "wrong: accepted, with other results"
    except IngotError as error:
        said = str(error)
        if len(said) > LETTERS or "\n" in said.strip():
            return f"sentence: {len(said):,} letters, {said[:40]!r}"
        return REFUSED
    except MemoryError:
        return "memory: MemoryError"
    except BaseException as error:
        return f"raw: {type(error).__name__}: {str(error)[:80]}"


def run(attempt: Attempt, total: int, first: int = 0) -> Found:
    """Make ``total`` attempts from number ``first`` on."""
    found, number, end = Found(), first, first + total
    while number < end:
        done, ended = _child(attempt, number, min(number + CHUNK, end))
        for each in done:
            found.add(*each)
        number += len(done)
        if ended and number < end:
            found.add(number, "", ended)
            number += 1
    return found


def _child(attempt: Attempt, first: int, end: int) -> tuple[list[tuple[int, str, str]], str]:
    """What a child made before it ended, and how it ended where not by itself."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            # ONNX Runtime and others write to the descriptors themselves.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            _limit()
            for number in range(first, end):
                # Its own action ends the child.
                signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
                signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
                with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
                    label, outcome = attempt(number, Path(place))
                line = json.dumps([number, label, outcome]) + "\n"
                os.write(writing, line.encode())
            status = 0
        except Exception:
            os.write(writing, (json.dumps([-1, traceback.format_exc(), "lost"]) + "\n").encode())
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as lines:
        done: list[tuple[int, str, str]] = [tuple(json.loads(line)) for line in lines]
    if done and done[-1][0] < 0:
        raise RuntimeError(f"the fuzzer itself failed:\n{done[-1][1]}")
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        by = signal.Signals(os.WTERMSIG(status))
        hangs = {signal.SIGPROF: "hang: of its processor", signal.SIGALRM: "hang: it waits"}
        return done, hangs.get(by, f"killed: by {by.name}")
    return done, f"exit: with status {os.WEXITSTATUS(status)}" if status else ""


def _limit() -> None:
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def command(text: str | None, attempt: Callable[[int], Attempt]) -> None:
    """The command line of a fuzzer; ``attempt`` is given the seed."""
    asked = argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    asked.add_argument("--n", type=int, default=1000, help="So many folders.")
    asked.add_argument("--seed", type=int, default=0, help="Of them all.")
    asked.add_argument("--only", type=int, help="One again, here; its folder is kept and named.")
    options = asked.parse_args()
    attempt_one = attempt(options.seed)
    if options.only is not None:
        place = Path(tempfile.mkdtemp(prefix="fuzz-"))
        print(place, *attempt_one(options.only, place), sep="\n")
        return
    begun = time.monotonic()
    found = run(attempt_one, options.n)
    print(f"{found} in {options.n} inputs and {time.monotonic() - begun:.0f} s")
    sys.exit(bool(found.faults))
