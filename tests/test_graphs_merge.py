"""Adapters merged into weights, against PEFT's own merge and against PEFT's adapted models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import (
    IDS,
    adapted_model,
    logits,
    make_adapter,
    merged_model,
)
from conftest import MakeCheckpoint
from oracle import relative_rms

from ingot.graphs.checkpoint import Checkpoint, assemble, block_reader
from ingot.graphs.family import family_of
from ingot.graphs.merge import open_checkpoint
from ingot.validate.truth.eager import EagerSession

LIMIT = 1e-5
Tensors = dict[str, torch.Tensor]

# Family, fields of its config, fields of PEFT's LoraConfig.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "granite attention": ("granite", {}, {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 3}),
    "granite rslora": (
        "granite",
        {},
        {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 5},
    ),
    "granite patterns": (
        "granite",
        {},
        {
            "target_modules": ["q_proj", "o_proj", "down_proj"],
            "rank_pattern": {r"layers\.1\..*": 2, "q_proj": 7, "o_proj": 1},
            "alpha_pattern": {"model.layers.0.mlp.down_proj": 40, "layers.(0|1).self_attn.q": 1000},
        },
    ),
    "granite one layer": (
        "granite",
        {},
        {"target_modules": ["gate_proj", "k_proj"], "layers_to_transform": [1]},
    ),
    "granite regular expression": (
        "granite",
        {},
        {
            "target_modules": r".*layers\.\d+\.(mlp\.(up|down)_proj|self_attn\.v_proj)",
            "exclude_modules": ["layers.0.mlp.up_proj"],
        },
    ),
    "granite dora": (
        "granite",
        {"tie_word_embeddings": False},
        {"target_modules": ["q_proj", "up_proj", "embed_tokens", "lm_head"], "use_dora": True},
    ),
    "granite biases": (
        "granite",
        {"attention_bias": True, "mlp_bias": True},
        {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
    ),
    "granite biases of B": (
        "granite",
        {"attention_bias": True},
        {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only", "lora_bias": True},
    ),
    "granite whole modules": (
        "granite",
        {"tie_word_embeddings": False},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens", "lm_head", "model.norm"],
        },
    ),
    "granite embedding": (
        "granite",
        {"tie_word_embeddings": False},
        {"target_modules": ["embed_tokens", "k_proj"], "modules_to_save": ["norm"]},
    ),
    "granite token rows": (
        "granite",
        {"tie_word_embeddings": False},
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [3, 501, 7], "lm_head": [8]},
        },
    ),
    "granite tied token rows": (
        "granite",
        {},
        {"target_modules": ["q_proj"], "trainable_token_indices": [300, 8]},
    ),
    "granite untied by whole modules": (
        "granite",
        {},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "granite tied whole modules": (
        "granite",
        {},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "olmoe experts": (
        "olmoe",
        {},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
        },
    ),
    "olmoe one parameter of two": (
        "olmoe",
        {},
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["experts.gate_up_proj", "gate.weight"],
            "alpha_pattern": {r"layers\.1\..*gate_up_proj": 32},
        },
    ),
    "olmoe all linear": ("olmoe", {}, {"target_modules": "all-linear"}),
    "olmoe whole experts": (
        "olmoe",
        {},
        {"target_modules": ["o_proj"], "modules_to_save": ["experts", "mlp.gate"]},
    ),
    "jetmoe experts": (
        "jetmoe",
        {},
        {
            "target_modules": ["kv_proj", "router.layer"],
            "target_parameters": ["input_linear.weight", "output_linear.weight"],
            "bias": "all",
        },
    ),
    "jetmoe one of the experts": (
        "jetmoe",
        {"tie_word_embeddings": False},
        {
            "target_modules": ["lm_head"],
            "target_parameters": ["self_attention.experts.input_linear.weight"],
        },
    ),
    "mamba2 projection": ("mamba2", {}, {"target_modules": ["in_proj"], "lora_alpha": 2}),
    "mamba2 whole modules": (
        "mamba2",
        {"tie_word_embeddings": False, "use_bias": True},
        {
            "target_modules": ["in_proj", "embeddings"],
            "modules_to_save": ["norm_f", "lm_head"],
            "bias": "all",
        },
    ),
}
# What PEFT's merge makes of a tied model is not what its adapter computes; see ``_tie``.
TIED: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"], "lora_alpha": 30},
    "both": {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True},
    "both alike": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "other rows of each": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [8]},
    },
    "embedding as a parameter": {
        "target_modules": [],
        "target_parameters": ["embed_tokens.weight"],
    },
}


def weights_of(checkpoint: Checkpoint) -> Tensors:
    """Every parameter of the eager graph, float32, block by block as an export reads it."""
    family = family_of(checkpoint)
    model = family.build(checkpoint.config, "generate")
    weight_map = family.weight_map(model, checkpoint, "generate")
    read = block_reader(checkpoint, weight_map, model)
    result = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        stack = len(shape) == 3 and shape[1] > 1
        result[name] = torch.stack([read(name, block) for block in range(shape[0] if stack else 1)])
        result[name] = result[name].reshape(shape)
        assert torch.equal(
            result[name], assemble(checkpoint, weight_map[name], shape, torch.float32)
        )
    return result


def eager_logits(checkpoint: Checkpoint) -> np.ndarray:
    session = EagerSession(checkpoint, "generate")
    session.reset(1, IDS.shape[1])
    return session.step(IDS.numpy(), np.ones_like(IDS.numpy()))


def check_merged(checkpoint: Checkpoint, oracle: Any) -> None:
    """The same weights to the bit, but for what a product of other shapes may round otherwise."""
    expected = oracle.state_dict()
    for name, weight in weights_of(checkpoint).items():
        error = (weight - expected[name]).abs().max()
        assert error <= 1e-6 * expected[name].abs().max() * (weight.dim() == 3), name
    assert relative_rms(logits(oracle).numpy(), eager_logits(checkpoint)) < LIMIT


@pytest.mark.parametrize("case", CASES)
def test_gives_the_weights_of_merge_and_unload(
    case: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    family, fields, config = CASES[case]
    base = make_checkpoint(family, **fields)
    adapter = make_adapter(base, tmp_path, **config)
    merged = open_checkpoint(base, adapter)
    before, after = eager_logits(Checkpoint.open(base)), eager_logits(merged)
    assert relative_rms(before, after) > 0.01, "the adapter changes nothing worth a test"
    check_merged(merged, merged_model(base, adapter))


@pytest.mark.parametrize("case", TIED)
def test_unties_what_the_adapter_makes_different(
    case: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint("granite")
    adapter = make_adapter(base, tmp_path, **TIED[case])
    merged = open_checkpoint(base, adapter)
    assert merged.config["tie_word_embeddings"] is False
    expected = logits(adapted_model(base, adapter)).numpy()
    assert relative_rms(expected, eager_logits(merged)) < LIMIT
    assert relative_rms(logits(merged_model(base, adapter)).numpy(), expected) > 0.01


def test_equals_the_merge_of_a_model_that_was_untied_first(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint("mamba2")
    adapter = make_adapter(base, tmp_path, target_modules=["in_proj", "embeddings"])
    check_merged(open_checkpoint(base, adapter), merged_model(base, adapter, untied=True))
