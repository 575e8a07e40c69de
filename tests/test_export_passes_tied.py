"""A head over the embedding's table becomes FusedMatMul: the graph, numbers and conditions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import (
    Arrays,
    interface,
    notices,
    notices_nothing_done,
    operators,
    parsed,
    refuses,
    run,
)

from ingot.export.passes.tied import TiedHeadToFusedMatMul

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
tied (int64[b, t] ids, float[9, 4] table, float[4, 4] w) => (float[b, t, 9] logits) {
    x = Gather (table, ids)
    turned_x = Transpose <perm = [0, 2, 1]> (x)
    back = Transpose <perm = [0, 2, 1]> (turned_x)
    h = MatMul (back, w)
    turned = Transpose <perm = [1, 0]> (table)
    logits = MatMul (h, turned)
}
"""
IDS = np.array([[0, 8, 3], [1, 1, 5]])


def weights() -> Arrays:
    random = np.random.default_rng(0)
    shapes = {"table": (9, 4), "w": (4, 4)}
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def tied() -> ir.Model:
    return parsed(TEXT, weights())


def test_a_tied_head_needs_no_transpose() -> None:
    model = tied()
    before, expected = interface(model), run(model, {"ids": IDS})["logits"]
    transposes = operators(model.graph)["Transpose"]
    assert TiedHeadToFusedMatMul()(model).modified
    assert interface(model) == before
    assert operators(model.graph)["FusedMatMul"] == 1
    assert operators(model.graph)["MatMul"] == 1
    assert operators(model.graph)["Transpose"] == transposes - 1
    found = run(model, {"ids": IDS})["logits"]
    table, w = weights().values()
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found, table[IDS] @ w @ table.T, rtol=0, atol=1e-5)


def test_a_transpose_with_another_reader_stays() -> None:
    text = TEXT.replace("float[b, t, 9] logits)", "float[b, t, 9] logits, float[4, 9] more)")
    model = parsed(text.replace("logits = Mat", "more = Relu (turned) logits = Mat"), weights())
    assert TiedHeadToFusedMatMul()(model).modified
    assert operators(model.graph)["FusedMatMul"] == 1
    assert operators(model.graph)["Transpose"] == 3


def test_an_untied_head_is_left_alone() -> None:
    text = TEXT.replace("turned = Transpose <perm = [1, 0]> (table)", "")
    text = text.replace("float[4, 4] w)", "float[4, 4] w, float[4, 9] turned)")
    model = parsed(text, {**weights(), "turned": np.ones((4, 9), dtype=np.float32)})
    assert not TiedHeadToFusedMatMul()(model).modified
    assert operators(model.graph)["MatMul"] == 2


def test_refuses_a_transpose_that_does_not_turn_the_table() -> None:
    text = TEXT.replace("[1, 0]> (table)", "[0, 1]> (table)").replace("float[9, 4]", "float[4, 4]")
    refuses(TiedHeadToFusedMatMul(), parsed(text, {"table": np.eye(4, dtype=np.float32)}), "turned")


def test_refuses_a_tied_head_in_a_branch() -> None:
    model = parsed("""
        <ir_version: 10, opset_import: ["" : 23]>
        branched (bool which, float[n, 4] x) => (y) <float[9, 4] table = {0, 0, 0, 0, 0, 0, 0, 0, 0,
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}> {
            y = If (which) <
                then_branch = one () => (float[n, 9] a) {
                    turned = Transpose <perm = [1, 0]> (table)
                    a = MatMul (x, turned)
                },
                else_branch = two () => (float[n, 9] b) { b = Gemm <transB = 1> (x, table) }
            >
        }
    """)
    assert model.graph.initializers["table"].is_initializer()
    refuses(TiedHeadToFusedMatMul(), model, "MatMul a is in a subgraph")


def test_notices_what_is_left() -> None:
    notices_nothing_done(TiedHeadToFusedMatMul(), tied(), "MatMul logits reads a transposed")


def take_another_table(model: ir.Model) -> None:
    table = model.graph.initializers["table"]
    table.shape = ir.Shape([4, 9])


def rename_the_logits(model: ir.Model) -> None:
    model.graph.outputs[0].name = "val_3"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (take_another_table, r"FusedMatMul .* multiplies \[b,t,4\] by the turned \[4,9\]"),
        (rename_the_logits, "the graph had .*logits"),
    ],
)
def test_notices_its_own_mistakes(spoil: Callable[[ir.Model], None], why: str) -> None:
    notices(TiedHeadToFusedMatMul(), tied(), spoil, why)
