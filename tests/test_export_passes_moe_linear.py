"""MoeLinear becomes one MatMul an expert: the graph, its numbers and its conditions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir
import pytest
from moe_linear_graph import FLOAT, INT64, arguments, built, plain_loop
from one_node import session, weight
from text_graph import notices, notices_nothing_done, refuses, the

from ingot.export.passes.moe_linear import MoeLinearToMatMuls
from ingot.export.passes.weights import Weight
from ingot.plugins import moe_linear as op
from ingot.plugins.operator import DOMAIN


def layer() -> tuple[ir.Model, dict[str, np.ndarray], dict[str, np.ndarray], list[tuple[str, int]]]:
    """Two nodes of one attention layer and one of another layer.

    Returns:
        The model; its feeds; its weights; the reads of them so far, as name and block.
    """
    x, ids, first = arguments(7, 2, 4, 8, 6, row_per_choice=False, ids="distinct", seed=5)
    _, other_ids, second = arguments(7, 2, 4, 6, 8, row_per_choice=True, ids="any", seed=6)
    third = arguments(7, 2, 5, 8, 3, row_per_choice=True, ids="any", seed=7)[2]
    stacks = {"in": first, "out": second, "other": third}
    reads: list[tuple[str, int]] = []

    def read(name: str, block: int) -> np.ndarray:
        reads.append((name, block))
        array: np.ndarray = stacks[name][block]
        return array

    def value(name: str) -> ir.Value:
        shape = stacks[name].shape
        tensor = Weight(name, shape, FLOAT, partial(read, name))
        return ir.val(name, FLOAT, shape, const_value=tensor)

    other = ir.val("other_ids", INT64, ["n", "k"])
    model = built(x, value("in"), other)
    reads.clear()
    graph = model.graph
    y, shared = graph[0].outputs[0], graph.inputs[1]
    for name, ids_value in (("out", shared), ("other", other)):
        stack = value(name)
        graph.register_initializer(stack)
        node = ir.node(op.moe_linear.name, [y, ids_value, stack], domain=DOMAIN)
        y = node.outputs[0]
        y.name, y.type, y.shape = f"y_{name}", ir.TensorType(FLOAT), ir.Shape(["n", "k", None])
        graph.append(node)
        graph.outputs.append(y)
    return model, {"x": x, "expert_ids": ids, "other_ids": other_ids}, stacks, reads


def test_lowering_shares_the_sorting_of_one_layer() -> None:
    model, feeds, stacks, _ = layer()
    before = session(model.clone()).run(None, feeds)
    assert MoeLinearToMatMuls()(model).modified
    operators = Counter(node.op_type for node in model.graph)
    assert operators["MoeLinear"] == 0 and not model.functions
    assert operators["Split"] == 3 and operators["MatMul"] == 4 + 4 + 5
    # One sorting for the two nodes of a layer, and one for the other layer.
    assert operators["NonZero"] == operators["ReduceSum"] == operators["ScatterND"] == 2
    assert [value.name for value in model.graph.outputs] == ["y", "y_out", "y_other"]
    found = session(model).run(None, feeds)
    y = plain_loop(feeds["x"], feeds["expert_ids"], stacks["in"])
    y_out = plain_loop(y, feeds["expert_ids"], stacks["out"])
    y_other = plain_loop(y_out, feeds["other_ids"], stacks["other"])
    for got, body, want in zip(found, before, (y, y_out, y_other), strict=True):
        assert want.std() > 0.1
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        np.testing.assert_allclose(body, want, rtol=0, atol=1e-5)


def test_lowering_gives_each_expert_a_weight_of_its_own_and_reads_nothing() -> None:
    model, _, stacks, reads = layer()
    MoeLinearToMatMuls()(model)
    assert not reads
    values = model.graph.initializers
    weights = {k: v.const_value for k, v in values.items() if isinstance(v.const_value, Weight)}
    names = [f"{name}.{e}" for name, stack in stacks.items() for e in range(len(stack))]
    assert sorted(weights) == sorted(names)
    for name, tensor in weights.items():
        stack, _, expert = name.rpartition(".")
        assert tensor is not None and values[name].shape == tensor.shape
        array = tensor.numpy()
        np.testing.assert_array_equal(array, stacks[stack][int(expert)].T)
        assert array.flags.c_contiguous
        assert reads == [(stack, int(expert))]
        reads.clear()


def test_lowering_keeps_a_body_that_another_node_uses() -> None:
    x, _, weights = arguments(2, 2, 3, 4, 5, row_per_choice=False, ids="any", seed=8)
    model = built(x, weight("w", weights))
    graph = model.graph
    half = weight("half", weights.astype(np.float16))
    graph.register_initializer(half)
    narrow = ir.node("CastLike", [graph.inputs[0], half])
    narrow.outputs[0].shape = graph.inputs[0].shape
    node = ir.node(op.moe_linear.name, [narrow.outputs[0], graph.inputs[1], half], domain=DOMAIN)
    graph.extend([narrow, node])
    assert MoeLinearToMatMuls()(model).modified
    assert [n for n in graph if n.op_type == "MoeLinear"] == [node]
    assert node.op_identifier() in model.functions
    assert not MoeLinearToMatMuls()(model).modified


def one(stack: ir.Value | None = None) -> ir.Model:
    x, _, weights = arguments(2, 2, 3, 4, 5, row_per_choice=False, ids="any", seed=8)
    return built(x, weight("w", weights) if stack is None else stack)


def test_half_precision_keeps_its_node() -> None:
    _, _, weights = arguments(2, 2, 3, 4, 5, row_per_choice=False, ids="any", seed=8)
    model = one(weight("w", weights.astype(np.float16)))
    assert not MoeLinearToMatMuls()(model).modified
    assert the(model, "MoeLinear").domain == DOMAIN and model.functions


def use_the_weight_twice(model: ir.Model) -> None:
    model.graph.append(ir.node("Relu", [model.graph.initializers["w"]]))


def read_the_weight(model: ir.Model) -> None:
    array = np.zeros((3, 5, 4), dtype=np.float32)
    model.graph.initializers["w"].const_value = ir.tensor(array, name="w")


def flatten_the_stack(model: ir.Model) -> None:
    model.graph.initializers["w"].shape = ir.Shape([15, 4])


def flatten_the_input(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape(["n"])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (use_the_weight_twice, "the value w is no weight of the checkpoint with one use"),
        (read_the_weight, "the value w is no weight of the checkpoint with one use"),
        (flatten_the_stack, r"the value w is no stack \[E, O, Kin\] but \[15,4\]"),
        (flatten_the_input, r"MoeLinear .* has an input neither \[N, Kin\] nor \[N, K, Kin\]"),
    ],
)
def test_refuses_what_it_cannot_split(spoil: Callable[[ir.Model], None], why: str) -> None:
    model = one()
    spoil(model)
    refuses(MoeLinearToMatMuls(), model, why)


def test_notices_what_is_left() -> None:
    notices_nothing_done(MoeLinearToMatMuls(), one(), "MoeLinear .* is left in float32")


def leave_the_stack(model: ir.Model) -> None:
    model.graph.register_initializer(weight("w", np.zeros((3, 5, 4), dtype=np.float32)))


def leave_the_function(model: ir.Model) -> None:
    function = ir.serde.deserialize_function(op.function_body())
    model.functions[function.identifier()] = function


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (leave_the_stack, "the value w is a weight that nothing reads"),
        (leave_the_function, "the function MoeLinear is left without a node"),
    ],
)
def test_notices_its_own_mistakes(spoil: Callable[[ir.Model], None], why: str) -> None:
    notices(MoeLinearToMatMuls(), one(), spoil, why)
