"""What is between the projections of a Mamba2 block -> one ``ingot.cpu::Mamba2Mixer``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.match import only_reader, producer, silu_of
from ingot.export.passes.replace import take_place
from ingot.plugins.causal_conv import causal_conv
from ingot.plugins.cpu.operators import DOMAIN, MIXER, VERSION
from ingot.plugins.mamba2_scan import mamba2_scan
from ingot.plugins.operator import DOMAIN as CANONICAL


@dataclass(frozen=True)
class _Norm:
    """A gated norm.

    Attributes:
        weight: ``[I]``.
        groups: that are normed by themselves.
        epsilon: of the root mean square.
        last: its last node.
    """

    weight: ir.Value
    groups: int
    epsilon: float
    last: ir.Node


@dataclass(frozen=True)
class _Mixer:
    """The nodes of what ``graphs.mamba2_mixer.Mamba2Mixer`` captures to, between its projections.

    Attributes:
        projected: ``[B, T, I + C + Hm]``.
        mask: ``[B, T]``.
        conv: ``ingot::CausalConv``.
        scan: ``ingot::Mamba2Scan``.
        groups: G.
        gated: the Mul of the scan's result and the gate's.
        norm: behind it; None without one.
    """

    projected: ir.Value
    mask: ir.Value
    conv: ir.Node
    scan: ir.Node
    groups: int
    gated: ir.Node
    norm: _Norm | None


class MixersToOperator(GraphPass):
    """Gathers convolution, scan, gate and norm, so that threads and memory are those of one node.

    Both operators have to be in the graph as such already.
    """

    looks_for = (mamba2_scan.name,)

    requires = GraphPass.any_graph

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            match = _match(node)
            if match is None:
                continue
            scan, norm = match.scan, match.norm
            a, (d, dt_bias, state, mask) = scan.inputs[2], scan.inputs[5:]
            window, taps, bias = match.conv.inputs[1:]
            made = ir.node(
                MIXER,
                [
                    *(match.projected, mask, window, state, taps, bias, a, d, dt_bias),
                    *([norm.weight] if norm else []),
                ],
                attributes={
                    "activation": match.conv.attributes["activation"].as_string(),
                    "groups": match.groups,
                    "norm_groups": norm.groups if norm else 0,
                    "epsilon": norm.epsilon if norm else 0.0,
                    "dt_min": scan.attributes["dt_min"].as_float(),
                    "dt_max": scan.attributes["dt_max"].as_float(),
                },
                domain=DOMAIN,
                version=VERSION,
                num_outputs=3,
            )
            last = norm.last if norm else match.gated
            model.graph.insert_before(last, made)
            take_place(last.outputs[0], made.outputs[0])
            for old, new in zip((match.conv, scan), made.outputs[1:], strict=True):
                take_place(old.outputs[1], new)
            modified = True
        # All that was between.
        RemoveUnusedNodesPass()(model)
        if modified:
            model.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(_match(node) is None, node, "is in a block that was not gathered")


def _match(scan: ir.Node) -> _Mixer | None:
    """The block around a scan; None of another node, or where its values are used elsewhere."""
    if scan.op_type != mamba2_scan.name or scan.domain != CANONICAL:
        return None
    x, dt, _, b, c, _, _, _, mask = scan.inputs
    parts = [_flat(each) for each in (x, b, c)]
    cut = None if parts[0] is None else producer(parts[0], "Split")
    if cut is None or mask is None or list(cut.outputs) != parts or not _last_axis(cut):
        return None
    conv = producer(cut.inputs[0], causal_conv.name)
    product = None if conv is None else producer(conv.inputs[0], "Mul")
    if conv is None or product is None or only_reader(product) is not conv:
        return None
    split = producer(dt, "Split")
    if split is None or len(split.outputs) != 3 or split.outputs[2] is not dt:
        return None
    gate, xbc = split.outputs[:2]
    if not _last_axis(split) or not _times_mask(product, xbc, mask):
        return None
    alone = only_reader(conv) is cut and all(
        _read_once(value) for value in (*parts, dt, xbc) if value is not None
    )
    gated = _gated(scan, gate)
    groups = b.shape[2] if b is not None and b.shape is not None else None
    whole = isinstance(groups, int) and split.inputs[0] is not None
    if not alone or not whole or gated is None:
        return None
    assert isinstance(groups, int) and split.inputs[0] is not None
    return _Mixer(split.inputs[0], mask, conv, scan, groups, gated, _norm(gated))


def _read_once(value: ir.Value) -> bool:
    """Whether a value has one reader, and is no output."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def _flat(value: ir.Value | None) -> ir.Value | None:
    """``[B, T, h*n]`` of what is ``[B, T, h, n]`` by a Reshape."""
    reshape = producer(value, "Reshape")
    flat = None if reshape is None else reshape.inputs[0]
    if value is None or flat is None or value.shape is None or flat.shape is None:
        return None
    heads, size = value.shape[2:] if len(value.shape) == 4 else (None, None)
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    same = flat.shape == (*value.shape[:2], heads * size)
    return flat if same and _read_once(value) else None


def _last_axis(split: ir.Node) -> bool:
    value = split.inputs[0]
    axis = split.attributes.get_int("axis", 0)
    return value is not None and value.shape is not None and axis in (-1, len(value.shape) - 1)


def _times_mask(product: ir.Node, xbc: ir.Value, mask: ir.Value) -> bool:
    """Whether it is ``xbc * mask[..., None]``."""
    for one, other in (product.inputs, reversed(product.inputs)):
        wide = producer(other, "Unsqueeze")
        if one is xbc and wide is not None and wide.inputs[0] is mask:
            axes = wide.inputs[1].const_value if wide.inputs[1] is not None else None
            return axes is not None and axes.numpy().tolist() in ([-1], [2])
    return False


def _gated(scan: ir.Node, gate: ir.Value) -> ir.Node | None:
    """The product of the scan's result, flat, and ``silu(gate)``."""
    flat = only_reader(scan)
    product = only_reader(flat) if flat is not None and flat.op_type == "Reshape" else None
    if flat is None or product is None or product.op_type != "Mul":
        return None
    y = flat.outputs[0]
    if y.shape is None or y.shape != gate.shape:
        return None
    for one, other in (product.inputs, reversed(product.inputs)):
        silu = producer(other, "Mul")
        if one is y and silu is not None and only_reader(silu) is product:
            return product if silu_of(silu) is gate else None
    return None


def _norm(gated: ir.Node) -> _Norm | None:
    """The norm of groups of what is gated, by a weight over all of them; None of another."""
    apart = only_reader(gated)
    norm = only_reader(apart) if apart is not None and apart.op_type == "Reshape" else None
    if apart is None or norm is None or norm.op_type != "RMSNormalization":
        return None
    together = only_reader(norm)
    scaled = only_reader(together) if together is not None else None
    if together is None or scaled is None:
        return None
    if (together.op_type, scaled.op_type) != ("Reshape", "Mul"):
        return None
    groups = apart.outputs[0].shape
    ones = norm.inputs[1].const_value if norm.inputs[1] is not None else None
    if groups is None or len(groups) != 4 or not isinstance(groups[2], int) or ones is None:
        return None
    fits = norm.attributes.get_int("axis", -1) in (-1, 3) and bool(np.all(ones.numpy() == 1))
    fits &= together.outputs[0].shape == gated.outputs[0].shape
    weights = [value for value in scaled.inputs if value is not together.outputs[0]]
    if not fits or len(weights) != 1 or weights[0] is None or weights[0].shape is None:
        return None
    inner = gated.outputs[0].shape
    if inner is None or weights[0].shape != (inner[-1],):
        return None
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    return _Norm(weights[0], groups[2], epsilon, scaled)
