"""Another ingot in the place of the truth: its numbers, eager's floors, and the truth's experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from damage import copied, one_percent, with_all_logits, with_weight

from ingot.export.ingot import Manifest
from ingot.export.progress import Stages
from ingot.export.request import ExportRequest
from ingot.graphs.checkpoint import Checkpoint
from ingot.plugins.errors import IngotError
from ingot.validate.result import Report
from ingot.validate.run import validate_ingot
from ingot.validate.truth.against import AgainstError, OtherReference, other_ingot
from ingot.validate.truth.cache import Recording
from ingot.validate.truth.inputs import QUICK, Inputs, make_inputs
from ingot.validate.truth.recording import Layout, all_router_logits, record
from ingot.validate.truth.reference import Reference
from ingot.validate.truth.replay import choices
from ingot.validate.truth.taps import TappedSession

# Minutes of tracing; `make test-slow` runs them, and so does CI.
pytestmark = pytest.mark.slow

WEIGHT = "layers.1.self_attn.q_norm.weight"
ROUTER = "layers.0.mlp.gate.weight"


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Reference:
    return Reference(Checkpoint.open(tiny), "generate")


@pytest.fixture(scope="module")
def usual(tiny_onnx: Path, reference: Reference) -> Report:
    """Against eager PyTorch."""
    return validate_ingot(tiny_onnx, reference, plan=QUICK)


@pytest.fixture(scope="module")
def changed(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_onnx`` with one weight 1 % larger."""
    return with_weight(tiny_onnx, tmp_path_factory.mktemp("changed") / "x", WEIGHT, one_percent)


def _against(ingot: Path, reference: Reference, other: Path) -> Report:
    return validate_ingot(ingot, OtherReference(reference, other, "it"), plan=QUICK)


def _floors(report: Report) -> dict[tuple[str, str], float | None]:
    return {(tensor.stage, tensor.name): tensor.floor for tensor in report.tensors}


def test_passes_an_equal_one_at_next_to_nothing(
    tiny_onnx: Path, reference: Reference, usual: Report, tmp_path: Path
) -> None:
    report = _against(tiny_onnx, reference, copied(tiny_onnx, tmp_path / "copy"))
    assert (report.verdict, report.failures) == ("passed", [])
    # With the same taps on it, the same graph computes the same numbers to the bit.
    inside = [tensor.error for tensor in report.tensors if tensor.stage.endswith("replayed")]
    assert len(inside) > 50 and set(inside) == {0.0}
    # Without them and in pieces, sums may be taken in another order.
    assert all(tensor.score is not None and tensor.score < 4 for tensor in report.tensors)
    assert all(tensor.score == 0 for t in report.tensors for tensor in [t] if t.stage == "prefill")
    assert report.against == "it, in what eager PyTorch's own error in float32 is"
    assert [t.stage for t in report.tensors] == [t.stage for t in usual.tensors]


@pytest.mark.parametrize("turned", [False, True], ids=["changed", "the other changed"])
def test_fails_one_with_a_weight_one_percent_off(
    tiny_onnx: Path, changed: Path, reference: Reference, turned: bool
) -> None:
    ingot, other = (tiny_onnx, changed) if turned else (changed, tiny_onnx)
    report = _against(ingot, reference, other)
    assert report.verdict == "failed"
    bad = {tensor.name for tensor in report.tensors if tensor.problem}
    # What is before that weight is still the same.
    assert bad >= {"logits", "hidden_states.2"}
    assert bad.isdisjoint({"present.0.key", "present.1.key", "present.1.value", "hidden_states.1"})
    assert all(t.score is not None and t.score > 100 for t in report.tensors if t.problem)
    # The truth is not asked, which would have found the other one right.
    if turned:
        assert _against(tiny_onnx, reference, tiny_onnx).verdict == "passed"


def test_two_targets_pass_at_a_few_floors(
    tiny_onnx: Path, tiny_ort: Path, reference: Reference
) -> None:
    for one, other in ((tiny_onnx, tiny_ort), (tiny_ort, tiny_onnx)):
        report = _against(one, reference, other)
        assert report.verdict == "passed"
        assert 0 < max(tensor.score or 0.0 for tensor in report.tensors) < 8


def _of_calls(report: Report) -> dict[tuple[str, str], float | None]:
    """The floors of whole calls; of forced experts that of the worst token counts."""
    return {key: f for key, f in _floors(report).items() if not key[0].startswith("experts")}


def test_floors_are_those_of_eager(
    tiny_onnx: Path, changed: Path, reference: Reference, usual: Report
) -> None:
    for other in (tiny_onnx, changed):
        found, expected = _of_calls(_against(tiny_onnx, reference, other)), _of_calls(usual)
        # Where experts were turned, there are replayed calls besides.
        assert {key: found[key] for key in expected} == expected
    assert all(floor is not None and floor > 0 for floor in _floors(usual).values())


def _recorded(
    ingot: Path, reference: Reference, truth: Recording | None
) -> tuple[Recording, Layout, Inputs]:
    """Of the graph of an ingot, with the truth's experts or its own."""
    manifest = Manifest.read(ingot)
    layout = Layout(manifest, reference.states)
    inputs = make_inputs(manifest.vocab_size, plan=QUICK)
    session = TappedSession(ingot, manifest)

    def choose(number: int) -> None:
        if truth is not None:
            session.choose(reference.routers.chosen(truth[number], inputs, number))

    return record(session, layout, inputs, choose), layout, inputs


def _assert_same(one: Recording, other: Recording) -> None:
    assert [list(call) for call in one] == [list(call) for call in other]
    for call, same in zip(one, other, strict=True):
        for name, array in call.items():
            np.testing.assert_array_equal(array, same[name], strict=True, err_msg=name)


def test_expects_the_others_numbers_under_the_truths_experts(
    tiny_onnx: Path, reference: Reference, tmp_path: Path
) -> None:
    def turn(router: Any) -> None:
        router *= -1

    # A router that chooses the least likely ones wherever it may.
    other = with_weight(tiny_onnx, tmp_path / "other", ROUTER, turn)
    _, layout, inputs = _recorded(tiny_onnx, reference, None)
    expected = reference.record(layout, [inputs], Stages())[0]
    found = OtherReference(reference, other, "it").record(layout, [inputs], Stages())[0]
    _assert_same(found.truth, expected.truth)
    _assert_same(found.eager, expected.eager)
    replayed, _, _ = _recorded(other, reference, expected.truth)
    _assert_same(found.expected, replayed)
    # The control: left alone, it would have used others, and computed something else.
    free, _, _ = _recorded(other, reference, None)
    top_k = reference.routers.top_k
    wanted, own = (choices(all_router_logits(side[0])[0], top_k) for side in (expected.truth, free))
    assert not (wanted & own).any()
    assert (free[0]["hidden_states.1"] != replayed[0]["hidden_states.1"]).any()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"precision": "float16"}, "generate float16 and this ingot generate float32"),
        ({"task": "features"}, "features float32 and this ingot generate float32"),
        (
            {"source": {"checkpoint": "x", "revision": None, "sha256": "0" * 64}},
            "was not made from ",
        ),
    ],
    ids=str,
)
def test_refuses_an_ingot_of_something_else(
    tiny_onnx: Path, reference: Reference, tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    other = copied(tiny_onnx, tmp_path / "other")
    replace(with_all_logits(Manifest.read(other)), **fields).write(other)
    with pytest.raises(AgainstError, match=named):
        OtherReference(reference, other, "it")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("target", "task", "full", "short"),
    [
        ("onnx", "generate", "float32", "fp32"),
        ("trt", "features", "float16", "fp16"),
        ("trt-rtx", "classify", "bfloat16", "bf16"),
    ],
)
def test_makes_the_other_of_the_same_task_and_precision(
    tiny: Path,
    tiny_onnx: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    task: str,
    full: str,
    short: str,
) -> None:
    asked: list[ExportRequest] = []

    def build(request: ExportRequest, _stages: Stages, validate: object) -> None:
        assert validate is None
        request.out.mkdir()
        asked.append(request)

    monkeypatch.setattr("ingot.validate.truth.against.build", build)
    manifest = replace(Manifest.read(tiny_onnx), task=task, precision=full)
    with other_ingot(target, manifest, Checkpoint.open(tiny), Stages()) as (folder, name):
        assert folder.is_dir() and temporary in folder.parents
        assert name == f"the {target} ingot of the same checkpoint"
    (request,) = asked
    assert (request.model, request.out) == (str(tiny), folder)
    assert (request.target, request.task, request.precision) == (target, task, short)
    # What runs here is the graph.
    assert request.builder == "none"
    assert list(temporary.iterdir()) == []


def test_removes_the_other_after_an_error(
    tiny: Path, tiny_onnx: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(request: ExportRequest, *_arguments: object) -> NoReturn:
        request.out.mkdir()
        assert len(list(temporary.iterdir())) == 1
        raise IngotError("no space")

    monkeypatch.setattr("ingot.validate.truth.against.build", build)
    manifest = Manifest.read(tiny_onnx)
    # The exception is kept, and with it whatever its frames hold on to.
    with (
        pytest.raises(IngotError, match="no space") as kept,
        other_ingot("ort", manifest, Checkpoint.open(tiny), Stages()),
    ):
        pass
    assert kept.value.__traceback__ is not None
    assert list(temporary.iterdir()) == []


def test_leaves_a_folder_that_was_given(tiny: Path, tiny_onnx: Path, temporary: Path) -> None:
    manifest, checkpoint = Manifest.read(tiny_onnx), Checkpoint.open(tiny)
    with other_ingot(str(tiny_onnx), manifest, checkpoint, Stages()) as (folder, name):
        assert (folder, name) == (tiny_onnx, f"the ingot {tiny_onnx}")
    assert (tiny_onnx / "model.onnx").is_file()
    damaged = with_weight(tiny_onnx, temporary / "damaged", WEIGHT, one_percent, known=False)
    for given, named in ((damaged, "is not the file"), (temporary / "absent", "is not an ingot")):
        with (
            pytest.raises(IngotError, match=named),
            other_ingot(str(given), manifest, checkpoint, Stages()),
        ):
            pass
