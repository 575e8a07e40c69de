"""OLMo 2 against transformers on one folder: eager, ``onnx`` and ``ort``, field by field."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import MakeCheckpoint, MakeIngot
from oracle import AgainstTransformers, Subject, all_but_some_are_slow

from ingot.graphs.config import ConfigError
from ingot.graphs.olmo2 import FAMILY

# Each turns on another field; the numbers are such that ignoring the field changes the result.
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "tied": {"tie_word_embeddings": True},
    "one key-value head a query head": {"num_key_value_heads": 4},
    "attention_bias": {"attention_bias": True},
    "hidden_act": {"hidden_act": "gelu"},
    "rms_norm_eps": {"rms_norm_eps": 0.05},
    "rope_theta": {"rope_theta": 100.0},
    "head_dim": {"head_dim": 32},
    "rope yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "rope_theta": 100.0,
        }
    },
}


@pytest.fixture(scope="module", params=all_but_some_are_slow(CONFIGS))
def subject(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> Subject:
    folder = make_checkpoint("olmo2", **CONFIGS[request.param])
    return Subject(request.param, folder, make_ingot)


class TestAgainstTransformers(AgainstTransformers):
    model_type = "olmo2"
    configs = CONFIGS


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"clip_qkv": 7.0}, "clip_qkv"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_experts": 4}, "num_experts"),
    ],
)
def test_refuses_what_it_does_not_compute(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        FAMILY.read_config({"model_type": "olmo2", **FAMILY.presets["tiny"], **change})
