"""A validation: it passes what is right on every seed, and fails each small wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from damage import copied
from judged import judged
from onnx import helper
from safetensors.torch import load_file, save_file

from ingot.export.ingot import GRAPH, MANIFEST, Manifest
from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.runtime.loading import load
from ingot.runtime.session import Floats, Ids
from ingot.validate import run
from ingot.validate.judge.judge import CACHES
from ingot.validate.run import examine, validate_ingot
from ingot.validate.truth.eager import EagerSession
from ingot.validate.truth.inputs import QUICK, Plan, make_inputs
from ingot.validate.truth.recording import Stepper
from ingot.validate.truth.reference import Reference

Tensors = dict[str, torch.Tensor]
STATES = [f"present.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]


@pytest.fixture(scope="module")
def eager(tiny: Path) -> EagerSession:
    return EagerSession(Checkpoint.open(tiny), "generate", streamed=False)


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Reference:
    return Reference(Checkpoint.open(tiny), "generate")


@pytest.fixture(scope="module", params=["onnx", "ort"])
def ingot(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


STAGES = ["prefill", *(f"decode {number}" for number in range(1, 33))]
AFTER = {
    "split": ["split 16", "split 16+3", "split 11", "split 11+8"],
    "short": ["split 2", "split 2+2", "split 2+2+15"],
    "row 0 alone": ["decode 1", "decode 2", "then 3 tokens", "then 2 tokens"],
    "row 1 alone": ["decode 1", "then 2 tokens", "then 9 tokens"],
    "row 2 alone": ["decode 1", "decode 2", "then 2 tokens", "then 3 tokens"],
    "two rows": ["decode 1", "decode 2"],
    "chat": ["decode 1", "then 9 tokens", "decode 2", "then 2 tokens", "decode 3", "then 3 tokens"],
    "padding first": ["then 2 tokens", "decode 1"],
    "every row padded": ["decode 1", "decode 2", "then 2 tokens"],
    "right padding": ["decode 1", "decode 2", "then 2 tokens"],
    "padding within": ["decode 1", "decode 2", "then 2 tokens"],
    "whole tiles": [
        *("decode 1", "decode 2", "then 62 tokens", "decode 3", "decode 4", "then 126 tokens"),
        "decode 5",
    ],
    "a tile of padding": ["decode 1", "then 3 tokens"],
    "four rows": ["decode 1", "decode 2"],
    "long": ["decode 1", "decode 2", "decode 3", "then 33 tokens"],
}
SPLITS = [*AFTER.pop("split"), *AFTER.pop("short"), "long split 2", "long split 2+257"]
# What is all padding has nothing to compare.
PIECES = SPLITS + [s for n, a in AFTER.items() for s in [n, *(f"{n}, {e}" for e in a)]][:-5]
PIECES = [stage for stage in PIECES if stage != "padding first"]
LONG = ["long", *(f"long, {each}" for each in AFTER["long"])]
WHOLE = [
    "split 16+3",
    "split 11+8",
    "split 2+2+15",
    *(name for name in AFTER if name not in ("long", "whole tiles", "a tile of padding")),
]
AGAIN = [
    f"{stage}, {how}" for stage in ("prefill", "decode 1") for how in ("5 times", "beside a fork")
]
LAST = [f"{stage}, the last {n}" for stage in ("prefill", "chat, then 9 tokens") for n in (1, 3)]
INSIDE = ["router_logits.0", "router_logits.1", *(f"hidden_states.{n}" for n in range(3))]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_passes_on_every_seed(ingot: Path, reference: Reference, seed: int) -> None:
    report = validate_ingot(ingot, reference, seed=seed)
    assert (report.verdict, report.failures) == ("passed", [])
    # A prefill and 32 decode steps, the caches at their end, and what is cut out of them.
    main = [(stage, name) for stage in STAGES for name in ["logits", *STATES]]
    main += [(CACHES, name) for name in STATES]
    expected = {(stage, name) for stage in [*PIECES, *LONG] for name in ["logits", *STATES]}
    expected |= {(f"{stage}, {CACHES}", name) for stage in WHOLE for name in STATES}
    expected |= {(stage, name) for stage in AGAIN for name in ["logits", *STATES]}
    expected |= {(f"{stage} alone", "logits") for stage in LAST}
    replayed = [f"{stage}, replayed" for stage in [*STAGES, *LONG]]
    replayed.append("experts forced 1")
    expected |= {(stage, name) for stage in replayed for name in ["logits", *STATES, *INSIDE]}
    expected |= {("experts forced 1", name) for name in ["logits", *STATES, *INSIDE]}
    found = [(t.stage, t.name) for t in report.tensors if "thread" not in t.stage]
    threads = {(t.stage, t.name) for t in report.tensors if "thread" in t.stage}
    assert found[: len(main)] == main
    assert set(found) == {*main, *expected} and len(found) == len(main) + len(expected)
    assert len(threads) == 3 * 5 and {name for _, name in threads} == {"logits", *STATES}
    assert all(t.score is not None and t.score < 5 for t in report.tensors)
    assert all(t.floor is not None and 1e-8 < t.floor < 1e-5 for t in report.tensors)
    assert report.coverage is not None and report.short == ()
    assert {mode: found.agreement for mode, found in report.routing.items()} == {
        "free": (1.0, 1.0),
        "replayed": (1.0, 1.0),
        "forced": (1.0, 1.0),
    }
    assert report.routing["free"].names == ("layer 0", "layer 1")
    assert [growth.kind for growth in report.growth] == [
        *("logits", "key", "value", "router", "hidden")
    ]
    assert [(each.layer, each.normed) for each in report.hidden] == [
        *((-1, False), (0, False), (1, True))
    ]
    assert all(0 <= each.error < 5 * each.floor for each in report.hidden)
    assert (
        report.distribution is not None and report.distribution.tokens == 19 + 12 + 1 + 3 * 32 + 105
    )
    assert 0 <= report.distribution.kl_max < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize("switch", [16, 100])
def test_pieces_of_a_call_that_turns_its_positions_are_held_against_pieces(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, target: str, switch: int
) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    folder = make_checkpoint("granite", max_position_embeddings=switch, rope_scaling=scaling)
    found = Reference(Checkpoint.open(folder), "generate")
    report = validate_ingot(make_ingot(folder, target), found, plan=QUICK)
    assert (report.verdict, report.failures) == ("passed", [])
    assert report.coverage is not None
    crossed = f"a prompt past the {switch} tokens at which positions change"
    assert crossed in {part.name for part in report.coverage.parts if part.covered}


def test_feeds_what_the_plan_says(tiny_ort: Path, reference: Reference) -> None:
    plan = Plan(prefill=21, decode=3, seeds=2)
    report = validate_ingot(tiny_ort, reference, plan=plan, seed=4)
    stages = dict.fromkeys(tensor.stage for tensor in report.tensors)
    calls = ["prefill", "decode 1", "decode 2", "decode 3"]
    pieces = ["split 16+5", "split 11+10", "row 0 alone", "row 1 alone"]
    inside = [f"{stage}, replayed" for stage in calls]
    for seed in (4, 5):
        expected = [f"seed {seed}, {s}" for s in [*calls, CACHES, *pieces, *inside]]
        assert [stage for stage in stages if stage in expected] == expected
        assert f"seed {seed}, decode 4" not in stages
    # Too few steps for a growth.
    assert report.verdict == "passed" and report.growth == ()
    assert report.distribution is not None and report.distribution.tokens == 2 * (
        21 + 14 + 1 + 3 * 3 + 105
    )


def test_sums_up_what_it_compared(ingot: Path, reference: Reference) -> None:
    report = validate_ingot(ingot, reference, seed=3)
    summary = report.summary()
    assert summary["verdict"] == "passed" and summary["seed"] == 3
    assert summary["against"] == "eager PyTorch in float64, beside eager PyTorch in float32"
    assert (summary["stages"], summary["compared"]) == (163, len(report.tensors))
    for kind in ("logits", "key", "value", "router", "hidden"):
        scores = [t.score for t in report.tensors if t.kind == kind]
        assert summary[f"{kind}_score"] == max(score for score in scores if score is not None)
    assert "first_failure" not in summary and "reason" not in summary
    assert summary["top1_agreement"] == 1.0
    assert summary["routing_agreement_free"] == 1.0
    assert 0 < summary["router_margin"] < 1


def _steps(session: Stepper) -> list[dict[str, Floats]]:
    """Every output after every call of one validation."""
    inputs = make_inputs(512)
    session.reset(*inputs.input_ids.shape)
    found = []
    for _, columns in inputs.steps:
        ids, mask = inputs.input_ids[:, columns], inputs.attention_mask[:, columns]
        found.append({"logits": session.step(ids, mask), **session.state()})
    return found


def test_streams_a_checkpoint_to_exactly_the_same_numbers(tiny: Path) -> None:
    loaded = EagerSession(Checkpoint.open(tiny), "generate", streamed=False)
    streamed = EagerSession(Checkpoint.open(tiny), "generate", streamed=True)
    for expected, found in zip(_steps(loaded), _steps(streamed), strict=True):
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
    # It held the layers' weights only while they ran.
    held = {name for name, p in streamed.model.named_parameters() if p.device.type != "meta"}
    assert held == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_forgets_everything_at_a_reset(eager: EagerSession) -> None:
    first = _steps(eager)
    for before, after in zip(first, _steps(eager), strict=True):
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array)


def _variant(
    tiny: Path,
    folder: Path,
    config: dict[str, Any] | None = None,
    edit: Callable[[Tensors], None] = lambda _weights: None,
) -> Checkpoint:
    """A copy of a checkpoint with one thing changed."""
    copy = shutil.copytree(tiny, folder / "checkpoint")
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**raw, **(config or {})}))
    weights = load_file(copy / "model.safetensors")
    edit(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(copy)


def _swap_experts(weights: Tensors) -> None:
    for which in ("gate_proj", "up_proj", "down_proj"):
        first, second = (f"model.layers.1.mlp.experts.{e}.{which}.weight" for e in (2, 5))
        weights[first], weights[second] = weights[second], weights[first]


def _swap_gate_and_up_of_one_expert(weights: Tensors) -> None:
    gate, up = (f"model.layers.0.mlp.experts.4.{w}_proj.weight" for w in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]


def _drop_query_norm(weights: Tensors) -> None:
    name = "model.layers.1.self_attn.q_norm.weight"
    weights[name] = torch.ones_like(weights[name])


def _nudge_one_router_row(weights: Tensors) -> None:
    weights["model.layers.0.mlp.gate.weight"][3] *= 1.01


def _nudge_final_norm(weights: Tensors) -> None:
    # As an epsilon that is too large would.
    weights["model.norm.weight"] *= 1.0005


WRONG: dict[str, tuple[dict[str, Any], Callable[[Tensors], None]]] = {
    "rope_theta off by 1 %": ({"rope_theta": 10100.0}, lambda _weights: None),
    "norm_topk_prob flipped": ({"norm_topk_prob": True}, lambda _weights: None),
    "another rms_norm_eps": ({"rms_norm_eps": 1e-3}, lambda _weights: None),
    "one expert fewer a token": ({"num_experts_per_tok": 1}, lambda _weights: None),
    "gelu for silu": ({"hidden_act": "gelu"}, lambda _weights: None),
    "two experts swapped": ({}, _swap_experts),
    "gate and up swapped in one expert": ({}, _swap_gate_and_up_of_one_expert),
    "no query norm": ({}, _drop_query_norm),
    "a router row 1 % off": ({}, _nudge_one_router_row),
    "the final norm 0.05 % off": ({}, _nudge_final_norm),
}


@pytest.mark.parametrize(
    "wrong",
    [n if i < 2 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(WRONG)],
)
def test_fails_an_ingot_of_another_model(
    tiny: Path, tiny_ort: Path, tmp_path: Path, wrong: str
) -> None:
    config, edit = WRONG[wrong]
    changed = Reference(_variant(tiny, tmp_path, config, edit), "generate")
    report = validate_ingot(tiny_ort, changed)
    assert report.verdict == "failed"
    assert any(t.problem for t in report.tensors if t.name == "logits")
    assert report.summary()["first_failure"] == report.failures[0]


def test_fails_no_copy_of_the_checkpoint(tiny: Path, ingot: Path, tmp_path: Path) -> None:
    # The control of the controls: copying and writing back changes nothing.
    unchanged = Reference(_variant(tiny, tmp_path), "generate")
    assert validate_ingot(ingot, unchanged).verdict == "passed"


class Faulty:
    """A right session with one fault in what it is fed or hands out."""

    def __init__(self, inner: Stepper) -> None:
        self.inner = inner
        self.tapped: dict[str, Floats] = {}

    def reset(self, batch: int, capacity: int) -> None:
        self.inner.reset(batch, capacity)

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        return self.inner.step(input_ids, attention_mask, logits_to_keep)

    def state(self) -> dict[str, Floats]:
        return self.inner.state()


class IgnoresPadding(Faulty):
    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        return self.inner.step(input_ids, np.ones_like(attention_mask), logits_to_keep)


class SwapsRows(Faulty):
    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        return self.inner.step(input_ids, attention_mask, logits_to_keep)[::-1]


class DropsAState(Faulty):
    def state(self) -> dict[str, Floats]:
        return {k: v for k, v in self.inner.state().items() if k != "present.1.value"}


class ScalesAState(Faulty):
    def state(self) -> dict[str, Floats]:
        found = self.inner.state()
        return {**found, "present.0.key": found["present.0.key"] * np.float32(1.001)}


class TurnsNanLate(Faulty):
    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        logits = self.inner.step(input_ids, attention_mask, logits_to_keep)
        return logits if input_ids.shape[1] > 1 else logits * np.float32(np.nan)


class ForgetsAtASplit(Faulty):
    """Right at a prefill and at single tokens, wrong at several tokens after a past."""

    def reset(self, batch: int, capacity: int) -> None:
        super().reset(batch, capacity)
        self.size = batch, capacity
        self.seen = 0

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        if self.seen and input_ids.shape[1] > 1:
            self.inner.reset(*self.size)
        self.seen += input_ids.shape[1]
        return self.inner.step(input_ids, attention_mask, logits_to_keep)


class ScramblesPadding(Faulty):
    """Right wherever a token is; padding may hold anything."""

    def reset(self, batch: int, capacity: int) -> None:
        super().reset(batch, capacity)
        self.mask: Ids = np.zeros((batch, 0), np.int64)

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        self.mask = np.concatenate((self.mask, attention_mask), axis=1)
        logits = self.inner.step(input_ids, attention_mask, logits_to_keep)
        return np.where(attention_mask[..., None] == 0, np.float32(np.nan), logits)

    def state(self) -> dict[str, Floats]:
        padding = self.mask[:, None, :, None] == 0
        found = self.inner.state()
        return {name: np.where(padding, np.float32(9), array) for name, array in found.items()}


def _compared(
    target: Path, reference: Reference, actual: Callable[[Stepper], Stepper]
) -> list[str]:
    """The failures, as stage and name."""
    found = judged(actual(load(target)), reference, Manifest.read(target))
    return [f"{tensor.stage}, {tensor.name}" for tensor in found if tensor.problem]


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        (IgnoresPadding, "prefill, logits"),
        (SwapsRows, "prefill, logits"),
        (DropsAState, "prefill, present.1.value"),
        (ScalesAState, "prefill, present.0.key"),
        (TurnsNanLate, "decode 1, logits"),
        (ForgetsAtASplit, "long, then 33 tokens, logits"),
    ],
)
def test_fails_a_session_with_a_fault(
    tiny_onnx: Path, reference: Reference, fault: type[Faulty], first: str
) -> None:
    assert _compared(tiny_onnx, reference, Faulty) == []
    assert _compared(tiny_onnx, reference, fault)[0] == first


def test_leaves_padding_out_of_the_comparison(tiny_onnx: Path, reference: Reference) -> None:
    assert _compared(tiny_onnx, reference, ScramblesPadding) == []


def test_reports_a_router_margin_of_zero(tiny: Path, make_ingot: MakeIngot, tmp_path: Path) -> None:
    def tie(weights: Tensors) -> None:
        # Two equal rows: a token that ranks them second and third has no margin at all.
        weights["model.layers.0.mlp.gate.weight"][6] = weights["model.layers.0.mlp.gate.weight"][1]

    tied = _variant(tiny, tmp_path, edit=tie)
    report = validate_ingot(make_ingot(tied.path, "onnx"), Reference(tied, "generate"), plan=QUICK)
    assert report.router_margin == 0.0
    assert report.verdict == "passed"


def test_makes_inputs_that_would_show_a_mistake() -> None:
    inputs = make_inputs(512, seed=1, plan=QUICK, rows=3)
    assert inputs.input_ids.shape == inputs.attention_mask.shape == (3, 27)
    padded = [[0] * padding + [1] * (27 - padding) for padding in (0, 7, 18)]
    assert inputs.attention_mask.tolist() == padded
    assert inputs.input_ids.min() >= 0 and inputs.input_ids.max() < 512
    assert not (inputs.input_ids[0] == inputs.input_ids[1]).all()
    two = make_inputs(512, seed=1, plan=QUICK)
    assert (two.input_ids == inputs.input_ids[:2]).all()
    assert (make_inputs(512, seed=2, plan=QUICK).input_ids != two.input_ids).any()
    # Every column is fed once, in order.
    columns = [c for _, part in inputs.steps for c in range(27)[part]]
    assert columns == list(range(27))


@pytest.mark.slow
def test_a_graph_too_damaged_to_be_taken_apart_keeps_its_report(
    tiny_onnx: Path, reference: Reference, tmp_path: Path
) -> None:
    """A cache that lies twice side by side: the session feeds what the graph takes, as ever."""
    folder = copied(tiny_onnx, tmp_path / "damaged")
    model = onnx.load(folder / GRAPH, load_external_data=False)
    past, present = "past_key_values.1.key", "present.1.key"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = {past: "once.past", present: "once"}.get(name, name)
    split = helper.make_node("Split", [past, "sizes"], ["once.past", "again"], axis=3)
    model.graph.node.insert(0, split)
    model.graph.node.append(helper.make_node("Concat", ["once", "once"], [present], axis=3))
    model.graph.initializer.append(
        helper.make_tensor("sizes", onnx.TensorProto.INT64, [2], [16] * 2)
    )
    for value in (*model.graph.input, *model.graph.output):
        if value.name in (past, present):
            value.type.tensor_type.shape.dim[3].dim_value = 32
    onnx.save(model, folder / GRAPH)
    raw = json.loads((folder / MANIFEST).read_text())
    for each in (*raw["inputs"], *raw["outputs"]):
        if each["name"] in (past, present):
            each["shape"][3] = 32
    (state,) = [state for state in raw["states"] if state["input"] == past]
    state["input_shape"][3] = state["output_shape"][3] = 32
    raw["files"][GRAPH]["bytes"] = (folder / GRAPH).stat().st_size
    (folder / MANIFEST).write_text(json.dumps(raw))

    report = examine(folder, reference, Stages(), plan=QUICK, verify=False)
    assert report.verdict == "failed" and any(present in each for each in report.failures)
    # The graph cannot be run beside another; that it is another graph is seen without.
    assert report.location is not None and report.location.layer == 1
    assert report.summary()["location"] == report.place and "\n" not in str(report.place)


@pytest.mark.slow
def test_an_operator_that_cannot_be_loaded_keeps_the_report(
    tiny_onnx: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = validate_ingot(tiny_onnx, reference, plan=QUICK)
    wrong = replace(found.tensors[0], problem="too far off")
    # As of an engine, whose graph no other has to load before it fails.
    failed = replace(found, tensors=(wrong, *found.tensors[1:]))
    monkeypatch.setattr(run, "validate_ingot", lambda *_args, **_options: failed)
    folder = copied(tiny_onnx, tmp_path / "damaged")
    model = onnx.load(folder / GRAPH, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "MatMul").op_type = "MatMull"
    onnx.save(model, folder / GRAPH)
    raw = json.loads((folder / MANIFEST).read_text())
    raw["files"][GRAPH]["bytes"] = (folder / GRAPH).stat().st_size
    (folder / MANIFEST).write_text(json.dumps(raw))
    report = examine(folder, reference, Stages(), plan=QUICK, verify=False)
    assert report.verdict == "failed" and "MatMull" in f"{report.place} {report.failures}"
