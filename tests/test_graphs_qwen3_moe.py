"""Qwen3 with experts against transformers: eager, ``onnx`` and ``ort``."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import MakeCheckpoint, MakeIngot
from oracle import AgainstTransformers, Subject, all_but_some_are_slow

from ingot.graphs.config import ConfigError
from ingot.graphs.qwen3_moe import FAMILY

# Each turns on another field; the numbers are such that ignoring the field changes the result.
CONFIGS: dict[str, dict[str, Any]] = {
    "a dense layer among sparse ones": {},
    "all sparse": {"mlp_only_layers": None},
    "decoder_sparse_step": {"mlp_only_layers": None, "decoder_sparse_step": 2},
    "no renormalised weights": {"norm_topk_prob": False},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "head_dim of its own": {"head_dim": 16},
    "hidden_act": {"hidden_act": "gelu"},
    "rms_norm_eps": {"rms_norm_eps": 0.05},
    "rope_theta": {"rope_theta": 100.0},
    "no experts": {"num_experts": 0},
    "a window": {"use_sliding_window": True, "sliding_window": 5},
    "a window that is not used": {"sliding_window": 4, "rope_theta": 50.0},
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
    folder = make_checkpoint("qwen3_moe", **CONFIGS[request.param])
    return Subject(request.param, folder, make_ingot)


class TestAgainstTransformers(AgainstTransformers):
    model_type = "qwen3_moe"
    configs = CONFIGS


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
        ({"mlp_only_layers": ["1"]}, "mlp_only_layers"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
    ],
)
def test_refuses_what_it_does_not_compute(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        FAMILY.read_config({"model_type": "qwen3_moe", **FAMILY.presets["tiny"], **change})
