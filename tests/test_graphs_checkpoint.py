"""Opening, checking and reading checkpoint folders, against safetensors and transformers."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OlmoeConfig, OlmoeForCausalLM, OlmoeModel

from ingot.graphs.checkpoint import (
    Checkpoint,
    CheckpointError,
    Part,
    assemble,
    assemble_row,
    block_reader,
    check_weights,
    load_parameters,
)
from ingot.graphs.family import family_of
from ingot.plugins.errors import IngotError, shown

Tensors = dict[str, torch.Tensor]

CONFIG: dict[str, Any] = {
    "model_type": "olmoe",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": None,
}
SHAPES = {
    "input_layernorm": (16,),
    "post_attention_layernorm": (16,),
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "self_attn.q_norm": (16,),
    "self_attn.k_norm": (8,),
    "mlp.gate": (4, 16),
}
EXPERT = {"gate_proj": (12, 16), "up_proj": (12, 16), "down_proj": (16, 12)}


def per_expert(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Random weights of CONFIG, as transformers 4 spells them; written out, not asked of Ingot."""
    torch.manual_seed(seed)
    weights = {
        "model.embed_tokens.weight": torch.randn(48, 16),
        "model.norm.weight": torch.randn(16),
        "lm_head.weight": torch.randn(48, 16),
    }
    for layer in range(2):
        for name, shape in SHAPES.items():
            weights[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape)
        for expert in range(4):
            for name, shape in EXPERT.items():
                weights[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"] = torch.randn(
                    shape
                )
    return {name: weight.to(dtype) for name, weight in weights.items()}


def fused(weights: Tensors) -> Tensors:
    """The same weights as transformers 5 holds them: one tensor per layer, gate rows, then up."""
    result = {name: weight for name, weight in weights.items() if ".experts." not in name}
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        result[f"{experts}.gate_up_proj"] = torch.stack(
            [
                torch.cat(
                    [
                        weights[f"{experts}.{expert}.gate_proj.weight"],
                        weights[f"{experts}.{expert}.up_proj.weight"],
                    ]
                )
                for expert in range(4)
            ]
        )
        result[f"{experts}.down_proj"] = torch.stack(
            [weights[f"{experts}.{expert}.down_proj.weight"] for expert in range(4)]
        )
    return result


def write(folder: Path, weights: Tensors, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(weights, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, weights: Tensors, shards: int = 3, **config: Any) -> Path:
    """Neighbouring tensors, an expert's halves among them, land in different shards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        held = dict(list(weights.items())[shard::shards])
        save_file(held, folder / file)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_raw(folder: Path, header: Mapping[str, Any], data: bytes, pad: int = 0) -> Path:
    """A safetensors file byte by byte, as other writers than the library may make it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    text = json.dumps(header).encode() + b" " * pad
    content = len(text).to_bytes(8, "little") + text + data
    (folder / "model.safetensors").write_bytes(content)
    return folder


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


def load(
    folder: Path, task: str = "generate", dtype: torch.dtype = torch.float32
) -> tuple[Tensors, Checkpoint]:
    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint)
    model = family.build(checkpoint.config, task)
    load_parameters(model, checkpoint, family.weight_map(model, checkpoint, task), dtype)
    return dict(model.named_parameters()), checkpoint


def assert_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


def refused(folder: Path, *named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for part in named:
        assert part in str(caught.value), caught.value


# The folder and config.json


def test_refuses_a_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "not a folder", "give")


def test_refuses_a_file_where_a_folder_belongs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "file", "not a folder")


def test_refuses_a_folder_without_config(tmp_path: Path) -> None:
    (write(tmp_path, per_expert()) / "config.json").unlink()
    refused(tmp_path, str(tmp_path), "no config.json", "model.safetensors")


@pytest.mark.parametrize("text", [b"{", b"", b"{'a': 1}", b"\xff\xfe", b'{"a": 1} x'])
def test_refuses_a_config_that_is_not_json(tmp_path: Path, text: bytes) -> None:
    (write(tmp_path, per_expert()) / "config.json").write_bytes(text)
    refused(tmp_path, "config.json", "not valid JSON")


@pytest.mark.parametrize("text", ["[]", "null", '"olmoe"', "3"])
def test_refuses_a_config_that_is_not_an_object(tmp_path: Path, text: str) -> None:
    (write(tmp_path, per_expert()) / "config.json").write_text(text)
    refused(tmp_path, "config.json", "JSON object", type(json.loads(text)).__name__)


# The files of the weights


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_refuses_pickles_and_says_how_to_convert(tmp_path: Path, name: str) -> None:
    (write(tmp_path, per_expert()) / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"never opened")
    refused(tmp_path, name, "pickle", "save_file", str(tmp_path))


def test_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    (write(tmp_path, per_expert()) / "model.safetensors").unlink()
    refused(tmp_path, str(tmp_path), "model.safetensors", "model.safetensors.index.json", "copy")


def test_names_weights_of_a_shard_without_its_index(tmp_path: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    (write(tmp_path, per_expert()) / "model.safetensors").rename(tmp_path / shard)
    refused(tmp_path, f"'{shard}'", "model.safetensors.index.json", "download or copy them there")


@pytest.mark.parametrize("around", [None, "state_dict", "model"])
def test_the_command_that_it_gives_converts(tmp_path: Path, around: str | None) -> None:
    weights = per_expert()
    (write(tmp_path, weights) / "model.safetensors").unlink()
    torch.save(weights if around is None else {around: weights, "epoch": 3}, tmp_path / "last.ckpt")
    with pytest.raises(IngotError) as error:
        Checkpoint.open(tmp_path)
    command = shlex.split(str(error.value).partition(f"export {tmp_path}: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=60)
    assert_same(load(tmp_path)[0], fused(weights))


def test_names_git_lfs_where_its_pointer_is_there(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (write(tmp_path, per_expert()) / "model.safetensors").write_text(pointer)
    refused(tmp_path, "model.safetensors", "git lfs pull")


def test_reads_safetensors_beside_pickles(tmp_path: Path) -> None:
    weights = per_expert()
    write(tmp_path, weights)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert_same(load(tmp_path)[0], fused(weights))


def test_refuses_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path, per_expert())
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "model.safetensors.index.json", "model-00002-of-00003.safetensors", "not in")


def test_refuses_an_index_that_places_a_tensor_in_a_shard_without_it(tmp_path: Path) -> None:
    write_sharded(tmp_path, per_expert())
    edit_index(tmp_path, extra="model-00001-of-00003.safetensors")
    refused(tmp_path, "places extra in model-00001-of-00003.safetensors", "does not hold it")


def test_refuses_a_shard_whose_tensor_the_index_places_elsewhere(tmp_path: Path) -> None:
    write_sharded(tmp_path, per_expert())  # lm_head is the third tensor, and in the third shard
    edit_index(tmp_path, **{"lm_head.weight": "model-00001-of-00003.safetensors"})
    refused(
        tmp_path, "model-00003-of-00003.safetensors holds lm_head.weight", "model-00001-of-00003"
    )


def test_refuses_a_shard_whose_tensor_the_index_lacks(tmp_path: Path) -> None:
    write_sharded(tmp_path, per_expert())
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    refused(tmp_path, "model-00003-of-00003.safetensors holds lm_head.weight", path.name)


@pytest.mark.parametrize("absolute", [False, True])
def test_refuses_a_shard_outside_the_folder(tmp_path: Path, absolute: bool) -> None:
    write(tmp_path / "other", {"stolen": torch.ones(2)})
    folder = write_sharded(tmp_path / "model", per_expert())
    shard = "../other/model.safetensors"
    if absolute:
        shard = str(tmp_path / "other" / "model.safetensors")
    edit_index(folder, stolen=shard)
    refused(folder, "model.safetensors.index.json", "outside the folder", shown(shard))


@pytest.mark.parametrize("shard", [".", "..", "", "sub/../../x", "/etc/passwd"])
def test_refuses_a_shard_that_is_no_file_name(tmp_path: Path, shard: str) -> None:
    edit_index(write_sharded(tmp_path, per_expert()), extra=shard)
    refused(tmp_path, "model.safetensors.index.json", shard)


@pytest.mark.parametrize("shard", [3, None, ["a"], {"a": 1}])
def test_refuses_a_shard_that_is_no_string(tmp_path: Path, shard: Any) -> None:
    edit_index(write_sharded(tmp_path, per_expert()), extra=shard)
    refused(tmp_path, "model.safetensors.index.json", "extra", repr(shard))


@pytest.mark.parametrize("text", ["{}", '{"weight_map": null}', '{"weight_map": ["a"]}'])
def test_refuses_an_index_without_a_weight_map(tmp_path: Path, text: str) -> None:
    (write_sharded(tmp_path, per_expert()) / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_refuses_an_index_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (write_sharded(tmp_path, per_expert()) / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "model.safetensors.index.json", "JSON")


# The bytes of a file


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, 0.999])
def test_refuses_a_truncated_file(tmp_path: Path, keep: float) -> None:
    file = write(tmp_path, per_expert()) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    refused(tmp_path, "model.safetensors", "truncated", "again")


def test_refuses_a_truncated_shard_by_its_name(tmp_path: Path) -> None:
    file = write_sharded(tmp_path, per_expert()) / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path, "model-00002-of-00003.safetensors", "truncated")


def test_refuses_bytes_after_the_tensors(tmp_path: Path) -> None:
    file = write(tmp_path, per_expert()) / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    refused(tmp_path, "model.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize("length", [10_000, 99_000_000, 2**40, 2**63, 2**64 - 1])
def test_refuses_a_header_length_past_the_end(tmp_path: Path, length: int) -> None:
    file = write(tmp_path, {"weight": torch.ones(3)}) / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    refused(tmp_path, "model.safetensors", "not a whole safetensors file")


def entry(begin: int, end: int, shape: tuple[int, ...] = (4,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"weight": entry(0, 4096, (1024,))},
        {"weight": entry(2**40, 2**40 + 16)},
        {"weight": entry(16, 0)},
        {"weight": entry(-16, 0)},
        {"weight": entry(0, 16, (5,))},
        {"weight": entry(0, 16, (2**62, 2**62))},
        {"weight": entry(0, 16), "other": entry(0, 16)},
        {"weight": entry(0, 8, (2,)), "other": entry(12, 16, (1,))},
        {"weight": {"dtype": "F32", "shape": [4]}},
        {"weight": {**entry(0, 16), "dtype": "F31"}},
        {"weight": "here"},
        ["weight"],
    ],
    ids=[
        "past the end",
        "far past the end",
        "backwards",
        "negative",
        "shape too large",
        "shape overflows",
        "overlap",
        "hole",
        "no offsets",
        "no such dtype",
        "no object",
        "list",
    ],
)
def test_refuses_a_header_that_lies(tmp_path: Path, header: Any) -> None:
    refused(write_raw(tmp_path, header, bytes(16)), "model.safetensors", "not a whole safetensors")


def test_refuses_a_header_that_is_not_json(tmp_path: Path) -> None:
    file = write(tmp_path, {"weight": torch.ones(3)}) / "model.safetensors"
    file.write_bytes((16).to_bytes(8, "little") + b"this is no JSON." + bytes(12))
    refused(tmp_path, "model.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.int64, "I64"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
    ],
)
def test_refuses_an_unsupported_dtype(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    weights = per_expert()
    weights["model.norm.weight"] = torch.ones(16).to(dtype)
    refused(
        write(tmp_path, weights),
        "model.safetensors: model.norm.weight is " + name,
        "F32, F16, BF16",
        "export the original",
    )


# The values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_refuses_a_weight_that_is_not_finite(
    tmp_path: Path, value: str, dtype: torch.dtype
) -> None:
    weights = per_expert(dtype=dtype)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    weights[name][7, 11] = float(value)
    weights[name][9, 0] = float(value)
    refused(
        write(tmp_path, weights), "model.safetensors", f"{name} holds a {value} ", "index [7, 11]"
    )


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("at", [0, 4099, 8191])
def test_finds_the_one_bad_weight_wherever_it_is(tmp_path: Path, value: str, at: int) -> None:
    weight = torch.randn(8192)
    weight[at] = float(value)
    checkpoint = Checkpoint.open(write_sharded(tmp_path, {"good": torch.ones(3), "bad": weight}, 2))
    checkpoint.read("good")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("bad")
    assert f"model-00002-of-00002.safetensors: bad holds a {value} at index [{at}]" in str(
        caught.value
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_accepts_the_largest_finite_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype)
    weight = torch.tensor([limit.max, limit.min, limit.tiny, limit.smallest_normal / 2, -0.0])
    checkpoint = Checkpoint.open(write(tmp_path, {"weight": weight.to(dtype)}))
    assert torch.equal(checkpoint.read("weight"), weight.to(dtype))


# Which tensors, of which shapes


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_norm.weight",
        "model.layers.0.mlp.experts.3.up_proj.weight",
        "model.layers.1.mlp.experts.0.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_refuses_a_missing_tensor(tmp_path: Path, name: str, sharded: bool) -> None:
    weights = per_expert()
    shape = list(weights.pop(name).shape)
    folder = tmp_path / "olmoe-copy"
    (write_sharded if sharded else write)(folder, weights)
    refused(folder, "olmoe-copy", f"{name} {shape} is missing", "config.json", "every shard")


def test_refuses_a_missing_fused_tensor(tmp_path: Path) -> None:
    weights = fused(per_expert())
    del weights["model.layers.1.mlp.experts.down_proj"]
    refused(write(tmp_path, weights), "model.layers.1.mlp.experts.down_proj", "missing")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.experts.4.up_proj.weight",
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        "score.weight",
    ],
)
def test_refuses_an_extra_tensor(tmp_path: Path, name: str) -> None:
    weights = {**per_expert(), name: torch.ones(3, 5)}
    refused(write(tmp_path, weights), f"{name} [3, 5]", "nothing in the graph uses it", "drop")


def test_refuses_both_spellings_at_once(tmp_path: Path) -> None:
    """Which of the two the model means cannot be known."""
    weights = per_expert()
    refused(write(tmp_path, {**fused(weights), **weights}), ".mlp.experts.", "uses it")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (47, 16)),
        ("model.embed_tokens.weight", (16, 48)),
        ("model.layers.1.self_attn.k_proj.weight", (16, 16)),
        ("model.layers.1.mlp.experts.1.gate_proj.weight", (16, 12)),
        ("model.norm.weight", (1, 16)),
        ("model.norm.weight", ()),
    ],
)
def test_refuses_another_shape(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    weights = per_expert()
    right = list(weights[name].shape)
    weights[name] = torch.ones(shape)
    refused(write(tmp_path, weights), name, str(list(shape)), str(right), "config.json")


def test_refuses_a_transposed_fused_tensor(tmp_path: Path) -> None:
    weights = fused(per_expert())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weights[name] = weights[name].transpose(1, 2).contiguous()
    refused(write(tmp_path, weights), name, "[4, 16, 24]", "[4, 24, 16]")


def tied_weights(difference: float, dtype: torch.dtype = torch.float32) -> Tensors:
    weights = per_expert()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone().to(dtype)
    weights["lm_head.weight"][47, 15] += difference
    return weights


def test_accepts_a_tied_head_that_repeats_the_embedding(tmp_path: Path) -> None:
    weights = tied_weights(0.0)
    loaded, _ = load(write(tmp_path, weights, tie_word_embeddings=True))
    del weights["lm_head.weight"]
    assert_same(loaded, fused(weights))


def test_accepts_a_tied_head_that_is_absent(tmp_path: Path) -> None:
    weights = tied_weights(0.0)
    del weights["lm_head.weight"]
    loaded, _ = load(write(tmp_path, weights, tie_word_embeddings=True))
    assert_same(loaded, fused(weights))


def test_refuses_a_tied_head_that_differs(tmp_path: Path) -> None:
    folder = write(tmp_path, tied_weights(1e-3), tie_word_embeddings=True)
    refused(folder, "tie_word_embeddings", "lm_head.weight", "model.embed_tokens.weight", "false")


def test_refuses_a_tied_head_of_another_shape(tmp_path: Path) -> None:
    weights = {**per_expert(), "lm_head.weight": torch.ones(3, 16)}
    folder = write(tmp_path, weights, tie_word_embeddings=True)
    refused(folder, "tie_word_embeddings", "lm_head.weight", "model.embed_tokens.weight")


def test_keeps_a_head_that_repeats_the_embedding_where_it_is_not_tied(tmp_path: Path) -> None:
    weights = tied_weights(0.0)
    assert_same(load(write(tmp_path, weights))[0], fused(weights))


def test_names_no_tensor_twice(tmp_path: Path) -> None:
    # A mistake in an architecture file, not in the input: hence no CheckpointError.
    checkpoint = Checkpoint.open(write(tmp_path, {"a": torch.ones(2)}))
    part = (Part("a", (2,)),)
    with pytest.raises(AssertionError, match="twice"):
        check_weights(checkpoint, {"x": part, "y": part})


# One of two tied names, and what is no weight


def only(weights: Tensors, keep: str) -> Tensors:
    """Tied weights that keep one of the two names, as writers of shared tensors do."""
    weights = dict(weights)
    shared = weights.pop("model.embed_tokens.weight")
    weights.pop("lm_head.weight")
    return {**weights, keep: shared}


@pytest.mark.parametrize("make", [write, write_sharded])
@pytest.mark.parametrize("task", ["generate", "features"])
def test_reads_a_tied_model_by_either_name(tmp_path: Path, task: str, make: Any) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    folders = [
        make(tmp_path / name, only(per_expert(), name), tie_word_embeddings=True) for name in names
    ]
    assert_same(*(load(folder, task)[0] for folder in folders))


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("keep", ["model.embed_tokens.weight", "lm_head.weight"])
def test_names_tie_word_embeddings_where_one_of_two_is_missing(
    tmp_path: Path, keep: str, fields: dict[str, Any]
) -> None:
    folder = write(tmp_path, only(per_expert(), keep), **fields)
    refused(folder, "is missing", "tie_word_embeddings", "to true", keep)


def test_says_nothing_of_ties_where_both_are_missing(tmp_path: Path) -> None:
    weights = only(per_expert(), "model.embed_tokens.weight")
    del weights["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path, weights))
    assert "tie_word_embeddings" not in str(caught.value)


def test_refuses_a_tied_head_without_elements(tmp_path: Path) -> None:
    weights = {
        **only(per_expert(), "model.embed_tokens.weight"),
        "lm_head.weight": torch.empty(0, 16),
    }
    refused(write(tmp_path, weights, tie_word_embeddings=True), "differs", "lm_head.weight")


BUFFERS: Tensors = {
    "model.rotary_emb.inv_freq": torch.ones(4),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64),
    "model.layers.1.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 8, 4),
    "model.layers.1.self_attn.rotary_emb.sin_cached": torch.ones(8, 4),
    "model.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
    "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
    "model.position_ids": torch.arange(8)[None],
}


@pytest.mark.parametrize("make", [write, write_sharded])
def test_leaves_known_buffers_aside(tmp_path: Path, make: Any) -> None:
    plain = load(write(tmp_path / "plain", per_expert()))[0]
    loaded, checkpoint = load(make(tmp_path / "old", {**per_expert(), **BUFFERS}))
    assert_same(loaded, plain)
    assert not checkpoint.entries.keys() & BUFFERS.keys()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        # Each of the name of a buffer, but of the shape of a weight.
        ("model.layers.0.self_attn.bias", (16,)),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4, 4)),
        ("model.layers.0.self_attn.q_proj.bias", (16,)),
        ("model.layers.0.self_attn.xrotary_emb.inv_freq", (4,)),
        ("position_ids", (8,)),
    ],
)
def test_refuses_what_only_looks_like_a_buffer(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    refused(write(tmp_path, {**per_expert(), name: torch.ones(shape)}), name, "silently drop")


# Weights in float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounds_float64_to_float32_and_from_there(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = {
        name: torch.randn(w.shape, dtype=torch.float64) for name, w in fused(per_expert()).items()
    }
    loaded, checkpoint = load(write(tmp_path, weights), dtype=dtype)
    for name, weight in loaded.items():
        assert checkpoint.read(name).dtype == torch.float64
        assert torch.equal(weight, weights[name].float().to(dtype)), name


def test_rounds_float64_of_one_expert_alike(tmp_path: Path) -> None:
    weights = {name: weight.double() + 2**-40 for name, weight in per_expert().items()}
    for folder, held in (("a", weights), ("b", fused(weights))):
        loaded, checkpoint = load(write(tmp_path / folder, held))
        family = family_of(checkpoint)
        model = family.build(checkpoint.config, "generate")
        read = block_reader(checkpoint, family.weight_map(model, checkpoint, "generate"), model)
        name = "model.layers.1.mlp.experts.gate_up_proj"
        assert torch.equal(read(name, 2), loaded[name][2])
        assert torch.equal(loaded[name], fused(weights)[name].float())


def test_refuses_what_float64_alone_holds(tmp_path: Path) -> None:
    weights = per_expert()
    weights["model.norm.weight"] = torch.ones(16, dtype=torch.float64)
    weights["model.norm.weight"][3] = -1e39
    refused(write(tmp_path, weights), "model.norm.weight", "[3]", "-1e+39", "finite in float32")


def test_digest_of_float64_is_of_its_own_bytes(tmp_path: Path) -> None:
    one = torch.ones(4, dtype=torch.float64)
    digests = {
        read_all(write(tmp_path / "a", {"x": one})),
        read_all(write(tmp_path / "b", {"x": one + 2**-50})),
        read_all(write(tmp_path / "c", {"x": one.float()})),
    }
    assert len(digests) == 3


# Bounds before any module is made


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 1000),
        ("num_experts", 10**9),
        ("num_experts", 60_000),
        ("hidden_size", 10**18),
        ("intermediate_size", 2**21),
        ("vocab_size", 2**63),
        ("vocab_size", 10**400),
        ("num_attention_heads", 2**31),
        ("max_position_embeddings", 10**18),
    ],
)
def test_refuses_sizes_that_nothing_stored_can_have_at_once(
    tmp_path: Path, name: str, value: int, stored: bool
) -> None:
    folder = write(tmp_path, per_expert(), **{name: value})
    checkpoint = Checkpoint.open(folder)
    if not stored and value < 10**6:
        return  # the tensors alone can tell
    began = time.process_time()
    with pytest.raises(IngotError) as caught:
        family_of(checkpoint).build(
            checkpoint.config, "generate", stored=checkpoint.entries if stored else None
        )
    assert name in str(caught.value) and len(str(caught.value)) < 300
    assert time.process_time() - began < 0.5


def test_says_what_is_stored_of_layers_and_of_sizes(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, per_expert()))
    family = family_of(checkpoint)
    count = len(checkpoint.entries)
    for fields, said in (
        ({"num_hidden_layers": count + 1}, f"num_hidden_layers is {count + 1}.* {count} tensors"),
        ({"vocab_size": 49}, "vocab_size is 49.* no dimension above 48"),
        ({"intermediate_size": 49}, "intermediate_size is 49.* no dimension above 48"),
    ):
        with pytest.raises(CheckpointError, match=said):
            family.build({**checkpoint.config, **fields}, "generate", stored=checkpoint.entries)


# What is quoted, and how it is read


@pytest.mark.parametrize(
    "fields",
    [
        {"zzz": "A" * 300_000},
        {"z" * 300_000: 1},
        {"hidden_act": "A" * 300_000},
        {"model_type": "A" * 300_000},
        {"num_experts": "A" * 300_000},
        {"quantization_config": {"quant_method": "A" * 300_000}},
        {"rope_scaling": {"type": "A" * 300_000}},
        {"rope_scaling": {"type": "linear", "factor": ["A" * 300_000]}},
        {"num_local_experts": 10**3000},
        {"eos_token_id": [[1]] * 100_000},
    ],
    ids=lambda fields: next(iter(fields))[:20],
)
def test_quotes_no_more_than_a_line(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(IngotError) as caught:
        load(write(tmp_path, per_expert(), **fields))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "[" * 100_000 + "]" * 100_000),
        ("config.json", '{"vocab_size": 1' + "0" * 5000 + "}"),
        ("config.json", '{"a":' * 100 + "1" + "}" * 100),
        ("config.json", "\ufeff{}"),
        ("config.json", "[" + "[],[]," * 3_000_000 + "1]"),
        ("model.safetensors.index.json", '{"weight_map":' + "[" * 100_000 + "]" * 100_000 + "}"),
        ("model.safetensors.index.json", '{"weight_map":{}, "n": 1' + "0" * 5000 + "}"),
        ("model.safetensors.index.json", '{"weight_map":"' + "A" * (9 << 20) + '"}'),
    ],
    ids=lambda text: text[:30],
)
def test_refuses_json_that_nobody_needs(tmp_path: Path, file: str, text: str) -> None:
    folder = write_sharded(tmp_path, per_expert())
    (folder / file).write_text(text, encoding="utf-8")
    refused(folder, file, "again")


def test_refuses_a_deep_or_long_header(tmp_path: Path) -> None:
    folder = write(tmp_path, per_expert())
    for text in (b'{"a":' + b"[" * 9000 + b"]" * 9000 + b"}", b" " * (9 << 20)):
        content = len(text).to_bytes(8, "little") + text
        (folder / "model.safetensors").write_bytes(content)
        refused(folder, "model.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"format": "pack-quantized"}}, "pack-quantized"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "unknown"),
        ({"quantization_config": "mxfp4"}, "mxfp4"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_names_the_method_of_a_quantised_checkpoint(
    tmp_path: Path, fields: dict[str, Any], method: str, dtype: torch.dtype
) -> None:
    weights = per_expert()
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.ones(16, 16).to(dtype)
    folder = write(tmp_path, weights, **fields)
    with pytest.raises(IngotError) as caught:
        load(folder)
    assert next(iter(fields)) in str(caught.value) and method in str(caught.value)


# Reading


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any finite pattern: subnormals, minus zero and both signs, not only what randn makes."""
    count = max(1, int(torch.tensor(shape).prod()))
    width = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(width)
    raw = torch.randint(limits.min, limits.max, (count,), dtype=width).view(dtype)
    raw = torch.where(torch.isfinite(raw), raw, torch.zeros_like(raw))
    return raw[: int(torch.tensor(shape).prod()) if shape else 1].reshape(shape)


def mixed(seed: int = 0) -> Tensors:
    """Each dtype and rank, across page boundaries, of odd sizes."""
    torch.manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(), (1,), (7,), (33, 65), (3, 5, 7), (5000,), (0, 3), (2, 1)]
    return {
        f"{dtype}.{index}": random_bits(dtype, shape)
        for dtype in (torch.float16, torch.float32, torch.bfloat16)
        for index, shape in enumerate(shapes)
    }


def test_reads_the_bits_that_safetensors_reads(tmp_path: Path) -> None:
    write(tmp_path, mixed())
    checkpoint = Checkpoint.open(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert checkpoint.entries.keys() == expected.keys()
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape, name
        assert torch.equal(bits(read), bits(tensor)), name


@pytest.mark.parametrize("pad", range(8))
def test_reads_tensors_at_any_offset(tmp_path: Path, pad: int) -> None:
    """The format promises no alignment: a header of any length, a float32 after odd halves."""
    torch.manual_seed(pad)
    tensors = {"halves": random_bits(torch.float16, (3,)), "single": torch.randn(5, 3)}
    header = {
        "__metadata__": {"written": "by hand"},
        "halves": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]},
        "single": {"dtype": "F32", "shape": [5, 3], "data_offsets": [6, 66]},
    }
    data = b"".join(bytes(bits(tensor).tolist()) for tensor in tensors.values())
    checkpoint = Checkpoint.open(write_raw(tmp_path, header, data, pad))
    assert_same({name: checkpoint.read(name) for name in checkpoint.entries}, tensors)


def test_reads_the_same_again(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, mixed()))
    once = {name: checkpoint.read(name).clone() for name in checkpoint.entries}
    digest = checkpoint.digest()
    assert_same(once, {name: checkpoint.read(name) for name in checkpoint.entries})
    assert checkpoint.digest() == digest


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    weights = per_expert()
    before = (write(tmp_path, weights) / "model.safetensors").read_bytes()
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.read("model.norm.weight").fill_(7)
    assert torch.equal(checkpoint.read("model.norm.weight"), weights["model.norm.weight"])
    assert (tmp_path / "model.safetensors").read_bytes() == before


# Loading


def test_loads_single_and_sharded_files_alike(tmp_path: Path) -> None:
    weights = per_expert()
    one, single = load(write(tmp_path / "single", weights))
    other, sharded = load(write_sharded(tmp_path / "sharded", weights))
    assert_same(one, fused(weights))
    assert_same(one, other)
    assert single.digest() == sharded.digest()


def test_loads_per_expert_and_fused_spellings_alike(tmp_path: Path) -> None:
    weights = per_expert()
    one, _ = load(write(tmp_path / "per expert", weights))
    other, _ = load(write_sharded(tmp_path / "fused", fused(weights)))
    assert_same(one, fused(weights))
    assert_same(one, other)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spelling", ["per expert", "fused"])
def test_converts_every_parameter(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype, spelling: str
) -> None:
    weights = per_expert(dtype=stored)
    on_disk = weights if spelling == "per expert" else fused(weights)
    loaded, _ = load(write(tmp_path, on_disk), dtype=wanted)
    assert_same(loaded, {name: w.to(wanted) for name, w in fused(weights).items()})


def test_tells_the_bytes_of_every_parameter(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, per_expert(dtype=torch.bfloat16)))
    family = family_of(checkpoint)
    model = family.build(CONFIG, "generate")
    weight_map = family.weight_map(model, checkpoint, "generate")
    told: list[int] = []
    load_parameters(model, checkpoint, weight_map, torch.float32, told.append)
    assert sum(told) == sum(4 * weight.numel() for weight in per_expert().values())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("spelling", ["per expert", "fused"])
def test_assembles_one_row_as_a_row_of_the_whole(tmp_path: Path, spelling: str) -> None:
    weights = per_expert(dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(
        write(tmp_path, weights if spelling == "per expert" else fused(weights))
    )
    family = family_of(checkpoint)
    model = family.build(CONFIG, "generate")
    weight_map = family.weight_map(model, checkpoint, "generate")
    for name, expected in fused(weights).items():
        parts, shape = weight_map[name], tuple(expected.shape)
        assert torch.equal(assemble(checkpoint, parts, shape, torch.float32), expected.float())
        if ".experts." not in name:
            continue
        for row in range(4):
            read = assemble_row(checkpoint, parts, shape, torch.float32, row)
            assert torch.equal(read, expected[row].float()), (name, row)


@pytest.fixture(params=[{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def theirs(request: pytest.FixtureRequest) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**{**CONFIG, **request.param}))
    # transformers starts norms at one and biases at zero, which would hide a mix-up.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("shard_size", ["1GB", "15KB"])
def test_loads_what_transformers_saved(
    tmp_path: Path, theirs: OlmoeForCausalLM, shard_size: str
) -> None:
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").is_file() == (shard_size == "1GB")
    assert_same(load(tmp_path)[0], dict(theirs.named_parameters()))


def test_loads_what_transformers_saved_in_bfloat16(
    tmp_path: Path, theirs: OlmoeForCausalLM
) -> None:
    theirs.bfloat16().save_pretrained(tmp_path)
    assert_same(load(tmp_path)[0], {name: p.float() for name, p in theirs.named_parameters()})


def test_loads_what_transformers_saved_as_it_holds_it(
    tmp_path: Path, theirs: OlmoeForCausalLM
) -> None:
    """transformers can skip its conversion back and write the fused tensors."""
    theirs.save_pretrained(tmp_path, save_original_format=False)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert_same(load(tmp_path)[0], dict(theirs.named_parameters()))


def test_loads_the_bare_model_that_transformers_saved(
    tmp_path: Path, theirs: OlmoeForCausalLM
) -> None:
    bare: OlmoeModel = theirs.model
    bare.save_pretrained(tmp_path)
    assert not any(name.startswith("model.") for name in Checkpoint.open(tmp_path).entries)
    assert_same(load(tmp_path, "features")[0], dict(bare.named_parameters()))


# Digests


def read_all(folder: Path, *, backwards: bool = False) -> str:
    checkpoint = Checkpoint.open(folder)
    for name in sorted(checkpoint.entries, reverse=backwards):
        checkpoint.read(name)
    return checkpoint.digest()


def test_digest_is_that_of_the_content(tmp_path: Path) -> None:
    weights = per_expert()
    digest = read_all(write(tmp_path / "a", weights))
    assert len(digest) == 64
    assert digest == read_all(tmp_path / "a", backwards=True)
    assert digest == read_all(write(tmp_path / "b", dict(reversed(list(weights.items())))))
    assert digest == read_all(write_sharded(tmp_path / "c", weights, 5))
    # Where the config's fields stand in their file is no content either.
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert digest == read_all(tmp_path / "a")


@pytest.mark.parametrize("sharded", [False, True])
def test_digest_changes_with_one_bit_of_one_weight(tmp_path: Path, sharded: bool) -> None:
    make = write_sharded if sharded else write
    weights = per_expert()
    digest = read_all(make(tmp_path / "a", weights))
    weights["model.layers.1.mlp.experts.3.down_proj.weight"].view(torch.int32)[15, 11] ^= 1
    assert digest != read_all(make(tmp_path / "b", weights))


def test_digest_changes_with_names_dtype_and_config(tmp_path: Path) -> None:
    one, two = torch.zeros(4), torch.ones(4)
    digests = {
        read_all(write(tmp_path / "a", {"x": one, "y": two})),
        read_all(write(tmp_path / "b", {"x": two, "y": one})),
        read_all(write(tmp_path / "c", {"x": one, "z": two})),
        read_all(write(tmp_path / "d", {"x": one, "y": two.half()})),
        read_all(write(tmp_path / "e", {"x": one, "y": two}, clip_qkv=8.0)),
    }
    assert len(digests) == 5


# Memory

MEASURE = """
import sys
from pathlib import Path
from ingot.graphs.checkpoint import Checkpoint

def resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) // 1024

checkpoint = Checkpoint.open(Path(sys.argv[1]))
checkpoint.read("small").sum()  # starts torch's threads and allocator
before = resident()
most = 0
for name in checkpoint.entries:
    tensor = checkpoint.read(name)
    tensor.sum()
    most = max(most, resident() - before)
    del tensor
print(most, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_one_tensor(tmp_path: Path) -> None:
    count, size = 8, 50 << 20
    block = torch.randn(size // 4).numpy().tobytes()
    header: dict[str, Any] = {"small": entry(0, 16)}
    for index in range(count):
        begin = 16 + index * size
        header[f"weight.{index}"] = entry(begin, begin + size, (size // 4096, 1024))
    write_raw(tmp_path, header, bytes(16))
    with (tmp_path / "model.safetensors").open("ab") as file:
        for _ in range(count):
            file.write(block)
    assert (tmp_path / "model.safetensors").stat().st_size > 400e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    most, after = (int(word) for word in done.stdout.split())
    assert 30 < most < 150  # megabytes; no growth at all would mean that nothing was read
    assert after < 30
