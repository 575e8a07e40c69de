"""Finding a checkpoint's architecture and task, and both namings of a bare model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OlmoeConfig, OlmoeForCausalLM, OlmoeModel

from ingot.graphs.checkpoint import Checkpoint, CheckpointError, load_parameters
from ingot.graphs.config import Facts
from ingot.graphs.family import active_parameters, family_of, find_family
from ingot.graphs.names import FAMILIES, RELEASED
from ingot.graphs.olmoe import OlmoeForCausalLM as OurCausalLM
from ingot.graphs.olmoe import OlmoeModel as OurModel
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.plugins.errors import IngotError

OLMOE = find_family("olmoe")


def whole(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_checkpoint(folder, OLMOE, {**preset_config(OLMOE, "tiny"), **config})
    return folder


def bare(folder: Path, *, keep_head: bool = False, **config: Any) -> Path:
    """The tensors of ``whole``, named as a bare ``OlmoeModel`` names them."""
    file = whole(folder, **config) / "model.safetensors"
    weights = load_file(file)
    head = weights.pop("lm_head.weight", None)
    renamed = {name.removeprefix("model."): weight for name, weight in weights.items()}
    if keep_head:
        renamed["lm_head.weight"] = renamed["embed_tokens.weight"] if head is None else head
    save_file({name: weight.clone() for name, weight in renamed.items()}, file)
    return folder


def load(folder: Path, task: str) -> tuple[torch.nn.Module, Checkpoint]:
    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint)
    model = family.build(checkpoint.config, task)
    load_parameters(model, checkpoint, family.weight_map(model, checkpoint, task), torch.float32)
    return model, checkpoint


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def refused(folder: Path, task: str, *named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(folder, task)
    for part in named:
        assert part in str(caught.value), caught.value


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize("model_type", ["llama2", "OLMoE", "olmo", "../olmoe", "config", ""])
def test_refuses_an_unknown_model_type_and_lists_the_supported(
    tmp_path: Path, model_type: str
) -> None:
    folder = edit_config(whole(tmp_path), model_type=model_type)
    refused(folder, "generate", "config.json", "model_type", repr(model_type), *FAMILIES)
    with pytest.raises(CheckpointError):
        find_family(model_type)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("nemotron_h", "nearest is granitemoehybrid, but nemotron_h has layers that are an MLP"),
        ("olmo3", "nearest is olmo2, but olmo3 has attention over a sliding window"),
        ("zamba2", "nearest is bamba, but zamba2 has attention layers and MLPs that are shared"),
        ("mamba", "nearest is mamba2, but mamba has Mamba1 layers"),
        ("mistral", "nearest is llama, but mistral has attention over a sliding window"),
        ("OLMoE", "nearest name is olmoe."),
        ("granite_", "nearest name is granite."),
        ("llama4", "nearest name is llama."),
    ],
)
def test_names_the_nearest_model_type_and_what_it_lacks(model_type: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        find_family(model_type)


def test_guesses_nothing_of_a_name_like_none_of_them() -> None:
    with pytest.raises(CheckpointError) as caught:
        find_family("whisper")
    assert str(caught.value).endswith(f"supported: {', '.join(FAMILIES)}, llama.")


def test_finds_granite_for_llama() -> None:
    assert find_family("llama") is find_family("granite")


@pytest.mark.parametrize("model_type", [None, 3, ["olmoe"]])
def test_refuses_a_config_without_a_model_type(tmp_path: Path, model_type: Any) -> None:
    folder = edit_config(whole(tmp_path), model_type=model_type)
    refused(folder, "generate", "config.json", "no model_type", *FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_complete(name: str) -> None:
    family = find_family(name)
    assert family.model_type == name
    assert name in RELEASED
    assert {"tiny", "small", "full"} == set(family.presets)
    for task in family.tasks:
        model = family.build(preset_config(family, "tiny"), task)
        assert not model.training
        assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("granite", Facts((0, 0), context_length=512, num_labels=2)),
        (
            "granitemoehybrid",
            Facts((1,) * 4, experts_per_token=2, chunk_size=8, context_length=512, num_labels=2),
        ),
        ("bamba", Facts((0,) * 4, chunk_size=8, context_length=512)),
        ("qwen3_moe", Facts((1, 0, 1), experts_per_token=2, context_length=512, num_labels=2)),
        ("jetmoe", Facts((2, 2), experts_per_token=2, context_length=512, num_labels=2)),
        ("mamba2", Facts((0, 0), chunk_size=8)),
        ("olmoe", Facts((1, 1), experts_per_token=2, context_length=512, pad_token_id=1)),
    ],
)
def test_families_state_facts(name: str, facts: Facts) -> None:
    family = find_family(name)
    config = preset_config(family, "tiny")
    assert family.read_config(config).facts == facts
    ends = {"eos_token_id": [7, 9], "pad_token_id": 3}
    expected = replace(facts, eos_token_ids=(7, 9), pad_token_id=3)
    assert family.read_config({**config, **ends}).facts == expected


@pytest.mark.parametrize("task", ["classify", "", "Generate"])
def test_refuses_a_task_the_family_lacks(task: str) -> None:
    with pytest.raises(IngotError) as caught:
        OLMOE.build(preset_config(OLMOE, "tiny"), task)
    for part in ("olmoe", repr(task), "generate", "features"):
        assert part in str(caught.value)


def test_builds_the_module_of_the_task() -> None:
    config = preset_config(OLMOE, "tiny")
    assert type(OLMOE.build(config, "generate")) is OurCausalLM
    assert type(OLMOE.build(config, "features")) is OurModel


def test_loads_features_from_a_bare_checkpoint(tmp_path: Path) -> None:
    model, checkpoint = load(bare(tmp_path), "features")
    assert not any(name.startswith("model.") for name in checkpoint.entries)
    assert_same(model, OlmoeModel.from_pretrained(tmp_path))


def test_loads_features_from_a_whole_checkpoint_and_leaves_the_head_aside(tmp_path: Path) -> None:
    model, checkpoint = load(whole(tmp_path), "features")
    assert_same(model, OlmoeForCausalLM.from_pretrained(tmp_path).model)
    assert "lm_head.weight" in checkpoint.entries
    assert "lm_head.weight" not in checkpoint.digests  # not even read


def test_loads_generate_from_a_whole_checkpoint(tmp_path: Path) -> None:
    model, _ = load(whole(tmp_path), "generate")
    assert_same(model, OlmoeForCausalLM.from_pretrained(tmp_path))


def test_refuses_to_generate_without_a_head(tmp_path: Path) -> None:
    refused(bare(tmp_path), "generate", "lm_head.weight [512, 64] is missing")


def test_generates_from_a_bare_checkpoint_whose_head_is_tied(tmp_path: Path) -> None:
    model, _ = load(bare(tmp_path, tie_word_embeddings=True), "generate")
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert_same(model.get_submodule("model"), OlmoeModel.from_pretrained(tmp_path))


def test_accepts_a_bare_checkpoint_with_a_repeated_head(tmp_path: Path) -> None:
    folder = bare(tmp_path, keep_head=True, tie_word_embeddings=True)
    assert "lm_head.weight" in Checkpoint.open(folder).entries
    for task in ("generate", "features"):
        load(folder, task)


def test_refuses_a_bare_checkpoint_whose_tied_head_differs(tmp_path: Path) -> None:
    folder = edit_config(bare(tmp_path, keep_head=True), tie_word_embeddings=True)
    refused(folder, "generate", "tie_word_embeddings", "lm_head.weight differs from embed_tokens")


@pytest.mark.parametrize("make", [whole, bare])
def test_refuses_an_extra_tensor_for_features_too(tmp_path: Path, make: Any) -> None:
    file = make(tmp_path) / "model.safetensors"
    save_file({**load_file(file), "score.weight": torch.ones(2, 64)}, file)
    refused(tmp_path, "features", "score.weight [2, 64]")


@pytest.mark.parametrize("make", [whole, bare])
def test_names_a_missing_tensor_as_the_checkpoint_would(tmp_path: Path, make: Any) -> None:
    file = make(tmp_path) / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layers.1.mlp.gate.weight"))
    del weights[name]
    save_file(weights, file)
    refused(tmp_path, "features", f"tensor {name} [8, 64] is missing")


def test_counts_active_parameters_as_one_tokens_share_of_the_experts() -> None:
    config = preset_config(OLMOE, "tiny")
    total, active = active_parameters(OLMOE.build(config, "generate"))
    with torch.device("meta"):
        theirs = OlmoeForCausalLM(OlmoeConfig(**config))
    sizes = {name: parameter.numel() for name, parameter in theirs.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert total == sum(sizes.values())
    assert experts == 2 * 8 * 3 * 64 * 32  # layers, experts, matrices and their shape
    assert active == total - experts * (8 - 2) // 8
