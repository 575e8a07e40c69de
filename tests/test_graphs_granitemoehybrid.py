"""Granite 4 against transformers on one folder: eager, ``onnx`` and ``ort``, field by field."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint, MakeIngot
from oracle import AgainstTransformers, Subject, all_but_some_are_slow
from safetensors.torch import load_file, save_file

from ingot.graphs.config import ConfigError
from ingot.graphs.granitemoehybrid import FAMILY, read_config

MIXED = ["mamba", "attention", "mamba"]
# Each turns on another field; the numbers are such that ignoring the field changes the result.
CONFIGS: dict[str, dict[str, Any]] = {
    "experts, no rotation, tied": {},
    "rope": {"position_embedding_type": "rope", "rope_theta": 100.0},
    "no experts": {"num_local_experts": 0, "num_experts_per_tok": 0},
    "untied": {"tie_word_embeddings": False},
    "two groups": {"mamba_n_groups": 2},
    "newer names of layers": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "attention alone": {"layer_types": ["attention"] * 4, "position_embedding_type": "rope"},
    "attention_bias": {"attention_bias": True},
    "no convolution bias": {"mamba_conv_bias": False},
    "embedding_multiplier": {"embedding_multiplier": 3.0},
    "residual_multiplier": {"residual_multiplier": 0.7},
    "attention_multiplier": {"attention_multiplier": 0.5},
    "logits_scaling": {"logits_scaling": 2.0},
    "hidden_act": {"hidden_act": "gelu"},
    "time_step_limit": {"time_step_limit": [0.02, 0.1]},
    "wide state, mamba_d_conv 2": {"mamba_d_state": 32, "mamba_d_conv": 2},
    "one key-value head a query head": {"num_key_value_heads": 4},
}


@pytest.fixture(scope="module", params=all_but_some_are_slow(CONFIGS, 5))
def subject(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> Subject:
    folder = make_checkpoint("granitemoehybrid", **CONFIGS[request.param])
    return Subject(request.param, folder, make_ingot)


class TestAgainstTransformers(AgainstTransformers):
    model_type = "granitemoehybrid"
    configs = CONFIGS


def test_reads_the_names_that_transformers_has_in_memory(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    """As a checkpoint has them that transformers 5 wrote without its own renaming."""
    folder = make_checkpoint("granitemoehybrid")
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("input_linear.weight", "experts.gate_up_proj")
        .replace("output_linear.weight", "experts.down_proj")
        .replace("router.layer.weight", "router.weight")
        if "block_sparse_moe" in name
        else name: tensor
        for name, tensor in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    one, other = make_ingot(folder, "onnx"), make_ingot(tmp_path, "onnx")
    assert (one / "weights.safetensors").read_bytes() == (
        other / "weights.safetensors"
    ).read_bytes()


BASE = FAMILY.presets["tiny"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"layer_types": ["mamba"]}, "must name each of 4 layers"),
        ({"layer_types": ["mamba", "mamba", "mlp", "mamba"]}, "layer_types is"),
        ({"layers_block_type": MIXED}, "two names of one field"),
        ({"mamba_d_head": 7}, "they must be equal"),
        ({"mamba_n_groups": 3}, "mamba_n_heads"),
        ({"mamba_d_conv": 1}, "at least 2"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type"),
        ({"logits_scaling": 0.0}, "logits_scaling"),
        ({"time_step_limit": [1.0, 0.5]}, "time_step_limit"),
        ({"sliding_window": 128}, "sliding_window"),
    ],
)
def test_refuses_what_it_does_not_compute(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        read_config({"model_type": "granitemoehybrid", **BASE, **change})


def test_reads_every_spelling_of_a_field() -> None:
    plain = read_config({"model_type": "granitemoehybrid", **BASE})
    other = {**BASE, "layers_block_type": BASE["layer_types"], "mamba_d_head": "auto"}
    del other["layer_types"]
    other["time_step_limit"] = [0.0, math.inf]
    assert read_config({"model_type": "granitemoehybrid", **other}) == plain
