"""Steps in a log: one line each, and more where one lasts."""

from __future__ import annotations

import pytest

from ingot.export.progress import RichStages


def test_a_step_that_lasts_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("ingot.export.progress.time.monotonic", lambda: now)
    stages = RichStages()
    with stages.stage("run eager float64", 8, "steps") as advance:
        for _ in range(8):
            now += 8.0
            advance(1)
    # At 24 and 48 seconds; what is done soon is one line.
    assert capsys.readouterr().err.splitlines() == [
        "run eager float64 ...",
        "run eager float64, 38% ...",
        "run eager float64, 75% ...",
    ]
    with stages.stage("capture graph") as advance:
        now += 1000.0
        advance(1)
    assert capsys.readouterr().err.splitlines() == ["capture graph ..."]
