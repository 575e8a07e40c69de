"""Attention over a cache becomes Ingot's operator, which rotates: graph, numbers, conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import toy_hybrid
from cached_attention import attention_text, feeds
from captured import Runs, assert_same, canonical
from text_graph import (
    interface,
    notices,
    notices_nothing_done,
    operators,
    parsed,
    run,
    wiring,
)
from traces import Traces

from ingot.export.passes.attention_operator import AttentionToOperator, RotateInAttention
from ingot.export.passes.rotary import RotationToOperator
from ingot.plugins.cpu.library import CpuLibrary
from ingot.plugins.cpu.operators import DOMAIN


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with toy_hybrid.registered():
        yield


@pytest.fixture(scope="module")
def library(cpu_library: CpuLibrary) -> Path:
    return cpu_library.path.with_name("libingot_ort.so")


def kernels(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == DOMAIN]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("granite", {}),
        ("olmoe", {"clip_qkv": 1.0}),
        ("jetmoe", {}),
        ("toy_hybrid", {}),
    ],
    ids=str,
)
def test_every_attention_is_one_node_with_the_numbers_of_all(
    family: str, changes: dict[str, Any], traces: Traces, library: Path
) -> None:
    model = canonical(traces, family, **changes)
    expected = Runs(model).prefill_and_decode(70)
    before, scales = interface(model), []
    for node in model.graph:
        if node.op_type == "Attention":
            scales.append(node.attributes["scale"].as_float())
    assert scales and AttentionToOperator()(model).modified
    assert model.opset_imports[DOMAIN] == 1
    assert [node.op_type for node in kernels(model)] == ["Attention"] * len(scales)
    found = operators(model.graph)
    assert found["Attention"] == len(scales)
    assert [node.attributes["scale"].as_float() for node in kernels(model)] == scales
    assert RotationToOperator()(model).modified
    # Of JetMoE the queries lie in another order before: those of chosen experts.
    rotations = family != "jetmoe"
    assert operators(model.graph)["RotaryEmbedding"] == len(scales) * (1 + rotations)
    assert_same(Runs(model, [library]).prefill_and_decode(70), expected)
    assert RotateInAttention()(model).modified == rotations
    assert interface(model) == before
    assert operators(model.graph)["RotaryEmbedding"] == len(scales) * (not rotations)
    for node in kernels(model):
        assert len(node.inputs) == (8 if rotations else 6)
        # The caches and what is read of them are the kernel's alone.
        for past in node.inputs[3:5]:
            assert past is not None and past.is_graph_input() and len(past.uses()) == 1
        for present in node.outputs[1:]:
            assert present.is_graph_output() and not present.uses()
    if rotations:
        assert_same(Runs(model, [library]).prefill_and_decode(70), expected)
    for change in (AttentionToOperator(), RotateInAttention()):
        assert not change(model).modified


@pytest.mark.parametrize("size", [16, 12])
@pytest.mark.parametrize(("tokens", "past"), [(7, 0), (1, 4), (3, 70)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (2, 2)])
def test_attention_has_the_numbers_of_the_standard_one(
    heads: int, groups: int, tokens: int, past: int, size: int, library: Path
) -> None:
    model = parsed(attention_text(heads, groups, size))
    given = feeds(heads, groups, size, tokens, past)
    # A token sees itself.
    places = np.arange(past + tokens) == np.arange(past, past + tokens)[:, None]
    given["visible"] = given["visible"] | places
    expected = run(model, given)
    assert AttentionToOperator()(model).modified
    (node,) = kernels(model)
    assert node.attributes["num_heads"].as_int() == heads
    assert node.attributes["kv_num_heads"].as_int() == groups
    found = Runs(model, [library])(given)
    assert found.keys() == expected.keys() == {"y", "present_key", "present_value"}
    real = given["attention_mask"][:, past:] != 0
    assert expected["y"][real].std() > 0.1
    np.testing.assert_allclose(found["y"][real], expected["y"][real], rtol=0, atol=1e-5)
    for name in ("present_key", "present_value"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_scale_that_is_left_out_is_that_of_the_heads_width(library: Path) -> None:
    text = attention_text(4, 2, 16).replace("<scale = 0.3>", "")
    model, given = parsed(text), feeds(4, 2, 16, 5, 0)
    expected = run(model, given)["y"]
    AttentionToOperator()(model)
    assert kernels(model)[0].attributes["scale"].as_float() == 0.25
    real = given["attention_mask"] != 0
    found = Runs(model, [library])(given)["y"]
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=1e-5)


LEFT_ALONE = {
    "causal by itself": ("scale = 0.3", "scale = 0.3, is_causal = 1"),
    "with a cap": ("scale = 0.3", "scale = 0.3, softcap = 30.0"),
    "the cache read elsewhere": ("mixed = Att", "more = Relu (present_key) mixed = Att"),
    "the past read elsewhere": ("mixed = Att", "more = Relu (past_value) mixed = Att"),
    "new tokens first": ("(past_key, new_key)", "(new_key, past_key)"),
    "along another axis": ("axis = 2> (past_key", "axis = 3> (past_key"),
    "heads not swapped": ("back = Transpose <perm = [0, 2, 1, 3]>", "back = Transpose"),
    "the result read elsewhere": ("back = Tr", "more = Relu (mixed) back = Tr"),
    "the result as an output": ("present_value)", "present_value, float[b, 4, t, 16] mixed)"),
    "not merged": ("y = Reshape (back, rows)", "y = Relu (back)"),
    "a mask that is added": ("bool[b, 1, t, s] visible", "float[b, 1, t, s] visible"),
    "no mask": ("present_value, visible)", "present_value)"),
    "the past of another": ("Concat <axis = 2> (past_key, n", "Concat <axis = 2> (other, n"),
}


@pytest.mark.parametrize("change", LEFT_ALONE)
def test_any_other_attention_is_left_alone(change: str) -> None:
    old, new = LEFT_ALONE[change]
    text = attention_text(4, 2, 16)
    assert old in text
    text = text.replace(old, new)
    if "other" in new:
        text = text.replace("new_key = T", "other = Relu (past_key) new_key = T")
    # What reads shows in an output, or it would be removed as unused.
    text = text.replace("y = R", "seen = Shape (more) y = R") if "more" in new else text
    text = text.replace(" y, {", " y, int64[n] seen, {") if "more" in new else text
    model = parsed(text)
    before = wiring(model)
    assert not AttentionToOperator()(model).modified
    assert wiring(model)[-1] == before[-1] or "more" in new
    assert not kernels(model) and DOMAIN not in model.opset_imports
    assert operators(model.graph)["Attention"] == 1


def test_all_are_swapped_or_none() -> None:
    other = "more = Attention <is_causal = 1> (query, query, query) mixed = Att"
    model = parsed(attention_text(4, 2, 16).replace("mixed = Att", other))
    assert not AttentionToOperator()(model).modified
    assert not kernels(model)


def test_leaves_attention_in_half_types_alone() -> None:
    text = attention_text(4, 2, 16).replace("float[", "float16[")
    assert not AttentionToOperator()(parsed(text)).modified


def read_a_cache(model: ir.Model) -> None:
    model.graph.append(ir.node("Relu", [kernels(model)[0].outputs[1]]))


def read_a_past(model: ir.Model) -> None:
    model.graph.append(ir.node("Relu", [kernels(model)[0].inputs[3]]))


def make_a_past(model: ir.Model) -> None:
    node = kernels(model)[0]
    copied = ir.node("Identity", [node.inputs[4]])
    model.graph.insert_before(node, copied)
    node.replace_input_with(4, copied.outputs[0])


def leave_one(model: ir.Model) -> None:
    model.graph.append(ir.node("Attention", [model.graph.inputs[2]] * 3))


def rename_an_output(model: ir.Model) -> None:
    model.graph.outputs[2].name = "val_7"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (read_a_cache, "present_key has spare room, and a node reads it"),
        (read_a_past, "past_key is a cache with spare room, for the kernel alone"),
        (make_a_past, "is a cache with spare room, for the kernel alone"),
        (leave_one, "Attention .* is left beside ingot.cpu::Attention"),
        (rename_an_output, "the graph had .*present_value.* and now has .*val_7"),
    ],
)
def test_notices_its_own_mistakes(spoil: Callable[[ir.Model], None], why: str) -> None:
    notices(AttentionToOperator(), parsed(attention_text(4, 2, 16)), spoil, why)


@pytest.fixture
def rotated(traces: Traces) -> ir.Model:
    """Two layers whose rotations are operators."""
    model = canonical(traces, "granite")
    AttentionToOperator()(model)
    RotationToOperator()(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return model


def rotation(model: ir.Model, which: int) -> ir.Node:
    """Of the first layer's queries or keys."""
    found = kernels(model)[0].inputs[which]
    node = found.producer() if found is not None else None
    assert node is not None and node.op_type == "RotaryEmbedding"
    return node


def copied(model: ir.Model, value: ir.Value | None) -> ir.Value:
    node = ir.node("Neg", [value])
    assert value is not None
    made = node.outputs[0]
    made.type, made.shape = value.type, value.shape
    before = value.producer()
    assert before is not None
    model.graph.insert_after(before, node)
    return made


def keys_by_other_tables(model: ir.Model) -> None:
    keys = rotation(model, 1)
    keys.replace_input_with(2, copied(model, keys.inputs[2]))


def keys_by_tables_swapped(model: ir.Model) -> None:
    keys = rotation(model, 1)
    cos, sin = keys.inputs[1:3]
    keys.replace_input_with(1, sin)
    keys.replace_input_with(2, cos)


def keys_not_rotated(model: ir.Model) -> None:
    kernels(model)[0].replace_input_with(1, rotation(model, 1).inputs[0])


def keys_changed_after(model: ir.Model) -> None:
    node = kernels(model)[0]
    node.replace_input_with(1, copied(model, node.inputs[1]))


def queries_read_elsewhere(model: ir.Model) -> None:
    model.graph.outputs.append(copied(model, rotation(model, 0).outputs[0]))


def keys_as_an_output(model: ir.Model) -> None:
    model.graph.outputs.append(rotation(model, 1).outputs[0])


def one_for_both(model: ir.Model) -> None:
    node = kernels(model)[0]
    node.replace_input_with(1, node.inputs[0])


def interleaved(model: ir.Model) -> None:
    for which in (0, 1):
        flag = ir.AttrInt64("interleaved", 1)
        rotation(model, which).attributes["interleaved"] = flag


def interleaved_queries(model: ir.Model) -> None:
    rotation(model, 0).attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def part_of_a_head(model: ir.Model) -> None:
    for which in (0, 1):
        part = ir.AttrInt64("rotary_embedding_dim", 8)
        rotation(model, which).attributes["rotary_embedding_dim"] = part


def tables_by_position(model: ir.Model) -> None:
    """Of all positions there are, of which each token has one."""
    (positions,) = (v for v in model.graph.inputs if v.name == "position_ids")
    for which in (0, 1):
        node = rotation(model, which)
        node.resize_inputs(4)
        node.replace_input_with(3, positions)


@pytest.mark.parametrize(
    "change",
    [
        keys_by_other_tables,
        keys_by_tables_swapped,
        keys_not_rotated,
        keys_changed_after,
        queries_read_elsewhere,
        keys_as_an_output,
        one_for_both,
        interleaved,
        interleaved_queries,
        part_of_a_head,
        tables_by_position,
    ],
    ids=lambda change: change.__name__,
)
def test_any_other_rotation_is_left_alone(
    change: Callable[[ir.Model], None], rotated: ir.Model
) -> None:
    change(rotated)
    first, second = kernels(rotated)
    read = list(first.inputs)
    assert RotateInAttention()(rotated).modified
    # The other layer's are as they were.
    assert list(first.inputs) == read and len(first.inputs) == 6
    assert len(second.inputs) == 8
    assert operators(rotated.graph)["RotaryEmbedding"] > 0


def test_rotates_for_no_other_operator(traces: Traces) -> None:
    model = canonical(traces, "granite")
    RotationToOperator()(model)
    before = operators(model.graph)["RotaryEmbedding"]
    assert not RotateInAttention()(model).modified
    assert operators(model.graph)["RotaryEmbedding"] == before == 4


def test_notices_a_rotation_that_is_left(rotated: ir.Model) -> None:
    notices_nothing_done(
        RotateInAttention(), rotated, "Attention .* reads what it could rotate itself"
    )


def test_notices_an_attention_that_is_forgotten(rotated: ir.Model) -> None:
    def back(model: ir.Model) -> None:
        """One is rotated outside again."""
        node = kernels(model)[0]
        tables = node.inputs[6:8]
        for place in (0, 1):
            turned = ir.node(
                "RotaryEmbedding", [node.inputs[place], *tables], attributes={"num_heads": 4}
            )
            model.graph.insert_before(node, turned)
            node.replace_input_with(place, turned.outputs[0])
        node.resize_inputs(6)

    notices(RotateInAttention(), rotated, back, "reads what it could rotate itself")
