"""The causal depthwise convolution -> the form that ONNX Runtime runs in its blocked layout."""

from __future__ import annotations

import onnx_ir as ir

from ingot.export.passes.constants import integers
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.match import (
    INT64_MAX,
    SWAP_TIME,
    CausalConv,
    match_causal_conv,
    only_reader,
    producer,
    transposes,
)
from ingot.export.passes.nodes import Nodes
from ingot.export.passes.replace import take_place

# Between [B, 1, T, C] and [B, C, 1, T].
TO_PLANES, FROM_PLANES = (0, 3, 1, 2), (0, 2, 3, 1)


class CausalConvToBlocked(GraphPass):
    """Appends to the state in ``[B, T, C]`` and convolves an image of height 1, ``[B, C, 1, T]``.

    ONNX Runtime runs a two-dimensional convolution in a layout with blocks of channels, where a
    depthwise one is vectorised over the channels; its one-dimensional one is not. The transposes
    next to it become part of the change of layout. Where a processor has no such layout, the
    result is the same and the cost about that of the form it replaces.

    Matches what ``graphs.mamba2`` captures to: Transpose, Concat after a state, a depthwise Conv
    without padding, an activation or none, Transpose back, and a Slice of the last W-1 columns as
    the new state. With any other use of a value on the way nothing changes.
    """

    looks_for = ("Conv",)
    requires = GraphPass.any_graph

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            match = match_causal_conv(node)
            if match is not None:
                _rewrite(model, match)
                modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(match_causal_conv(node) is None, node, "is causal and was not moved")
            image = node.inputs[0] if node.op_type == "Conv" else None
            if transposes(producer(image, "Transpose"), TO_PLANES):
                # Another node between would keep the transposes out of the blocked layout.
                absorbed = transposes(only_reader(node), FROM_PLANES)
                self.ensure(absorbed, node, "is not followed by the transpose to [B, 1, T, C]")


def _rewrite(model: ir.Model, match: CausalConv) -> None:
    past, kernel, bias = match.concat.inputs[0], *(*match.conv.inputs[1:], None)[:2]
    assert past is not None and past.shape is not None
    channels, history = past.shape[1], past.shape[2]
    assert isinstance(channels, int) and isinstance(history, int)
    one, two = integers(model, [1]), integers(model, [2])
    nodes = Nodes()
    rows = nodes.add("Transpose", past, perm=SWAP_TIME)
    window = nodes.add("Concat", rows, match.inward.inputs[0], axis=1)
    # starts, ends, axes
    last = [integers(model, [n]) for n in (-history, INT64_MAX, 1)]
    tail = nodes.add("Slice", window, *last)
    state = nodes.add("Transpose", tail, perm=SWAP_TIME)
    image = nodes.add("Unsqueeze", window, one)
    planes = nodes.add("Transpose", image, perm=TO_PLANES)
    flat_kernel = nodes.add("Unsqueeze", kernel, two)
    weights = [flat_kernel] if bias is None else [flat_kernel, bias]
    conv = nodes.add("Conv", planes, *weights, group=channels)
    back = nodes.add("Transpose", conv, perm=FROM_PLANES)
    result = nodes.add("Squeeze", back, one)
    model.graph.insert_before(match.conv, nodes)
    take_place(match.tail.outputs[0], state)
    before, after = match.conv.outputs[0], match.outward.outputs[0]
    result.type, result.shape = after.type, after.shape
    ir.convenience.replace_all_uses_with(before, result)
    for node in match.activation:
        node.outputs[0].type, node.outputs[0].shape = after.type, after.shape
    source = match.outward.inputs[0]
    assert source is not None
    take_place(after, source)
    done = [match.outward, match.tail, match.conv, match.concat, match.inward]
    model.graph.remove(done, safe=True)
