"""Narrower numbers than eager PyTorch has, in one place; and what is below rounding itself."""

from __future__ import annotations

import numpy as np
import onnx

from proof.editing import Edit, Editor, rounded, scaled
from proof.fault import Fault, Where, in_layer
from proof.faults.constants import set_of
from proof.planting import in_graph, in_kernel

KIND, BELOW = "rounding", "below the floor"
BF16, F16, F32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
LAYER, KERNEL = Where(1), in_layer(1)
SSM = "present_states.1.ssm"


def value(name: str, to: int, back: int = F32) -> Edit:
    """A value goes through another type."""
    return lambda edit: edit.change(name, rounded(to, back))


def made(weight: str, to: int, back: int = F32) -> Edit:
    """What is made of a weight does."""
    return lambda edit: edit.change(edit.made_of(weight), rounded(to, back))


def router(to: int) -> Edit:
    """The logits that the last mixture of experts chooses by do; the router's own are exact."""

    def apply(edit: Editor) -> None:
        for node in edit.alike(edit.nodes("MoE", "MoeDispatch")[-1]):
            edit.input_of(node, 1, rounded(to))

    return apply


def larger(name: str, factor: float, dtype: object = np.float32) -> Edit:
    """A value is so much larger."""
    return lambda edit: edit.change(name, scaled(factor, dtype))


def product(weight: str, factor: float, dtype: object = np.float32) -> Edit:
    """A product is."""
    return lambda edit: edit.change(edit.made_of(weight), scaled(factor, dtype))


FAULTS: list[Fault] = [
    in_graph("state in bfloat16", "mamba2 onnx", KIND, value(SSM, BF16), LAYER, ("numbers",)),
    in_graph("state in bfloat16", "mamba2 ort", KIND, value(SSM, BF16), LAYER, ("numbers",)),
    in_graph("state in bfloat16", "mamba2 fp16", KIND, value(SSM, BF16), LAYER),
    in_graph("state in float16", "mamba2 fp16", KIND, value(SSM, F16), LAYER),
    in_kernel("state in float16", "mamba2 ort", KIND, value(SSM, F16), KERNEL),
    in_kernel(
        "values in float16",
        "granite ort",
        KIND,
        made("layers.1.self_attn.v_proj.weight", F16),
        KERNEL,
    ),
    in_graph(
        "values in bfloat16",
        "granite onnx",
        KIND,
        made("layers.1.self_attn.v_proj.weight", BF16),
        LAYER,
        ("numbers",),
    ),
    in_graph(
        "norm in float16",
        "olmoe ort",
        KIND,
        made("layers.1.input_layernorm.weight", F16),
        LAYER,
        ("numbers",),
    ),
    in_graph(
        "products in bfloat16, float16",
        "granite fp16",
        KIND,
        made("layers.1.mlp.down_proj.weight", BF16, F16),
        LAYER,
    ),
    in_graph(
        "logits in float16", "granite ort", KIND, value("logits", F16), Where(None), ("numbers",)
    ),
    in_kernel("logits in float16", "olmoe onnx", KIND, value("logits", F16), in_layer(None)),
    in_graph(
        "cosines in float16", "jetmoe ort", KIND, value("cos", F16), Where(None), ("numbers",)
    ),
    in_graph("experts chosen in float16", "olmoe ort", KIND, router(F16), LAYER),
    in_graph("experts chosen in bfloat16", "jetmoe onnx", KIND, router(BF16), LAYER),
    in_kernel("experts chosen in bfloat16", "olmoe 64 experts onnx", KIND, router(BF16), KERNEL),
    in_kernel("experts chosen in bfloat16", "olmoe 64 experts ort", KIND, router(BF16), KERNEL),
    in_graph(
        "logits times 1.003, float16",
        "granite fp16",
        KIND,
        larger("logits", 1.003, np.float16),
        Where(None),
    ),
    in_graph(
        "eps 1e-3, float16",
        "olmoe fp16",
        KIND,
        set_of("RMSNormalization", 4, "epsilon", 1e-3),
        LAYER,
    ),
    in_kernel(
        "products 5 % off, float16",
        "granite fp16",
        KIND,
        product("layers.1.self_attn.o_proj.weight", 1.05, np.float16),
        KERNEL,
    ),
    in_kernel(
        "products 5 % off, float16",
        "olmoe fp16",
        KIND,
        product("layers.1.self_attn.o_proj.weight", 1.05, np.float16),
        KERNEL,
    ),
    in_kernel(
        "logits times 1.003",
        "granite ort",
        KIND,
        larger("logits", 1.003),
        Where(None, ("kernels",), also=(1,)),
    ),
    in_kernel(
        "logits times 1 + 6e-8", "granite ort", BELOW, larger("logits", 1.00000006), None, ()
    ),
    in_kernel(
        "logits times 1 + 1.2e-7", "mamba2 onnx", BELOW, larger("logits", 1.00000012), None, ()
    ),
    in_kernel(
        "products times 1 + 1.2e-7",
        "granite onnx",
        BELOW,
        product("layers.1.self_attn.o_proj.weight", 1.00000012),
        None,
        (),
    ),
    in_kernel(
        "eps 1.00001e-5",
        "olmoe ort",
        BELOW,
        set_of("RMSNormalization", 5, "epsilon", 1.00001e-5),
        None,
        (),
    ),
    in_kernel(
        "products times 1 + 1e-4 rounded away, float16",
        "granite fp16",
        BELOW,
        product("layers.1.self_attn.o_proj.weight", 1.0001, np.float16),
        None,
        (),
    ),
]
