"""FlexOlmo against transformers on one folder: eager, ``onnx`` and ``ort``, field by field."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import MakeCheckpoint, MakeIngot
from oracle import AgainstTransformers, Subject, all_but_some_are_slow

from ingot.graphs.config import ConfigError
from ingot.graphs.flex_olmo import FAMILY

# Each turns on another field; the numbers are such that ignoring the field changes the result.
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    # A norm behind the experts takes a factor off their sum again, but for its epsilon.
    "rms_norm_eps": {"rms_norm_eps": 0.5},
    "norm_topk_prob": {"rms_norm_eps": 0.5, "norm_topk_prob": True},
    "tied": {"tie_word_embeddings": True},
    "one key-value head a query head": {"num_key_value_heads": 4},
    "attention_bias": {"attention_bias": True},
    "hidden_act": {"hidden_act": "gelu"},
    "rope_theta": {"rope_theta": 100.0},
    "every expert chosen": {"num_experts_per_tok": 4},
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
    folder = make_checkpoint("flex_olmo", **CONFIGS[request.param])
    return Subject(request.param, folder, make_ingot)


class TestAgainstTransformers(AgainstTransformers):
    model_type = "flex_olmo"
    configs = CONFIGS


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_local_experts": 8, "num_experts": 4}, "another name of num_experts"),
        ({"clip_qkv": 7.0}, "clip_qkv"),
        ({"sliding_window": 128}, "sliding_window"),
    ],
)
def test_refuses_what_it_does_not_compute(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        FAMILY.read_config({"model_type": "flex_olmo", **FAMILY.presets["tiny"], **change})
