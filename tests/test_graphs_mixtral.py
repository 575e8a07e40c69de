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
        # transformers needs it said here.
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "rope_theta": 100.0,
        },
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


def test_reads_the_names_that_transformers_has_in_memory(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    """The seeded checkpoint has the hub's: an expert's matrices by themselves."""
    folder = make_checkpoint("mixtral")
    tensors = load_file(folder / "model.safetensors")
    experts = range(FAMILY.presets["tiny"]["num_local_experts"])
    for layer in range(2):
        on_hub = f"model.layers.{layer}.block_sparse_moe"
        here = f"model.layers.{layer}.mlp"
        tensors[f"{here}.gate.weight"] = tensors.pop(f"{on_hub}.gate.weight")
        parts = [
            [tensors.pop(f"{on_hub}.experts.{e}.{name}.weight") for name in ("w1", "w3", "w2")]
            for e in experts
        ]
        tensors[f"{here}.experts.gate_up_proj"] = torch.stack(
            [torch.cat((gate, up)) for gate, up, _ in parts]
        )
        tensors[f"{here}.experts.down_proj"] = torch.stack([down for *_, down in parts])
    assert not any("block_sparse_moe" in name for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    one, other = make_ingot(folder, "onnx"), make_ingot(tmp_path, "onnx")
    assert (one / "weights.safetensors").read_bytes() == (
        other / "weights.safetensors"
    ).read_bytes()
