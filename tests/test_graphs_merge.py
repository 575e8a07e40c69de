"""Adapters merged into weights, against PEFT's own merge and against PEFT's adapted models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import (
    CONFIG,
    IDS,
    WEIGHTS,
    adapted_model,
    change_config,
    change_tensors,
    logits,
    make_adapter,
    merged_model,
)
from conftest import MakeCheckpoint
from oracle import relative_rms
from safetensors.torch import load_file, save_file

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
    "granite tied where nothing is": (
        "granite",
        {"tie_word_embeddings": False},
        {
            "target_modules": ["embed_tokens"],
            "modules_to_save": ["norm"],
            "ensure_weight_tying": True,
        },
    ),
    "granite whole and tied where nothing is": (
        "granite",
        {"tie_word_embeddings": False},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
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


EXPERTS: dict[str, Any] = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
SPLIT = ("gate_proj", "up_proj", "down_proj")


def fused(base: Path, out: Path) -> Path:
    """A checkpoint of OLMoE with its experts in one tensor a parameter."""
    tensors = load_file(base / "model.safetensors")
    experts = {name for name in tensors if ".experts." in name}
    kept = {name: tensor for name, tensor in tensors.items() if name not in experts}
    for layer in range(2):
        owner = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{owner}.{expert}.{which}.weight"] for expert in range(8)])
            for which in SPLIT
        )
        kept[f"{owner}.gate_up_proj"] = torch.cat((gate, up), dim=1)
        kept[f"{owner}.down_proj"] = down
    save_file(kept, out / "model.safetensors")
    (out / "config.json").write_text((base / "config.json").read_text())
    return out


def expert_by_expert(adapter: Path) -> Path:
    """An adapter as one trained with transformers 4, whose experts were linear layers."""
    generator = torch.Generator().manual_seed(5)
    tensors: Tensors = {}
    for layer in range(2):
        for expert in range(8):
            for which in SPLIT:
                name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{which}"
                inputs, outputs = (32, 64) if which == "down_proj" else (64, 32)
                tensors[f"{name}.lora_A.weight"] = torch.randn((3, inputs), generator=generator)
                tensors[f"{name}.lora_B.weight"] = torch.randn((outputs, 3), generator=generator)
        name = f"base_model.model.model.layers.{layer}.mlp.gate"
        tensors[f"{name}.lora_A.weight"] = torch.randn((3, 64), generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn((8, 3), generator=generator)
    tensors = {name: 0.1 * tensor for name, tensor in tensors.items()}
    adapter.mkdir()
    save_file(tensors, adapter / WEIGHTS)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 2, "target_modules": [*SPLIT, "gate"]}
    (adapter / CONFIG).write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    return adapter


@pytest.mark.parametrize("adapter_of", ["parameters", "experts"])
@pytest.mark.parametrize("stored", ["parameters", "experts"])
def test_merges_experts_of_either_spelling_into_either(
    adapter_of: str, stored: str, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    base = fused(tiny, tmp_path / "base") if stored == "parameters" else tiny
    if adapter_of == "parameters":
        adapter = make_adapter(base, tmp_path / "adapter", **EXPERTS)
    else:
        adapter = expert_by_expert(tmp_path / "adapter")
    check_merged(open_checkpoint(base, adapter), merged_model(base, adapter))


def test_whole_experts_replace_those_of_another_spelling(tiny: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}
    adapter = make_adapter(tiny, tmp_path / "adapter", **config)
    oracle = merged_model(tiny, adapter)

    def split(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        for layer in range(2):
            owner = f"base_model.model.model.layers.{layer}.mlp.experts"
            for expert in range(8):
                gate, up = tensors[f"{owner}.gate_up_proj"][expert].chunk(2)
                down = tensors[f"{owner}.down_proj"][expert]
                for which, tensor in zip(SPLIT, (gate, up, down), strict=True):
                    kept[f"{owner}.{expert}.{which}.weight"] = tensor
        return kept

    change_tensors(adapter, split)
    check_merged(open_checkpoint(tiny, adapter), oracle)
    (tmp_path / "base").mkdir()
    check_merged(open_checkpoint(fused(tiny, tmp_path / "base"), adapter), oracle)


def with_names(adapter: Path, change: Any) -> Path:
    return change_tensors(
        adapter, lambda tensors: {change(name): tensor for name, tensor in tensors.items()}
    )


def test_takes_names_with_the_name_of_the_adapter_in_them(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint("granite", tie_word_embeddings=False)
    config: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}
    adapter = make_adapter(base, tmp_path, modules_to_save=["lm_head"], **config)
    oracle = merged_model(base, adapter)

    def named(name: str) -> str:
        for role in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            name = name.replace(f".{role}", f".{role}.mine")
        name = name.replace("lora_magnitude_vector", "lora_magnitude_vector.mine.weight")
        return name.replace("lm_head.weight", "lm_head.modules_to_save.mine.weight")

    check_merged(open_checkpoint(base, with_names(adapter, named)), oracle)


@pytest.mark.parametrize("whole_adapter", [True, False])
def test_a_bare_model_and_its_adapter_have_names_without_a_prefix(
    whole_adapter: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint("granite")
    config: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
    }
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    expected = weights_of(open_checkpoint(base, adapter))
    if not whole_adapter:
        with_names(adapter, lambda name: name.replace("model.model.", "model."))
        assert weights_of(open_checkpoint(base, adapter)).keys() == expected.keys()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    found = weights_of(open_checkpoint(tmp_path / "bare", adapter))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adds_in_float32_whatever_the_files_have(
    dtype: torch.dtype, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint("jetmoe", dtype=dtype)
    config = CASES["jetmoe experts"][2]
    adapter = make_adapter(base, tmp_path, **config)
    change_tensors(adapter, lambda tensors: {n: tensor.to(dtype) for n, tensor in tensors.items()})
    check_merged(open_checkpoint(base, adapter), merged_model(base, adapter))


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_a_tied_tensor_has_either_name_or_both(
    stored: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint("granite")
    tied = make_adapter(base, tmp_path / "tied", **CASES["granite tied token rows"][2])
    untied = make_adapter(base, tmp_path / "untied", **CASES["granite untied by whole modules"][2])
    oracles = [merged_model(base, adapter) for adapter in (tied, untied)]
    tensors = load_file(base / "model.safetensors")
    weight = tensors.pop("model.embed_tokens.weight")
    if stored != "head":
        tensors["model.embed_tokens.weight"] = weight
    if stored != "embedding":
        tensors["lm_head.weight"] = weight.clone()
    save_file(tensors, base / "model.safetensors")
    for adapter, oracle in zip((tied, untied), oracles, strict=True):
        check_merged(open_checkpoint(base, adapter), oracle)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_takes_a_vocabulary_that_was_resized(
    fields: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint("granite", **fields)
    adapter = make_adapter(base, tmp_path, rows=519, target_modules=["q_proj"])
    merged = open_checkpoint(base, adapter)
    assert merged.config["vocab_size"] == 519
    check_merged(merged, merged_model(base, adapter, rows=519))


def test_the_digest_is_of_the_adapter_too(tiny: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny, tmp_path, target_modules=["q_proj"])

    def digest(adapter: Path | None = adapter) -> str:
        checkpoint = open_checkpoint(tiny, adapter)
        for name in checkpoint.entries:
            checkpoint.read(name)
        return checkpoint.digest()

    first = digest()
    assert first == digest() != digest(None)
    change_config(adapter, lora_alpha=9)
    second = digest()
    change_tensors(adapter, lambda tensors: {name: 2 * each for name, each in tensors.items()})
    assert len({first, second, digest()}) == 3
