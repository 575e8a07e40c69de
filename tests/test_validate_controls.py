"""Negative controls: each wrong export of a right checkpoint fails, and the report says where."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from torch import nn
from traces import Traces

from ingot.export.ingot import GRAPH, MANIFEST
from ingot.export.passes.graph_pass import PassError
from ingot.export.progress import Stages
from ingot.export.write_weights import write_weights
from ingot.graphs import attention
from ingot.graphs.checkpoint import Checkpoint, block_reader
from ingot.graphs.family import Family
from ingot.graphs.layers import ModelOutput
from ingot.plugins.errors import IngotError
from ingot.plugins.mamba2_scan import mamba2_scan
from ingot.validate.judge.compare import compare
from ingot.validate.result import Report
from ingot.validate.run import examine
from ingot.validate.truth.inputs import QUICK
from ingot.validate.truth.reference import Reference

pytestmark = pytest.mark.usefixtures("shared_traces")

TARGETS = ("onnx", "ort")
# The last of two layers: what is wrong in it leaves the first one right.
LAYER = 1
DROPPED = f"present.{LAYER}.value"
NORMALISED = {"norm_topk_prob": True}

Read = Callable[[str, int], torch.Tensor]
# Makes the export wrong as long as the patch lasts.
Fault = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more to a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Subject:
    """A right checkpoint, and what is made of it once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reference = Reference(Checkpoint.open(folder), "generate")


@dataclass(frozen=True)
class Control:
    """One wrong export.

    Attributes:
        family: of the checkpoint.
        fault: what is wrong.
        layer: where the report has to find it.
        operator: likewise.
        lowered: the operator where the ``ort`` target has another.
        first: the first call that shows it.
        hidden: what the names of the calls begin with that cannot show it.
        config: of the checkpoint.
        retraced: whether the graph is another one, and not the weights alone.
        added: layer and operator of a node that no right graph has, and that may be named itself.
    """

    family: str
    fault: Fault
    layer: int | None
    operator: str
    lowered: str | None = None
    first: str = "prefill"
    hidden: tuple[str, ...] = ("nothing",)
    config: dict[str, Any] = field(default_factory=dict)
    retraced: bool = True
    added: tuple[int | None, str] | None = None


class Exports:
    """Wrong ingots and right ones, each traced once for both targets."""

    def __init__(self, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> None:
        self._make_checkpoint, self._make_ingot = make_checkpoint, make_ingot
        self._subjects: dict[tuple[str, str], Subject] = {}
        self._wrong: dict[Fault, Traces] = {}

    def subject(self, family: str, config: dict[str, Any]) -> Subject:
        key = family, repr(config)
        if key not in self._subjects:
            self._subjects[key] = Subject(self._make_checkpoint(family, **config))
        return self._subjects[key]

    def right(self, subject: Subject, target: str) -> Path:
        return self._make_ingot(subject.folder, target)

    def wrong(self, control: Control, target: str) -> tuple[Path, Subject]:
        subject = self.subject(control.family, control.config)
        own = {}
        if control.retraced:
            own["capture"] = self._wrong.setdefault(control.fault, Traces())
        with pytest.MonkeyPatch.context() as patch:
            control.fault(patch)
            return self._make_ingot(subject.folder, target, **own), subject


@pytest.fixture(scope="module")
def exports(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> Exports:
    return Exports(make_checkpoint, make_ingot)


def examined(ingot: Path, subject: Subject) -> Report:
    """The path of ``python -m validate``."""
    return examine(ingot, subject.reference, Stages(), plan=QUICK)


def of_model(change: Callable[[Any], None]) -> Fault:
    """The model is another one before it is traced; its parameters stay."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        right = Family.build

        def build(family: Family, *arguments: Any) -> nn.Module:
            model = right(family, *arguments)
            change(model)
            return model

        patch.setattr(Family, "build", build)

    return apply


def of_layer(change: Callable[[Any], None]) -> Fault:
    """One layer of the model is."""
    return of_model(lambda model: change(bare(model).layers[LAYER]))


def bare(model: Any) -> Any:
    return getattr(model, model.base_model_prefix)


def of_weights(change: Callable[[Read, str, int], torch.Tensor]) -> Fault:
    """The graph is right, and its weights are read wrong."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        def reader(*arguments: Any) -> Read:
            right = block_reader(*arguments)
            return lambda name, block: change(right, name, block)

        patch.setattr("ingot.export.graph.block_reader", reader)

    return apply


def of_weight(wrong: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    """One weight is."""

    def change_one(read: Read, name: str, block: int) -> torch.Tensor:
        weight = read(name, block)
        return change(weight.clone()).contiguous() if name == wrong else weight

    return of_weights(change_one)


def of_config(**changed: Any) -> Fault:
    """Some fields of ``config.json`` are read wrong."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        right = Checkpoint.open

        def opened(path: Path) -> Checkpoint:
            checkpoint = right(path)
            return replace(checkpoint, config={**checkpoint.config, **changed})

        patch.setattr(Checkpoint, "open", opened)

    return apply


def of_scan(change: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Fault:
    """The scan of one layer is another function."""

    def edit(layer: Any) -> None:
        right = layer.mixer.forward

        def forward(*arguments: torch.Tensor) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("ingot.graphs.mamba2_mixer.mamba2_scan", change)
                return right(*arguments)

        layer.mixer.forward = forward

    return of_layer(edit)


def swapped_experts(read: Read, name: str, block: int) -> torch.Tensor:
    swapped = name.startswith(f"model.layers.{LAYER}.mlp.experts.")
    return read(name, {2: 5, 5: 2}.get(block, block) if swapped else block)


def flip_renormalisation(layer: Any) -> None:
    layer.mlp.normalise = not layer.mlp.normalise


# A dropped weight is still read: a graph that never reads one is no export at all (see below).
def without_skip(*arguments: Any) -> Any:
    x, dt, a, b, c, skip, *rest = arguments
    return mamba2_scan(x, dt, a, b, c, skip * 0, *rest)


def without_bias(*arguments: Any) -> Any:
    *before, bias, state, mask, chunk_size, least, most = arguments
    return mamba2_scan(*before, bias * 0, state, mask, chunk_size, least, most)


def with_rounded_state(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    y, state = mamba2_scan(*arguments)
    return y, state.to(torch.bfloat16).to(state.dtype)


def with_nan_in_state(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    y, state = mamba2_scan(*arguments)
    spot = torch.zeros(state.shape[1:], dtype=state.dtype)
    spot[3, 2, 1] = math.nan
    return y, state + spot


def skip_query_and_key_norm(layer: Any) -> None:
    for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
        norm.forward = lambda x, norm=norm: x * norm.weight


def drop_residual_multiplier(layer: Any) -> None:
    layer.residual_multiplier = 1.0


def see_one_padding_position(patch: pytest.MonkeyPatch) -> None:
    right = attention.causal_mask

    def mask_off_by_one(
        attention_mask: torch.Tensor, tokens: int, window: int | None = None
    ) -> torch.Tensor:
        """A row's mask begins one position early."""
        after = torch.cat((attention_mask[:, 1:], attention_mask[:, -1:]), dim=1)
        return right(attention_mask | after, tokens, window)

    patch.setattr(attention, "causal_mask", mask_off_by_one)


def shift_positions_after_a_past(model: Any) -> None:
    right = bare(model).forward

    def forward(
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: tuple[torch.Tensor, ...],
    ) -> Any:
        total = torch.ones_like(attention_mask).sum(1, keepdim=True)
        new = torch.ones_like(input_ids).sum(1, keepdim=True)
        return right(input_ids, attention_mask, position_ids + (total > new), past)

    bare(model).forward = forward


def scale_logits(model: Any) -> None:
    right = model.forward

    def forward(*arguments: Any) -> ModelOutput:
        out: ModelOutput = right(*arguments)
        return out._replace(main=out.main * 1.001)

    model.forward = forward


def with_nan(weight: torch.Tensor) -> torch.Tensor:
    weight[3, 4] = math.nan
    return weight


def forget_a_state(patch: pytest.MonkeyPatch) -> None:
    """The convolution of one layer begins afresh in every call, and the manifest knows no state."""
    from ingot.graphs.mamba2 import Mamba2Model

    states: Any = Mamba2Model.states
    forward = Mamba2Model.forward
    at = 2 * LAYER

    def forgetful(model: Any, ids: Any, mask: Any, positions: Any, past: Any) -> ModelOutput:
        past = (*past[:at], past[0] * 0, *past[at:])
        out = forward(model, ids, mask, positions, past)
        return out._replace(present=(*out.present[:at], *out.present[at + 1 :]))

    def fewer(model: Any) -> Any:
        every = states.fget(model)
        return (*every[:at], *every[at + 1 :])

    patch.setattr(Mamba2Model, "states", property(fewer))
    patch.setattr(Mamba2Model, "forward", forgetful)


def drop_an_output(patch: pytest.MonkeyPatch) -> None:
    """The file lacks an output that the manifest names."""

    def write(model: ir.Model, *arguments: Any) -> str:
        (output,) = (value for value in model.graph.outputs if value.name == DROPPED)
        model.graph.outputs.remove(output)
        return write_weights(model, *arguments)

    patch.setattr("ingot.export.build.write_weights", write)


CONTROLS = {
    "1 two experts swapped": Control(
        "olmoe", of_weights(swapped_experts), LAYER, "MoeDispatch", "MoE", retraced=False
    ),
    "2a top-k weights not renormalised": Control(
        "olmoe", of_layer(flip_renormalisation), LAYER, "MoeDispatch", "MoE", config=NORMALISED
    ),
    "2b top-k weights renormalised": Control(
        "olmoe", of_layer(flip_renormalisation), LAYER, "MoeDispatch", "MoE"
    ),
    "3 D dropped": Control("mamba2", of_scan(without_skip), LAYER, "Mamba2Scan", "Mul"),
    "4 dt_bias dropped": Control("mamba2", of_scan(without_bias), LAYER, "Mamba2Scan", "Add"),
    "5 state in bfloat16": Control("mamba2", of_scan(with_rounded_state), LAYER, "Cast"),
    "6 rope base 1 % off, olmoe": Control("olmoe", of_config(rope_theta=10100.0), None, "Mul"),
    "6 rope base 1 % off, granite": Control("granite", of_config(rope_theta=10100.0), None, "Mul"),
    # What is left of the norm, in its place.
    "7 query and key norm skipped": Control(
        "olmoe", of_layer(skip_query_and_key_norm), LAYER, "Mul"
    ),
    # The export folds the multiplier into this product's weight.
    "8 residual multiplier dropped": Control(
        "granite", of_layer(drop_residual_multiplier), LAYER, "MatMul"
    ),
    # Where the fault adds nodes, the first value that both graphs have behind them.
    "9 mask off by one": Control(
        "granite", see_one_padding_position, None, "Slice", hidden=("row 0", "row 2")
    ),
    "10 positions off by one in decode": Control(
        "olmoe",
        of_model(shift_positions_after_a_past),
        None,
        "Unsqueeze",
        first="decode 1",
        hidden=("prefill",),
        added=(None, "Shape"),
    ),
    "11 logits times 1.001": Control("olmoe", of_model(scale_logits), None, "MatMul"),
    "12 o_proj transposed": Control(
        "olmoe",
        of_weight(f"model.layers.{LAYER}.self_attn.o_proj.weight", lambda w: w.T),
        LAYER,
        "MatMul",
        retraced=False,
    ),
    "12 q_proj transposed": Control(
        "olmoe",
        of_weight(f"model.layers.{LAYER}.self_attn.q_proj.weight", lambda w: w.T),
        LAYER,
        "MatMul",
        retraced=False,
    ),
    "13 NaN in a weight": Control(
        "olmoe",
        of_weight(f"model.layers.{LAYER}.self_attn.v_proj.weight", with_nan),
        LAYER,
        "MatMul",
        retraced=False,
    ),
    "13 NaN in a state": Control("mamba2", of_scan(with_nan_in_state), LAYER, "Add"),
    "14 state forgotten": Control(
        "mamba2",
        forget_a_state,
        LAYER,
        "Concat",
        "Conv",
        added=(0, "Mul"),
    ),
}


# The first is quick, since it starts from the right export's trace; the others take minutes.
CASES = [
    pytest.param(name, target, marks=[pytest.mark.slow] * bool(number))
    for number, (name, target) in enumerate(product(CONTROLS, TARGETS))
]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_fails_a_wrong_export_and_says_where(exports: Exports, name: str, target: str) -> None:
    control = CONTROLS[name]
    report = examined(*exports.wrong(control, target))
    assert report.verdict == "failed"
    failed = [tensor.stage for tensor in report.tensors if tensor.problem]
    assert failed[0] == control.first
    assert not any(stage.startswith(control.hidden) for stage in failed)
    found = report.location
    assert found is not None
    operator = (control.lowered or control.operator) if target == "ort" else control.operator
    assert (found.layer, found.operator) in ((control.layer, operator), control.added)
    assert found.ratio > 100
    assert report.summary()["location"] == str(found)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param("granite", {}, id="granite"),
        pytest.param("mamba2", {}, id="mamba2"),
        pytest.param("olmoe", {}, id="olmoe"),
        pytest.param("olmoe", NORMALISED, id="olmoe, renormalised"),
    ],
)
def test_passes_the_right_export(
    exports: Exports, family: str, config: dict[str, Any], target: str
) -> None:
    # By the same path, so that each failure above is the fault's doing.
    subject = exports.subject(family, config)
    report = examined(exports.right(subject, target), subject)
    assert (report.verdict, report.failures, report.location) == ("passed", [], None)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_refuses_a_graph_without_an_output(exports: Exports, target: str) -> None:
    wrong = Control("olmoe", drop_an_output, LAYER, "", retraced=False)
    ingot, subject = exports.wrong(wrong, target)
    model = onnx.load(str(ingot / GRAPH), load_external_data=False)
    assert DROPPED not in [output.name for output in model.graph.output]
    states = json.loads((ingot / MANIFEST).read_text())["states"]
    assert DROPPED in [state["output"] for state in states]
    with pytest.raises(IngotError, match=DROPPED):
        examined(ingot, subject)


@pytest.mark.slow
def test_exports_no_graph_that_leaves_a_weight_unread(exports: Exports) -> None:
    def skip(layer: Any) -> None:
        layer.self_attn.q_norm.forward = lambda x: x

    wrong = Control("olmoe", of_layer(skip), LAYER, "")
    name = rf"model\.layers\.{LAYER}\.self_attn\.q_norm\.weight"
    with pytest.raises(PassError, match=rf"the graph never uses the weight {name}\W"):
        exports.wrong(wrong, "onnx")


def test_proves_nothing_by_nothing() -> None:
    (nothing,) = compare("prefill", {}, {}, {}, {})
    assert nothing.problem == "nothing was compared"
    report = Report("ingot", "olmoe", "onnx", "float32", "nothing", 0, ())
    assert (report.verdict, report.failures) == ("failed", ["nothing was compared"])
