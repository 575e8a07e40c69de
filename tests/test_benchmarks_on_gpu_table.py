"""The closing table: what failed stands first, and all of it fits one screen."""

from __future__ import annotations

from benchmarks.on_gpu.runner import CUT, FAILED, OK, REFUSED, Outcome
from benchmarks.on_gpu.table import LINES, WIDTH, closing

NAMES = ("load", "ceilings", "small", "large", "models", "timings", "sanitizer", "tuning")


def full_run() -> dict[str, Outcome]:
    """Many figures, each longer than a line."""
    text = "figure " * 40
    return {
        name: Outcome(OK, 1.0, {str(n): {"status": OK, "text": text} for n in range(30)})
        for name in NAMES
    }


def test_fits_one_screen() -> None:
    lines = closing(full_run(), [], 300.0, 90).splitlines()
    assert len(lines) == LINES and max(map(len, lines)) <= WIDTH
    assert lines[0] == "nothing failed"
    assert lines[-2].startswith("... and ") and lines[-1] == "300 s in all"


def test_failures_stand_first_however_many() -> None:
    outcomes = full_run()
    wrong = {str(n): {"status": FAILED, "text": f"case {n}: 2 of 1"} for n in range(20)}
    outcomes["small"] = Outcome(FAILED, 1.0, wrong)
    outcomes["large"] = Outcome(CUT, 1.0, {}, "stopped by its deadline")
    lines = closing(outcomes, ["tuning"], 300.0, 90).splitlines()
    assert lines[0] == "FAILED  small: case 0: 2 of 1"
    assert lines[8].strip() == "small: and 12 more"
    assert lines[9] == "CUT     large: stopped by its deadline"
    assert lines[10] == "MISSING tuning: not entered"
    assert len(lines) <= LINES


def test_says_what_was_refused_and_what_to_commit() -> None:
    times = {"built-in": 2.0, "64x64": 1.0}
    outcomes = {
        "sanitizer": Outcome(OK, 1.0, {"memcheck": {"status": REFUSED, "text": "not here"}}),
        "tuning": Outcome(
            CUT, 1.0, {"N": {"status": OK, "table": "tiles", "at": 4, "seconds_of": times}}
        ),
    }
    text = closing(outcomes, [], 9.0, 90)
    assert "refused: not here" in text and "{90, 0, {64, 64}}," in text


def test_a_rehearsal_has_no_figures() -> None:
    assert "figure" not in closing(full_run(), [], 9.0, None)
