"""Graphs of half precision in float32, against the same formula in numpy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ingot.runtime.onnxruntime_session import open_session
from ingot.validate.locate.widen import widen, widened

NODE = helper.make_node
F32, F16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
X = np.random.default_rng(3).standard_normal(64).astype(np.float32)
# Rounded where the graph keeps it; what is computed with it is not.
WEIGHT = np.random.default_rng(4).standard_normal(64).astype(np.float16)


def _model(nodes: list[onnx.NodeProto], **more: Any) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", F32, ["n"])],
        [value("y", F32, ["n"])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, **more)


def _run(model: onnx.ModelProto) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = open_session(model.SerializeToString())
    return np.asarray(session.run(None, {"x": X})[0])


def test_computes_in_float32_what_a_float16_graph_would_round() -> None:
    model = _model([NODE("Cast", ["x"], ["h"], to=F16), NODE("Mul", ["h", "w"], ["y"])])
    widen(model, "float16")
    np.testing.assert_array_equal(_run(model), X * WEIGHT.astype(np.float32))


@pytest.mark.parametrize(
    ("precision", "other", "dtype"),
    [("float16", BF16, ml_dtypes.bfloat16), ("float32", F16, np.float16)],
)
def test_still_rounds_to_a_precision_that_is_not_the_graph_s(
    precision: str, other: int, dtype: type
) -> None:
    model = _model([NODE("Cast", ["x"], ["h"], to=other), NODE("Mul", ["h", "w"], ["y"])])
    widen(model, precision)
    rounded = X.astype(dtype).astype(np.float32)
    assert (rounded != X).any()
    np.testing.assert_array_equal(_run(model), rounded * WEIGHT.astype(np.float32))


def test_widens_functions_branches_and_constants() -> None:
    two = NODE("Constant", [], ["c"], value=numpy_helper.from_array(np.array(2, np.float16)))
    out = [helper.make_tensor_value_info("b", F32, ["n"])]
    branches = {
        f"{name}_branch": helper.make_graph([two, NODE(op, ["h", "c"], ["b"])], name, [], out)
        for name, op in (("then", "Add"), ("else", "Sub"))
    }
    body = [
        NODE("Cast", ["a"], ["h"], to=F16),
        NODE("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        NODE("If", ["yes"], ["r"], **branches),
    ]
    opset = [helper.make_opsetid("", 21)]
    function = helper.make_function("local", "F", ["a"], ["r"], body, opset)
    model = _model([NODE("F", ["x"], ["y"], domain="local")], functions=[function])
    widen(model, "float16")
    np.testing.assert_array_equal(_run(model), X + 2)


def test_leaves_what_lies_in_another_file_to_who_gives_it() -> None:
    model = _model([NODE("Mul", ["x", "w"], ["y"])])
    (weight,) = model.graph.initializer
    onnx.external_data_helper.set_external_data(weight, "weights.bin", 16, 128)
    weight.ClearField("raw_data")
    widen(model, "float16")
    assert weight.data_type == F32
    where = {entry.key: entry.value for entry in weight.external_data}
    assert where == {"location": "weights.bin", "offset": "16", "length": "128"}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_widens_an_array_of_half_precision(dtype: type) -> None:
    half: np.ndarray = X.astype(dtype)
    assert widened(half).dtype == np.float32
    np.testing.assert_array_equal(widened(half).astype(np.float64), half.astype(np.float64))


@pytest.mark.parametrize("array", [X, np.arange(3), np.array([True])])
def test_leaves_an_array_of_another_kind(array: np.ndarray) -> None:
    assert widened(array) is array
