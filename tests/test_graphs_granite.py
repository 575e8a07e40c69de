"""Granite against transformers on the same folder: eager, ``onnx`` and ``ort``, field by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from oracle import (
    DECODE,
    LIMIT,
    PREFILL,
    TARGETS,
    WAYS,
    Subject,
    check_cached_decode,
    check_greedy_generation,
    check_last_logits,
    check_logits_and_states,
    check_padded_batch,
    check_padding_anywhere,
    every_other_is_slow,
    oracle_steps,
    relative_rms,
    tokens,
)
from transformers import AutoModelForCausalLM, GraniteModel, LlamaConfig, LlamaForCausalLM
from transformers import GraniteConfig as OracleConfig

from ingot.export.ingot import Manifest
from ingot.export.request import ExportError
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.config import ConfigError
from ingot.graphs.granite import FAMILY, GraniteConfig
from ingot.graphs.granite_multipliers import NOT_MULTIPLIED
from ingot.graphs.preset import write_checkpoint
from ingot.runtime.loading import load
from ingot.runtime.onnxruntime_session import open_session
from ingot.runtime.session import Session
from ingot.validate.truth.eager import EagerSession

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
# Each turns on another field; the numbers are such that ignoring the field changes the result.
CONFIGS: dict[str, dict[str, Any]] = {
    "all multipliers, tied": {},
    "untied": {"tie_word_embeddings": False},
    "attention_bias and mlp_bias": {"attention_bias": True, "mlp_bias": True},
    "embedding_multiplier": {"embedding_multiplier": 3.0},
    "residual_multiplier": {"residual_multiplier": 0.7},
    "attention_multiplier": {"attention_multiplier": 0.5},
    "logits_scaling": {"logits_scaling": 2.0},
    "one key-value head a query head": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 24},
    "hidden_act": {"hidden_act": "gelu"},
    "rope yarn": {"rope_parameters": {**YARN, "rope_theta": 100.0}},
}


@pytest.fixture(scope="module", params=every_other_is_slow(CONFIGS))
def subject(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> Subject:
    folder = make_checkpoint("granite", **CONFIGS[request.param])
    return Subject(request.param, folder, make_ingot)


@pytest.mark.parametrize("way", WAYS)
def test_logits_and_caches_equal_transformers(subject: Subject, way: str) -> None:
    check_logits_and_states(subject, way)


@pytest.mark.parametrize("way", WAYS)
def test_cached_decode_equals_full_prefill(subject: Subject, way: str) -> None:
    check_cached_decode(subject, way)


@pytest.mark.parametrize("way", TARGETS)
def test_greedy_generation_is_identical(subject: Subject, way: str) -> None:
    check_greedy_generation(subject, way)


@pytest.mark.parametrize("way", WAYS)
def test_last_logits_alone_equal_transformers(subject: Subject, way: str) -> None:
    check_last_logits(subject, way)


@pytest.mark.parametrize("way", WAYS)
def test_padded_batch_equals_each_row_alone(subject: Subject, way: str) -> None:
    check_padded_batch(subject, way)


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_takes_padding_anywhere(subject: Subject, way: str) -> None:
    check_padding_anywhere(subject, way)


LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.2, 1.5, 2.0, 2.0, 2.5, 3.0, 3.0],
    "long_factor": [1.0, 3.0, 5.0, 8.0, 13.0, 20.0, 30.0, 44.0],
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "way", ["eager", *(pytest.param(way, marks=pytest.mark.slow) for way in ("ort", "onnx"))]
)
def test_longrope_switches_with_the_length_of_a_call_as_transformers_does(
    way: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    folder = make_checkpoint("granite", rope_parameters=LONGROPE, max_position_embeddings=64)
    oracle: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    session: Session | EagerSession
    if way == "eager":
        session = EagerSession(Checkpoint.open(folder), "generate")
    else:
        session = load(make_ingot(folder, way))
    ids, mask = tokens(512)
    original = LONGROPE["original_max_position_embeddings"]
    assert PREFILL < original < PREFILL + DECODE
    # A cache that is decoded over the switch: what it holds stays as it was rotated.
    session.reset(*ids.shape)
    decoded, at = [], 0
    for want in oracle_steps(oracle, ids, mask):
        end = at + want["logits"].shape[1]
        decoded.append(session.step(ids[:, at:end], mask[:, at:end]))
        real = mask[:, at:end] != 0
        assert relative_rms(want["logits"][real], decoded[-1][real]) < LIMIT
        at = end
    # Prompts below and past it, each in one call.
    for length in (original - 1, original, original + 1, ids.shape[1]):
        with torch.no_grad():
            expected = oracle(torch.from_numpy(ids[:, :length]), use_cache=False).logits.numpy()
        session.reset(len(ids), length)
        found = session.step(ids[:, :length], np.ones_like(ids[:, :length]))
        assert relative_rms(expected, found) < LIMIT
    # In one call past the switch every position is rotated by the long factors.
    session.reset(*ids.shape)
    whole = session.step(ids, mask)[:, -1]
    assert relative_rms(whole, decoded[-1][:, -1]) > 100 * LIMIT


def test_multipliers_cost_nothing_at_run_time(subject: Subject) -> None:
    for ingot in subject.ingots.values():
        for node in ir.load(ingot / "model.onnx").graph:
            if node.op_type not in ("Mul", "Div"):
                continue
            value, factor = node.inputs
            assert value is not None and factor is not None
            producer = value.producer()
            # yarn's factor on cos and sin is not on the signal path.
            if producer is not None and producer.op_type not in ("Cos", "Sin"):
                assert factor.const_value is None or len(factor.const_value.shape), node


@torch.no_grad()
def test_bare_model_and_hidden_states_equal_transformers(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    folder = make_checkpoint("granite")
    oracle: Any = GraniteModel.from_pretrained(folder, dtype=torch.float32)
    ids, mask = tokens(512)
    positions = torch.from_numpy(np.maximum(mask.cumsum(-1) - 1, 0))
    want = oracle(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        position_ids=positions,
        output_hidden_states=True,
    )
    real = mask != 0
    session = load(make_ingot(folder, "ort", task="features"))
    session.reset(len(ids), ids.shape[1])
    found = session.step(ids, mask)
    assert relative_rms(want.last_hidden_state.numpy()[real], found[real]) < LIMIT

    eager = EagerSession(Checkpoint.open(folder), "features")
    out = eager.model(
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        positions,
        tuple(torch.zeros(len(ids), 2, 0, 16) for _ in eager.states),
    )
    assert len(out.hidden_states) == len(want.hidden_states)
    for tensor, expected in zip(out.hidden_states, want.hidden_states, strict=True):
        assert relative_rms(expected.numpy()[real], tensor.numpy()[real]) < LIMIT


def test_hidden_states_of_an_ingot_are_those_of_the_graph(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    """Where a value is an output, its multiplier must not be folded away from it."""

    folder = make_checkpoint("granite")
    eager = EagerSession(Checkpoint.open(folder), "generate")
    ids, mask = tokens(512)
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    past = tuple(torch.zeros(len(ids), 2, 0, 16) for _ in eager.states)
    with torch.no_grad():
        want = eager.model(*map(torch.from_numpy, (ids, mask, positions)), past)
    for target in TARGETS:
        out = make_ingot(folder, target, extra_outputs=("hidden_states",))
        session = open_session(out / "model.onnx")
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds |= {s.input: p.numpy() for s, p in zip(eager.states, past, strict=True)}
        names = [f"hidden_states.{i}" for i in range(3)]
        found = session.run(["logits", *names], feeds)
        for expected, array in zip((want.main, *want.hidden_states), found, strict=True):
            assert relative_rms(expected.numpy()[mask != 0], array[mask != 0]) < LIMIT


@pytest.mark.parametrize(
    "name",
    [
        "embedding_multiplier",
        "residual_multiplier",
        "attention_multiplier",
        "logits_scaling",
        "hidden_act",
        "rope yarn",
    ],
)
def test_ignoring_the_field_would_show(make_checkpoint: MakeCheckpoint, name: str) -> None:
    """The same weights without the field: no difference would make the comparisons above empty."""
    folder = make_checkpoint("granite", **CONFIGS[name])
    ids, mask = tokens(512)
    results = []
    for fields in (CONFIGS[name], {}):
        kept = {key: FAMILY.presets["tiny"].get(key) for key in CONFIGS[name]}
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **kept, **fields}))
        session = EagerSession(Checkpoint.open(folder), "generate")
        session.reset(len(ids), ids.shape[1])
        results.append(session.step(ids, mask)[mask != 0])
    assert relative_rms(results[0], results[1]) > 100 * LIMIT


def test_absent_fields_take_transformers_defaults() -> None:
    ours, theirs = GraniteConfig.read({"model_type": "granite"}), OracleConfig()
    for name in GraniteConfig.__dataclass_fields__:
        if name not in ("rope", "facts", "head_dim"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads


def test_refuses_a_field_it_does_not_implement() -> None:
    with pytest.raises(ConfigError, match="sliding_window"):
        GraniteConfig.read({"model_type": "granite", "sliding_window": 4096})


def test_the_full_preset_has_the_released_size() -> None:
    model = FAMILY.build(FAMILY.presets["full"], "generate")
    assert 2.5e9 < sum(parameter.numel() for parameter in model.parameters()) < 2.6e9


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-40])
def test_refuses_a_scale_of_attention_that_no_kernel_takes(scale: float) -> None:
    with pytest.raises(ConfigError, match=r"attention_multiplier .* greater than 0"):
        GraniteConfig.read({"model_type": "granite", "attention_multiplier": scale})


def test_refuses_router_logits_it_does_not_have(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    folder = make_checkpoint("granite")
    with pytest.raises(ExportError, match="granite has no router_logits; it has: hidden_states"):
        make_ingot(folder, "onnx", extra_outputs=("router_logits",))


# Llama, which is Granite without its multipliers.

# Every field of the released Granite 3B and 8B code models, scaled down.
CODE = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 80,
    "initializer_range": 0.02,
    "intermediate_size": 160,
    "max_position_embeddings": 2048,
    "mlp_bias": True,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
    "vocab_size": 512,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
    "rope_type": "llama3",
}
LLAMAS: dict[str, dict[str, Any]] = {
    "granite-3b-code": {},
    "granite-8b-code": {
        "hidden_size": 64,
        "intermediate_size": 224,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_theta": 10000000,
    },
    "untied, without biases": {
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": 24,
    },
    "rope llama3": {"rope_scaling": LLAMA3, "rope_theta": 50.0},
}


def llama(folder: Path, **fields: Any) -> Path:
    config = {**CODE, **fields}
    granite = {**config, "model_type": "granite", **NOT_MULTIPLIED, "pretraining_tp": None}
    write_checkpoint(folder, FAMILY, granite, seed=3)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def llama_logits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of transformers, and ids ``[1, T]``."""
    oracle: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokens(512)[0][:1]
    return oracle(torch.from_numpy(ids)).logits.numpy(), ids


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_s_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    folder = llama(tmp_path, **LLAMAS[name])
    want, ids = llama_logits(folder)
    session = EagerSession(Checkpoint.open(folder), "generate")
    session.reset(1, ids.shape[1])
    assert relative_rms(want, session.step(ids, np.ones_like(ids))) < LIMIT


@pytest.mark.slow
def test_an_ingot_of_llama_is_granite(tmp_path: Path, make_ingot: MakeIngot) -> None:
    folder = llama(tmp_path)
    want, ids = llama_logits(folder)
    out = make_ingot(folder, "ort")
    assert Manifest.read(out).model_type == "granite"
    session = load(out)
    session.reset(1, ids.shape[1])
    assert relative_rms(want, session.step(ids, np.ones_like(ids))) < LIMIT


def test_absent_fields_of_llama_take_transformers_defaults() -> None:
    ours, theirs = GraniteConfig.read({"model_type": "llama"}), LlamaConfig()
    for name in GraniteConfig.__dataclass_fields__:
        if name not in ("rope", "facts") and "multiplier" not in name and "scaling" not in name:
            assert getattr(ours, name) == getattr(theirs, name), name
    assert theirs.head_dim is not None
    assert ours.attention_multiplier == theirs.head_dim**-0.5
    assert (ours.embedding_multiplier, ours.residual_multiplier, ours.logits_scaling) == (1, 1, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"pretraining_tp": 2},
        {"sliding_window": 4096},
        {"attention_multiplier": 0.5},
        {"residual_multiplier": 0.22},
        {"logits_scaling": 8.0},
        {"embedding_multiplier": 12.0},
        {"attn_logit_softcapping": 30.0},
        {"use_qk_norm": True},
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        {"num_experts": 8},
    ],
)
def test_refuses_what_is_beyond_llama_by_its_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    inner = "partial_rotary_factor" if name == "rope_parameters" else name
    with pytest.raises(ConfigError, match=inner):
        GraniteConfig.read({**CODE, **fields})
