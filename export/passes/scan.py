"""``ingot::Mamba2Scan`` -> ``com.microsoft::LinearAttention``, ONNX Runtime's own kernel."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from ingot.export.passes.constants import constant, integers
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.nodes import Nodes
from ingot.export.passes.replace import take_place
from ingot.plugins.mamba2_scan import mamba2_scan
from ingot.plugins.operator import DOMAIN

SWAP_STATE = (0, 1, 3, 2)


@dataclass(frozen=True)
class _Mask:
    """What the scans of one mask share.

    Attributes:
        column: the mask as ``[B, T, 1]``.
        one_token: whether T is 1, ``[1]`` bool.
    """

    column: ir.Value
    one_token: ir.Value


@dataclass(frozen=True)
class _Recurrence:
    """A scan whose steps are computed: S_t = exp(decay_t) S_{t-1} + scaled_t b_t^T, y_t = S_t c_t.

    Attributes:
        scaled: dt' x, ``[B, T, Hm*Pm]``.
        decay: dt' A, ``[B, T, Hm]``.
        b: ``[B, T, G, Ns]``.
        c: ``[B, T, G, Ns]``.
        state: ``[B, Hm, Pm, Ns]``.
        sizes: Hm, Pm, G and Ns.
    """

    scaled: ir.Value
    decay: ir.Value
    b: ir.Value
    c: ir.Value
    state: ir.Value
    sizes: tuple[int, int, int, int]


class Mamba2ScanToLinearAttention(GraphPass):
    """Runs the recurrence in the kernel, and the rest of the operator in standard operators.

    The kernel computes S_t = exp(g_t) S_{t-1} + k_t v_t^T and y_t = S_t^T q_t. With g = dt' A,
    q = C, k = B and v = dt' x that is the scan over the transposed state, and two transposes of the
    state. In a call with one token they would cost more than all else. There, k = dt' x and v = B
    leave the state as it is stored; the kernel's y means nothing then, and one product of the new
    state with C gives the real one. An ``If`` asks whether T is 1.

    A scan in another type than float32, or of unknown sizes, keeps its node.
    """

    looks_for = (mamba2_scan.name,)

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            sizes = _sizes(node)
            if sizes is None:
                continue
            heads, head_size, groups, states = sizes
            self.require(heads % groups == 0, node, f"has {heads} heads in {groups} groups")
            state = node.inputs[7].shape if node.inputs[7] is not None else None
            fits = state is not None and state[1:] == (heads, head_size, states)
            self.require(fits, node, f"has a state {state}, not [B, Hm, Pm, Ns]")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        masks: dict[ir.Value, _Mask] = {}
        for node in list(model.graph):
            sizes = _sizes(node)
            if sizes is not None:
                _swap(model, node, sizes, masks)
        if masks:
            model.opset_imports["com.microsoft"] = 1
            RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        return ir.passes.PassResult(model, modified=bool(masks))

    def ensures(self, model: ir.Model) -> None:
        names: Counter[str | None] = Counter()
        for node in model.graph.all_nodes():
            self.ensure(_sizes(node) is None, node, "was not swapped")
            names.update(value.name for value in node.outputs)
        for node in model.graph.all_nodes():
            if node.op_type == "LinearAttention":
                self.ensure(node.graph is not model.graph, node, "is in no branch of an If")
                queries, heads = (
                    node.attributes[f"{kind}_num_heads"].as_int() for kind in ("q", "kv")
                )
                fits = heads % queries == 0
                self.ensure(fits, node, f"has {queries} heads of queries for {heads} of states")
            for value in node.outputs if node.graph is not model.graph else ():
                self.ensure(names[value.name] == 1, value, "is in a branch and has another's name")


def _sizes(node: ir.Node) -> tuple[int, int, int, int] | None:
    """Hm, Pm, G and Ns, if it is a scan that the kernel can run."""
    if node.domain != DOMAIN or node.op_type != mamba2_scan.name:
        return None
    x, b = node.inputs[0], node.inputs[3]
    if x is None or b is None or x.shape is None or b.shape is None:
        return None
    sizes = [size for size in (*x.shape[2:], *b.shape[2:]) if isinstance(size, int)]
    if len(sizes) != 4 or x.dtype != ir.DataType.FLOAT:
        return None
    heads, head_size, groups, states = sizes
    return heads, head_size, groups, states


def _swap(
    model: ir.Model,
    node: ir.Node,
    sizes: tuple[int, int, int, int],
    masks: dict[ir.Value, _Mask],
) -> None:
    x, dt, a, b, c, d, dt_bias, state, mask = node.inputs
    assert b is not None and c is not None and state is not None and mask is not None
    heads, head_size, _, _ = sizes
    nodes = Nodes()
    if mask not in masks:
        tokens = nodes.add("Shape", mask, start=1, end=2)
        masks[mask] = _Mask(
            column=nodes.add("Unsqueeze", mask, integers(model, [2])),
            one_token=nodes.add("Equal", tokens, integers(model, [1])),
        )
    step = nodes.add("Softplus", nodes.add("Add", dt, dt_bias))
    low, high = _limit(model, node, "dt_min"), _limit(model, node, "dt_max")
    if low is not None or high is not None:
        step = nodes.add("Clip", step, low, high)
    step = nodes.add("Mul", step, masks[mask].column)
    decay = nodes.add("Mul", step, a)
    scaled = nodes.add("Mul", x, nodes.add("Unsqueeze", step, integers(model, [3])))
    scaled = nodes.add("Reshape", scaled, integers(model, [0, 0, heads * head_size]))
    recurrence = _Recurrence(scaled, decay, b, c, state, sizes)
    branches = {
        "then_branch": _branch(node, "one_token", *_one_token(model, recurrence)),
        "else_branch": _branch(node, "many_tokens", *_many_tokens(model, recurrence)),
    }
    chosen = ir.node("If", [masks[mask].one_token], attributes=branches, num_outputs=2)
    nodes.append(chosen)
    skip = nodes.add("Mul", x, nodes.add("Unsqueeze", d, integers(model, [1])))
    y = nodes.add("Add", chosen.outputs[0], skip)
    model.graph.insert_before(node, nodes)
    chosen.outputs[0].type, chosen.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    take_place(node.outputs[0], y)
    take_place(node.outputs[1], chosen.outputs[1])
    model.graph.remove(node, safe=True)


def _limit(model: ir.Model, node: ir.Node, name: str) -> ir.Value | None:
    """The limit as a scalar constant, or None where no softplus can reach it."""
    limit = node.attributes[name].as_float()
    if limit <= 0 or limit == math.inf:
        return None
    return constant(model, f"float_{limit!r}", np.array(limit, dtype=np.float32))


def _one_token(model: ir.Model, r: _Recurrence) -> tuple[Nodes, ir.Value, ir.Value]:
    """T = 1 -> the nodes, ``y [B, 1, Hm, Pm]`` without D x, and the new state."""
    heads, head_size, groups, states = r.sizes
    nodes = Nodes()
    b = r.b
    if groups < heads:
        b = nodes.add("Unsqueeze", b, integers(model, [3]))
        b = nodes.add("Expand", b, integers(model, [1, 1, 1, heads // groups, 1]))
    b = nodes.add("Reshape", b, integers(model, [0, 0, heads * states]))
    # Any query will do.
    _, state = _linear_attention(nodes, heads, heads, r.scaled, r.scaled, b, r.state, r.decay)
    rows = heads // groups * head_size
    of_group = nodes.add("Reshape", state, integers(model, [0, groups, rows, states]))
    c = nodes.add("Reshape", r.c, integers(model, [0, groups, states, 1]))
    y = nodes.add("MatMul", of_group, c)
    return nodes, nodes.add("Reshape", y, integers(model, [0, 1, heads, head_size])), state


def _many_tokens(model: ir.Model, r: _Recurrence) -> tuple[Nodes, ir.Value, ir.Value]:
    """Any T -> the nodes, ``y [B, T, Hm, Pm]`` without D x, and the new state."""
    heads, head_size, groups, states = r.sizes
    nodes = Nodes()
    packed = integers(model, [0, 0, groups * states])
    b, c = nodes.add("Reshape", r.b, packed), nodes.add("Reshape", r.c, packed)
    state = nodes.add("Transpose", r.state, perm=SWAP_STATE)
    y, state = _linear_attention(nodes, groups, heads, c, b, r.scaled, state, r.decay)
    y = nodes.add("Reshape", y, integers(model, [0, 0, heads, head_size]))
    return nodes, y, nodes.add("Transpose", state, perm=SWAP_STATE)


def _linear_attention(
    nodes: Nodes, query_heads: int, heads: int, *inputs: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Query, key, value, state and decay -> y and the new state."""
    node = ir.node(
        "LinearAttention",
        inputs,
        domain="com.microsoft",
        num_outputs=2,
        attributes={
            "update_rule": "gated",
            "scale": 1.0,
            "q_num_heads": query_heads,
            "kv_num_heads": heads,
        },
    )
    nodes.append(node)
    return node.outputs[0], node.outputs[1]


def _branch(scan: ir.Node, name: str, nodes: Nodes, y: ir.Value, new_state: ir.Value) -> ir.Graph:
    """A branch's graph; its values get names that no other graph of the model has."""
    for result, value in zip((y, new_state), scan.outputs, strict=True):
        result.type, result.shape = value.type, value.shape
    prefix = f"{scan.outputs[0].name}.{name}"
    made = [value for node in nodes for value in node.outputs]
    for index, value in enumerate(made):
        value.name = f"{prefix}.{index}"
    return ir.Graph([], [y, new_state], nodes=nodes, name=prefix)
