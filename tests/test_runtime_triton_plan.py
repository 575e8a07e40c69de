"""Which models an ingot has in Triton, and which ingots and settings are refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeIngot
from damage import as_lowered, copied
from test_runtime_classify import checkpoint as classifier
from triton_ingots import parsed, with_engine

from ingot.export.ingot import Manifest
from ingot.plugins.errors import IngotError
from ingot.runtime.triton_lint import lint
from ingot.runtime.triton_plan import PLUGINS, Settings, TritonError, make_plan
from ingot.runtime.triton_repository import write_repository

# Minutes of exports; `make test-slow` runs them, and so does CI.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"builder": "tensorrt-rtx"}, "loads no engine of tensorrt-rtx"),
        ({"libraries": ("libingot_kernels.so",)}, f"needs the plugins as {PLUGINS}"),
    ],
)
def test_leaves_out_a_graph_that_tritons_backend_cannot_run(
    tiny_onnx: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    ingot = with_engine(tiny_onnx, tmp_path / "ingot", **changes)
    plan = write_repository(ingot, tmp_path / "r", Settings(name="m"))
    assert plan.models == ["m_generate"] and reason in plan.why
    assert reason in (tmp_path / "r" / "README.md").read_text()
    assert not (tmp_path / "r" / "m").exists()
    assert lint(tmp_path / "r") == []


def test_serves_ingots_own_kernels_by_the_python_model_alone(
    own_kernels: Path, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    plan = write_repository(own_kernels, tmp_path / "r", Settings(name="m"))
    assert plan.models == ["m_generate"] and "needs a library of operators" in plan.why
    assert plan.why in (tmp_path / "r" / "README.md").read_text()
    assert not (tmp_path / "r" / "m").exists()
    assert lint(tmp_path / "r") == []
    ingot = make_ingot(classifier(tmp_path / "checkpoint"), "ort", task="classify", kernels="ingot")
    with pytest.raises(TritonError, match=r"only its graph could be served.*--kernels ort"):
        write_repository(ingot, tmp_path / "c", Settings())


def test_serves_features_and_classes_by_the_graph_alone(
    ingots: Callable[..., Path], make_ingot: MakeIngot, tmp_path: Path
) -> None:
    plan = write_repository(
        ingots("olmoe", task="features"), tmp_path / "f", Settings(name="features")
    )
    assert plan.models == ["features"] and "no next token" in plan.why
    config = parsed(tmp_path / "f" / "features" / "config.pbtxt")
    assert config.output[0].name == "last_hidden_state"
    assert lint(tmp_path / "f") == []
    ingot = make_ingot(classifier(tmp_path / "checkpoint"), "ort", task="classify")
    write_repository(ingot, tmp_path / "c", Settings(name="classes"))
    config = parsed(tmp_path / "c" / "classes" / "config.pbtxt")
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    # Without state a warm-up is possible.
    (warmup,) = config.model_warmup
    assert set(warmup.inputs) == {item.name for item in config.input}
    assert lint(tmp_path / "c") == []


def _failed(ingot: Path, folder: Path) -> Path:
    copy = Path(shutil.copytree(ingot, folder))
    replace(Manifest.read(copy), validation={"verdict": "failed"}).write(copy)
    return copy


def test_refuses_an_ingot_that_does_not_fit_and_leaves_nothing(
    ingots: Callable[..., Path], tiny_onnx: Path, tmp_path: Path
) -> None:
    graph_only = as_lowered(Path(shutil.copytree(tiny_onnx, tmp_path / "graph")))
    features = ingots("olmoe", task="features")
    damaged = Path(shutil.copytree(tiny_onnx, tmp_path / "damaged"))
    (damaged / "weights.safetensors").write_bytes(b"no")
    cases = {
        "failed its validation": _failed(tiny_onnx, tmp_path / "failed"),
        "no engine, and Triton builds none": graph_only,
        "only its graph could be served": with_engine(
            features, tmp_path / "rtx", builder="tensorrt-rtx"
        ),
        "without the GPU kernels of MoeDispatch": with_engine(
            tiny_onnx, tmp_path / "bare", libraries=()
        ),
        "is not the file that was validated": damaged,
        "is not an ingot": tmp_path,
    }
    for sentence, ingot in cases.items():
        with pytest.raises(IngotError, match=sentence):
            write_repository(ingot, tmp_path.with_name(f"{tmp_path.name}-out"), Settings())
        assert not tmp_path.with_name(f"{tmp_path.name}-out").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (Settings(name="a/b"), "'a/b' is no model name"),
        (Settings(name="x" * 41), "at most 40"),
        (Settings(streams=0), "--streams is 0"),
        (Settings(threads=-1), "--threads is -1"),
        (Settings(max_batch=0), "--max-batch is 0"),
        (Settings(capacity=513), "--capacity is 513; it must be 2 to 512"),
        (Settings(capacity=1), "--capacity is 1"),
    ],
)
def test_refuses_a_setting_that_does_not_fit(
    tiny_ort: Path, tmp_path: Path, settings: Settings, sentence: str
) -> None:
    with pytest.raises(TritonError, match=re.escape(sentence)):
        write_repository(tiny_ort, tmp_path / "r", settings)
    assert list(tmp_path.iterdir()) == []


def test_takes_any_capacity_where_nothing_limits_the_context(
    tiny_ort: Path, tmp_path: Path
) -> None:
    generation = {**Manifest.read(tiny_ort).generation, "context_length": None}
    ingot = copied(tiny_ort, tmp_path / "ingot", generation=generation)
    with pytest.raises(TritonError, match="--capacity is 1; it must be at least 2"):
        write_repository(ingot, tmp_path / "r", Settings(capacity=1))
    manifest = Manifest.read(ingot)
    assert make_plan(ingot, manifest, Settings(capacity=100_000)).settings.capacity == 100_000
    assert make_plan(ingot, manifest, Settings()).settings.capacity == 4096


@pytest.mark.parametrize("engine", [False, True])
def test_batches_states_of_fixed_size(
    ingots: Callable[..., Path], tmp_path: Path, engine: bool
) -> None:
    ingot = ingots("mamba2", "onnx")
    if engine:
        ingot = with_engine(ingot, tmp_path / "ingot")
    write_repository(ingot, tmp_path / "r", Settings(name="m", max_batch=8))
    # The engine's limit, not the option's.
    assert parsed(tmp_path / "r" / "m" / "config.pbtxt").max_batch_size == (4 if engine else 8)
    assert lint(tmp_path / "r") == []
    assert "takes those of its batch with it" in (tmp_path / "r" / "README.md").read_text()
