"""ONNX Runtime's kernels compute something else; the files are right."""

from __future__ import annotations

import numpy as np
import onnx

from proof.editing import Edit, Editor, attribute, plus, scaled, value_of
from proof.fault import Fault, in_layer
from proof.faults.constants import set_of
from proof.planting import in_kernel

KIND = "kernel"
KERNEL, FIRST = in_layer(1), in_layer(0)


def through_float16(operator: str, index: int) -> Edit:
    """One input of every such node is read in float16."""

    def make(edit: Editor, value: str) -> str:
        narrow = edit("Cast", value, to=onnx.TensorProto.FLOAT16)
        return edit("Cast", narrow, to=onnx.TensorProto.FLOAT)

    def apply(edit: Editor) -> None:
        for node in edit.nodes(operator):
            for each in edit.alike(node):
                edit.input_of(each, index, make)

    return apply


def fewer_experts(edit: Editor) -> None:
    """One expert less, in the last mixture."""
    for node in edit.alike(edit.nodes("MoE", "MoeDispatch")[-1]):
        name = "k" if node.op_type == "MoE" else "top_k"
        attribute(node, name, value_of(node, name) - 1)


def ties_the_other_way(edit: Editor) -> None:
    """Among equal logits the other expert: each is a little larger than the one before it."""
    for node in edit.nodes("MoE"):
        for each in edit.alike(node):
            edit.input_of(each, 1, _leaning)


def _leaning(edit: Editor, value: str) -> str:
    lean = edit.constant(np.arange(8) * 1e-3, np.float32)
    return edit("Add", value, lean)


def input_overwritten(edit: Editor) -> None:
    """The kernel reads what it has written: its input is twice itself."""
    edit.input_of(edit.nodes("MoE")[-1], 0, scaled(2.0))


def choice_plus_one(edit: Editor) -> None:
    """The next expert takes the place of the one that was chosen."""
    node = edit.nodes("MoeLinear")[-1]

    def next_one(edit: Editor, value: str) -> str:
        return edit("Mod", edit("Add", value, edit.constant(1)), edit.constant(4))

    edit.input_of(node, 1, next_one)


def larger(operator: str, index: int, factor: float) -> Edit:
    """What one node gives is larger."""
    return lambda edit: edit.change(edit.nodes(operator)[index].output[0], scaled(factor))


FAULTS: list[Fault] = [
    in_kernel(
        "another scale",
        "granite ort",
        KIND,
        set_of("GroupQueryAttention", 1, "scale", 0.07),
        KERNEL,
    ),
    in_kernel(
        "scale of the head's width",
        "granite ort",
        KIND,
        set_of("GroupQueryAttention", 0, "scale", 0.0),
        FIRST,
    ),
    in_kernel(
        "softcap 5", "olmoe ort", KIND, set_of("GroupQueryAttention", 1, "softcap", 5.0), KERNEL
    ),
    in_kernel(
        "a window of 16",
        "jetmoe ort",
        KIND,
        set_of("GroupQueryAttention", 1, "local_window_size", 16),
        KERNEL,
    ),
    in_kernel(
        "another scale, float16",
        "granite fp16",
        KIND,
        set_of("Attention", 1, "scale", 0.08),
        KERNEL,
    ),
    in_kernel("another scale", "olmoe onnx", KIND, set_of("Attention", 1, "scale", 0.26), KERNEL),
    in_kernel("one expert less", "olmoe ort", KIND, fewer_experts, KERNEL),
    in_kernel("one expert less", "olmoe onnx", KIND, fewer_experts, KERNEL),
    in_kernel("one expert less", "jetmoe ort", KIND, fewer_experts, KERNEL),
    in_kernel("one expert less, float16", "olmoe fp16", KIND, fewer_experts, KERNEL),
    in_kernel(
        "weights always sum to 1",
        "olmoe ort",
        KIND,
        set_of("MoE", 1, "normalize_routing_weights", 1),
        KERNEL,
    ),
    in_kernel("experts read in float16", "olmoe ort", KIND, through_float16("MoE", 0), FIRST),
    in_kernel(
        "logits read in float16", "olmoe 64 experts ort", KIND, through_float16("MoE", 1), FIRST
    ),
    in_kernel("later experts preferred", "olmoe ort", KIND, ties_the_other_way, FIRST),
    in_kernel("an input that is overwritten", "olmoe ort", KIND, input_overwritten, KERNEL),
    in_kernel("an input that is overwritten", "jetmoe ort", KIND, input_overwritten, KERNEL),
    in_kernel("the next expert", "jetmoe onnx", KIND, choice_plus_one, KERNEL),
    in_kernel(
        "scan's scale", "mamba2 ort", KIND, set_of("LinearAttention", 3, "scale", 1.01), KERNEL
    ),
    in_kernel(
        "time step clamped at 0.5",
        "mamba2 onnx",
        KIND,
        set_of("Mamba2Scan", 1, "dt_max", 0.5),
        KERNEL,
    ),
    in_kernel(
        "time step clamped at 0.5, float16",
        "mamba2 fp16",
        KIND,
        set_of("Mamba2Scan", 1, "dt_max", 0.5),
        KERNEL,
    ),
    in_kernel(
        "keys read in float16",
        "granite ort",
        KIND,
        through_float16("GroupQueryAttention", 1),
        FIRST,
    ),
    in_kernel("products of float16", "granite onnx", KIND, through_float16("MatMul", 0), FIRST),
    in_kernel(
        "eps 1e-4", "granite onnx", KIND, set_of("RMSNormalization", 2, "epsilon", 1e-4), KERNEL
    ),
    in_kernel(
        "positions from 1",
        "granite ort",
        KIND,
        lambda e: e.change("position_ids", plus(1), rank=2),
        FIRST,
    ),
    in_kernel(
        "scan's scale",
        "hybrid ort",
        KIND,
        set_of("LinearAttention", 3, "scale", 1.01),
        in_layer(2),
    ),
    in_kernel("one expert less", "hybrid onnx", KIND, fewer_experts, in_layer(3)),
    # Less than a half type shows.
    in_kernel(
        "logits 0.2 % too large, float16",
        "olmoe fp16",
        KIND,
        lambda e: e.change("logits", scaled(1.002)),
        in_layer(None),
    ),
    in_kernel(
        "eps 1e-4, float16",
        "mamba2 fp16",
        KIND,
        set_of("RMSNormalization", 2, "epsilon", 1e-4),
        KERNEL,
    ),
    in_kernel(
        "gate 0.1 % too large, float16", "granite fp16", KIND, larger("MatMul", 4, 1.001), FIRST
    ),
    in_kernel(
        "gate 0.1 % too large, bfloat16", "granite bf16", KIND, larger("MatMul", 4, 1.001), FIRST
    ),
    in_kernel(
        "state 0.1 % too large, bfloat16",
        "mamba2 bf16",
        KIND,
        lambda e: e.change("present_states.1.ssm", scaled(1.001)),
        KERNEL,
    ),
]
