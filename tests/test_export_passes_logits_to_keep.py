"""The logits of the last tokens alone: the graph, its numbers and its conditions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from one_node import session
from text_graph import (
    Arrays,
    interface,
    notices,
    notices_nothing_done,
    parsed,
    refuses,
    the,
    wiring,
)

from ingot.export.passes.all_logits import AllLogits
from ingot.export.passes.logits_to_keep import KeepLastLogits

V, H = 9, 4
TOKENS = 5
# A norm whose output is a hidden state, a head and a factor on its logits; and a state.
TEXT = f"""
<ir_version: 10, opset_import: ["" : 23]>
headed (int64[batch, sequence] ids, float[batch, 2] past, float[{V}, {H}] table, float[{H}] norm,
        float[{H}, {V}] head)
    => (float[batch, sequence, {V}] logits, float[batch, sequence, {H}] hidden,
        float[batch, 2] present)
<float eight = {{8.0}}>
{{
    x = Gather (table, ids)
    hidden = RMSNormalization (x, norm)
    all = MatMul (hidden, head)
    logits = Div (all, eight)
    present = Identity (past)
}}
"""
TIED = TEXT.replace("(hidden, head)", "(hidden, turned)").replace(
    "all = ", "turned = Transpose <perm = [1, 0]> (table) all = "
)
FEEDS = {
    "ids": np.array([[0, 8, 3, 1, 2], [1, 1, 5, 0, 7]]),
    "past": np.ones((2, 2), np.float32),
}
BOTH = pytest.mark.parametrize(("text", "head"), [(TEXT, "head"), (TIED, "table")])


def graph(text: str = TEXT) -> ir.Model:
    random = np.random.default_rng(0)
    shapes = {"table": (V, H), "norm": (H,), "head": (H, V)}
    made = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if text == TIED:
        text = text.replace(f",\n        float[{H}, {V}] head", "")
        del made["head"]
    return parsed(text, made)


def computed(model: ir.Model, kept: int | None = None) -> Arrays:
    runner = session(model)
    asked = {} if kept is None else {"logits_to_keep": np.array([kept])}
    names = [value.name for value in runner.get_outputs()]
    return dict(zip(names, map(np.asarray, runner.run(names, {**FEEDS, **asked})), strict=True))


@BOTH
@pytest.mark.parametrize("kept", [None, 0, 1, 2, TOKENS, TOKENS + 1])
def test_gives_the_last_logits_and_every_hidden_state(
    text: str, head: str, kept: int | None
) -> None:
    model = graph(text)
    before = computed(model)
    KeepLastLogits(head)(model)
    after = computed(model, kept)
    np.testing.assert_array_equal(after["logits"], before["logits"][:, -(kept or 0) :])
    for name in ("hidden", "present"):
        np.testing.assert_array_equal(after[name], before[name])


def test_adds_an_input_that_need_not_be_given() -> None:
    model = graph()
    KeepLastLogits("head")(model)
    assert ("logits_to_keep", "[1]", "INT64") in interface(model)
    # Behind those of the tokens.
    assert [value.name for value in model.graph.inputs] == ["ids", "logits_to_keep", "past"]
    runner = session(model)
    assert [each.name for each in runner.get_overridable_initializers()] == ["logits_to_keep"]
    (logits, hidden, _) = runner.get_outputs()
    assert logits.shape == ["batch", "kept_sequence", V]
    assert hidden.shape == ["batch", "sequence", H]


@pytest.mark.parametrize("level", [0, 1, 2, 3, 99])
def test_stays_an_input_at_every_level_of_optimisation(
    level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = graph()
    expected = computed(model)["logits"]
    KeepLastLogits("head")(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(level)
    monkeypatch.setattr(onnxruntime, "SessionOptions", lambda: options)
    runner = session(model)
    for kept in (0, 1, 3):
        (found,) = runner.run(["logits"], {**FEEDS, "logits_to_keep": np.array([kept])})
        np.testing.assert_array_equal(found, expected[:, -kept:])


@BOTH
def test_can_be_taken_out_again(text: str, head: str) -> None:
    model, before = graph(text), graph(text)
    KeepLastLogits(head)(model)
    AllLogits()(model)
    assert interface(model) == interface(before)
    assert wiring(model) == wiring(before)
    assert "logits_to_keep" not in model.graph.initializers
    np.testing.assert_array_equal(computed(model)["logits"], computed(before)["logits"])


def test_leaves_a_graph_without_it_alone() -> None:
    model = graph()
    before = wiring(model)
    assert not AllLogits()(model).modified
    assert wiring(model) == before


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("logits = Div (all, eight)", "logits = Softmax (all)", "neither factor nor type"),
        (
            "all = MatMul (hidden, head)",
            "other = Identity (head) all = MatMul (hidden, other)",
            "at 0 places",
        ),
        ("logits = Div", "twice = MatMul (x, head) logits = Div", "at 2 places"),
        ("sequence", "length", "not over all new tokens"),
    ],
)
def test_states_what_it_needs(before: str, after: str, why: str) -> None:
    refuses(KeepLastLogits("head"), graph(TEXT.replace(before, after)), why)


def test_needs_the_name_of_its_input() -> None:
    model = graph()
    KeepLastLogits("head")(model)
    refuses(KeepLastLogits("head"), model, "is the name of an initializer already")


def test_notices_its_own_mistakes() -> None:
    notices_nothing_done(KeepLastLogits("head"), graph(), "logits_to_keep is no input")

    def uncut(model: ir.Model) -> None:
        product, cut = the(model, "MatMul"), the(model, "Slice")
        product.replace_input_with(0, cut.inputs[0])

    notices(KeepLastLogits("head"), graph(), uncut, "is over all new tokens")

    def misnamed(model: ir.Model) -> None:
        the(model, "MatMul").outputs[0].shape = ir.Shape(["batch", "sequence", V])

    notices(KeepLastLogits("head"), graph(), misnamed, "is of shape")
    model = graph()
    KeepLastLogits("head")(model)
    notices_nothing_done(AllLogits(), model, "is still an input")


def test_takes_out_what_it_knows_alone() -> None:
    model = graph()
    KeepLastLogits("head")(model)
    the(model, "Slice").replace_input_with(1, model.graph.initializers["logits_to_keep"])
    refuses(AllLogits(), model, "Slice .* reads logits_to_keep")
