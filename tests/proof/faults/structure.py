"""Nodes that are added, missing, replaced or wired otherwise, also in branches and bodies."""

from __future__ import annotations

import numpy as np
import onnx

from proof.editing import (
    Edit,
    Editor,
    Make,
    attribute,
    plus,
    reversed_along,
    rolled,
    scaled,
    value_of,
)
from proof.fault import By, Fault, Where
from proof.planting import in_graph

KIND = "structure"
LAYER, OUTSIDE = Where(1), Where(None)
# Between the last layer and the norm behind it.
BEHIND = Where(1, also=(None,))
NUMBERS: tuple[By, ...] = ("numbers",)


def swapped(operator: str, number: int, first: int, second: int) -> Edit:
    """Two inputs of a node change places."""

    def apply(edit: Editor) -> None:
        node = edit.anywhere(operator)[number]
        node.input[first], node.input[second] = node.input[second], node.input[first]

    return apply


def passed_by(node_of: str) -> Edit:
    """What reads the node that a weight goes into reads what went in."""

    def apply(edit: Editor) -> None:
        node = edit.reader(node_of)
        _rewire(edit, node.output[0], node.input[0])

    return apply


def _rewire(edit: Editor, value: str, to: str) -> None:
    for node in edit.graph.node:
        for index, name in enumerate(node.input):
            if name == value:
                node.input[index] = to


def no_residual(edit: Editor) -> None:
    """The last layer's output is the second of its two summands."""
    read = next(n for n in edit.nodes("RMSNormalization") if n.input[1].endswith(_LAST_NORM))
    total = edit.maker(read.input[0])
    _rewire(edit, total.output[0], total.input[1])


_LAST_NORM = ("model.norm.weight", "norm_f.weight")


def state_of_layer_zero(edit: Editor) -> None:
    """The scan of layer 1 begins with the state of layer 0."""
    first, second = edit.nodes("Mamba2Scan")
    second.input[7] = first.input[7]
    # A graph's input has to be read.
    edit.change("past_states.0.conv", beside("past_states.1.ssm"), rank=3)


def beside(other: str) -> Make:
    """The same, and nothing of something else, which is read by that."""

    def make(edit: Editor, value: str) -> str:
        nothing = edit("Mul", edit("ReduceMax", other, keepdims=0), edit.constant(0, np.float32))
        return edit("Add", value, nothing)

    return make


def replaced(operator: str, number: int, by: str) -> Edit:
    """A node has another operator."""

    def apply(edit: Editor) -> None:
        edit.anywhere(operator)[number].op_type = by

    return apply


def between(value: str, make: Make, rank: int = 3) -> Edit:
    """A node more behind a value."""
    return lambda edit: edit.change(value, make, rank=rank)


def behind(weight: str, make: Make) -> Edit:
    """A node more behind what is made of a weight."""
    return lambda edit: edit.change(edit.made_of(weight), make)


def before(operator: str, number: int, index: int, make: Make) -> Edit:
    """A node more before one input of a node."""
    return lambda edit: edit.input_of(edit.nodes(operator)[number], index, make)


def in_body(function: str, operator: str, number: int, name: str, value: object) -> Edit:
    """An attribute inside of a function's body."""
    return lambda edit: attribute(edit.body(function, operator)[number], name, value)


def body_operator(function: str, operator: str, number: int, by: str) -> Edit:
    """An operator inside of a function's body."""

    def apply(edit: Editor) -> None:
        edit.body(function, operator)[number].op_type = by

    return apply


def body_rewired(function: str, operator: str, index: int, to: str) -> Edit:
    """An input of the first such node of a body."""

    def apply(edit: Editor) -> None:
        edit.body(function, operator)[0].input[index] = to

    return apply


def body_constant(function: str, name: str, value: int) -> Edit:
    """A constant of a body."""

    def apply(edit: Editor) -> None:
        (node,) = (n for n in edit.body(function, "Constant") if n.output[0] == name)
        (held,) = node.attribute
        if held.type == onnx.AttributeProto.INT:
            attribute(node, held.name, value)
        elif held.type == onnx.AttributeProto.INTS:
            attribute(node, held.name, [value])
        elif held.type == onnx.AttributeProto.FLOAT:
            attribute(node, held.name, float(value))
        else:
            array = onnx.numpy_helper.to_array(held.t)
            other = np.full(array.shape, value, array.dtype)
            attribute(node, held.name, onnx.numpy_helper.from_array(other))

    return apply


def other_perm(before: list[int], after: list[int]) -> Edit:
    """The last such permutation, branches included."""

    def apply(edit: Editor) -> None:
        node = [n for n in edit.anywhere("Transpose") if value_of(n, "perm") == before][-1]
        attribute(node, "perm", after)

    return apply


def clamped_mask(edit: Editor, value: str) -> str:
    """The first column of the mask is seen by everybody."""
    first = edit("Slice", value, *(edit.constant([n]) for n in (0, 1, 1)))
    rest = edit("Slice", value, *(edit.constant([n]) for n in (1, 2**62, 1)))
    ones = edit("Max", first, edit.constant(1))
    return edit("Concat", ones, rest, axis=1)


def all_seen(edit: Editor, value: str) -> str:
    """Nothing is padding."""
    return edit("Max", value, edit.constant(1))


def identity(edit: Editor, value: str) -> str:
    """The same once more."""
    return edit("Identity", value)


def halved_in_row_one(edit: Editor, value: str) -> str:
    """Row 1 has row 0's."""
    zero = edit.constant([0])
    return edit("Expand", edit("Gather", value, zero, axis=0), edit("Shape", value))


GQA = "GroupQueryAttention"
KV = "layers.1.self_attn.v_proj.weight"
FAULTS: list[Fault] = [
    in_graph(
        "a query norm passed by",
        "olmoe onnx",
        KIND,
        passed_by("layers.1.self_attn.q_norm.weight"),
        LAYER,
    ),
    in_graph("a norm passed by", "mamba2 ort", KIND, passed_by("layers.1.norm.weight"), LAYER),
    in_graph(
        "a norm passed by",
        "granite fp16",
        KIND,
        passed_by("layers.1.post_attention_layernorm.weight"),
        LAYER,
    ),
    in_graph("no residual", "granite ort", KIND, no_residual, BEHIND),
    in_graph("no residual", "mamba2 onnx", KIND, no_residual, BEHIND),
    in_graph("keys for values", "granite onnx", KIND, swapped("Attention", 1, 1, 2), LAYER),
    in_graph("past behind the new", "olmoe onnx", KIND, swapped("Concat", 4, 0, 1), None, NUMBERS),
    in_graph("sine for cosine", "granite ort", KIND, replaced("Cos", 0, "Sin"), OUTSIDE, NUMBERS),
    in_graph(
        "gate without its sigmoid",
        "granite onnx",
        KIND,
        replaced("Sigmoid", 1, "Tanh"),
        LAYER,
        NUMBERS,
    ),
    in_graph(
        "no sign in the rotation",
        "jetmoe ort",
        KIND,
        replaced("Neg", 2, "Identity"),
        LAYER,
        NUMBERS,
    ),
    in_graph("later for earlier", "granite onnx", KIND, replaced("GreaterOrEqual", 0, "Greater")),
    in_graph(
        "softplus is ReLU", "mamba2 ort", KIND, replaced("Softplus", 1, "Relu"), LAYER, NUMBERS
    ),
    in_graph(
        "first column always seen",
        "granite ort",
        KIND,
        between("attention_mask", clamped_mask, 2),
        OUTSIDE,
        NUMBERS,
    ),
    in_graph(
        "padding is seen",
        "olmoe onnx",
        KIND,
        between("attention_mask", all_seen, 2),
        OUTSIDE,
        NUMBERS,
    ),
    in_graph(
        "padding is seen",
        "mamba2 onnx",
        KIND,
        between("attention_mask", all_seen, 2),
        None,
        NUMBERS,
    ),
    in_graph("positions from 1", "granite ort", KIND, between("position_ids", plus(1), 2), OUTSIDE),
    in_graph("one node more that does nothing", "granite onnx", KIND, behind(KV, identity), LAYER),
    in_graph("one node more that does nothing", "olmoe fp16", KIND, behind(KV, identity), LAYER),
    in_graph(
        "row 1 has row 0's values", "olmoe ort", KIND, behind(KV, halved_in_row_one), LAYER, NUMBERS
    ),
    in_graph("values times 1.0001", "granite onnx", KIND, behind(KV, scaled(1.0001)), LAYER),
    in_graph(
        "values times 1.01, float16",
        "jetmoe fp16",
        KIND,
        behind("layers.1.self_attention.kv_proj.weight", scaled(1.01, np.float16)),
        LAYER,
    ),
    in_graph(
        "logits times 1.001", "mamba2 ort", KIND, between("logits", scaled(1.001)), OUTSIDE, NUMBERS
    ),
    in_graph(
        "logits the other way round",
        "granite onnx",
        KIND,
        between("logits", reversed_along(2)),
        OUTSIDE,
        NUMBERS,
    ),
    in_graph(
        "heads rolled by one",
        "granite onnx",
        KIND,
        behind("layers.1.self_attn.q_proj.weight", rolled(2)),
        LAYER,
        NUMBERS,
    ),
    in_graph(
        "the key's state is the value's",
        "jetmoe onnx",
        KIND,
        swapped("Attention", 0, 1, 2),
        Where(0),
        NUMBERS,
    ),
    in_graph(
        "router read before its norm",
        "jetmoe onnx",
        KIND,
        before("MoeDispatch", 1, 1, reversed_along(1)),
        LAYER,
    ),
    in_graph(
        "router not reversed",
        "olmoe ort",
        KIND,
        before("MoE", 1, 1, reversed_along(1)),
        LAYER,
        NUMBERS,
    ),
    in_graph(
        "experts' choice rolled",
        "jetmoe onnx",
        KIND,
        before("MoeLinear", 3, 1, reversed_along(1)),
        LAYER,
    ),
    in_graph(
        "an output for its input",
        "olmoe ort",
        KIND,
        swapped("Where", 0, 1, 2),
        Where(None),
        NUMBERS,
    ),
    in_graph(
        "state of layer 0 in layer 1", "mamba2 onnx", KIND, state_of_layer_zero, LAYER, NUMBERS
    ),
    in_graph("another branch's turn", "mamba2 ort", KIND, other_perm([0, 1, 3, 2], [0, 1, 2, 3])),
    in_graph("B for C", "mamba2 onnx", KIND, swapped("Mamba2Scan", 1, 3, 4), LAYER, NUMBERS),
    in_graph(
        "B for C for several tokens", "mamba2 ort", KIND, swapped("LinearAttention", 3, 0, 1), None
    ),
    in_graph(
        "softmax over tokens",
        "olmoe onnx",
        KIND,
        in_body("MoeDispatch", "Softmax", 0, "axis", 0),
        None,
    ),
    in_graph(
        "smallest logits win",
        "olmoe onnx",
        KIND,
        in_body("MoeDispatch", "TopK", 0, "largest", 0),
        None,
    ),
    in_graph("tiles of 8", "olmoe onnx", KIND, body_constant("MoeDispatch", "sixteen", 8), None),
    in_graph(
        "softplus is its negative",
        "mamba2 onnx",
        KIND,
        body_operator("Mamba2Scan", "Relu", 0, "Neg"),
        None,
    ),
    in_graph(
        "no skip", "mamba2 onnx", KIND, body_rewired("Mamba2Scan", "CastLike", 0, "Y_scan"), None
    ),
    in_graph(
        "triangle from the diagonal",
        "mamba2 onnx",
        KIND,
        body_constant("Mamba2Scan", "below", 0),
        None,
    ),
    in_graph(
        "a floor of -20 for dA",
        "mamba2 onnx",
        KIND,
        body_constant("Mamba2Scan", "dA_floor", -20),
        None,
    ),
    in_graph(
        "no activation",
        "mamba2 fp16",
        KIND,
        body_operator("CausalConv", "Sigmoid", 0, "Tanh"),
        None,
    ),
    in_graph(
        "softmax over tokens, float16",
        "olmoe fp16",
        KIND,
        in_body("MoeDispatch", "Softmax", 0, "axis", 0),
        None,
    ),
]
