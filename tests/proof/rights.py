"""Exports that are unusual and right: each has to pass, and by plain ``passed``.

Odd sizes, extreme constants, heavy tails, massive activations, routers that tie, other dtypes and
tasks, adapters. Where configs are alike, one trace does for several, since only weights differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from proof.bases import DYNAMIC, GIVEN, NARROW, OWN, UNEVEN, Base, Tensors, exact


def heavy(tensors: Tensors) -> None:
    """Matrices with the tails of a Student t of three degrees of freedom."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and "embed" not in name:
            # A normal over the root of a chi-squared, of three squares of normals.
            squares = torch.randn((3, *tensor.shape), generator=generator).square().sum(0) / 3
            tensor /= squares.sqrt().clamp(min=0.05).to(tensor.dtype)


def massive(first: float, second: float) -> Callable[[Tensors], None]:
    """Two channels of the hidden state are so much larger, from the embedding on."""

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if "embed" in name:
                tensor[:, 5] *= first
                tensor[:, 40] *= second

    return change


def tied_routers(apart: float) -> Callable[[Tensors], None]:
    """Pairs of experts whose rows of the router differ by so little."""

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("mlp.gate.weight", "router.layer.weight")):
                tensor[1::2] = tensor[::2] * (1 + apart)

    return change


def equal_routers(tensors: Tensors) -> None:
    """Every expert is as good as another."""
    for name, tensor in tensors.items():
        if name.endswith(("mlp.gate.weight", "router.layer.weight")):
            tensor[:] = tensor[:1]


def zero_routers(tensors: Tensors) -> None:
    """Routers that have learned nothing."""
    for name, tensor in tensors.items():
        if name.endswith(("mlp.gate.weight", "router.layer.weight")):
            tensor.zero_()


def large_norms(least: float, most: float) -> Callable[[Tensors], None]:
    """Norms whose weights reach from 10 to the power of ``least`` to that of ``most``."""

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if "norm" in name:
                tensor *= torch.logspace(least, most, tensor.numel()).to(tensor.dtype)

    return change


def zeros(*endings: str) -> Callable[[Tensors], None]:
    """Every tensor whose name ends so is zero."""

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith(endings):
                tensor.zero_()

    return change


def unknown_tokens(tensors: Tensors) -> None:
    """Half of the tokens are embedded as zeros, as padding is."""
    for name, tensor in tensors.items():
        if "embed" in name:
            tensor[: len(tensor) // 2] = 0


def shifted(ending: str, by: float) -> Callable[[Tensors], None]:
    """Every tensor whose name ends so is more or less by so much."""

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith(ending):
                tensor += by

    return change


def lora(base: Path, folder: Path) -> None:
    """An adapter of every projection of the attention."""
    from adapters import make_adapter

    make_adapter(base, folder, target_modules=["q_proj", "v_proj", "o_proj"])


_ONE = {"num_experts": 8, "num_experts_per_tok": 1}
_MADE: list[Base] = []


def right(name: str, family: str, target: str = "ort", **more: Any) -> None:
    """One more; its precision is the target's."""
    precision = "fp16" if target == "trt" else "fp32"
    label = "fp16" if target == "trt" else target
    _MADE.append(Base(f"{family} {label}, {name}", family, target, precision, **more))


def sized(name: str, family: str, target: str = "ort", /, **config: Any) -> None:
    """One more, of another config."""
    right(name, family, target, config=config)


def _own(block: int = 32, *, symmetric: bool = True) -> dict[str, Any]:
    """A request of whole numbers for exact kernels of Ingot's own."""
    return {**exact(block, symmetric=symmetric), **OWN}


FAMILIES = ("granite", "olmoe", "jetmoe", "mamba2", "granitemoehybrid")
for _family in FAMILIES:
    right("as it is", _family, "onnx")
    right("as it is", _family)
    right("heavy tails", _family, change=heavy)
    right("heavy tails", _family, "onnx", change=heavy)
    right("massive activations", _family, change=massive(100.0, 1000.0))
    right("massive activations, seed 8", _family, change=massive(300.0, 300.0), seed=8)
    right("another seed", _family, seed=23)
    # Over four layers a rounding error of some tokens grows, with more, to what no floor foresees.
    _norms = large_norms(-2, 1) if _family == "granitemoehybrid" else large_norms(-3, 2)
    right("large norms", _family, change=_norms)
    right("bfloat16 stored", _family, stored=torch.bfloat16)
    right("features", _family, task="features")
    right("bfloat16 kept", _family, stored=torch.bfloat16, weights="checkpoint")
    right("rounded to bfloat16", _family, "onnx", weights="bf16")
    right("rounded to float16", _family, change=heavy, weights="fp16")
    right("as it is", _family, "trt")
    right("heavy tails", _family, "trt", change=heavy)
    right("massive activations", _family, "trt", change=massive(30.0, 100.0))
    right("int4", _family, weights="int4", more=exact())
    right(
        "int4, zero points",
        _family,
        weights="int4",
        change=heavy,
        more=exact(64, symmetric=False),
        # JetMoE's routers take it apart: it is as far from itself as from a model of no context.
        max_kl=3.0 if _family == "jetmoe" else None,
    )
    right("int8", _family, weights="int8", stored=torch.bfloat16, more=exact(128))
    right("int8, zero points", _family, weights="int8", more=exact(symmetric=False))
    right("panels", _family, change=heavy, more=OWN)
    right("panels, bfloat16 kept", _family, stored=torch.bfloat16, weights="checkpoint", more=OWN)
    right("panels, int8", _family, weights="int8", change=heavy, more=_own(128, symmetric=False))
    right("panels, int4", _family, weights="int4", more=_own())
    right("panels, int8 activations", _family, weights="int8", more={"block": 64, **OWN})
# Put together from the same layers.
for _family in (
    "bamba",
    "flex_olmo",
    "granitemoe",
    "granitemoeshared",
    "mixtral",
    "olmo2",
    "qwen3_moe",
):
    right("as it is", _family)
    right("bfloat16 kept", _family, stored=torch.bfloat16, weights="checkpoint")
    right("as it is", _family, "trt")
    right("int4, zero points", _family, weights="int4", more=exact(64, symmetric=False))
    right("panels", _family, change=heavy, more=OWN)
    right("panels, int4", _family, weights="int4", more=_own())
for _family in ("olmoe", "jetmoe", "granite"):
    right("int4, uneven sizes", _family, weights="int4", config=UNEVEN, more=exact(64))
    right("panels, int4, uneven sizes", _family, weights="int4", config=UNEVEN, more=_own(64))
right("panels, tied routers", "olmoe", change=tied_routers(0.0), weights="int4", more=_own())
right("panels, equal routers", "jetmoe", change=equal_routers, more=OWN)
right("panels, a classifier", "jetmoe", task="classify", weights="bf16", more=OWN)
right("panels, given numbers", "olmoe", packed="awq", weights="checkpoint", more={**GIVEN, **OWN})
right("portable", "jetmoe", stored=torch.bfloat16, weights="bf16", more={"kernels": "portable"})
right("int4, a classifier", "jetmoe", task="classify", weights="int4", more=exact())
right("int4, tied routers", "olmoe", change=tied_routers(0.0), weights="int4", more=exact())
right("int4, near-tied routers", "olmoe", change=tied_routers(2e-7), weights="int4", more=exact())
right("int4, equal routers", "jetmoe", change=equal_routers, weights="int4", more=exact())
right(
    "int4, an expert of zeros",
    "olmoe",
    change=zeros("experts.1.down_proj.weight"),
    weights="int4",
    more=exact(),
)
right("int4, adapter", "granite", adapter=lora, weights="int4", more=exact())
right(
    "int4, massive activations",
    "granite",
    change=massive(100.0, 1000.0),
    weights="int4",
    more=exact(),
)
for _family, _packed in (("granite", "gptq"), ("olmoe", "awq"), ("jetmoe", "pack-quantized")):
    right("given numbers", _family, packed=_packed, weights="checkpoint", more=GIVEN)
for _target in ("onnx", "ort"):
    right("a classifier", "jetmoe", _target, task="classify")
    for _name, _change in (
        ("near-tied routers", tied_routers(2e-7)),
        ("tied routers", tied_routers(0.0)),
        ("equal routers", equal_routers),
        ("routers of zeros", zero_routers),
    ):
        right(_name, "olmoe", _target, change=_change)
        right(_name + ", one of eight", "olmoe", _target, config=_ONE, change=_change)
        right(_name, "jetmoe", _target, change=_change)
    right("dynamic rope past its length", "granite", _target, config=DYNAMIC)
    right("64 experts, one chosen", "olmoe", _target, config=NARROW)
right("near-tied routers", "olmoe", "trt", change=tied_routers(2e-4))
for _family in FAMILIES:
    right("tokens of zeros", _family, change=unknown_tokens)
right("tokens of zeros", "granite", "trt", change=unknown_tokens)
right("values of zeros", "granite", change=zeros("v_proj.weight"))
right("keys of zeros", "granite", "onnx", change=zeros("k_proj.weight"))
right("an attention of zeros", "olmoe", change=zeros("layers.0.self_attn.o_proj.weight"))
right("an expert of zeros", "olmoe", change=zeros("experts.1.down_proj.weight"))
right("a mixer of zeros", "mamba2", change=zeros("layers.0.mixer.in_proj.weight"))
right("a convolution of zeros", "mamba2", "onnx", change=zeros("conv1d.weight"))
right("states that go at once", "mamba2", change=shifted("A_log", 4.0))
right("states that stay", "mamba2", change=shifted("dt_bias", -20.0))
right("adapter", "granite", adapter=lora)
right("adapter", "olmoe", "onnx", adapter=lora)
right("adapter, bfloat16 kept", "olmoe", stored=torch.bfloat16, weights="checkpoint", adapter=lora)
right("adapter, rounded to bfloat16", "granite", weights="bf16", adapter=lora)
sized("seven tokens", "granite", vocab_size=7)
sized("seven tokens", "mamba2", "onnx", vocab_size=7)
sized("one layer", "olmoe", num_hidden_layers=1)
sized("one layer", "mamba2", num_hidden_layers=1)
sized("biases", "granite", attention_bias=True, mlp_bias=True)
sized("heads of one", "mamba2", num_heads=128, head_dim=1, n_groups=1)
sized("a limited step", "mamba2", time_step_limit=[0.01, 0.1])
right("seven labels", "jetmoe", task="classify", config={"num_labels": 7})
sized("six layers", "granite", num_hidden_layers=6)
sized("one expert", "olmoe", num_experts=1, num_experts_per_tok=1)
sized("one expert", "jetmoe", "onnx", num_local_experts=1, num_experts_per_tok=1)
sized("all experts", "olmoe", num_experts=4, num_experts_per_tok=4)
sized("all experts", "jetmoe", num_local_experts=4, num_experts_per_tok=4)
sized("eight of 64 experts", "olmoe", num_experts=64, num_experts_per_tok=8)
sized("chunks of one", "mamba2", chunk_size=1)
sized("chunks of three", "mamba2", "onnx", chunk_size=3)
sized("chunks of 256", "mamba2", "onnx", chunk_size=256)
sized("a kernel of two", "mamba2", conv_kernel=2)
sized("a group for each head", "mamba2", n_groups=8)
sized("one group", "mamba2", "onnx", n_groups=1)
sized("untied", "mamba2", tie_word_embeddings=False)
sized("untied", "granite", "onnx", tie_word_embeddings=False)
sized("tied", "olmoe", "onnx", tie_word_embeddings=True)
sized("heads of eight", "granite", num_attention_heads=8, num_key_value_heads=4)
sized("one key-value head", "granite", num_key_value_heads=1)
sized("as many key-value heads", "olmoe", "onnx", num_key_value_heads=4)
sized("eps 1e-12", "granite", rms_norm_eps=1e-12)
sized("eps 0.1", "olmoe", rms_norm_eps=0.1)
sized("eps 0.1 and sharp attention", "granite", rms_norm_eps=0.1, attention_multiplier=4.0)
sized("sharp attention", "granite", "onnx", attention_multiplier=4.0)
sized("sharp attention, float16", "granite", "trt", attention_multiplier=1.0)
sized("logits over 1e-3", "granite", logits_scaling=1e-3)
sized("multipliers 1000 and 3", "granite", embedding_multiplier=1000.0, residual_multiplier=3.0)
sized("clipped at 0.05", "olmoe", clip_qkv=0.05)
sized("clipped at 0.05", "olmoe", "onnx", clip_qkv=0.05)
sized(
    "yarn",
    "granite",
    rope_parameters={
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 128,
    },
)
sized("131072 positions", "granite", "onnx", max_position_embeddings=131072)
sized("weights that sum to 1", "olmoe", norm_topk_prob=True)
right("as it is", "toy_hybrid", "onnx")
right("as it is", "toy_hybrid")

RIGHTS = {base.name: base for base in _MADE}
