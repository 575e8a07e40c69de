"""Granite against transformers on the same folder: eager, ``onnx`` and ``ort``, field by field."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from oracle import (
    LIMIT,
    TARGETS,
    WAYS,
    Subject,
    check_cached_decode,
    check_greedy_generation,
    check_logits_and_caches,
    check_padded_batch,
    every_other_is_slow,
    relative_rms,
    tokens,
)
from transformers import GraniteConfig as OracleConfig
from transformers import GraniteModel

from ingot.export.request import ExportError
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.config import ConfigError
from ingot.graphs.granite import FAMILY, GraniteConfig
from ingot.runtime.loading import load
from ingot.runtime.onnxruntime_session import open_session
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
    check_logits_and_caches(subject, way)


@pytest.mark.parametrize("way", WAYS)
def test_cached_decode_equals_full_prefill(subject: Subject, way: str) -> None:
    check_cached_decode(subject, way)


@pytest.mark.parametrize("way", TARGETS)
def test_greedy_generation_is_identical(subject: Subject, way: str) -> None:
    check_greedy_generation(subject, way)


@pytest.mark.parametrize("way", WAYS)
def test_padded_batch_equals_each_row_alone(subject: Subject, way: str) -> None:
    check_padded_batch(subject, way)


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


def test_refuses_router_logits_it_does_not_have(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    folder = make_checkpoint("granite")
    with pytest.raises(ExportError, match="granite has no router_logits; it has: hidden_states"):
        make_ingot(folder, "onnx", extra_outputs=("router_logits",))
