"""``ingot::MoeDispatch`` -> ``com.microsoft::MoE``, ONNX Runtime's own kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from ingot.export.passes.constants import constant, integers
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.match import only_reader, producer
from ingot.export.passes.weights import ReadBlock, Weight, rearrange
from ingot.plugins.moe_dispatch import moe_dispatch
from ingot.plugins.operator import DOMAIN

INT64_MIN = np.iinfo(np.int64).min


class MoeDispatchToMoE(GraphPass):
    """Swaps the operator and rearranges the experts' weights for it, at export.

    The CPU kernel takes a gated MLP only as SiLU with the rows of gate and up interleaved; for
    another activation the node stays and runs through its function body. Among equal router
    logits the kernel takes the *higher* expert id, and the operator's meaning is the lower, so
    the experts are stored in reverse order and the router's logits reversed.

    ONNX Runtime lets the kernel write its output over its input, and the kernel then reads what it
    has overwritten (1.31.1: wrong by the size of the activations). A ``Where`` that always takes
    the output keeps the input alive past the kernel. Its condition depends on an input of the
    graph, because the optimizer removes a constant one.
    """

    looks_for = (moe_dispatch.name,)

    def __init__(self, alive: str = "attention_mask") -> None:
        super().__init__()
        self.alive = alive

    def requires(self, model: ir.Model) -> None:
        inputs = [value.name for value in model.graph.inputs]
        for node in filter(_is_silu, model.graph):
            self.require(self.alive in inputs, node, f"needs the graph input {self.alive}")
            x, _, *weights = node.inputs
            for value in (x, *weights):
                wide = value is not None and value.dtype == ir.DataType.FLOAT
                self.require(wide, node, "is not float32")
            for value in weights:
                assert value is not None
                own = isinstance(value.const_value, Weight) and len(value.uses()) == 1
                self.require(own, value, "is no weight of the checkpoint with one use")
            self.require(_is_gated_stack(*weights), node, "has no stacks [E, 2I, H] and [E, H, I]")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        always: ir.Value | None = None
        for node in list(model.graph):
            if _is_silu(node):
                always = always or self._always(model)
                self._swap(model, node, always)
                modified = True
        if modified:
            model.opset_imports["com.microsoft"] = 1
            RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(not _is_silu(node), node, "was not swapped")
            if node.domain != "com.microsoft" or node.op_type != "MoE":
                continue
            x, router_logits, gate_up, _, down = node.inputs
            reverse = producer(router_logits, "Slice") is not None
            self.ensure(reverse, node, "takes the router's logits in the operator's order")
            gated = _is_gated_stack(gate_up, down)
            self.ensure(gated, node, "has no stacks [E, 2I, H] and [E, H, I]")
            keep = only_reader(node)
            alive = keep is not None and keep.op_type == "Where" and keep.inputs[2] is x
            self.ensure(alive, node, "may write over its input: no Where alone reads both")
            bound = producer(keep.inputs[0], "GreaterOrEqual") if keep is not None else None
            smallest = producer(bound.inputs[0], "ReduceMin") if bound is not None else None
            source = smallest.inputs[0] if smallest is not None else None
            fed = source is not None and source.is_graph_input()
            self.ensure(fed, node, "has a Where that an optimizer can fold")

    def _always(self, model: ir.Model) -> ir.Value:
        """A boolean scalar that is true in every call and that no optimizer can fold."""
        source = next(v for v in model.graph.inputs if v.name == self.alive)
        smallest = ir.node("ReduceMin", [source], attributes={"keepdims": 0})
        bound = constant(model, "int64_min", np.array(INT64_MIN, dtype=np.int64))
        true = ir.node("GreaterOrEqual", [smallest.outputs[0], bound])
        model.graph.insert_before(model.graph[0], [smallest, true])
        return true.outputs[0]

    def _swap(self, model: ir.Model, node: ir.Node, always: ir.Value) -> None:
        x, router_logits, gate_up, down = node.inputs
        assert gate_up is not None and down is not None
        experts = down.shape[0] if down.shape is not None else None
        assert isinstance(experts, int)
        for value, change in ((gate_up, _interleaved), (down, _same)):
            assert value.shape is not None
            shape = tuple(value.shape.numpy())
            rearrange(value, partial(_reversed, change, experts), shape, backwards=True)
        # starts, ends, axes, steps
        along_experts = [integers(model, [n]) for n in (-1, INT64_MIN, 1, -1)]
        reverse = ir.node("Slice", [router_logits, *along_experts])
        moe = ir.node(
            "MoE",
            [x, reverse.outputs[0], gate_up, None, down],
            domain="com.microsoft",
            attributes={
                "k": node.attributes["top_k"].as_int(),
                "normalize_routing_weights": node.attributes["normalize"].as_int(),
                "activation_type": "swiglu",
                "swiglu_fusion": 1,
                # swiglu(x) = x * sigmoid(alpha * x) * (up + beta): plain SiLU gating.
                "activation_alpha": 1.0,
                "activation_beta": 0.0,
            },
        )
        keep = ir.node("Where", [always, moe.outputs[0], x])
        for result in (moe.outputs[0], keep.outputs[0]):
            result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        model.graph.insert_before(node, [reverse, moe, keep])
        ir.convenience.replace_all_uses_with(node.outputs[0], keep.outputs[0])
        model.graph.remove(node, safe=True)


def _is_silu(node: ir.Node) -> bool:
    is_dispatch = node.domain == DOMAIN and node.op_type == moe_dispatch.name
    return is_dispatch and node.attributes["activation"].as_string() == "silu"


def _is_gated_stack(gate_up: ir.Value | None, down: ir.Value | None) -> bool:
    """Whether they are ``[E, 2I, H]`` and ``[E, H, I]``."""
    shapes = [value.shape for value in (gate_up, down) if value is not None and value.shape]
    if [len(shape) for shape in shapes] != [3, 3]:
        return False
    experts, hidden, inner = shapes[1].numpy()
    return shapes[0] == (experts, 2 * inner, hidden)


def _reversed(
    change: Callable[[np.ndarray], np.ndarray], experts: int, read: ReadBlock
) -> ReadBlock:
    return lambda block: change(read(experts - 1 - block))


def _interleaved(gate_up: np.ndarray) -> np.ndarray:
    """One expert's ``[..., 2I, H]``: gate rows then up rows -> gate and up rows in turn."""
    rows, hidden = gate_up.shape[-2:]
    halves = gate_up.reshape(2, rows // 2, hidden)
    return np.ascontiguousarray(halves.swapaxes(0, 1)).reshape(gate_up.shape)


def _same(down: np.ndarray) -> np.ndarray:
    return down
