"""Granite with experts against transformers: eager, ``onnx`` and ``ort``."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import MakeCheckpoint, MakeIngot
from oracle import AgainstTransformers, Subject, all_but_some_are_slow

from ingot.graphs.config import ConfigError
from ingot.graphs.granitemoe import FAMILY

# Each turns on another field; the numbers are such that ignoring the field changes the result.
CONFIGS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "attention_bias": {"attention_bias": True},
    "embedding_multiplier": {"embedding_multiplier": 3.0},
    "residual_multiplier": {"residual_multiplier": 0.7},
    "attention_multiplier": {"attention_multiplier": 0.5},
    "logits_scaling": {"logits_scaling": 2.0},
    "hidden_act": {"hidden_act": "gelu"},
    "rope_theta": {"rope_theta": 100.0},
    "one key-value head a query head": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 32},
    "every expert chosen": {"num_local_experts": 4, "num_experts_per_tok": 4},
}


@pytest.fixture(scope="module", params=all_but_some_are_slow(CONFIGS))
def subject(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> Subject:
    folder = make_checkpoint("granitemoe", **CONFIGS[request.param])
    return Subject(request.param, folder, make_ingot)


class TestAgainstTransformers(AgainstTransformers):
    model_type = "granitemoe"
    configs = CONFIGS


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"logits_scaling": 0.0}, "logits_scaling"),
        ({"layer_types": ["mamba", "mamba"]}, "layer_types"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"shared_intermediate_size": 48}, "shared_intermediate_size"),
    ],
)
def test_refuses_what_it_does_not_compute(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        FAMILY.read_config({"model_type": "granitemoe", **FAMILY.presets["tiny"], **change})
