"""Seeded checkpoints: reproducible, readable by transformers, lively enough to show mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from ingot.graphs import preset
from ingot.graphs.checkpoint import Checkpoint, load_parameters
from ingot.graphs.family import active_parameters
from ingot.graphs.olmoe import FAMILY
from ingot.graphs.preset import preset_config, random_weight, tensors, write_checkpoint
from ingot.plugins.errors import IngotError

# As many layers as the largest preset, so that growth or decay with depth would show.
DEEP = {**preset_config(FAMILY, "tiny"), "num_hidden_layers": 16}
# Everything a checkpoint may have beside the tiny preset's tensors.
BIASED = {**preset_config(FAMILY, "tiny"), "attention_bias": True, "num_key_value_heads": 4}
TIED = {**preset_config(FAMILY, "tiny"), "tie_word_embeddings": True}


def make(folder: Path, config: dict[str, Any] | None = None, **options: Any) -> Path:
    folder.mkdir()
    write_checkpoint(folder, FAMILY, config or preset_config(FAMILY, "tiny"), **options)
    return folder


def load_theirs(folder: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' model and its report on the tensors it found."""
    found: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = found
    return model, info


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    one = content(make(tmp_path / "a", seed=3))
    torch.manual_seed(99)  # the state of the global generator must not matter
    assert one == content(make(tmp_path / "b", seed=3))
    assert one.keys() == {"config.json", "model.safetensors"}


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    one = load_file(make(tmp_path / "a", seed=0) / "model.safetensors")
    other = load_file(make(tmp_path / "b", seed=1) / "model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        assert not torch.equal(one[name], other[name]), name


def test_no_two_tensors_are_alike(tmp_path: Path) -> None:
    """Were two experts or layers the same, an export that swaps them would pass."""
    weights = load_file(make(tmp_path / "a") / "model.safetensors")
    assert len({bytes(w.flatten().numpy().tobytes()) for w in weights.values()}) == len(weights)


def test_weight_depends_on_its_name_shape_and_seed_alone() -> None:
    one = random_weight(FAMILY, "model.layers.0.mlp.gate.weight", (4, 8), 5)
    torch.rand(3)
    assert torch.equal(one, random_weight(FAMILY, "model.layers.0.mlp.gate.weight", (4, 8), 5))
    assert not torch.equal(one, random_weight(FAMILY, "model.layers.1.mlp.gate.weight", (4, 8), 5))
    assert not torch.equal(one, random_weight(FAMILY, "model.layers.0.mlp.gate.weight", (4, 8), 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_writes_the_dtype_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make(tmp_path / "a", dtype=dtype)
    exact = load_file(make(tmp_path / "b") / "model.safetensors")
    for name, weight in load_file(folder / "model.safetensors").items():
        assert weight.dtype == dtype
        assert torch.equal(weight, exact[name].to(dtype)), name
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert {**config, **preset_config(FAMILY, "tiny")} == config


def test_tells_the_bytes_it_makes(tmp_path: Path) -> None:
    told: list[int] = []
    folder = make(tmp_path / "a", dtype=torch.bfloat16, advance=told.append)
    assert sum(told) == sum(w.nbytes for w in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("config", [None, BIASED, TIED], ids=["tiny", "biased", "tied"])
def test_transformers_loads_every_tensor(tmp_path: Path, config: dict[str, Any] | None) -> None:
    folder = make(tmp_path / "a", config)
    model, info = load_theirs(folder)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], problem
    # And the two readers agree on which tensor is which.
    checkpoint = Checkpoint.open(folder)
    graph = FAMILY.build(checkpoint.config, "generate")
    weight_map = FAMILY.weight_map(graph, checkpoint, "generate")
    load_parameters(graph, checkpoint, weight_map, torch.float32)
    ours, theirs = dict(graph.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("config", [None, DEEP], ids=["tiny", "deep"])
def test_activations_and_router_margins_are_lively(
    tmp_path: Path, config: dict[str, Any] | None
) -> None:
    # Measured in transformers: this is a property of the weights, not of our graph.
    model, _ = load_theirs(make(tmp_path / "a", config))
    torch.manual_seed(0)
    ids = torch.randint(0, 512, (4, 32))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, output_router_logits=True)
    layers = model.config.num_hidden_layers
    assert len(out.hidden_states) == layers + 1
    for depth, hidden in enumerate(out.hidden_states):
        assert 0.3 < hidden.square().mean().sqrt() < 5, depth
    # A layer that adds next to nothing could be left out unnoticed.
    for before, after in zip(out.hidden_states, out.hidden_states[1:-1], strict=False):
        assert (after - before).square().mean().sqrt() > 0.1 * before.square().mean().sqrt()
    assert len(out.router_logits) == layers
    top_k = model.config.num_experts_per_tok
    for logits in out.router_logits:
        ordered = logits.sort(-1, descending=True).values
        margin = ordered[:, top_k - 1] - ordered[:, top_k]
        # Far above rounding error for every token, and plain for most of them.
        assert margin.min() > 1e-5
        assert margin.median() > 0.1
        assert logits.std() > 0.5
        # All experts are used, and no token would be served by one expert alone.
        chosen = logits.topk(top_k).indices
        assert len(chosen.unique()) == model.config.num_experts
        assert 0.2 < torch.softmax(logits, -1).max(-1).values.median() < 0.9
    # Logits of random weights, neither flat nor one token's alone.
    assert 0.3 < out.logits.std() < 5


def test_shards_hold_what_one_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single = make(tmp_path / "single")
    limit = 100_000
    monkeypatch.setattr(preset, "SHARD_BYTES", limit)
    sharded = make(tmp_path / "sharded")
    names = sorted(file.name for file in sharded.glob("*.safetensors"))
    count = len(names)
    assert count > 3
    assert names == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    held = [load_file(sharded / name) for name in names]
    # A shard may pass the limit with a single tensor only.
    assert all(len(s) == 1 or sum(w.nbytes for w in s.values()) <= limit for s in held)
    together = {name: weight for shard in held for name, weight in shard.items()}
    assert len(together) == sum(len(shard) for shard in held)
    expected = load_file(single / "model.safetensors")
    assert together.keys() == expected.keys()
    assert all(torch.equal(together[name], expected[name]) for name in expected)


def test_sharded_checkpoint_opens_as_the_single_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make(tmp_path / "single")]
    monkeypatch.setattr(preset, "SHARD_BYTES", 100_000)
    folders.append(make(tmp_path / "sharded"))
    digests = set()
    for folder in folders:
        checkpoint = Checkpoint.open(folder)
        graph = FAMILY.build(checkpoint.config, "generate")
        weight_map = FAMILY.weight_map(graph, checkpoint, "generate")
        load_parameters(graph, checkpoint, weight_map, torch.float32)
        digests.add(checkpoint.digest())
    assert len(digests) == 1
    # transformers reads the index, too.
    _, info = load_theirs(folders[1])
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("limit", [1, 64 * 512 * 4, 10**9])
def test_any_shard_size_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(preset, "SHARD_BYTES", limit)
    checkpoint = Checkpoint.open(make(tmp_path / "a"))
    assert {name: entry.shape for name, entry in checkpoint.entries.items()} == dict(
        tensors(FAMILY, preset_config(FAMILY, "tiny"))
    )


@pytest.mark.parametrize("name", ["huge", "", "Tiny"])
def test_refuses_an_unknown_preset_and_names_the_choices(name: str) -> None:
    with pytest.raises(IngotError) as caught:
        preset_config(FAMILY, name)
    for part in ("olmoe", repr(name), "tiny", "small", "full"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["tiny", "small", "full"])
def test_preset_configs_build_and_transformers_agrees_on_their_size(name: str) -> None:
    config = preset_config(FAMILY, name)
    model = FAMILY.build(config, "generate")
    assert all(parameter.is_meta for parameter in model.parameters())
    with torch.device("meta"):
        theirs = OlmoeForCausalLM(OlmoeConfig(**config))
    total, active = active_parameters(model)
    assert total == sum(parameter.numel() for parameter in theirs.parameters())
    assert active < total


def test_full_preset_has_the_released_shape() -> None:
    # OLMoE-1B-7B: 6.9 billion parameters, 1.3 billion of them active (arXiv:2409.02060, table 1).
    total, active = active_parameters(FAMILY.build(preset_config(FAMILY, "full"), "generate"))
    assert round(total / 1e9, 1) == 6.9
    assert round(active / 1e9, 1) == 1.3
    # The same count by hand: 16 layers of attention, norms, router and 64 or 8 experts.
    hidden, inner, vocab = 2048, 1024, 50304
    shared = 4 * hidden**2 + 4 * hidden + 64 * hidden
    outside = 2 * vocab * hidden + hidden
    assert total == outside + 16 * (shared + 64 * 3 * hidden * inner)
    assert active == outside + 16 * (shared + 8 * 3 * hidden * inner)


def test_full_preset_spells_its_experts_one_by_one() -> None:
    """As the released checkpoint does, so that the full preset exercises the same path."""
    shapes = dict(tensors(FAMILY, preset_config(FAMILY, "full")))
    assert len(shapes) == 3 + 16 * (9 + 64 * 3)
    assert shapes["model.layers.15.mlp.experts.63.down_proj.weight"] == (2048, 1024)
    assert shapes["model.layers.0.mlp.experts.0.gate_proj.weight"] == (1024, 2048)
    assert sum(math.prod(shape) for shape in shapes.values()) == 6919161856
