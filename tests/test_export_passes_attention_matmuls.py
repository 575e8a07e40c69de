"""Attention taken apart: the graph, its numbers and its conditions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from cached_attention import attention_text, feeds
from text_graph import notices, notices_nothing_done, operators, parsed, refuses, run, the

from ingot.export.passes.attention_matmuls import AttentionToMatMuls


@pytest.mark.parametrize(("tokens", "past"), [(7, 0), (1, 4), (3, 4)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (6, 1), (2, 2)])
def test_attention_becomes_two_products(heads: int, groups: int, tokens: int, past: int) -> None:
    model = parsed(attention_text(heads, groups, 12))
    given = feeds(heads, groups, 12, tokens, past)
    expected = run(model, given)
    assert AttentionToMatMuls()(model).modified
    found = run(model, given)
    real = given["attention_mask"][:, past:] != 0
    assert expected["y"][real].std() > 0.1
    np.testing.assert_allclose(found["y"][real], expected["y"][real], rtol=0, atol=1e-5)
    # A row of padding sees nothing, and yet becomes no NaN that later layers would spread.
    assert np.isfinite(found["y"]).all()
    kinds = operators(model.graph)
    assert kinds["MatMul"] == 2 and kinds["Softmax"] == 1 and kinds["Attention"] == 0
    # No key or value is repeated for the heads that share it.
    assert not kinds["Expand"] and not kinds["Tile"]


def test_the_default_scale_is_that_of_the_head_size() -> None:
    model = parsed(attention_text(4, 2, 12).replace("<scale = 0.3>", ""))
    given = feeds(4, 2, 12, 3, 0)
    expected = run(model, given)["y"][0]
    AttentionToMatMuls()(model)
    np.testing.assert_allclose(run(model, given)["y"][0], expected, rtol=0, atol=1e-5)


def test_layers_share_what_the_mask_becomes() -> None:
    text = attention_text(4, 2, 16)
    line = next(line for line in text.splitlines() if "Attention" in line)
    second = line.replace("mixed", "again").replace("(query", "(mixed")
    model = parsed(text.replace(line, line + second).replace("(mixed)", "(again)"))
    AttentionToMatMuls()(model)
    assert operators(model.graph)["Where"] == 1
    assert operators(model.graph)["Softmax"] == 2


def test_half_precision_keeps_its_node() -> None:
    model = parsed(attention_text(4, 2, 16).replace("float[", "float16["))
    assert not AttentionToMatMuls()(model).modified
    assert operators(model.graph)["Attention"] == 1


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("scale = 0.3", "is_causal = 1", "is more than q, k, v, a bool mask and a scale"),
        ("scale = 0.3", "softcap = 30.0", "is more than q, k, v, a bool mask and a scale"),
        (", visible)", ")", "is more than q, k, v, a bool mask and a scale"),
        (
            "float[b, t, 4, 16] q",
            "float[b, t, h, 16] q",
            "is over .* heads or head sizes unknown",
        ),
    ],
)
def test_refuses_what_it_would_leave_out(old: str, new: str, why: str) -> None:
    text = attention_text(4, 2, 16)
    assert old in text
    refuses(AttentionToMatMuls(), parsed(text.replace(old, new)), f"Attention mixed {why}")


def test_refuses_shapes_that_it_does_not_know() -> None:
    model = parsed(attention_text(4, 2, 16))
    key = the(model, "Attention").inputs[1]
    assert key is not None
    key.shape = ir.Shape(["b", "s", 32])
    why = r"Attention mixed is over .*\[b,s,32\].* not \[B, h, T, D\] each"
    refuses(AttentionToMatMuls(), model, why)


def test_notices_what_is_left() -> None:
    model = parsed(attention_text(4, 2, 16))
    notices_nothing_done(AttentionToMatMuls(), model, "Attention mixed is left in float32")


def over_heads(model: ir.Model) -> None:
    the(model, "Softmax").attributes["axis"] = ir.AttrInt64("axis", 1)


def without_its_type(model: ir.Model) -> None:
    model.graph.outputs[0].type = None


@pytest.mark.parametrize(
    ("spoil", "why"),
    [(over_heads, "Softmax .* is not over the keys"), (without_its_type, "had .*y FLOAT")],
)
def test_notices_its_own_mistakes(spoil: Callable[[ir.Model], None], why: str) -> None:
    notices(AttentionToMatMuls(), parsed(attention_text(4, 2, 16)), spoil, why)
