"""What passes look for: the nodes around a value, and the patterns that two passes know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

INT64_MAX = np.iinfo(np.int64).max
SWAP_TIME = (0, 2, 1)

# Elementwise, so that a Transpose may come before or after.
ACTIVATIONS = ("Gelu", "Relu", "Swish")


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes ``value``, if it is of that type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def only_reader(node: ir.Node) -> ir.Node | None:
    """The node that alone reads the first output."""
    readers = [use.node for use in node.outputs[0].uses()]
    return readers[0] if len(readers) == 1 and read_only_by(node, readers) else None


def read_only_by(node: ir.Node, readers: Iterable[ir.Node]) -> bool:
    """Whether the first output has one use in each of ``readers`` and no other."""
    value = node.outputs[0]
    found = [use.node for use in value.uses()]
    return not value.is_graph_output() and sorted(map(id, found)) == sorted(map(id, readers))


def silu_of(product: ir.Node) -> ir.Value | None:
    """x, where a Mul is ``x * sigmoid(x)``, as SiLU is written, and nothing else reads x."""
    for x, other in (product.inputs, reversed(product.inputs)):
        sigmoid = producer(other, "Sigmoid")
        if x is not None and sigmoid is not None and sigmoid.inputs[0] is x:
            alone = {use.node for use in x.uses()} == {product, sigmoid}
            return x if alone and only_reader(sigmoid) is product else None
    return None


def transposes(node: ir.Node | None, perm: tuple[int, ...]) -> bool:
    """Whether it is a Transpose by exactly ``perm``."""
    if node is None or node.op_type != "Transpose" or "perm" not in node.attributes:
        return False
    return tuple(node.attributes["perm"].as_ints()) == perm


def is_plain_attention(node: ir.Node) -> bool:
    """Whether it is Attention over q, k, v and a bool mask, with no more to it than a scale."""
    if node.op_type != "Attention" or len(node.inputs) != 4 or len(node.outputs) != 1:
        return False
    mask = node.inputs[3]
    # The tracer writes the others as 0; the mode is that of an output which is not there.
    names = node.attributes.keys() - {"scale", "qk_matmul_output_mode"}
    is_neutral = not any(node.attributes[name].value for name in names)
    return is_neutral and mask is not None and mask.dtype == ir.DataType.BOOL


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


def match_causal_conv(conv: ir.Node) -> CausalConv | None:
    """The causal convolution around a Conv; None where it is another, or its values are used."""
    if conv.op_type != "Conv":
        return None
    kernel = conv.inputs[1]
    if kernel is None or kernel.shape is None or not kernel.shape.is_static():
        return None
    if len(kernel.shape) != 3:
        return None
    channels, depth, width = kernel.shape.numpy()
    if depth != 1 or width < 2 or not _is_plain(conv, channels):
        return None
    concat = producer(conv.inputs[0], "Concat")
    if concat is None or len(concat.inputs) != 2 or not _joins_time(concat):
        return None
    past, new = concat.inputs
    inward = producer(new, "Transpose")
    if past is None or past.shape is None or list(past.shape[1:]) != [channels, width - 1]:
        return None
    if inward is None or not transposes(inward, SWAP_TIME) or not read_only_by(inward, [concat]):
        return None
    tails = [use.node for use in concat.outputs[0].uses() if use.node is not conv]
    if len(tails) != 1 or not _takes_last(tails[0], width - 1):
        return None
    if not read_only_by(concat, [conv, tails[0]]):
        return None
    activation = _activation(conv)
    if activation is None:
        return None
    outward = only_reader(activation[-1] if activation else conv)
    if outward is None or not transposes(outward, SWAP_TIME):
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


def _joins_time(concat: ir.Node) -> bool:
    return concat.attributes["axis"].as_int() in (2, -1)


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


def _activation(conv: ir.Node) -> tuple[ir.Node, ...] | None:
    """The nodes between the convolution and the Transpose; None where they are something else."""
    reader = only_reader(conv)
    if reader is not None:
        is_known = reader.op_type in ACTIVATIONS and len(reader.inputs) == 1
        return (reader,) if is_known else ()
    # SiLU is written as x * sigmoid(x).
    readers = [use.node for use in conv.outputs[0].uses()]
    sigmoid = next((node for node in readers if node.op_type == "Sigmoid"), None)
    product = next((node for node in readers if node.op_type == "Mul"), None)
    if sigmoid is None or product is None or not read_only_by(conv, [sigmoid, product]):
        return None
    return (sigmoid, product) if read_only_by(sigmoid, [product]) else None
