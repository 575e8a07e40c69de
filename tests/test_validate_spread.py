"""How far figures move: between two runs, and between processors that a machine can stand for."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MakeIngot
from damage import with_weight
from test_validate_report import make_report, with_tensor

from ingot.export.progress import Stages
from ingot.validate.baseline import read_baseline
from ingot.validate.processor import ISA, Emulated
from ingot.validate.result import Report
from ingot.validate.spread import Figures, Task, elsewhere, figures, largest, measure, of_means

TASK = Task("ingot", "checkpoint", None, None, {}, 0)


def scaled(report: Report, **factors: float) -> Figures:
    """The figures of a report, errors and floors of all tensors multiplied."""
    error, floor = factors.get("error", 1.0), factors.get("floor", 1.0)
    return {key: (e * error, f * floor) for key, (e, f) in figures(report).items()}


def test_the_spread_of_equal_runs_is_nothing() -> None:
    here = figures(make_report())
    assert len(here) == 63
    for what in ("error", "floor", "score"):
        assert set(largest(here, here, what).values()) == {0.0}
    assert of_means(here, here) == {"logits": 0.0, "key": 0.0, "value": 0.0}


def test_the_spread_is_the_largest_difference_of_a_kind_either_way() -> None:
    one = make_report()
    key = next(n for n, t in enumerate(one.tensors) if t.kind == "key")
    for factor in (1.25, 1 / 1.25):
        other = with_tensor(one, key, error=(one.tensors[key].error or 0) * factor)
        found = largest(figures(one), figures(other), "score")
        assert found == pytest.approx({"logits": 0.0, "key": 0.25, "value": 0.0})
        assert largest(figures(one), figures(other), "floor")["key"] == 0.0


def test_the_mean_is_of_all_calls_of_one_tensor() -> None:
    one = make_report()
    tensors = list(one.tensors)
    for n, tensor in enumerate(tensors):
        if tensor.name == "present.1.key":
            # By turns half and twice as much, and at the ninth call twice.
            factor = 2.0 if tensor.stage == "prefill" or int(tensor.stage[-1]) % 2 else 0.5
            tensors[n] = replace(tensor, floor=(tensor.floor or 0) * factor)
    found = of_means(figures(one), figures(replace(one, tensors=tuple(tensors))))
    assert found == pytest.approx({"logits": 0.0, "key": 2 ** (1 / 9) - 1, "value": 0.0})


def test_what_has_no_figure_has_no_spread() -> None:
    one = with_tensor(make_report(), 0, error=math.nan)
    one = with_tensor(one, 7, error=None)
    one = with_tensor(one, 14, error=0.0)
    assert largest(figures(one), figures(make_report()), "error")["logits"] == 0.0
    assert largest({}, figures(make_report()), "error") == {}


def test_processors_and_threads_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_report(environment={ISA: "AVX2"})
    others = [Emulated("one", {}), Emulated("two", {}), Emulated("ends", {})]
    monkeypatch.setattr("ingot.validate.spread.emulated", lambda now: others)
    monkeypatch.setattr("ingot.validate.spread.one_processor", lambda: Emulated("threads", {}, 1))
    found: dict[str, Figures | None] = {
        "one": scaled(first, floor=1.1),
        "two": scaled(first, floor=0.5),
        "ends": None,
        "threads": scaled(first, error=1.3),
    }
    spread = measure(first, first, TASK, Stages(), lambda task, other: found[other.name])
    assert spread.processors == ("one", "two")
    assert spread.run["logits"] == 0.0
    assert spread.threads == pytest.approx({"logits": 0.3, "key": 0.3, "value": 0.3})
    assert spread.tensor == pytest.approx({"logits": 1.0, "key": 1.0, "value": 1.0})
    assert spread.mean == pytest.approx({"logits": 1.0, "key": 1.0, "value": 1.0})
    # What no process came to the end of was not measured.
    spread = measure(first, first, TASK, Stages(), lambda task, other: None)
    assert (spread.processors, spread.threads, spread.tensor, spread.mean) == ((), {}, {}, {})


def test_a_process_that_fails_measures_nothing(tmp_path: Path) -> None:
    task = replace(TASK, ingot=str(tmp_path), checkpoint=str(tmp_path))
    assert elsewhere(task, Emulated("it", {"PYTHONPATH": str(tmp_path)})) is None


@pytest.mark.slow
def test_a_baseline_holds_under_other_instructions_and_sees_twenty_bits(
    tiny: Path, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    ingot = make_ingot(tiny, "ort")
    kept = tmp_path / "baseline.json"

    def validate(folder: Path, *options: str | Path, **environment: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "ingot.validate", folder, "--checkpoint", tiny, "--quick"]
        done = subprocess.run(
            [*map(str, command), *map(str, options)],
            env={**os.environ, "INGOT_CACHE": "off", **environment},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    status, said = validate(ingot, "--save-baseline", kept)
    assert status == 0, said
    spread = read_baseline(kept).spread
    assert "without AVX" in spread.processors
    # The floors move between instructions, the target does not.
    assert max(spread.tensor.values()) > 0.01 > 1e-6 > max(spread.threads.values(), default=0.0)
    fewer = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    for environment in ({}, fewer, {"OMP_NUM_THREADS": "1"}):
        status, said = validate(ingot, "--gate", kept, **environment)
        assert (status, "WORSE" in said) == (0, False), said
    header = json.loads(_header(ingot))
    name = next(n for n in header if n.endswith("layers.1.self_attn.o_proj.weight"))
    import numpy as np

    def round_to_20_bits(array: np.ndarray) -> None:
        mantissa, exponent = np.frexp(array.astype(np.float64))
        array[...] = np.ldexp(np.round(mantissa * 2**20) / 2**20, exponent)

    worse = with_weight(ingot, tmp_path / "worse", name, round_to_20_bits)
    for environment in ({}, fewer):
        status, said = validate(worse, "--gate", kept, **environment)
        assert status == 1 and "WORSE" in said, said


def _header(ingot: Path) -> bytes:
    data = (ingot / "weights.safetensors").read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]
