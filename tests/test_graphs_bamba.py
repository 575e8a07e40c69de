"""Bamba against transformers on one folder: eager, ``onnx`` and ``ort``, field by field."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import MakeCheckpoint, MakeIngot
from oracle import AgainstTransformers, Subject, all_but_some_are_slow

from ingot.graphs.bamba import FAMILY
from ingot.graphs.config import ConfigError

# Each turns on another field; the numbers are such that ignoring the field changes the result.
CONFIGS: dict[str, dict[str, Any]] = {
    "one layer of attention": {},
    "two groups": {"mamba_n_groups": 2},
    "two layers of attention, no convolution bias": {
        "attn_layer_indices": [0, 3],
        "mamba_conv_bias": False,
    },
    "attention alone": {"attn_layer_indices": [0, 1, 2, 3]},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "hidden_act": {"hidden_act": "gelu"},
    "rope_theta": {"rope_theta": 100.0},
    "time_step_limit": {"time_step_limit": [0.02, 0.1]},
    "wide state, mamba_d_conv 2": {"mamba_d_state": 32, "mamba_d_conv": 2},
    "rms_norm_eps": {"rms_norm_eps": 0.05},
}


@pytest.fixture(scope="module", params=all_but_some_are_slow(CONFIGS))
def subject(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> Subject:
    folder = make_checkpoint("bamba", **CONFIGS[request.param])
    return Subject(request.param, folder, make_ingot)


class TestAgainstTransformers(AgainstTransformers):
    model_type = "bamba"
    configs = CONFIGS


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"attn_layer_indices": [4]}, "attn_layer_indices"),
        ({"attn_layer_indices": [True]}, "attn_layer_indices"),
        ({"layer_types": ["mamba"] * 4}, "differ in which layers"),
        ({"partial_rotary_factor": 1.0}, "0.5 of a head"),
        ({"attn_rotary_emb": 16}, "0.5 of a head"),
        ({"mamba_d_head": 7}, "they must be equal"),
        ({"mamba_n_groups": 3}, "mamba_n_heads"),
        ({"sliding_window": 128}, "sliding_window"),
    ],
)
def test_refuses_what_it_does_not_compute(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        FAMILY.read_config({"model_type": "bamba", **FAMILY.presets["tiny"], **change})


def test_reads_every_spelling_of_a_field() -> None:
    preset = {"model_type": "bamba", **FAMILY.presets["tiny"]}
    plain = FAMILY.read_config(preset)
    assert FAMILY.read_config({**preset, "mamba_d_head": "auto"}) == plain
    assert FAMILY.read_config({**preset, "partial_rotary_factor": 0.5}) == plain
    kinds = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
    assert FAMILY.read_config({**preset, "layer_types": kinds}) == plain
