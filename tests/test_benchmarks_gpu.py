"""The command that proves and measures a GPU: its rehearsal, and what a run makes of its phases."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from benchmarks import gpu
from benchmarks.on_gpu.bench import Bench
from benchmarks.on_gpu.devices import Host
from benchmarks.on_gpu.runner import CUT, FAILED, OK, Found, Item, Outcome, Phase, Wrong
from ingot.plugins.device import has_gpu
from ingot.plugins.library import Library

SCRIPT = Path(gpu.__file__)


def command(*arguments: str | Path, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    # Triton's interpreter is for the command to choose.
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**clean, "OMP_NUM_THREADS": "1"},
    )


def rehearsed(out: Path, *arguments: str | Path, script: Path = SCRIPT) -> dict[str, Any]:
    """What a rehearsal in which nothing failed found, by phase."""
    done = command("--rehearse", "--out", out, *arguments, script=script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing failed" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert results["passed"] and results["rehearsal"] and not results["missing"]
    phases: dict[str, Any] = results["phases"]
    for name, outcome in phases.items():
        assert outcome["status"] == OK, (name, outcome)
        assert any(item["status"] == OK for item in outcome["items"].values())
    return phases


@pytest.mark.slow
def test_every_phase_finds_right_numbers(tmp_path: Path) -> None:
    phases = rehearsed(tmp_path, "--kernels", "interpreter")
    assert list(phases) == [phase.name for phase in gpu.PHASES]


@pytest.mark.slow
def test_models_that_are_computed_have_an_error(tmp_path: Path) -> None:
    models = rehearsed(tmp_path, "--kernels", "interpreter", "--only", "models")["models"]["items"]
    assert models["olmoe two layers"]["error"] > 0
    assert len(models["mamba2 whole"]["tokens"]) == 3


@pytest.mark.slow
def test_every_phase_is_entered_where_nothing_computes(tmp_path: Path) -> None:
    """From a folder that has nothing but what `make gpu-bundle` packs."""
    listed = re.search(r"git ls-files Makefile (.*) > ", (gpu.ROOT / "Makefile").read_text())
    assert listed is not None
    for folder in listed[1].split():
        ignored = shutil.ignore_patterns("__pycache__", "lib")
        shutil.copytree(gpu.ROOT / folder, tmp_path / folder, ignore=ignored, symlinks=True)
    script = tmp_path / "benchmarks" / "gpu.py"
    phases = rehearsed(tmp_path / "results", "--kernels", "recorder", script=script)
    assert list(phases) == [phase.name for phase in gpu.PHASES]
    texts = [item["text"] for item in phases["small"]["items"].values()]
    assert len(texts) == 20 and all("launches recorded" in text for text in texts)


@pytest.mark.skipif(has_gpu(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path) -> None:
    done = command("--out", tmp_path)
    assert done.returncode == 1
    assert "PyTorch finds no CUDA device; run nvidia-smi" in done.stdout
    assert "MISSING ceilings, small, large" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert json.loads((tmp_path / "results.json").read_text())["passed"] is False


def test_a_python_without_pytorch_is_named() -> None:
    # No packages at all.
    bare = [sys.executable, "-I", "-S", str(SCRIPT)]
    done = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has no torch, onnx, safetensors, click; run this with a Python" in done.stderr
    assert "Traceback" not in done.stderr


def test_refuses_a_phase_that_is_none() -> None:
    done = command("--only", "small,huge")
    assert done.returncode == 2
    assert "no phase huge; there are load, ceilings, small" in done.stderr


def phase(
    name: str, *calls: Any, seconds: float = 5.0, proves: bool = False, whole: bool = False
) -> Phase:
    def items(_bench: Bench) -> Iterator[Item]:
        return (Item(f"item {n}", call) for n, call in enumerate(calls))

    return Phase(name, seconds, items, proves, whole)


def fine() -> Found:
    return {"text": "fine"}


def wrong() -> Found:
    raise Wrong("2 of 1")


def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *phases: Phase,
    budget: float = 30.0,
    rehearsal: bool = False,
    earlier: dict[str, Outcome] | None = None,
    wanted: list[str] | None = None,
) -> gpu.Run:
    def no_library(_path: Path | None) -> Library:
        raise AssertionError

    monkeypatch.setattr(gpu, "PHASES", phases)
    bench = Bench(Host(), rehearsal, True, no_library, tmp_path)
    made = gpu.Run(bench, tmp_path, wanted or [each.name for each in phases], budget, earlier)
    made.go()
    made.close()
    return made


def test_a_failure_is_told_first_and_run_again_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(
        tmp_path,
        monkeypatch,
        phase("load", fine),
        phase("small", fine, wrong),
        phase("tuning", fine),
    )
    assert not made.passed
    table = capsys.readouterr().out.split("\n\n")[1]
    assert table.startswith("FAILED  small: item 1: 2 of 1")
    earlier = gpu.found_before(tmp_path)
    assert gpu.not_passed(earlier) == ["small"]

    # The one that failed passes now; the other is not run again, and nothing is lost.
    def not_again() -> Found:
        raise AssertionError

    again = run(
        tmp_path,
        monkeypatch,
        phase("load", fine),
        phase("small", not_again, fine),
        phase("tuning", not_again),
        earlier=earlier,
        wanted=["small"],
    )
    assert again.passed and gpu.not_passed(gpu.found_before(tmp_path)) == []


def test_what_builds_upon_itself_is_run_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = {"tuning": Outcome(FAILED, items={"item 0": {"status": OK, "text": "before"}})}
    made = run(tmp_path, monkeypatch, phase("tuning", fine, whole=True), earlier=earlier)
    assert made.outcomes["tuning"].items["item 0"]["text"] == "fine"


def test_nothing_to_run_again_where_all_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, monkeypatch, phase("load", fine)).passed
    assert gpu.not_passed(gpu.found_before(tmp_path)) == []


def test_a_run_cut_short_keeps_what_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    def hang() -> Found:
        time.sleep(60)
        return {}

    made = run(
        tmp_path,
        monkeypatch,
        phase("load", fine, proves=True),
        phase("timings", hang, seconds=1.0),
        # Time enough for a process to begin on a machine that has much else to do.
        phase("tuning", fine, seconds=60.0),
        budget=64.0,
    )
    results = json.loads((tmp_path / "results.json").read_text())["phases"]
    assert [results[name]["status"] for name in ("load", "timings", "tuning")] == [OK, CUT, OK]
    # The proof is whole, so the run is right; what was cut is run again.
    assert made.passed
    assert gpu.not_passed(gpu.found_before(tmp_path)) == ["timings"]


@pytest.mark.parametrize("rehearsal", [False, True])
def test_a_phase_that_is_not_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rehearsal: bool
) -> None:
    """Fails a rehearsal always, and a run where the phase proves something."""
    late = phase("timings", fine, seconds=0.0)
    phases = (phase("load", fine), late)
    made = run(tmp_path, monkeypatch, *phases, budget=0.0, rehearsal=rehearsal)
    assert made.missing == ["load", "timings"]
    assert made.passed != rehearsal
    proof = phase("small", fine, proves=True)
    assert not run(tmp_path, monkeypatch, proof, budget=0.0).passed


def test_without_kernels_nothing_else_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(tmp_path, monkeypatch, phase("load", wrong), phase("small", fine))
    assert made.missing == ["small"] and not made.passed


def test_refuses_results_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(click.ClickException, match=r"is not a run's results.json"):
        gpu.found_before(tmp_path)


def test_the_deadlines_fit_the_budget() -> None:
    first, *others = gpu.PHASES
    assert first.name == "load" and sum(each.seconds for each in others) <= 340
