"""What a TensorRT export refuses before anything is built, and how it chooses its builder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from conftest import MakeCheckpoint, MakeIngot

from ingot.export import engine
from ingot.export.cli import export_command
from ingot.export.eligibility import EligibilityError
from ingot.export.engine import RTX, TENSORRT, Builder, EngineError, choose_builder, plan_engine
from ingot.export.ingot import Manifest
from ingot.export.request import ExportRequest, Limits


def has(monkeypatch: pytest.MonkeyPatch, *, gpu: bool, installed: tuple[str, ...]) -> None:
    monkeypatch.setattr(engine, "has_gpu", lambda: gpu)
    monkeypatch.setattr(engine, "_installed", lambda builder: builder in installed)


@pytest.mark.parametrize(
    ("wanted", "target", "gpu", "installed", "chosen"),
    [
        ("auto", "trt", True, (TENSORRT, RTX), TENSORRT),
        ("auto", "trt", True, (RTX,), RTX),
        ("auto", "trt", False, (TENSORRT, RTX), RTX),
        ("auto", "trt-rtx", True, (TENSORRT, RTX), RTX),
        (RTX, "trt", True, (TENSORRT, RTX), RTX),
        (TENSORRT, "trt", True, (TENSORRT,), TENSORRT),
        ("none", "trt", False, (), None),
        ("none", "trt-rtx", False, (), None),
    ],
)
def test_chooses_a_builder(
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    target: str,
    gpu: bool,
    installed: tuple[str, ...],
    chosen: str | None,
) -> None:
    has(monkeypatch, gpu=gpu, installed=installed)
    assert choose_builder(wanted, target) == chosen


@pytest.mark.parametrize(
    ("wanted", "target", "gpu", "installed", "message"),
    [
        (
            "auto",
            "trt",
            False,
            (),
            r"tensorrt_rtx is missing; .*pip install 'ingot-export\[trt-rtx\]'",
        ),
        ("auto", "trt", True, (), r"tensorrt_rtx is missing"),
        (
            TENSORRT,
            "trt",
            True,
            (RTX,),
            r"tensorrt is missing; .*pip install 'ingot-export\[trt\]'",
        ),
        (TENSORRT, "trt", False, (TENSORRT,), r"machine with an NVIDIA GPU only.*--builder none"),
        (TENSORRT, "trt-rtx", True, (TENSORRT,), "trt-rtx is built by tensorrt-rtx"),
    ],
)
def test_refuses_a_builder_that_cannot_work(
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    target: str,
    gpu: bool,
    installed: tuple[str, ...],
    message: str,
) -> None:
    has(monkeypatch, gpu=gpu, installed=installed)
    with pytest.raises(EngineError, match=message):
        choose_builder(wanted, target)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_batch=0), "must be at least 1"),
        (Limits(max_seq=64, opt_seq=65), "--opt-seq 65 is more than --max-seq 64"),
    ],
)
def test_refuses_sizes_that_contradict_each_other(limits: Limits, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        plan_engine(ExportRequest("olmoe", "trt", Path("x"), limits=limits))


def test_refuses_to_embed_plugins_that_are_not_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engine, "PLUGIN_LIBRARY", tmp_path / "libingot_trt.so")
    with pytest.raises(EngineError, match=r"libingot_trt.so, which is not built; run make plugins"):
        plan_engine(ExportRequest("olmoe", "trt", Path("x"), embed_plugins=True))


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (
            "olmoe",
            {"intermediate_size": 36},
            r"MoeDispatch: intermediate size 36 is not a multiple of 8: pad it, or .*fp32",
        ),
        # A second limit of an operator is slow, as each is a trace of its own.
        pytest.param(
            "olmoe",
            {"num_experts": 66, "num_experts_per_tok": 65},
            r"65 of 66 experts; .* up to 64",
            marks=pytest.mark.slow,
        ),
        ("jetmoe", {"kv_channels": 10}, r"MoeLinear: .*put size 20 is not a multiple of 8"),
        ("mamba2", {"conv_kernel": 9}, r"CausalConv: width 9; the kernel takes up to 8"),
        ("mamba2", {"state_size": 264}, r"Mamba2Scan: head size 16 and state size 264"),
    ],
)
def test_refuses_what_no_kernel_takes(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    family: str,
    config: dict[str, int],
    message: str,
) -> None:
    """Before the weights are read, and without a trace at the destination."""
    folder, out = make_checkpoint(family, **config), tmp_path / "out"
    result = CliRunner().invoke(
        export_command,
        ["--model", str(folder), "--target", "trt", "--builder", "none", "--out", str(out)],
    )
    assert result.exit_code == 2
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    error = result.stderr.splitlines()[-1]
    with pytest.raises(EligibilityError, match=message):
        raise EligibilityError(error)
    assert "refused" in result.stderr and "write weights" not in result.stderr


def test_float32_takes_any_size(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> None:
    folder = make_checkpoint("olmoe", intermediate_size=36)
    ingot = make_ingot(folder, "trt", builder="none", precision="fp32")
    assert Manifest.read(ingot).engine is None


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_half_precision_is_for_tensorrt(tmp_path: Path, target: str) -> None:
    arguments = ["--model", "olmoe", "--preset", "tiny", "--target", target]
    result = CliRunner().invoke(
        export_command, [*arguments, "--precision", "bf16", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 2
    assert f"--precision bf16 goes with a TensorRT target; {target} ingots" in result.stderr


@pytest.mark.parametrize(
    ("precision", "plugins", "devices"),
    [
        ("float32", False, (75, 80, 86, 89, 90, 100, 103, 120, 121)),
        ("bfloat16", False, (80, 86, 89, 90, 100, 103, 120, 121)),
        ("float32", True, (80, 86, 89, 90, 100, 120)),
    ],
)
def test_an_engine_with_our_kernels_promises_no_device_that_they_do_not_run_on(
    precision: str, plugins: bool, devices: tuple[int, ...]
) -> None:
    knows = (75, 80, 86, 89, 90, 100, 103, 120, 121)
    builder = Builder.__new__(Builder)
    builder.name = RTX
    builder.trt = SimpleNamespace(ComputeCapability=SimpleNamespace(**{f"SM{c}": c for c in knows}))
    assert builder.compute_capabilities(precision, plugins) == devices


def test_an_engine_without_kernels_says_so(
    monkeypatch: pytest.MonkeyPatch,
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorrt_rtx")
    missing = tmp_path / "libingot_kernels.so"
    monkeypatch.setattr(engine, "KERNEL_LIBRARY", missing)
    ingot = make_ingot(make_checkpoint("olmoe"), "trt", builder=RTX, limits=Limits(1, 16, 8))
    found = Manifest.read(ingot).engine
    assert found is not None and found.libraries == ()
