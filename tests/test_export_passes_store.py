"""Matrices are stored narrower and computed as wide as before; what is small or routes is not."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from text_graph import Arrays, interface, notices, operators, parsed, run, the

from ingot.export.passes.graph_pass import PassError
from ingot.export.passes.store import StoreNarrow
from ingot.export.passes.weights import Weight

# A table that is looked up in and turned for the head, a layer, its bias, a norm, and a router.
TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
model (
    int64[b, t] ids, float[9, 4] table, float[4, 4] w, float[4] bias, float[4] norm,
    float[4, 3] gate
) => (float[b, t, 9] logits, float[b, t, 3] chosen) {
    x = Gather (table, ids)
    product = MatMul (x, w)
    h = Add (product, bias)
    scaled = Mul (h, norm)
    routed = MatMul (scaled, gate)
    chosen = Identity (routed)
    turned = Transpose <perm = [1, 0]> (table)
    logits = MatMul (scaled, turned)
}
"""
IDS = np.array([[0, 8, 3], [1, 1, 5]])
BFLOAT16, FLOAT16 = ir.DataType.BFLOAT16, ir.DataType.FLOAT16


def weights() -> Arrays:
    random = np.random.default_rng(0)
    shapes = {"table": (9, 4), "w": (4, 4), "bias": (4,), "norm": (4,), "gate": (4, 3)}
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def model(arrays: Arrays | None = None) -> ir.Model:
    result = parsed(TEXT, arrays or weights())
    # The parser takes no such name.
    routed = next(v for node in result.graph for v in node.outputs if v.name == "routed")
    routed.name = "router_logits.0"
    return result


def stored(graph: ir.Model) -> dict[str | None, ir.DataType]:
    values = graph.graph.initializers.values()
    return {v.name: v.const_value.dtype for v in values if isinstance(v.const_value, Weight)}


def always(dtype: ir.DataType) -> StoreNarrow:
    return StoreNarrow(lambda _name: dtype)


@pytest.mark.parametrize(
    ("dtype", "numpy"), [(BFLOAT16, ml_dtypes.bfloat16), (FLOAT16, np.float16)]
)
def test_computes_in_float32_what_the_rounded_matrices_give(
    dtype: ir.DataType, numpy: type
) -> None:
    graph = model()
    before = interface(graph)
    assert always(dtype)(graph).modified
    assert interface(graph) == before
    found = run(graph, {"ids": IDS})
    arrays = weights()
    table, w = (arrays[name].astype(numpy).astype(np.float32) for name in ("table", "w"))
    h = (table[IDS] @ w + arrays["bias"]) * arrays["norm"]
    np.testing.assert_allclose(found["logits"], h @ table.T, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["chosen"], h @ arrays["gate"], rtol=0, atol=1e-5)
    # Float32 itself would be seen.
    exact = (arrays["table"][IDS] @ arrays["w"] + arrays["bias"]) * arrays["norm"]
    assert np.abs(found["logits"] - exact @ arrays["table"].T).max() > 1e-4


def test_norms_biases_and_routers_stay_as_they_are() -> None:
    graph = model()
    always(BFLOAT16)(graph)
    wide = ir.DataType.FLOAT
    assert stored(graph) == {
        "table": BFLOAT16,
        "w": BFLOAT16,
        "bias": wide,
        "norm": wide,
        "gate": wide,
    }


def test_of_a_table_only_the_rows_looked_up_are_widened() -> None:
    graph = model()
    always(BFLOAT16)(graph)
    gather = the(graph, "Gather")
    assert gather.inputs[0] is graph.graph.initializers["table"]
    assert [use.node.op_type for use in gather.outputs[0].uses()] == ["Cast"]
    # One cast of the table for the head, one of the matrix, one of the rows.
    assert operators(graph.graph)["Cast"] == 3


def test_a_type_as_wide_changes_nothing() -> None:
    graph = model()
    assert not always(ir.DataType.FLOAT)(graph).modified
    assert not always(ir.DataType.DOUBLE)(graph).modified
    assert operators(graph.graph)["Cast"] == 0


def test_each_weight_has_its_own_type() -> None:
    graph = model()
    types = {"w": FLOAT16, "table": BFLOAT16}
    StoreNarrow(types.__getitem__)(graph)
    assert stored(graph)["w"] == FLOAT16 and stored(graph)["table"] == BFLOAT16


def test_refuses_a_number_that_the_type_does_not_have() -> None:
    arrays = weights()
    arrays["w"][1, 2] = 7e4
    graph = model(arrays)
    always(FLOAT16)(graph)
    weight = graph.graph.initializers["w"].const_value
    assert isinstance(weight, Weight)
    with pytest.raises(PassError, match=r"w holds 7e\+04, which is beyond float16; give --weights"):
        weight.read_block(0)
    graph = model(arrays)
    always(BFLOAT16)(graph)
    run(graph, {"ids": IDS})


@pytest.mark.parametrize(
    ("undo", "why"),
    [
        (
            lambda graph: the(graph, "MatMul").replace_input_with(1, graph.graph.initializers["w"]),
            "computes in the type that w is stored in",
        ),
        (
            lambda graph: setattr(
                graph.graph.initializers["w"], "type", ir.TensorType(ir.DataType.FLOAT)
            ),
            "is stored as",
        ),
    ],
)
def test_notices(undo: Callable[[ir.Model], object], why: str) -> None:
    notices(always(BFLOAT16), model(), undo, why)
