"""Phases that crash, hang or are wrong, and what a run makes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import ends

from benchmarks.on_gpu.bench import Bench
from benchmarks.on_gpu.devices import Host
from benchmarks.on_gpu.runner import (
    CUT,
    FAILED,
    OK,
    REFUSED,
    Found,
    Item,
    Outcome,
    Phase,
    Refused,
    Wrong,
    run_phase,
)
from ingot.plugins.library import Library


class Lost(Host):
    """A device whose context is lost in the process that ran ``lose``."""

    lost = False

    def usable(self) -> bool:
        return not self.lost


def bench(tmp_path: Path) -> Bench:
    def no_library(_path: Path | None) -> Library:
        raise AssertionError("no kernels are asked for")

    return Bench(Lost(), True, True, no_library, tmp_path)


def run(
    tmp_path: Path,
    *items: tuple[str, Callable[[], Found]],
    seconds: float = 20.0,
    done: tuple[str, ...] = (),
) -> tuple[Outcome, list[str]]:
    def every(_bench: Bench) -> Iterator[Item]:
        return (Item(name, call) for name, call in items)

    before = {name: {"status": OK, "text": "before"} for name in done}
    outcome = follow(tmp_path, every, before, seconds)
    return outcome, [name for name in outcome.items if name not in before]


def follow(
    tmp_path: Path,
    items: Callable[[Bench], Iterator[Item]],
    before: dict[str, Found] | None = None,
    seconds: float = 20.0,
    given: Bench | None = None,
) -> Outcome:
    outcome = Outcome(items=dict(before or {}))
    told: list[Found] = []
    phase = Phase("phase", seconds, items)
    given = given or bench(tmp_path)
    run_phase(phase, given, time.monotonic() + seconds, outcome, told.append)
    assert told == list(outcome.items.values())[len(before or {}) :]
    return outcome


def fine() -> Found:
    return {"text": "fine", "figure": 3}


def test_goes_on_behind_an_item_that_ends_the_process(tmp_path: Path) -> None:
    def die() -> Found:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    outcome, told = run(tmp_path, ("a", fine), ("b", die), ("c", fine))
    assert told == ["a", "b", "c"]
    assert outcome.status == FAILED
    assert [each["status"] for each in outcome.items.values()] == [OK, FAILED, OK]
    assert outcome.items["b"]["text"] == "b: the process was ended by SIGKILL"
    assert outcome.items["a"]["figure"] == 3


def test_a_lost_context_costs_one_item(tmp_path: Path) -> None:
    def lose() -> Found:
        Lost.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def needs_the_device() -> Found:
        assert not Lost.lost
        return {}

    outcome, _ = run(tmp_path, ("a", lose), ("b", needs_the_device))
    assert outcome.items["b"]["status"] == OK
    text = outcome.items["a"]["text"]
    assert text == "a: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert "Traceback" in outcome.items["a"]["traceback"]


def test_kills_what_passes_the_deadline(tmp_path: Path) -> None:
    def hang() -> Found:
        time.sleep(60)
        return {}

    began = time.monotonic()
    outcome, told = run(tmp_path, ("a", fine), ("b", hang), ("c", fine), seconds=5.0)
    assert time.monotonic() - began < 15
    assert outcome.status == CUT and told == ["a", "b"]
    assert outcome.items["b"]["status"] == CUT


def test_ends_what_a_killed_phase_had_started(tmp_path: Path) -> None:
    started = tmp_path / "pid"

    def start() -> Found:
        process = subprocess.Popen(["sleep", "60"])
        started.write_text(str(process.pid))
        process.wait()
        return {}

    run(tmp_path, ("a", start), seconds=5.0)
    assert ends(int(started.read_text()))


def test_tells_wrong_from_refused(tmp_path: Path) -> None:
    def wrong() -> Found:
        raise Wrong("1.0 of 0.1")

    def refused() -> Found:
        raise Refused("not installed")

    outcome, _ = run(tmp_path, ("a", refused))
    assert outcome.status == OK and outcome.items["a"]["status"] == REFUSED
    outcome, _ = run(tmp_path, ("a", refused), ("b", wrong))
    assert outcome.status == FAILED and outcome.items["b"]["text"] == "b: 1.0 of 0.1"


def test_a_phase_that_cannot_begin_says_why(tmp_path: Path) -> None:
    def broken(_bench: Bench) -> Iterator[Item]:
        raise ValueError("no kernels")
        yield

    outcome = follow(tmp_path, broken)
    assert outcome.status == FAILED and outcome.text.startswith("ValueError: no kernels")


def test_keeps_for_later_items_and_later_phases(tmp_path: Path) -> None:
    given = bench(tmp_path)

    def keep() -> Found:
        return {"keep": {"answer": 42}}

    def use() -> Found:
        assert given.found["answer"] == 42
        return {}

    def items(_bench: Bench) -> Iterator[Item]:
        yield Item("a", keep)
        yield Item("b", use)

    outcome = follow(tmp_path, items, given=given)
    assert outcome.status == OK and given.found["answer"] == 42
    assert "keep" not in outcome.items["a"]


def test_does_not_run_what_passed_before(tmp_path: Path) -> None:
    outcome, told = run(tmp_path, ("a", fine), ("b", fine), ("c", fine), done=("a", "c"))
    assert told == ["b"] and outcome.status == OK
    assert outcome.items["a"]["text"] == "before"


def test_a_failure_is_told_although_the_deadline_came(tmp_path: Path) -> None:
    def wrong() -> Found:
        raise Wrong("2 of 1")

    def hang() -> Found:
        time.sleep(60)
        return {}

    # Time enough for a process to begin on a machine that has much else to do.
    outcome, _ = run(tmp_path, ("a", wrong), ("b", hang), seconds=5.0)
    assert outcome.status == FAILED and outcome.text == "stopped by its deadline"


@pytest.mark.parametrize("status", [3, 0])
def test_a_process_that_ends_between_items_is_a_failure(tmp_path: Path, status: int) -> None:
    def ends(_bench: Bench) -> Iterator[Item]:
        yield Item("a", fine)
        os._exit(status)

    outcome = follow(tmp_path, ends)
    assert outcome.status == FAILED and outcome.items["a"]["status"] == OK
    assert f"the process ended with status {status}" in outcome.text
