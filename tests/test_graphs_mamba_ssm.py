"""The layout of mamba_ssm against transformers on the same weights under its own names."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeIngot
from oracle import LIMIT, relative_rms, tokens
from safetensors.torch import load_file, save_file
from transformers import Mamba2ForCausalLM

from ingot.graphs.checkpoint import Checkpoint, CheckpointError
from ingot.graphs.config import ConfigError
from ingot.graphs.family import family_of, find_family
from ingot.graphs.mamba2 import Mamba2Config
from ingot.graphs.mamba_ssm import config, tensor_names, wrote
from ingot.graphs.preset import write_checkpoint
from ingot.runtime.loading import load
from ingot.validate.truth.eager import EagerSession

# Every field of the released models, their sizes scaled down but those of a head and its state.
RELEASED = {
    "d_model": 64,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 501,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
# What transformers' own config of the same model says.
TRANSFORMERS = {
    "model_type": "mamba2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "num_heads": 2,
    "head_dim": 64,
    "state_size": 128,
    "n_groups": 1,
    "expand": 2,
    "conv_kernel": 4,
    "chunk_size": 256,
    "residual_in_fp32": True,
    "tie_word_embeddings": True,
    "use_bias": False,
    "use_conv_bias": True,
    "layer_norm_epsilon": 1e-5,
}
# Other fields of mamba_ssm -> the same as transformers says it.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Of 130m and of 2.7b, which differ in their sizes alone.
    "mamba2-130m": ({}, {}),
    "mamba2-2.7b": (
        {"d_model": 96, "n_layer": 3},
        {"hidden_size": 96, "num_hidden_layers": 3, "num_heads": 3},
    ),
    "untied": ({"tie_embeddings": False}, {"tie_word_embeddings": False}),
    "no padding of the vocabulary": ({"vocab_size": 512, "pad_vocab_size_multiple": 1}, {}),
    "narrow residual": ({"residual_in_fp32": False}, {"residual_in_fp32": False}),
    "sizes of the mixer": (
        {"ssm_cfg": {"headdim": 16, "d_state": 24, "ngroups": 4, "expand": 3, "d_conv": 3}},
        {
            "num_heads": 12,
            "head_dim": 16,
            "state_size": 24,
            "n_groups": 4,
            "expand": 3,
            "conv_kernel": 3,
        },
    ),
    "biases": (
        {"ssm_cfg": {"bias": True, "conv_bias": False}},
        {"use_bias": True, "use_conv_bias": False},
    ),
    "dt_limit": ({"ssm_cfg": {"dt_limit": [0.01, 0.05]}}, {"time_step_limit": [0.01, 0.05]}),
    "what draws new weights": (
        {"ssm_cfg": {"A_init_range": [1, 8], "dt_min": 0.1, "use_mem_eff_path": False}},
        {},
    ),
}
COMPARED = ("mamba2-130m", "mamba2-2.7b", "sizes of the mixer", "biases", "dt_limit")


def theirs(name: str) -> dict[str, Any]:
    """mamba_ssm's config of a pair."""
    fields = PAIRS[name][0]
    return {**RELEASED, **fields, "ssm_cfg": {"layer": "Mamba2", **fields.get("ssm_cfg", {})}}


def written(folder: Path, name: str, *, pickled: bool = False) -> tuple[Path, Path]:
    """A checkpoint in the layouts of mamba_ssm and of transformers."""
    for part in ("mamba_ssm", "transformers"):
        (folder / part).mkdir()
    hf, ssm = folder / "transformers", folder / "mamba_ssm"
    write_checkpoint(hf, find_family("mamba2"), {**TRANSFORMERS, **PAIRS[name][1]}, seed=5)
    (ssm / "config.json").write_text(json.dumps(theirs(name)))
    held = load_file(hf / "model.safetensors")
    held["backbone.embedding.weight"] = held.pop("backbone.embeddings.weight")
    if not pickled:
        save_file(held, ssm / "model.safetensors")
    elif theirs(name)["tie_embeddings"]:
        # As state_dict() has a tied head: the same memory under a second name.
        torch.save({**held, "lm_head.weight": held["backbone.embedding.weight"]}, ssm / "weights")
        (ssm / "weights").rename(ssm / "pytorch_model.bin")
    return ssm, hf


@torch.no_grad()
def logits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of transformers, and ids ``[1, T]``."""
    ids = tokens(512)[0][:1]
    model: Any = Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.from_numpy(ids)).logits.numpy(), ids


def check(session: Any, want: np.ndarray, ids: np.ndarray) -> None:
    session.reset(1, ids.shape[1])
    assert relative_rms(want, session.step(ids, np.ones_like(ids))) < LIMIT


@pytest.mark.parametrize("name", PAIRS)
def test_config_is_that_of_transformers(name: str) -> None:
    assert wrote(theirs(name))
    expected = Mamba2Config.read({**TRANSFORMERS, **PAIRS[name][1]})
    assert Mamba2Config.read(config(theirs(name))) == expected


def test_absent_fields_take_the_defaults_of_mamba_ssm() -> None:
    found = config({"ssm_cfg": {"layer": "Mamba2"}})
    assert (found["hidden_size"], found["num_hidden_layers"], found["vocab_size"]) == (
        2560,
        64,
        50280,
    )
    assert (found["num_heads"], found["state_size"], found["n_groups"]) == (80, 128, 1)
    assert found["tie_word_embeddings"] and found["residual_in_fp32"]


@pytest.mark.parametrize("name", COMPARED)
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    ssm, hf = written(tmp_path, name)
    check(EagerSession(Checkpoint.open(ssm), "generate"), *logits(hf))


@pytest.mark.slow
def test_ingot_s_logits_equal_transformers(tmp_path: Path, make_ingot: MakeIngot) -> None:
    ssm, hf = written(tmp_path, "mamba2-130m")
    check(load(make_ingot(ssm, "ort")), *logits(hf))


@pytest.mark.parametrize("kept", ["lm_head.weight", "backbone.embedding.weight"])
def test_reads_a_tied_model_by_either_name_and_in_shards(tmp_path: Path, kept: str) -> None:
    ssm, hf = written(tmp_path, "mamba2-130m")
    held = load_file(ssm / "model.safetensors")
    (ssm / "model.safetensors").unlink()
    save_file({kept: held.pop("backbone.embedding.weight")}, ssm / "a.safetensors")
    save_file(held, ssm / "b.safetensors")
    places = {kept: "a.safetensors", **dict.fromkeys(held, "b.safetensors")}
    (ssm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    check(EagerSession(Checkpoint.open(ssm), "generate"), *logits(hf))


def test_gates_without_a_norm_where_rmsnorm_is_false() -> None:
    raw = {**RELEASED, "ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}
    assert Mamba2Config.read(config(raw)).mixer.norm_eps is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"ssm_cfg": {}}, "Mamba1"),
        ({"ssm_cfg": {"layer": None}}, "Mamba1"),
        ({"ssm_cfg": {"layer": "Mamba1", "d_state": 16}}, "layer .Mamba1"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "Mamba3"),
        ({"ssm_cfg": 3}, "ssm_cfg is 3"),
        ({"d_model": "64"}, "d_model"),
        ({"d_model": 0}, "d_model"),
        ({"n_layer": 2.0}, "n_layer"),
        ({"d_intermediate": 128}, "d_intermediate is 128"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"ssm": {"headdim": 5}}, "headdim 5"),
        ({"ssm": {"d_ssm": 64}}, "d_ssm is 64"),
        ({"ssm": {"D_has_hdim": True}}, "D_has_hdim"),
        ({"ssm": {"norm_before_gate": True}}, "norm_before_gate"),
        ({"ssm": {"learnable_init_states": True}}, "learnable_init_states"),
        ({"ssm": {"activation": "gelu"}}, "activation"),
        ({"ssm": {"dt_limit": [0.5, 0.1]}}, "dt_limit"),
        ({"ssm": {"dt_limit": [0.0]}}, "dt_limit"),
        ({"ssm": {"mimo": True}}, "mimo"),
    ],
)
def test_refuses_what_mamba2_here_does_not_compute(fields: dict[str, Any], named: str) -> None:
    mixer = {"layer": "Mamba2", **fields.pop("ssm", {})}
    with pytest.raises(ConfigError, match=named):
        config({**RELEASED, "ssm_cfg": mixer, **fields})


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"model_type": "mamba2", "ssm_cfg": {}},
        {"n_layer": 2, "n_embd": 8},
        {"model_type": "mpt", "d_model": 8, "n_layer": 2},
    ],
)
def test_knows_the_layout_from_others(raw: dict[str, Any]) -> None:
    assert not wrote(raw)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("backbone.embedding.weight", "backbone.embeddings.weight"),
        ("embedding.weight", "embeddings.weight"),
        ("backbone.layers.0.mixer.in_proj.weight", "backbone.layers.0.mixer.in_proj.weight"),
        ("wte.embedding.weight", "wte.embedding.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_renames_the_embedding_alone(stored: str, name: str) -> None:
    assert tensor_names({"rms_norm": True}, [stored]) == {stored: name}


def test_refuses_an_embedding_in_both_spellings(tmp_path: Path) -> None:
    ssm, _ = written(tmp_path, "mamba2-130m")
    held = load_file(ssm / "model.safetensors")
    held["backbone.embeddings.weight"] = held["backbone.embedding.weight"] + 1
    save_file(held, ssm / "model.safetensors")
    with pytest.raises(ConfigError, match="embedding twice"):
        Checkpoint.open(ssm)


def test_refuses_a_norm_that_the_config_has_not() -> None:
    raw = config({**RELEASED, "ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}})
    layer = "backbone.layers.0.mixer."
    assert tensor_names(raw, [layer + "D"]) == {layer + "D": layer + "D"}
    with pytest.raises(ConfigError, match="rmsnorm is False"):
        tensor_names(raw, [layer + "D", layer + "norm.weight"])


def test_names_ssm_cfg_where_a_tensor_has_another_shape(tmp_path: Path) -> None:
    ssm, _ = written(tmp_path, "mamba2-130m")
    raw = {**RELEASED, "ssm_cfg": {"layer": "Mamba2", "d_state": 64}}
    (ssm / "config.json").write_text(json.dumps(raw))
    checkpoint = Checkpoint.open(ssm)
    family = family_of(checkpoint)
    model = family.build(checkpoint.config, "generate")
    with pytest.raises(CheckpointError, match="mamba_ssm's d_model, vocab_size and ssm_cfg"):
        family.weight_map(model, checkpoint, "generate")


def test_the_advice_for_pickles_converts_them(tmp_path: Path) -> None:
    place = tmp_path / "a folder's name"
    place.mkdir()
    ssm, hf = written(place, "mamba2-130m", pickled=True)
    with pytest.raises(CheckpointError, match="pickle weights only") as caught:
        Checkpoint.open(ssm)
    said = str(caught.value)
    assert "mamba_ssm" in said
    # As a shell reads it, with the Python that runs this.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    command = said[said.index("python -c") :]
    subprocess.run(command, shell=True, check=True, env={**os.environ, "PATH": path})
    assert math.isfinite(load_file(ssm / "model.safetensors")["lm_head.weight"].sum())
    check(EagerSession(Checkpoint.open(ssm), "generate"), *logits(hf))
