"""Attention becomes GroupQueryAttention: the graph, its numbers and its conditions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from cached_attention import attention_text, feeds
from text_graph import notices, operators, parsed, refuses, run, the, wiring

from ingot.export.passes.attention import AttentionToGroupQueryAttention


@pytest.mark.parametrize(("tokens", "past"), [(7, 0), (1, 4)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (2, 2)])
def test_attention_becomes_group_query_attention(
    heads: int, groups: int, tokens: int, past: int
) -> None:
    model = parsed(attention_text(heads, groups, 16))
    given = feeds(heads, groups, 16, tokens, past)
    expected = run(model, given)
    assert AttentionToGroupQueryAttention()(model).modified
    found = run(model, given)
    assert found.keys() == expected.keys() == {"y", "present_key", "present_value"}
    real = given["attention_mask"][:, past:] != 0
    assert expected["y"][real].std() > 0.1
    np.testing.assert_allclose(found["y"][real], expected["y"][real], rtol=0, atol=1e-5)
    for name in ("present_key", "present_value"):
        assert np.array_equal(found[name], expected[name])
    assert operators(model.graph)["GroupQueryAttention"] == 1
    assert operators(model.graph)["Attention"] == 0
    # Only the kernel reads a cache, whose buffer may have spare room.
    for value in model.graph.inputs:
        if (value.name or "").startswith("past"):
            assert [use.node.op_type for use in value.uses()] == ["GroupQueryAttention"]


LEFT_ALONE = {
    "causal by itself": ("scale = 0.3", "scale = 0.3, is_causal = 1"),
    "with a cap": ("scale = 0.3", "scale = 0.3, softcap = 30.0"),
    "the cache read elsewhere": ("mixed = Att", "more = Relu (present_key) mixed = Att"),
    "the past read elsewhere": ("mixed = Att", "more = Relu (past_value) mixed = Att"),
    "new tokens first": ("(past_key, new_key)", "(new_key, past_key)"),
    "heads not swapped": ("back = Transpose <perm = [0, 2, 1, 3]>", "back = Transpose"),
    "the result read elsewhere": ("back = Tr", "more = Relu (mixed) back = Tr"),
    "the result as an output": ("present_value)", "present_value, float[b, 4, t, 16] mixed)"),
    "not merged": ("y = Reshape (back, rows)", "y = Relu (back)"),
}


@pytest.mark.parametrize("change", LEFT_ALONE)
def test_any_other_attention_is_left_alone(change: str) -> None:
    old, new = LEFT_ALONE[change]
    text = attention_text(4, 2, 16)
    assert old in text
    model = parsed(text.replace(old, new))
    before = wiring(model)
    assert not AttentionToGroupQueryAttention()(model).modified
    assert wiring(model) == before


def test_all_are_swapped_or_none() -> None:
    other = "more = Attention <is_causal = 1> (query, query, query) mixed = Att"
    model = parsed(attention_text(4, 2, 16).replace("mixed = Att", other))
    before = wiring(model)
    assert not AttentionToGroupQueryAttention()(model).modified
    assert wiring(model) == before


def test_attention_with_a_head_size_the_kernel_refuses_stays() -> None:
    model = parsed(attention_text(4, 2, 12))
    assert not AttentionToGroupQueryAttention()(model).modified
    assert operators(model.graph)["Attention"] == 1


def test_needs_the_mask_it_counts_tokens_by() -> None:
    model = parsed(attention_text(4, 2, 16))
    refuses(AttentionToGroupQueryAttention("mask"), model, "lengths from mask, not an input")


def test_looks_into_no_branch() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    branched (bool which, float[b, 4, t, 16] x) => (y) {
        y = If (which) <
            then_branch = one () => (float[b, 4, t, 16] a) { a = Attention (x, x, x) },
            else_branch = two () => (float[b, 4, t, 16] b) { b = Identity (x) }
        >
    }
    """
    change = AttentionToGroupQueryAttention()
    refuses(change, parsed(text), "Attention a is in a subgraph, where the pass does not look")


def read_a_cache(model: ir.Model) -> None:
    model.graph.append(ir.node("Relu", [model.graph.outputs[1]]))


def read_a_past(model: ir.Model) -> None:
    model.graph.append(ir.node("Relu", [model.graph.inputs[5]]))


def forget_groups(model: ir.Model) -> None:
    the(model, "GroupQueryAttention").attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", 4)


def leave_one(model: ir.Model) -> None:
    model.graph.append(ir.node("Attention", [model.graph.inputs[2]] * 3))


def rename_an_output(model: ir.Model) -> None:
    model.graph.outputs[2].name = "val_7"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (read_a_cache, "present_key has spare room, and a node reads it"),
        (read_a_past, "past_key is a cache with spare room, for the kernel alone"),
        (forget_groups, "GroupQueryAttention .* has rows of 64, 32 and 32 for its heads"),
        (leave_one, "Attention .* is left beside GroupQueryAttention"),
        (rename_an_output, "the graph had .*present_value.* and now has .*val_7"),
    ],
)
def test_notices_its_own_mistakes(spoil: Callable[[ir.Model], None], why: str) -> None:
    notices(AttentionToGroupQueryAttention(), parsed(attention_text(4, 2, 16)), spoil, why)
