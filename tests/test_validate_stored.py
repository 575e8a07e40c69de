"""Matrices stored narrower than they are computed in: lossless, or judged as they are rounded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from oracle import KEPT, logits, of_transformers, relative_rms
from proof import stored
from proof.fault import Change
from safetensors import safe_open
from traces import Traces

from ingot.export.ingot import WEIGHTS, Manifest
from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.validate.result import Report
from ingot.validate.run import examine
from ingot.validate.truth.inputs import QUICK
from ingot.validate.truth.reference import Reference

FAMILIES = ("granite", "jetmoe", "mamba2", "olmoe")


def examined(ingot: Path, checkpoint: Path, traces: Traces) -> Report:
    opened = Checkpoint.open(checkpoint)
    reference = Reference.of_ingot(ingot, Manifest.read(ingot), opened)
    return examine(ingot, reference, Stages(), plan=QUICK, capture=traces)


def dtypes(ingot: Path) -> dict[str, str]:
    with safe_open(ingot / WEIGHTS, "np") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("target", [pytest.param("onnx", marks=pytest.mark.slow), "ort"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_precision_checkpoint_loses_nothing(
    family: str, target: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, traces: Traces
) -> None:
    checkpoint = make_checkpoint(family, dtype=torch.bfloat16)
    whole = make_ingot(checkpoint, target)
    kept = make_ingot(checkpoint, target, weights="checkpoint")
    sizes = [(ingot / WEIGHTS).stat().st_size for ingot in (whole, kept)]
    assert sizes[1] < 0.6 * sizes[0]
    assert relative_rms(of_transformers(checkpoint), logits(kept)) < 2e-6
    assert relative_rms(logits(whole), logits(kept)) < 2e-6
    report = examined(kept, checkpoint, traces)
    assert (report.verdict, report.failures, report.short) == ("passed", [], ())
    assert Manifest.read(kept).weight_bytes == sizes[1] - _header(kept)


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        ("bf16", torch.bfloat16),
        pytest.param("fp16", torch.float16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_rounded_is_judged_as_it_is_stored(
    family: str,
    weights: str,
    dtype: torch.dtype,
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    traces: Traces,
) -> None:
    checkpoint = make_checkpoint(family)
    ingot = make_ingot(checkpoint, "ort", weights=weights)
    found = logits(ingot)
    expected = of_transformers(checkpoint, lambda matrix: matrix.to(dtype).float())
    assert relative_rms(expected, found) < 2e-6
    # Rounding itself is far above that, and is no fault of the kernels.
    assert relative_rms(of_transformers(checkpoint), found) > 1e-4
    report = examined(ingot, checkpoint, traces)
    assert (report.verdict, report.failures, report.short) == ("passed", [], ())
    assert all(tensor.score is None or tensor.score < 4 for tensor in report.worst.values())


def test_a_checkpoint_of_float32_is_kept_as_it_is(
    tiny: Path, tiny_ort: Path, make_ingot: MakeIngot
) -> None:
    kept = make_ingot(tiny, "ort", weights="checkpoint")
    assert set(dtypes(kept).values()) == {"F32"} == set(dtypes(tiny_ort).values())
    np.testing.assert_array_equal(logits(kept), logits(tiny_ort))


def test_says_in_the_manifest_and_in_the_file_what_is_stored(
    tiny: Path, tiny_ort: Path, make_ingot: MakeIngot
) -> None:
    ingot = make_ingot(tiny, "ort", weights="bf16")
    assert (
        Manifest.read(ingot).weights == "bfloat16" and Manifest.read(ingot).precision == "float32"
    )
    with safe_open(ingot / WEIGHTS, "np") as file:
        assert file.metadata() == {"format": "pt", "weights": "bfloat16"}
    found = dtypes(ingot)
    narrow = {name for name, dtype in found.items() if dtype == "BF16"}
    assert {name for name in found if name.endswith(KEPT)} == set(found) - narrow
    # Where it goes without saying nothing is said.
    assert "weights" not in json.loads((tiny_ort / "ingot.json").read_text())


@pytest.fixture(scope="module")
def narrow(tiny: Path, make_ingot: MakeIngot) -> Path:
    return make_ingot(tiny, "ort", weights="bf16")


def _one_ulp(array: np.ndarray) -> None:
    array.view(np.uint16)[3, 5] ^= 1


@pytest.mark.parametrize(
    ("change", "said", "layer"),
    [
        (
            stored.weight("layers.1.self_attn.o_proj.weight", _one_ulp),
            "1 of 4096 elements differs",
            1,
        ),
        (
            stored.weight("layers.1.mlp.experts.down_proj", lambda a: a[[1, 0, 2, 3, 4, 5, 6, 7]]),
            "layer 1, model.layers.1.mlp.experts",
            1,
        ),
        (stored.field("weights", to="float16"), "it is stored as BF16 and should be F16", 0),
        (stored.field("weights", to="checkpoint"), "it is stored as BF16 and should be F32", 0),
        (
            stored.manifest(lambda held: held.pop("weights")),
            "it is stored as BF16 and should be F32",
            0,
        ),
    ],
)
def test_names_a_weight_that_is_not_as_it_should_be_stored(
    change: Change,
    said: str,
    layer: int,
    narrow: Path,
    tiny: Path,
    tmp_path: Path,
    traces: Traces,
) -> None:
    wrong = Path(shutil.copytree(narrow, tmp_path / "wrong"))
    change(wrong)
    report = examined(wrong, tiny, traces)
    assert report.verdict == "failed"
    assert any(said in failure for failure in report.failures), report.failures[:6]


def _header(ingot: Path) -> int:
    with (ingot / WEIGHTS).open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
