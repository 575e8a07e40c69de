"""What compute-sanitizer's output means."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import ends

from benchmarks.on_gpu.runner import Refused, Wrong
from benchmarks.on_gpu.sanitized import FINISHED, PLANTED
from benchmarks.on_gpu.sanitizer import ENDED, OUT_OF_TIME, _run, verdict

HEAD = "========= COMPUTE-SANITIZER\n"
INVALID = "========= Invalid __global__ write of size 2 bytes\n=========     at linear_one+0x7d0\n"
RACE = "========= Error: Race reported between Write access at a and Read access at b\n"
SUMMARY = "========= RACECHECK SUMMARY: "
CLEAN = f"{HEAD}{FINISHED}\n"


def test_a_clean_run_that_saw_the_planted_write_is_right() -> None:
    output = f"{CLEAN}{PLANTED}\n{INVALID}========= ERROR SUMMARY: 1 error\n"
    assert verdict("memcheck", output) == "no finding; a planted write past the end was seen"


@pytest.mark.parametrize(
    ("tool", "output", "message"),
    [
        ("memcheck", f"{HEAD}{INVALID}{FINISHED}\n", "1 findings, the first: Invalid __global__"),
        ("memcheck", f"{HEAD}{INVALID}", "1 findings"),
        (
            "racecheck",
            f"{CLEAN}{RACE}{SUMMARY}2 hazards displayed (2 errors, 0 warnings)\n",
            "2 errors to be looked at, the first: Error: Race reported",
        ),
        (
            "memcheck",
            f"{CLEAN}{PLANTED}\n{INVALID}{INVALID.replace('linear_one', 'gate_up')}",
            "not planted: Invalid __global__ write at gate_up",
        ),
    ],
)
def test_a_finding_is_wrong(tool: str, output: str, message: str) -> None:
    with pytest.raises(Wrong, match=message):
        verdict(tool, output)


@pytest.mark.parametrize(
    ("tool", "output", "message"),
    [
        ("memcheck", f"{HEAD}========= Error: Device not supported\n", "refuses this machine"),
        ("memcheck", CLEAN, "checked nothing"),
        ("memcheck", f"{CLEAN}{PLANTED}\n========= ERROR SUMMARY: 0 errors\n", "checked nothing"),
        ("memcheck", f"{HEAD}{OUT_OF_TIME}\n", "did not come to the end"),
        (
            "racecheck",
            f"{HEAD}Traceback (most recent call last):\nImportError: no torch\n{ENDED} 1\n",
            "the cases did not end: ImportError: no torch",
        ),
        ("racecheck", CLEAN, "no summary"),
    ],
)
def test_a_tool_that_checked_nothing_fails_nothing(tool: str, output: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        verdict(tool, output)


@pytest.mark.parametrize(
    ("counted", "expected"),
    [
        ("0 hazards displayed (0 errors, 0 warnings)", "no hazard"),
        ("1 hazard displayed (0 errors, 1 warning)", "1 warnings, no error; see racecheck.log"),
    ],
)
def test_racecheck_is_right_without_errors(counted: str, expected: str) -> None:
    assert verdict("racecheck", f"{CLEAN}{SUMMARY}{counted}\n") == expected


def test_a_tool_that_is_out_of_time_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither the tool nor what it had started."""
    pid = tmp_path / "pid"
    output = _run(["sh", "-c", f"sleep 60 & echo $! > {pid}; echo begun; wait"], 1.0)
    assert "begun" in output and OUT_OF_TIME in output
    assert ends(int(pid.read_text()))
