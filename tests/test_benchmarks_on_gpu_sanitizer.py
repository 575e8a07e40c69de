"""What compute-sanitizer's output means."""

from __future__ import annotations

import pytest

from benchmarks.on_gpu.runner import Refused, Wrong
from benchmarks.on_gpu.sanitized import FINISHED, PLANTED
from benchmarks.on_gpu.sanitizer import verdict

HEAD = "========= COMPUTE-SANITIZER\n"
INVALID = "========= Invalid __global__ write of size 2 bytes\n=========     at linear_one+0x7d0\n"
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
            f"{HEAD}========= Error: Race reported between Write access at a and Read access\n",
            "Race reported",
        ),
        (
            "racecheck",
            f"{CLEAN}========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n",
            "2 hazard",
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
        ("memcheck", HEAD, "did not come to the end"),
        ("racecheck", CLEAN, "no summary"),
    ],
)
def test_a_tool_that_checked_nothing_fails_nothing(tool: str, output: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        verdict(tool, output)


def test_racecheck_is_clean_without_hazards() -> None:
    output = f"{CLEAN}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert verdict("racecheck", output) == "no hazard"
