"""Runs phases, each in a process of its own with a deadline.

A phase is a list of named items. Its process tells what it began and what it found; one that
crashes or loses its CUDA context costs the item it was at, and a new process goes on behind it. One
that passes its deadline is killed, and what it had not reached is listed.

The process is forked, so that PyTorch is imported once; nothing here may therefore touch CUDA.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
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
    """

    name: str
    seconds: float
    items: Callable[[Bench], Iterator[Item]]
    proves: bool = False


@dataclass
class Outcome:
    """What became of a phase.

    Attributes:
        status: ``ok``, ``failed`` or ``cut``.
        seconds: that it took.
        items: by name, each with ``status`` and ``text``.
        text: what is to say of the phase as a whole.
    """

    status: str
    seconds: float
    items: dict[str, Found]
    text: str = ""


def run_phase(
    phase: Phase,
    bench: Bench,
    deadline: float,
    tell: Callable[[str, Found], None],
    only: Collection[str] | None = None,
) -> Outcome:
    """Run one phase to its end or its deadline.

    Args:
        phase: what to run.
        bench: its surroundings; what its items keep is put there.
        deadline: a value of ``time.monotonic``.
        tell: is told every item that ended.
        only: names of the items to run; by default all.
    """
    began = time.monotonic()
    outcome = Outcome(OK, 0.0, {})
    context = multiprocessing.get_context("fork")

    def end_item(name: str, found: Found) -> None:
        bench.found.update(found.pop("keep", {}))
        outcome.items[name] = found
        tell(name, found)

    while True:
        ours, theirs = context.Pipe(duplex=False)
        done = set(outcome.items)
        child = context.Process(target=_work, args=(phase, bench, done, only, theirs))
        child.start()
        theirs.close()
        at, ended = None, False
        try:
            at, ended = _follow(ours, deadline, end_item, outcome)
        finally:
            if not ended:
                _kill(child)
            child.join()
        if ended:
            break
        late = time.monotonic() >= deadline
        if at is not None:
            text = "stopped by the deadline" if late else _how_it_ended(child.exitcode)
            end_item(at, {"status": CUT if late else FAILED, "text": f"{at}: {text}"})
        if late:
            outcome.status = CUT
            outcome.text = outcome.text or "stopped by its deadline"
            break
        if at is None and not outcome.text and child.exitcode != AGAIN:
            outcome.text = f"between two items: {_how_it_ended(child.exitcode)}"
            outcome.status = FAILED
            break
    if outcome.status == OK and any(f["status"] == FAILED for f in outcome.items.values()):
        outcome.status = FAILED
    outcome.seconds = time.monotonic() - began
    return outcome


# Exit status of a process that asks for another one to go on.
AGAIN = 75


def _kill(child: BaseProcess) -> None:
    """End a phase's process and all that it started, such as a compiler or a sanitizer."""
    if child.pid is not None:
        # Its group is there from its first line on; before that it has started nothing.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()


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
    only: Collection[str] | None,
    theirs: Connection,
) -> None:
    """A phase's process, the first of a group of its own."""
    os.setsid()
    # The parent's handlers write its results.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        for item in phase.items(bench):
            if item.name in done or (only is not None and item.name not in only):
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
