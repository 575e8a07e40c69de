"""Every expert is run once: with few tokens, on a right graph green, and on a wrong one red."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from ingot.export.ingot import GRAPH, MANIFEST, WEIGHTS, Manifest
from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.runtime.session import Floats, Ids
from ingot.validate.judge.forced import ForcedJudge
from ingot.validate.result import FORCED, Report, TensorResult
from ingot.validate.run import validate_ingot
from ingot.validate.truth.forced import TOKENS, forced_runs
from ingot.validate.truth.inputs import QUICK
from ingot.validate.truth.recording import Layout
from ingot.validate.truth.reference import Reference, References
from ingot.validate.truth.taps import TappedSession

Change = Callable[[onnx.ModelProto], None]
# Nodes that choose by router logits, in the targets' graphs.
CHOOSING = ("MoE", "MoeDispatch")


def reference_of(checkpoint: Path, precision: str = "float32") -> Reference:
    return Reference(Checkpoint.open(checkpoint), "generate", precision)


@pytest.mark.parametrize(
    ("experts", "top_k"), [((8, 8), 2), ((9,), 2), ((7, 4, 3), 3), ((64,), 1), ((512,), 1)]
)
def test_every_expert_is_given_with_few_tokens(experts: tuple[int, ...], top_k: int) -> None:
    runs = forced_runs(experts, top_k, 512, 0, stateful=True)
    assert len(runs) == -(-max(experts) // (top_k * TOKENS))
    for each in runs:
        assert each.input_ids.shape == (1, TOKENS) and each.attention_mask.all()
        assert [columns for _, columns in each.steps] == [slice(0, TOKENS)]
    names = [name for each in runs for name, _ in each.steps]
    assert names == [f"experts forced {number + 1}" for number in range(len(runs))]
    for router, count in enumerate(experts):
        mask = np.concatenate([each.forced[0][router] for each in runs])
        assert mask.shape == (len(runs) * TOKENS, count)
        assert (mask.sum(1) == min(top_k, count)).all()
        # None more often than another, but to fill up a set.
        often = mask.sum(0)
        assert often.min() >= 1 and often.max() - often.min() <= -(-len(mask) // (count // top_k))


def test_other_seeds_give_other_experts_and_tokens() -> None:
    one, same, other = (forced_runs((8,), 2, 512, s, stateful=True)[0] for s in (0, 0, 1))
    assert (one.forced[0][0] == same.forced[0][0]).all()
    assert (one.forced[0][0] != other.forced[0][0]).any()
    assert (one.input_ids == same.input_ids).all() and (one.input_ids != other.input_ids).any()


def test_nothing_is_forced_where_every_token_has_all_experts() -> None:
    assert forced_runs((), 0, 512, 0, stateful=True) == []
    assert forced_runs((1, 4), 4, 512, 0, stateful=True) == []


class Subject:
    """A checkpoint's truth under every expert, and what a graph of it makes of them."""

    def __init__(self, checkpoint: Path, ingot: Path, precision: str = "float32") -> None:
        self.reference = reference_of(checkpoint, precision)
        self.layout = Layout(Manifest.read(ingot), self.reference.states)
        top_k = self.reference.routers.top_k
        self.runs = forced_runs(self.reference.experts, top_k, 512, 0, stateful=True)
        self.references: list[References] = self.reference.record(self.layout, self.runs, Stages())

    def judged(self, ingot: Path) -> ForcedJudge:
        return self.judged_by(TappedSession(ingot, Manifest.read(ingot)))

    def judged_by(self, session: TappedSession) -> ForcedJudge:
        judge = ForcedJudge(self.reference.routers, self.layout, self.runs, self.references)
        judge.judge(session)
        return judge


@pytest.fixture(scope="module")
def subject(tiny: Path, tiny_onnx: Path) -> Subject:
    return Subject(tiny, tiny_onnx)


@pytest.fixture(params=["onnx", "ort"])
def ingot(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"tiny_{request.param}")
    return found


def changed(ingot: Path, out: Path, change: Change) -> Path:
    """A copy with another graph."""
    shutil.copytree(ingot, out)
    model = onnx.load(str(out / GRAPH), load_external_data=False)
    change(model)
    (out / GRAPH).write_bytes(model.SerializeToString())
    raw = json.loads((out / MANIFEST).read_text())
    raw["files"][GRAPH]["bytes"] = (out / GRAPH).stat().st_size
    (out / MANIFEST).write_text(json.dumps(raw))
    return out


def reweighted(ingot: Path, out: Path, match: str, expert: int) -> Path:
    """A copy in which an expert has other weights of the same size."""
    shutil.copytree(ingot, out)
    raw = bytearray((out / WEIGHTS).read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    found = 0
    for name, entry in json.loads(raw[8:begin]).items():
        if match not in name:
            continue
        found += 1
        first, last = (begin + offset for offset in entry["data_offsets"])
        dtype = {"F32": np.float32, "F16": np.float16}[entry["dtype"]]
        stack = np.frombuffer(bytes(raw[first:last]), dtype).reshape(entry["shape"]).copy()
        stack[expert] = np.roll(stack[expert], 1, axis=0)
        raw[first:last] = stack.tobytes()
    assert found == 1
    (out / WEIGHTS).write_bytes(raw)
    return out


def _choosers(model: onnx.ModelProto, kinds: tuple[str, ...] = CHOOSING) -> list[onnx.NodeProto]:
    found = [node for node in model.graph.node if node.op_type in kinds]
    # Another TopK than a router's is none.
    found = [n for n in found if n.op_type != "TopK" or n.input[0].startswith("router_logits")]
    assert found
    return found


def by_half_precision(kinds: tuple[str, ...] = CHOOSING) -> Change:
    """Logits pass through float16 before the choice."""

    def change(model: onnx.ModelProto) -> None:
        nodes = list(model.graph.node)
        for number, node in enumerate(_choosers(model, kinds)):
            place = 0 if node.op_type == "TopK" else 1
            short, long = f"short.{number}", f"long.{number}"
            casts = [
                oh.make_node("Cast", [node.input[place]], [short], to=onnx.TensorProto.FLOAT16),
                oh.make_node("Cast", [short], [long], to=onnx.TensorProto.FLOAT),
            ]
            node.input[place] = long
            at = nodes.index(node)
            nodes[at:at] = casts
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    return change


def with_attribute(names: tuple[str, ...], value: Callable[[int], int]) -> Change:
    """Another value of an attribute of what chooses."""

    def change(model: onnx.ModelProto) -> None:
        for node in _choosers(model):
            (attribute,) = (each for each in node.attribute if each.name in names)
            attribute.i = value(attribute.i)

    return change


def ties_to_the_higher_id(model: onnx.ModelProto) -> None:
    """A TopK over logits in reverse order, its ids counted back."""
    nodes = list(model.graph.node)
    bounds = {"s": -1, "e": np.iinfo(np.int64).min, "a": 1, "t": -1}
    for name, value in bounds.items():
        array = np.array([value], np.int64)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    model.graph.initializer.append(numpy_helper.from_array(np.array(3), "last_expert"))
    for number, node in enumerate(_choosers(model, ("TopK",))):
        at = nodes.index(node)
        ids, node.output[1] = node.output[1], f"back.{number}"
        nodes[at + 1 : at + 1] = [oh.make_node("Sub", ["last_expert", f"back.{number}"], [ids])]
        turned = f"turned.{number}"
        nodes[at:at] = [oh.make_node("Slice", [node.input[0], *bounds], [turned])]
        node.input[0] = turned
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def problems(judge: ForcedJudge) -> list[str]:
    return [result.problem for result in judge.results if result.problem]


def test_passes_a_right_graph_all_of_whose_experts_it_ran(subject: Subject, ingot: Path) -> None:
    judge = subject.judged(ingot)
    assert problems(judge) == [] and judge.unread == {}
    assert judge.routing[FORCED].agreement == (1.0, 1.0)
    assert judge.routing[FORCED].problems == []
    assert judge.experts == {0: tuple(range(8)), 1: tuple(range(8))}
    names = ["logits", *(f"present.{n}.{k}" for n in range(2) for k in ("key", "value"))]
    taps = [f"router_logits.{n}" for n in range(2)] + [f"hidden_states.{n}" for n in range(3)]
    assert {(r.stage, r.name) for r in judge.results} == {
        ("experts forced 1", name) for name in (*names, *taps)
    }
    assert len(judge.results) == len(names) + len(taps) and judge.calls == 1
    scores = [result.score for result in judge.results]
    assert all(score is not None and score < 4 for score in scores)


def test_fails_a_choice_by_rounded_logits(subject: Subject, ingot: Path, tmp_path: Path) -> None:
    judge = subject.judged(changed(ingot, tmp_path / "half", by_half_precision()))
    first, second = judge.routing[FORCED].ignored
    assert (first.router, second.router) == (0, 1) and first.row == 0
    assert first.forced != first.used and 1 < first.tokens < TOKENS
    assert "where its logits were made to say" in judge.routing[FORCED].problems[0]
    assert problems(judge)


def test_fails_one_expert_less(subject: Subject, ingot: Path, tmp_path: Path) -> None:
    change = with_attribute(("k", "top_k"), lambda k: k - 1)
    judge = subject.judged(changed(ingot, tmp_path / "less", change))
    assert [each.tokens for each in judge.routing[FORCED].ignored] == [TOKENS] * 2
    assert judge.routing[FORCED].agreement == (0.0, 0.0)


def test_fails_other_shares_of_the_right_experts(
    subject: Subject, ingot: Path, tmp_path: Path
) -> None:
    change = with_attribute(("normalize_routing_weights", "normalize"), lambda flag: 1 - flag)
    judge = subject.judged(changed(ingot, tmp_path / "shares", change))
    assert judge.routing[FORCED].ignored == () and problems(judge)


@pytest.mark.parametrize("expert", [0, 7])
def test_fails_other_weights_of_any_expert(
    subject: Subject, ingot: Path, tmp_path: Path, expert: int
) -> None:
    judge = subject.judged(reweighted(ingot, tmp_path / "other", "layers.1.mlp.experts.d", expert))
    wrong = {result.name for result in judge.results if result.problem}
    assert wrong == {"logits", "hidden_states.2"} and judge.routing[FORCED].ignored == ()


class Disturbed(TappedSession):
    """One token of a hidden state is off by so much of its size."""

    off = 0.0

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        main = super().step(input_ids, attention_mask, logits_to_keep)
        state = self.tapped["hidden_states.2"][0, 5]
        error = np.random.default_rng(0).standard_normal(state.shape)
        scale = np.sqrt(np.mean(np.square(state)) / np.mean(np.square(error)))
        state += (self.off * scale * error).astype(np.float32)
        return main


def test_an_error_at_one_token_is_not_thinned_out(subject: Subject, tiny_onnx: Path) -> None:
    def worst(session: TappedSession) -> TensorResult:
        judge = subject.judged_by(session)
        (found,) = (each for each in judge.results if each.name == "hidden_states.2")
        return found

    session = Disturbed(tiny_onnx, Manifest.read(tiny_onnx))
    right = worst(session)
    assert right.problem == "" and right.floor is not None
    # Over all of the call's tokens it would be a quarter of that.
    session.off = 2 * right.limit * right.floor
    wrong = worst(session)
    assert wrong.problem and wrong.score is not None and wrong.score > 1.5 * wrong.limit
    session.off = right.limit * right.floor / 4
    assert worst(session).problem == ""


def test_names_what_it_cannot_read(subject: Subject, tiny_onnx: Path, tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        for node in _choosers(model):
            node.op_type = "OtherDispatch"
        function = next(f for f in model.functions if f.name == "MoeDispatch")
        function.name = "OtherDispatch"

    judge = subject.judged(changed(tiny_onnx, tmp_path / "renamed", rename))
    assert list(judge.unread) == [0, 1] and problems(judge) == []
    # The numbers alone say that they were run.
    assert judge.experts[0] == tuple(range(8)) and judge.routing[FORCED].ignored == ()


# Whole validations of other shapes; `make test-slow` runs them.

PRECISIONS = {"onnx": "fp32", "ort": "fp32", "trt": "fp16"}


def validated(checkpoint: Path, ingot: Path) -> Report:
    precision = Manifest.read(ingot).precision
    return validate_ingot(ingot, reference_of(checkpoint, precision), plan=QUICK, verify=False)


def made(make_ingot: MakeIngot, checkpoint: Path, target: str) -> Path:
    precision = PRECISIONS[target]
    extra: dict[str, Any] = {"builder": "none"} if target == "trt" else {}
    return make_ingot(checkpoint, target, precision=precision, **extra)


@pytest.mark.slow
@pytest.mark.parametrize("target", PRECISIONS)
def test_fails_an_expert_that_no_token_chose(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path, target: str
) -> None:
    checkpoint = make_checkpoint("olmoe", num_experts=64, num_experts_per_tok=1)
    ingot = made(make_ingot, checkpoint, target)
    right = validated(checkpoint, ingot)
    assert right.failures == [] and right.coverage is not None
    assert [each.never for each in right.coverage.experts] == [(), ()]
    # Of the second router, in the order in which the target has them.
    expert = right.coverage.experts[1].forced[-1]
    place = 63 - expert if target == "ort" else expert
    wrong = validated(
        checkpoint, reweighted(ingot, tmp_path / "wrong", "layers.1.mlp.experts.d", place)
    )
    assert {t.name for t in wrong.tensors if t.problem} == {"logits", "hidden_states.2"}
    assert {t.stage.rstrip(" 1234") for t in wrong.tensors if t.problem} == {"experts forced"}


@pytest.mark.slow
@pytest.mark.parametrize("target", PRECISIONS)
@pytest.mark.parametrize("kinds", [("TopK",), ("MoE", "MoeDispatch", "Slice")])
def test_fails_a_choice_by_rounded_logits_in_attention_and_mlp(
    ingots: Callable[..., Path],
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    tmp_path: Path,
    target: str,
    kinds: tuple[str, ...],
) -> None:
    checkpoint = make_checkpoint("jetmoe")
    ingot = made(make_ingot, checkpoint, target)
    kinds = tuple(kind for kind in kinds if kind != "Slice")
    wrong = changed(ingot, tmp_path / "wrong", by_half_precision(kinds))
    report = validated(checkpoint, wrong)
    routers = {each.router for each in report.routing[FORCED].ignored}
    assert routers == ({0, 2} if kinds == ("TopK",) else {1, 3})


def tied(checkpoint: Path, group: int, apart: float) -> None:
    """Make the rows of each router alike, some at a time."""
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    draw = torch.Generator().manual_seed(0)
    for name, rows in weights.items():
        if name.endswith(("gate.weight", "router.layer.weight")):
            for place in range(len(rows)):
                first = rows[place // group * group]
                if place % group:
                    rows[place] = first + apart * torch.randn(first.shape, generator=draw)
    save_file(weights, file, metadata={"format": "pt"})


SHAPES = {
    "pairs": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 1}, 2),
    "triples": ("olmoe", {"num_experts": 9, "num_experts_per_tok": 2}, 3),
    "attention": ("jetmoe", {}, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", PRECISIONS)
@pytest.mark.parametrize("apart", [0.0, 2e-7])
@pytest.mark.parametrize("shape", SHAPES)
def test_passes_routers_that_are_equal_or_nearly(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, shape: str, apart: float, target: str
) -> None:
    family, config, group = SHAPES[shape]
    checkpoint = make_checkpoint(family, **config)
    tied(checkpoint, group, apart)
    report = validated(checkpoint, made(make_ingot, checkpoint, target))
    assert report.failures == []
    assert report.router_margin is not None and report.router_margin < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_fails_ties_that_go_to_the_higher_id(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path, target: str
) -> None:
    checkpoint = make_checkpoint("jetmoe")
    # Of three equals two are chosen, or one.
    tied(checkpoint, 3, 0.0)
    ingot = made(make_ingot, checkpoint, target)
    report = validated(checkpoint, changed(ingot, tmp_path / "higher", ties_to_the_higher_id))
    assert {each.router for each in report.routing["replayed"].ignored} == {0, 2}


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_passes_routers_without_a_choice(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, top_k: int, target: str
) -> None:
    checkpoint = make_checkpoint("olmoe", num_experts=top_k, num_experts_per_tok=top_k)
    report = validated(checkpoint, made(make_ingot, checkpoint, target))
    assert report.failures == [] and FORCED not in report.routing


@pytest.mark.slow
def test_bounds_the_tokens_of_a_call_of_many_experts(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint("olmoe", num_experts=512, num_experts_per_tok=1)
    report = validated(checkpoint, made(make_ingot, checkpoint, "ort"))
    assert report.failures == [] and report.coverage is not None
    assert [len(each.never) for each in report.coverage.experts] == [0, 0]
    assert len({t.stage for t in report.tensors if t.stage.startswith("experts forced")}) == 32


@pytest.mark.slow
def test_says_nothing_of_experts_where_there_are_none(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint("mamba2")
    report = validated(checkpoint, made(make_ingot, checkpoint, "ort"))
    assert report.routing == {} and report.coverage is not None and report.failures == []
    coverage = report.coverage
    words = [part.name for part in coverage.parts] + [each.why for each in coverage.left_out]
    assert coverage.experts == ()
    assert not [each for each in (*words, *coverage.not_asked) if "expert" in each]
