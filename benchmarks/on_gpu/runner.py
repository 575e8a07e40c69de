"""Runs phases, each in a process of its own with a deadline.

A phase is a list of named items. Its process tells what it began and what it found; one that
crashes or loses its CUDA context costs the item it was at, and a new process goes on behind it. One
that passes its deadline is killed, and what it had not reached is listed.

The process is forked, so that PyTorch is imported once; nothing here may therefore touch CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from benchmarks.on_gpu.bench import Bench

# Of an item: right or done; wrong or broken; not to be had here; stopped by the deadline.
OK, FAILED, REFUSED, CUT = "ok", "failed", "refused", "cut"

Found = dict[str, Any]


class Refused(Exception):  # noqa: N818 -- no error: a peer or tool that is not to be had here
    """An item that this machine cannot run, which is nobody's fault; one sentence why."""


class Wrong(Exception):  # noqa: N818 -- what was found, not what broke
    """An item whose numbers are wrong; one sentence with the figures."""


@dataclass(frozen=True)
class Item:
    """One thing a phase does.

    Attributes:
        name: unique in the phase.
        run: does it. What it returns goes into the results: ``text``, one line to print, and any
            figures; ``keep``, a mapping, goes to later phases.
    """

    name: str
    run: Callable[[], Found]


@dataclass(frozen=True)
class Phase:
    """One phase.

    Attributes:
        name: as ``--only`` has it.
        seconds: its share of the time.
        items: what it does, made as it goes.
        proves: whether the numbers' proof is incomplete without all of it.
        whole: whether items build upon those before them, so that none is of use alone.
    """

    name: str
    seconds: float
    items: Callable[[Bench], Iterator[Item]]
    proves: bool = False
    whole: bool = False


@dataclass
class Outcome:
    """What became of a phase.

    Attributes:
        status: ``ok``, ``failed``, or ``cut`` where it is right as far as it came.
        seconds: that it took.
        items: by name, each with ``status`` and ``text``.
        text: what is to say of the phase as a whole.
    """

    status: str = CUT
    seconds: float = 0.0
    items: dict[str, Found] = field(default_factory=dict)
    text: str = ""


def run_phase(
    phase: Phase,
    bench: Bench,
    deadline: float,
    outcome: Outcome,
    tell: Callable[[Found], None],
) -> None:
    """Run one phase to its end or its deadline.

    Args:
        phase: what to run.
        bench: its surroundings; what its items keep is put there.
        deadline: a value of ``time.monotonic``.
        outcome: takes what is found; items that are in it already are not run again.
        tell: is told of every item that ended.
    """
    began = time.monotonic()
    bench.deadline = deadline
    ended = False
    context = multiprocessing.get_context("fork")

    def end_item(name: str, found: Found) -> None:
        bench.found.update(found.pop("keep", {}))
        outcome.items[name] = found
        outcome.seconds = time.monotonic() - began
        tell(found)

    while True:
        ours, theirs = context.Pipe(duplex=False)
        done = set(outcome.items)
        child = context.Process(target=_work, args=(phase, bench, done, theirs))
        child.start()
        theirs.close()
        at, ended = None, False
        try:
            at, ended = _follow(ours, deadline, end_item, outcome)
        finally:
            _end(child, kill=not ended)
        if ended:
            break
        late = time.monotonic() >= deadline
        if at is not None:
            text = "stopped by the deadline" if late else _how_it_ended(child.exitcode)
            end_item(at, {"status": CUT if late else FAILED, "text": f"{at}: {text}"})
        if late:
            outcome.text = "stopped by its deadline"
            break
        if at is None and child.exitcode != AGAIN:
            outcome.text = f"between two items: {_how_it_ended(child.exitcode)}"
            outcome.status = FAILED
            break
    if any(found["status"] == FAILED for found in outcome.items.values()):
        outcome.status = FAILED
    elif ended and outcome.status == CUT:
        outcome.status = OK
    outcome.seconds = time.monotonic() - began


# Exit status of a process that asks for another one to go on.
AGAIN = 75

JOIN_SECONDS = 10.0
# Of Linux's prctl.
PR_SET_PDEATHSIG = 1


def _end(child: BaseProcess, *, kill: bool) -> None:
    """End a phase's process and all that it started, such as a compiler or a sanitizer."""
    if kill:
        child.kill()
    # A driver may keep a process that was killed for a while.
    child.join(JOIN_SECONDS)
    if child.pid is not None:
        # Its group is there from its first line on; before that it has started nothing.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def die_with_parent() -> None:
    """Be killed where the process that started this one ends, however it does (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _follow(
    ours: Connection,
    deadline: float,
    end_item: Callable[[str, Found], None],
    outcome: Outcome,
) -> tuple[str | None, bool]:
    """Read what a process tells; the item it was at, and whether it came to its end."""
    at: str | None = None
    while ours.poll(max(0.0, deadline - time.monotonic())):
        try:
            kind, name, found = ours.recv()
        except EOFError:
            return at, False
        if kind == "began":
            at = name
        elif kind == "found":
            end_item(name, found)
            at = None
        elif kind == "broken":
            outcome.status, outcome.text = FAILED, name
            return None, True
        else:
            return None, True
    return at, False


def _how_it_ended(status: int | None) -> str:
    if status is not None and status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process ended with status {status}"


def _work(
    phase: Phase,
    bench: Bench,
    done: Collection[str],
    theirs: Connection,
) -> None:
    """A phase's process, the first of a group of its own."""
    os.setpgid(0, 0)
    die_with_parent()
    # What there is by now stays: collections need not look at it again and again.
    gc.collect()
    gc.freeze()
    # The parent's handlers write its results.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        for item in phase.items(bench):
            if item.name in done:
                continue
            theirs.send(("began", item.name, None))
            found = run_item(item)
            bench.found.update(found.get("keep", {}))
            theirs.send(("found", item.name, found))
            if found["status"] == FAILED and not bench.device.usable():
                os._exit(AGAIN)
        theirs.send(("ended", "", None))
    except Exception as error:
        theirs.send(("broken", _sentence(error) + "\n" + traceback.format_exc(), None))
    theirs.close()
    # No destructors: the driver may hang in them after an error.
    os._exit(0)


def run_item(item: Item) -> Found:
    """What an item found, an exception included."""
    began = time.monotonic()
    try:
        found: Found = {"status": OK, "text": item.name, **item.run()}
    except Refused as error:
        found = {"status": REFUSED, "text": f"{item.name}: {error}"}
    except Wrong as error:
        found = {"status": FAILED, "text": f"{item.name}: {error}"}
    except Exception as error:
        found = {"status": FAILED, "text": f"{item.name}: {_sentence(error)}"}
        found["traceback"] = traceback.format_exc()
    found["seconds"] = round(time.monotonic() - began, 3)
    return found


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
