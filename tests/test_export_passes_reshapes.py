"""Sizes from token inputs and reshapes by constants: the graph, its numbers and its conditions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import Arrays, notices, notices_nothing_done, operators, parsed, refuses, run, the

from ingot.export.passes.reshapes import SimplifyReshapes, SizeError, SizesFromTokens

TOKENS = ("ids", "mask")
# The batch size of a state, and the past's and the state's own; a reshape by computed sizes.
TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
sizes (int64[batch, sequence] ids, int64[batch, total] mask, float[batch, 2, past, 3] state,
       float[batch, sequence, 6] x) => (float[batch, sequence, 2, 3] y, float[batch] ones)
{
    one = Constant <value_ints: ints = [1]> ()
    heads = Constant <value_ints: ints = [2, 3]> ()
    rows = Shape <start = 0, end = 1> (state)
    columns = Shape <start = 1, end = 2> (x)
    target = Concat <axis = 0> (rows, columns, heads)
    y = Reshape (x, target)
    like = Shape <start = 0, end = 1> (mask)
    ones = ConstantOfShape <value = float[1] {1.0}> (like)
}
"""


def feeds() -> Arrays:
    random = np.random.default_rng(0)
    return {
        "ids": np.zeros((2, 4), dtype=np.int64),
        "mask": np.zeros((2, 9), dtype=np.int64),
        "state": np.zeros((2, 2, 5, 3), dtype=np.float32),
        "x": random.normal(size=(2, 4, 6)).astype(np.float32),
    }


def test_no_size_is_read_from_a_state() -> None:
    model = parsed(TEXT)
    expected = run(model, feeds())
    assert SizesFromTokens(TOKENS)(model).modified
    read = [
        (node.inputs[0].name, node.attributes["start"].as_int(), node.attributes["end"].as_int())
        for node in model.graph
        if node.op_type == "Shape" and node.inputs[0] is not None
    ]
    # The state's and x's; what reads a token input stays.
    assert read == [("ids", 0, 1), ("ids", 1, 2), ("mask", 0, 1)]
    found = run(model, feeds())
    assert np.array_equal(found["y"], expected["y"])
    assert np.array_equal(found["y"], feeds()["x"].reshape(2, 4, 2, 3))
    assert not SizesFromTokens(TOKENS)(model).modified


@pytest.mark.parametrize(
    ("new", "why"),
    [
        ("<start = 0, end = 2> (state)", "Shape rows reads not one size of a state"),
        ("<start = 9, end = 10> (state)", "Shape rows reads not one size of a state"),
        ("(state)", "Shape rows reads not one size of a state"),
        ("<start = 2, end = 3> (state)", "Shape rows reads past, which no token input has"),
    ],
)
def test_refuses_sizes_that_no_token_has(
    new: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = "<start = 0, end = 1> (state)"
    assert old in TEXT
    model = parsed(TEXT.replace(old, new))
    refuses(SizesFromTokens(TOKENS), model, why)
    monkeypatch.delenv("INGOT_DEBUG")
    with pytest.raises(SizeError, match=f"^{why}; take the size from the token ids"):
        SizesFromTokens(TOKENS)(model)


def test_refuses_a_token_input_that_is_not_there() -> None:
    refuses(SizesFromTokens(("ids", "positions")), parsed(TEXT), "positions is no graph input")


def test_notices_sizes_that_are_left() -> None:
    why = "Shape rows reads a size of a state"
    notices_nothing_done(SizesFromTokens(TOKENS), parsed(TEXT), why)


def test_a_reshape_keeps_its_leading_sizes_by_zeros() -> None:
    model = parsed(TEXT)
    expected = run(model, feeds())
    assert SimplifyReshapes()(model).modified
    reshape = the(model, "Reshape")
    shape = reshape.inputs[1]
    assert shape is not None and shape.is_initializer() and shape.const_value is not None
    assert shape.const_value.numpy().tolist() == [0, 0, 2, 3]
    assert reshape.attributes["allowzero"].as_int() == 0
    assert not the(model, "Concat").outputs[0].uses()
    assert np.array_equal(run(model, feeds())["y"], expected["y"])
    assert not SimplifyReshapes()(model).modified


LEFT_ALONE = {
    "sizes in another place": ("float[batch, sequence, 2, 3] y", "float[sequence, batch, 2, 3] y"),
    "a size that the input lacks": (
        "float[batch, sequence, 2, 3] y",
        "float[batch, other, 2, 3] y",
    ),
    "an empty axis": ("float[batch, sequence, 2, 3] y", "float[batch, sequence, 0, 3] y"),
}


@pytest.mark.parametrize("change", LEFT_ALONE)
def test_any_other_reshape_is_left_alone(change: str) -> None:
    old, new = LEFT_ALONE[change]
    assert old in TEXT
    model = parsed(TEXT)
    target = parsed(TEXT.replace(old, new)).graph.outputs[0].shape
    model.graph.outputs[0].shape = target
    assert not SimplifyReshapes()(model).modified
    assert operators(model.graph)["Concat"] == 1


def test_refuses_a_reshape_of_sizes_without_names() -> None:
    model = parsed(TEXT)
    x = the(model, "Reshape").inputs[0]
    assert x is not None
    x.shape = ir.Shape([None, "sequence", 6])
    refuses(SimplifyReshapes(), model, "Reshape y has a size without a name in ")


def test_notices_a_computed_shape_that_is_left() -> None:
    notices_nothing_done(SimplifyReshapes(), parsed(TEXT), "Reshape y has a computed shape")


def keep_another_axis(model: ir.Model) -> None:
    value = the(model, "Reshape").inputs[1]
    assert value is not None
    value.const_value = ir.tensor([0, 0, 0, 3], name=value.name, dtype=ir.DataType.INT64)


def forget_the_output(model: ir.Model) -> None:
    model.graph.outputs[0].shape = None


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (keep_another_axis, r"Reshape y keeps axis 2 of \[batch,sequence,6\] for"),
        (forget_the_output, "the graph had .*output 0 y"),
    ],
)
def test_notices_its_own_mistakes(spoil: Callable[[ir.Model], None], why: str) -> None:
    notices(SimplifyReshapes(), parsed(TEXT), spoil, why)
