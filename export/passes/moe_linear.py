"""``ingot::MoeLinear`` -> one plain MatMul per expert, for ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from ingot.export.passes.constants import constant, integers
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.nodes import Nodes
from ingot.export.passes.replace import take_place
from ingot.export.passes.weights import ReadBlock, Weight
from ingot.plugins.moe_linear import moe_linear
from ingot.plugins.operator import DOMAIN


@dataclass(frozen=True)
class _Order:
    """The M = N*K choices sorted by expert, as values of the graph.

    Attributes:
        token: ``[M]``, the token of each choice in that order.
        choice: ``[M, 2]``, token and place in its row of ``expert_ids``.
        counts: ``[E]``, how many choices each expert has.
        inverse: ``[N, K]``, where each choice went.
    """

    token: ir.Value
    choice: ir.Value
    counts: ir.Value
    inverse: ir.Value


class MoeLinearToMatMuls(GraphPass):
    """Sorts the rows by expert, splits them, and multiplies each piece by its expert's weight.

    Each expert's weight becomes an initializer of its own, ``{weight}.{e}``, stored ``[Kin, O]``:
    ONNX Runtime then packs it at load as for any linear layer, and no weight is copied in a run. A
    piece may be empty and then costs next to nothing. Nodes that share their ``expert_ids``,
    as the two of an attention layer do, share the sorting.

    A weight of another dtype than float32 keeps its node: the operator accumulates in float32.
    """

    looks_for = (moe_linear.name,)

    def requires(self, model: ir.Model) -> None:
        for node in filter(_is_wide, model.graph):
            x, _, weight = node.inputs
            assert weight is not None
            own = isinstance(weight.const_value, Weight) and len(weight.uses()) == 1
            self.require(own, weight, "is no weight of the checkpoint with one use")
            stack = weight.shape is not None and len(weight.shape) == 3
            self.require(stack, weight, f"is no stack [E, O, Kin] but {weight.shape}")
            rows = x is not None and x.shape is not None and len(x.shape) in (2, 3)
            self.require(rows, node, "has an input neither [N, Kin] nor [N, K, Kin]")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        orders: dict[ir.Value, _Order] = {}
        modified = False
        for node in list(model.graph):
            if not _is_wide(node):
                continue
            _, expert_ids, weight = node.inputs
            assert expert_ids is not None and weight is not None
            experts = _split_weight(model, weight)
            if expert_ids not in orders:
                orders[expert_ids] = _sort(model, node, expert_ids, len(experts))
            _multiply(model, node, orders[expert_ids], experts)
            model.graph.remove(node, safe=True)
            model.graph.initializers.pop(weight.name or "")
            modified = True
        if modified:
            RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        kinds = {node.op_identifier() for node in model.graph}
        for node in model.graph:
            self.ensure(not _is_wide(node), node, "is left in float32")
        for identifier in model.functions:
            left = identifier[:2] == (DOMAIN, moe_linear.name) and identifier not in kinds
            self.ensure(not left, f"the function {moe_linear.name}", "is left without a node")
        for value in model.graph.initializers.values():
            read = bool(value.uses()) or not isinstance(value.const_value, Weight)
            self.ensure(read, value, "is a weight that nothing reads")


def _is_wide(node: ir.Node) -> bool:
    """Whether it is the operator with float32 weights."""
    weight = node.inputs[2] if node.domain == DOMAIN and node.op_type == moe_linear.name else None
    return weight is not None and weight.dtype == ir.DataType.FLOAT


def _split_weight(model: ir.Model, weight: ir.Value) -> list[ir.Value]:
    """New initializers, one an expert, that read nothing yet."""
    stack = weight.const_value
    assert isinstance(stack, Weight), f"{weight.name} is no weight of the checkpoint"
    experts, out, size = stack.shape.numpy()
    assert len(weight.uses()) == 1 and stack.blocks == experts
    values = []
    for expert in range(experts):
        name = f"{weight.name}.{expert}"
        read = partial(_transposed, stack.read_block, expert, out)
        tensor = Weight(name, (size, out), stack.dtype, read, stack.origins[expert : expert + 1])
        values.append(ir.val(name, stack.dtype, (size, out), const_value=tensor))
        model.graph.register_initializer(values[-1])
    return values


def _transposed(read: ReadBlock, expert: int, out: int, _block: int) -> np.ndarray:
    # The one block of a single expert may come as [1, O, Kin].
    rows = torch.from_numpy(read(expert)).reshape(out, -1)
    # torch's copy of a transposed view is four times as fast as numpy's.
    return rows.T.contiguous().numpy()


def _sort(model: ir.Model, before: ir.Node, expert_ids: ir.Value, experts: int) -> _Order:
    """Order the choices by expert, then by token; the nodes go in front of ``before``."""
    nodes = Nodes()
    all_experts = constant(
        model, f"experts_{experts}", np.arange(experts, dtype=np.int64).reshape(-1, 1, 1)
    )
    is_expert = nodes.add("Equal", all_experts, expert_ids)
    # NonZero lists [expert, token, place] in row-major order: this is the sort.
    found = nodes.add("NonZero", is_expert)
    token = nodes.add("Gather", found, constant(model, "int64_scalar_1", np.array(1)), axis=0)
    pair = nodes.add(
        "Slice", found, integers(model, [1]), integers(model, [3]), integers(model, [0])
    )
    choice = nodes.add("Transpose", pair, perm=(1, 0))
    hits = nodes.add("Cast", is_expert, to=int(ir.DataType.INT64))
    counts = nodes.add("ReduceSum", hits, integers(model, [1, 2]), keepdims=0)
    zero, one = (constant(model, f"int64_scalar_{n}", np.array(n)) for n in (0, 1))
    places = nodes.add("Range", zero, nodes.add("Size", expert_ids), one)
    # Every element is overwritten, so the ids serve as any tensor of that shape would.
    inverse = nodes.add("ScatterND", expert_ids, choice, places)
    model.graph.insert_before(before, nodes)
    return _Order(token, choice, counts, inverse)


def _multiply(model: ir.Model, node: ir.Node, order: _Order, experts: list[ir.Value]) -> None:
    x = node.inputs[0]
    assert x is not None and x.shape is not None
    if len(x.shape) == 2:
        rows = ir.node("Gather", [x, order.token], attributes={"axis": 0})
    else:
        rows = ir.node("GatherND", [x, order.choice])
    split = ir.node(
        "Split", [rows.outputs[0], order.counts], attributes={"axis": 0}, num_outputs=len(experts)
    )
    products = [
        ir.node("MatMul", [piece, weight])
        for piece, weight in zip(split.outputs, experts, strict=True)
    ]
    joined = ir.node("Concat", [p.outputs[0] for p in products], attributes={"axis": 0})
    back = ir.node("Gather", [joined.outputs[0], order.inverse], attributes={"axis": 0})
    model.graph.insert_before(node, [rows, split, *products, joined, back])
    take_place(node.outputs[0], back.outputs[0])
