"""The causal depthwise convolution -> the form that ONNX Runtime runs in its blocked layout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ingot.export.passes.constants import integers
from ingot.export.passes.replace import take_place

INT64_MAX = np.iinfo(np.int64).max
SWAP_TIME = (0, 2, 1)

# Elementwise, so that a Transpose may come before or after.
ACTIVATIONS = ("Gelu", "Relu", "Swish")


@dataclass(frozen=True)
class CausalConv:
    """The nodes of what ``graphs.mamba2`` captures to as a causal convolution.

    Attributes:
        inward: ``[B, T, C]`` -> ``[B, C, T]``.
        concat: after the state, ``[B, C, W-1+T]``.
        tail: the last W-1 columns, the new state.
        conv: -> ``[B, C, T]``.
        activation: elementwise nodes on the way, in order.
        outward: -> ``[B, T, C]``.
    """

    inward: ir.Node
    concat: ir.Node
    tail: ir.Node
    conv: ir.Node
    activation: tuple[ir.Node, ...]
    outward: ir.Node


class CausalConvToBlocked(ir.passes.InPlacePass):
    """Appends to the state in ``[B, T, C]`` and convolves an image of height 1, ``[B, C, 1, T]``.

    ONNX Runtime runs a two-dimensional convolution in a layout with blocks of channels, where a
    depthwise one is vectorised over the channels; its one-dimensional one is not. The transposes
    next to it become part of the change of layout. Where a processor has no such layout, the
    result is the same and the cost about that of the form it replaces.

    Matches what ``graphs.mamba2`` captures to: Transpose, Concat after a state, a depthwise Conv
    without padding, an activation or none, Transpose back, and a Slice of the last W-1 columns as
    the new state. With any other use of a value on the way nothing changes.

    Postcondition: the states keep their names and shapes; the activation works on ``[B, T, C]``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            match = match_causal_conv(node) if node.op_type == "Conv" else None
            if match is not None:
                _rewrite(model, match)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def match_causal_conv(conv: ir.Node) -> CausalConv | None:
    """The causal convolution around a Conv; None where it is another, or its values are used."""
    kernel = conv.inputs[1]
    if kernel is None or kernel.shape is None or not kernel.shape.is_static():
        return None
    if len(kernel.shape) != 3:
        return None
    channels, depth, width = kernel.shape.numpy()
    if depth != 1 or width < 2 or not _is_plain(conv, channels):
        return None
    concat = _producer(conv.inputs[0], "Concat")
    if concat is None or len(concat.inputs) != 2 or not _has_axis(concat, 2):
        return None
    past, new = concat.inputs
    inward = _producer(new, "Transpose")
    if past is None or past.shape is None or list(past.shape[1:]) != [channels, width - 1]:
        return None
    if inward is None or not _swaps_time(inward) or not _read_only_by(inward, [concat]):
        return None
    tails = [use.node for use in concat.outputs[0].uses() if use.node is not conv]
    if len(tails) != 1 or not _takes_last(tails[0], width - 1):
        return None
    if not _read_only_by(concat, [conv, tails[0]]):
        return None
    activation = _activation(conv)
    if activation is None:
        return None
    last = activation[-1] if activation else conv
    outward = _only_reader(last)
    if outward is None or not _swaps_time(outward):
        return None
    return CausalConv(inward, concat, tails[0], conv, activation, outward)


def _is_plain(conv: ir.Node, channels: int) -> bool:
    """Depthwise, stride and dilation 1, no padding."""
    attributes = conv.attributes
    if "group" not in attributes or attributes["group"].as_int() != channels:
        return False
    if "auto_pad" in attributes and attributes["auto_pad"].as_string() not in ("NOTSET", "VALID"):
        return False
    for name, neutral in (("pads", 0), ("strides", 1), ("dilations", 1)):
        if name in attributes and set(attributes[name].as_ints()) != {neutral}:
            return False
    return True


def _activation(conv: ir.Node) -> tuple[ir.Node, ...] | None:
    """The nodes between the convolution and the Transpose; None where they are something else."""
    readers = [use.node for use in conv.outputs[0].uses()]
    if len(readers) == 1 and _read_only_by(conv, readers):
        if readers[0].op_type in ACTIVATIONS and len(readers[0].inputs) == 1:
            return (readers[0],)
        return ()
    # SiLU is written as x * sigmoid(x).
    sigmoid = next((node for node in readers if node.op_type == "Sigmoid"), None)
    product = next((node for node in readers if node.op_type == "Mul"), None)
    if sigmoid is None or product is None or not _read_only_by(conv, [sigmoid, product]):
        return None
    if not _read_only_by(sigmoid, [product]):
        return None
    return sigmoid, product


def _rewrite(model: ir.Model, match: CausalConv) -> None:
    past, kernel, bias = match.concat.inputs[0], *(*match.conv.inputs[1:], None)[:2]
    assert past is not None and past.shape is not None and kernel is not None
    channels, history = past.shape[1], past.shape[2]
    assert isinstance(channels, int) and isinstance(history, int)
    one, two = integers(model, [1]), integers(model, [2])
    rows = _transpose(past, SWAP_TIME)
    window = ir.node("Concat", [rows.outputs[0], match.inward.inputs[0]], attributes={"axis": 1})
    # starts, ends, axes
    last = [integers(model, [n]) for n in (-history, INT64_MAX, 1)]
    tail = ir.node("Slice", [window.outputs[0], *last])
    state = _transpose(tail.outputs[0], SWAP_TIME)
    image = ir.node("Unsqueeze", [window.outputs[0], one])
    planes = _transpose(image.outputs[0], (0, 3, 1, 2))
    flat_kernel = ir.node("Unsqueeze", [kernel, two])
    inputs = [planes.outputs[0], flat_kernel.outputs[0], *([bias] if bias is not None else [])]
    conv = ir.node("Conv", inputs, attributes={"group": channels})
    back = _transpose(conv.outputs[0], (0, 2, 3, 1))
    result = ir.node("Squeeze", [back.outputs[0], one])
    made = [rows, window, tail, state, image, planes, flat_kernel, conv, back, result]
    model.graph.insert_before(match.conv, made)
    take_place(match.tail.outputs[0], state.outputs[0])
    before, after = match.conv.outputs[0], match.outward.outputs[0]
    result.outputs[0].type, result.outputs[0].shape = after.type, after.shape
    ir.convenience.replace_all_uses_with(before, result.outputs[0])
    for node in match.activation:
        node.outputs[0].type, node.outputs[0].shape = after.type, after.shape
    source = match.outward.inputs[0]
    assert source is not None
    take_place(after, source)
    done = [match.outward, match.tail, match.conv, match.concat, match.inward]
    model.graph.remove(done, safe=True)


def _transpose(value: ir.Value, perm: tuple[int, ...]) -> ir.Node:
    return ir.node("Transpose", [value], attributes={"perm": perm})


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _only_reader(node: ir.Node) -> ir.Node | None:
    readers = [use.node for use in node.outputs[0].uses()]
    return readers[0] if len(readers) == 1 and _read_only_by(node, readers) else None


def _read_only_by(node: ir.Node, readers: Iterable[ir.Node]) -> bool:
    """Whether the first output has one use in each of ``readers`` and no other."""
    value = node.outputs[0]
    found = [use.node for use in value.uses()]
    return not value.is_graph_output() and sorted(map(id, found)) == sorted(map(id, readers))


def _has_axis(node: ir.Node, axis: int) -> bool:
    return node.attributes["axis"].as_int() in (axis, axis - 3)


def _swaps_time(node: ir.Node) -> bool:
    if node.op_type != "Transpose" or "perm" not in node.attributes:
        return False
    return tuple(node.attributes["perm"].as_ints()) == SWAP_TIME


def _takes_last(node: ir.Node, columns: int) -> bool:
    """Whether a Slice takes the last columns of a matrix in a batch."""
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return False
    numbers = []
    for value in node.inputs[1:]:
        constant = ir.convenience.get_const_tensor(value) if value is not None else None
        if constant is None or constant.size != 1:
            return False
        numbers.append(constant.numpy().item())
    starts, ends, axes, *steps = numbers
    return starts == -columns and ends >= INT64_MAX // 2 and axes in (2, -1) and steps in ([], [1])
