"""Mixtral against transformers on one folder: eager, ``onnx`` and ``ort``, field by field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from oracle import AgainstTransformers, Subject, all_but_some_are_slow
from safetensors.torch import load_file, save_file

from ingot.graphs.config import ConfigError
from ingot.graphs.mixtral import FAMILY

# Each turns on another field; the numbers are such that ignoring the field changes the result.
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "tied": {"tie_word_embeddings": True},
    "one key-value head a query head": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 32},
    "hidden_act": {"hidden_act": "gelu"},
    "rms_norm_eps": {"rms_norm_eps": 0.05},
    "rope_theta": {"rope_theta": 100.0},
    "sliding_window": {"sliding_window": 5},
    "every expert chosen": {"num_experts_per_tok": 4},
    "one expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
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
    folder = make_checkpoint("mixtral", **CONFIGS[request.param])
    return Subject(request.param, folder, make_ingot)


class TestAgainstTransformers(AgainstTransformers):
    model_type = "mixtral"
    configs = CONFIGS


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_experts": 8}, "another name of num_local_experts"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_refuses_what_it_does_not_compute(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        FAMILY.read_config({"model_type": "mixtral", **FAMILY.presets["tiny"], **change})


def test_reads_the_names_of_the_hub(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    """An expert's matrices by themselves, under names of their own."""
    folder = make_checkpoint("mixtral")
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        here = name.replace(".mlp.", ".block_sparse_moe.")
        owner = here.rpartition(".")[0]
        if here.endswith("gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                renamed[f"{owner}.{expert}.w1.weight"] = gate.clone()
                renamed[f"{owner}.{expert}.w3.weight"] = up.clone()
        elif here.endswith("down_proj"):
            for expert, down in enumerate(tensor):
                renamed[f"{owner}.{expert}.w2.weight"] = down.clone()
        else:
            renamed[here] = tensor
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    one, other = make_ingot(folder, "onnx"), make_ingot(tmp_path, "onnx")
    assert (one / "weights.safetensors").read_bytes() == (
        other / "weights.safetensors"
    ).read_bytes()
