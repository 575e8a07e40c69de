"""What exports is wrong: its reader, its passes, or the layout that they give the weights.

Where the fault is in the code it lasts during the validation, and a fresh capture has it too. Then
only what shares no code with the export sees it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ingot.graphs.checkpoint import block_reader
from ingot.graphs.family import Family
from proof.fault import By, Fault, InExport, Patch, Where, in_layer, saying

KIND = "export"
Read = Callable[[str, int], torch.Tensor]


def reading(change: Callable[[Read, str, int], torch.Tensor]) -> Patch:
    """Weights are read wrong."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        def reader(*arguments: Any) -> Read:
            right = block_reader(*arguments)
            return lambda name, block: change(right, name, block)

        patch.setattr("ingot.export.graph.block_reader", reader)

    return apply


def one(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Patch:
    """One of them is."""

    def change_one(read: Read, name: str, block: int) -> torch.Tensor:
        found = read(name, block)
        return change(found.clone()).contiguous() if name.endswith(ending) else found

    return reading(change_one)


def experts_exchanged(read: Read, name: str, block: int) -> torch.Tensor:
    exchanged = name.startswith("model.layers.1.mlp.experts.")
    return read(name, {2: 5, 5: 2}.get(block, block) if exchanged else block)


def neighbour(read: Read, name: str, block: int) -> torch.Tensor:
    """Of expert 7 the neighbour's down projection."""
    stale = name.endswith("layers.1.mlp.experts.down_proj") and block == 7
    return read(name, 6 if stale else block)


def last_row_lost(weight: torch.Tensor) -> torch.Tensor:
    weight[-1] = 0
    return weight


def gate_for_up(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat(weight.chunk(2)[::-1])


def narrow(read: Read, name: str, block: int) -> torch.Tensor:
    found = read(name, block)
    return found.to(torch.bfloat16).to(found.dtype)


def of_layer(change: Callable[[Any], None], number: int = 1) -> Patch:
    """One layer of the model is another one, before it is traced."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        right = Family.build

        def build(family: Family, *arguments: Any) -> nn.Module:
            model: Any = right(family, *arguments)
            change(getattr(model, model.base_model_prefix).layers[number])
            return model  # type: ignore[no-any-return]

        patch.setattr(Family, "build", build)

    return apply


def other_weights(layer: Any) -> None:
    layer.mlp.normalise = True


def no_multiplier(layer: Any) -> None:
    layer.residual_multiplier = 1.0


def no_norms(layer: Any) -> None:
    for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
        norm.forward = lambda x, norm=norm: x * norm.weight


def passes(name: str, make: Callable[[Any], Any]) -> Patch:
    """A function of a pass is another one, made of the right one."""
    module, _, function = name.rpartition(".")

    def apply(patch: pytest.MonkeyPatch) -> None:
        held = importlib.import_module(f"ingot.export.passes.{module}")
        patch.setattr(held, function, make(getattr(held, function)))

    return apply


def folded_with(change: Callable[[float], float]) -> Callable[[Any], Any]:
    """A factor is folded as another one."""

    def make(right: Any) -> Any:
        return lambda producer, factor: right(producer, change(factor))

    return make


def not_interleaved(right: Any) -> Any:
    """Gate and up stay one behind the other."""
    return lambda block: np.ascontiguousarray(block)


def not_reversed(right: Any) -> Any:
    """Experts stay in the checkpoint's order."""
    del right
    return lambda change, experts, read: lambda block: change(read(block))


def expert_after(right: Any) -> Any:
    """Each expert's product is the next one's."""
    return lambda read, expert, out, block: right(read, (expert + 1) % 4, out, block)


def shorter_pasts(right: Callable[..., str]) -> Callable[..., str]:
    """Options of an engine whose caches do not hold what its masks do."""
    return lambda made: right(made).replace("x4095x", "x9x")


def says(function: str, wrong: Callable[[Any], Any]) -> Patch:
    """One function of the export is another, made of the right one."""
    module, name = function.rsplit(".", 1)
    right = getattr(importlib.import_module(f"ingot.export.{module}"), name)
    return lambda patch: patch.setattr(f"ingot.export.{function}", wrong(right))


def exported(
    name: str,
    base: str,
    patch: Patch,
    where: Where | None,
    by: tuple[By, ...] = ("weights",),
    **more: bool,
) -> Fault:
    kind = "export, lasting" if more.get("lasting") else KIND
    return Fault(name, base, kind, "export", InExport(patch, **more), by, where)


LAYER = Where(1)
O_PROJ = "layers.1.self_attn.o_proj.weight"
FAULTS: list[Fault] = [
    exported("two experts exchanged", "olmoe onnx", reading(experts_exchanged), LAYER),
    exported("two experts exchanged", "olmoe ort", reading(experts_exchanged), LAYER, lasting=True),
    exported("an expert's neighbour", "olmoe ort", reading(neighbour), LAYER, lasting=True),
    exported("an expert's neighbour", "olmoe fp16", reading(neighbour), LAYER),
    exported("turned", "granite ort", one(O_PROJ, lambda w: w.T), LAYER, lasting=True),
    exported("turned", "granite onnx", one(O_PROJ, lambda w: w.T), LAYER),
    exported(
        "the last row lost",
        "olmoe onnx",
        one("embed_tokens.weight", last_row_lost),
        Where(words="embed_tokens"),
        lasting=True,
    ),
    exported(
        "the last row lost",
        "mamba2 ort",
        one("embeddings.weight", last_row_lost),
        Where(words="embeddings"),
    ),
    exported(
        "gate for up",
        "olmoe ort",
        one("layers.1.mlp.experts.gate_up_proj", gate_for_up),
        LAYER,
        lasting=True,
    ),
    exported(
        "gate for up",
        "jetmoe onnx",
        one("layers.1.mlp.input_linear.weight", gate_for_up),
        LAYER,
        lasting=True,
    ),
    exported(
        "all in bfloat16", "granite ort", reading(narrow), Where(words="weight"), lasting=True
    ),
    exported(
        "all in bfloat16", "mamba2 fp16", reading(narrow), Where(words="weight"), lasting=True
    ),
    exported(
        "D lost", "mamba2 onnx", one("layers.1.mixer.D", torch.zeros_like), LAYER, lasting=True
    ),
    exported(
        "taps reversed",
        "mamba2 ort",
        one("layers.1.mixer.conv1d.weight", lambda w: w.flip(-1)),
        LAYER,
        lasting=True,
    ),
    exported(
        "a factor folded twice",
        "granite onnx",
        passes("scales._fold", folded_with(lambda f: f * f)),
        None,
        retraced=True,
    ),
    exported(
        "a factor folded 0.1 % off",
        "granite ort",
        passes("scales._fold", folded_with(lambda f: f * 1.001)),
        None,
        retraced=True,
        lasting=True,
    ),
    exported(
        "gate behind up",
        "olmoe ort",
        passes("moe._interleaved", not_interleaved),
        None,
        lasting=True,
    ),
    exported("gate behind up", "jetmoe ort", passes("moe._interleaved", not_interleaved), None),
    exported(
        "experts not reversed",
        "olmoe ort",
        passes("moe._reversed", not_reversed),
        None,
        lasting=True,
    ),
    exported(
        "the next expert's product",
        "jetmoe ort",
        passes("moe_linear._transposed", expert_after),
        None,
        lasting=True,
    ),
    exported(
        "weights sum to 1",
        "olmoe onnx",
        of_layer(other_weights),
        LAYER,
        ("graph", "numbers"),
        retraced=True,
    ),
    exported(
        "no multiplier",
        "granite onnx",
        of_layer(no_multiplier),
        LAYER,
        ("weights", "numbers"),
        retraced=True,
    ),
    exported(
        "labels the other way round",
        "jetmoe classify ort",
        says("manifest._labels", lambda right: lambda *given: right(*given)[::-1]),
        saying("labels of ingot.json"),
        ("contract",),
        lasting=True,
    ),
    exported(
        "bytes of half the weights",
        "olmoe ort",
        says("manifest._weight_bytes", lambda right: lambda *given: right(*given) // 2),
        saying("weight_bytes of ingot.json"),
        ("contract",),
        lasting=True,
    ),
    exported(
        "an engine for shorter pasts",
        "granite fp16",
        says(
            "build.trtexec_options", lambda right: lambda made: right(made).replace("x4095x", "x9x")
        ),
        saying("trtexec.txt has a profile"),
        ("contract",),
        lasting=True,
    ),
    exported(
        "another activation of the convolution",
        "mamba2 bf16",
        says("passes.causal_conv._activation", lambda _right: lambda _nodes: "gelu"),
        in_layer(0),
        ("numbers",),
        lasting=True,
    ),
    exported(
        "no query norm", "olmoe ort", of_layer(no_norms), LAYER, ("graph", "numbers"), retraced=True
    ),
]
