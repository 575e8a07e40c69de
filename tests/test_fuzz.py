"""The fuzzers: a short run of each, and that they see what they look for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import checkpoint, forks, ingot

from ingot.plugins.errors import IngotError


@pytest.mark.parametrize("fuzzer", [checkpoint.Fuzzer, ingot.Fuzzer], ids=["checkpoint", "ingot"])
def test_every_changed_folder_is_refused_or_right(fuzzer: Callable[[int], forks.Attempt]) -> None:
    found = forks.run(fuzzer(15), 150)
    assert found.faults == {}
    assert (
        found.counts[forks.REFUSED] > 50 < found.counts.total() - found.counts[forks.REFUSED] + 45
    )


def _refused() -> bool:
    raise IngotError("config.json is damaged.")


def _long() -> bool:
    raise IngotError("x" * 10_000)


def _lines() -> bool:
    raise IngotError("one\ntwo")


def _deep() -> bool:
    return _deep()


def _killed() -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def _busy() -> bool:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        pass
    return True


def _large() -> bool:
    return bool(bytearray(forks.MEMORY * 2))


def _exits() -> bool:
    os._exit(3)


def test_counts_what_comes_of_each_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "CPU_SECONDS", 0.2)
    kinds: list[tuple[Callable[[], bool], str]] = [
        (lambda: True, "right"),
        (_refused, "refused"),
        (lambda: False, "wrong: accepted"),
        (_long, "sentence: 10,000 letters"),
        (_lines, "sentence: 7 letters"),
        (_deep, "raw: RecursionError"),
        (_killed, "killed: by SIGKILL"),
        (_busy, "hang: of its processor"),
        (_large, "memory: MemoryError"),
        (_exits, "exit: with status"),
    ]

    def attempt(number: int, place: Path) -> tuple[str, str]:
        assert list(place.iterdir()) == []
        return "label", forks.outcome_of(kinds[number][0])

    found = forks.run(attempt, len(kinds))
    assert found.counts.total() == len(kinds)
    for number, (_, expected) in enumerate(kinds[2:], 2):
        (kind,) = [k for k, seen in found.faults.items() if seen[0].startswith(f"{number} ")]
        assert kind.startswith(expected)
    assert (found.counts["right"], found.counts["refused"]) == (1, 1)


def test_makes_the_same_folder_of_the_same_number(tmp_path: Path) -> None:
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
    fuzzer = ingot.Fuzzer(3)
    assert fuzzer(4, tmp_path / "1") == fuzzer(4, tmp_path / "2")
    first, second = (
        {
            path.relative_to(tmp_path / n): path.read_bytes()
            for path in (tmp_path / n).rglob("*")
            if path.is_file()
        }
        for n in ("1", "2")
    )
    assert first == second != {}
