"""OLMoE against transformers on the same folder: eager, ``onnx`` and ``ort``, field by field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from oracle import (
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
from transformers import OlmoeForCausalLM, OlmoeModel

from ingot.export.ingot import Manifest
from ingot.graphs.checkpoint import Checkpoint
from ingot.runtime.loading import load
from ingot.runtime.onnxruntime_session import open_session
from ingot.validate.truth.eager import EagerSession

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Each turns on another field; the numbers are such that ignoring the field changes the result.
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "one key-value head a query head": {"num_key_value_heads": 4},
    "clip_qkv": {"clip_qkv": 0.7},
    "norm_topk_prob": {"norm_topk_prob": True},
    "attention_bias": {"attention_bias": True},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "hidden_act gelu": {"hidden_act": "gelu"},
    "hidden_act gelu_new": {"hidden_act": "gelu_new"},
    "rms_norm_eps": {"rms_norm_eps": 0.05},
    "rope_theta": {"rope_theta": 100.0},
    "rope linear, old spelling": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
        "max_position_embeddings": 16,
    },
    "rope yarn": {"rope_parameters": {**YARN, "rope_theta": 100.0}},
    "rope llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 100.0}},
    "head size 12, no kernel for it": {"hidden_size": 48},
    "every expert chosen": {"num_experts": 4, "num_experts_per_tok": 4},
    "one expert": {"num_experts": 1, "num_experts_per_tok": 1},
}


@pytest.fixture(scope="module", params=every_other_is_slow(CONFIGS))
def subject(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> Subject:
    return Subject(request.param, make_checkpoint(**CONFIGS[request.param]), make_ingot)


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


def test_the_kernels_are_swapped_where_they_are_right(subject: Subject) -> None:
    operators = Manifest.read(subject.ingots["ort"]).graph["operators"]
    gated_silu = not subject.name.startswith("hidden_act")
    assert ("MoE" in operators) == gated_silu
    assert ("MoeDispatch" in operators) != gated_silu
    assert ("GroupQueryAttention" in operators) == (not subject.name.startswith("head size"))
    assert ("FusedMatMul" in operators) == (subject.name == "tie_word_embeddings")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_compute_in_float32(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, dtype: torch.dtype
) -> None:
    subject = Subject(str(dtype), make_checkpoint(dtype=dtype), make_ingot)
    ids, mask = tokens(512)
    expected = oracle_steps(subject.oracle, ids, mask)[0]["logits"]
    for session in subject.sessions.values():
        session.reset(len(ids), ids.shape[1])
        logits = session.step(ids[:, :PREFILL], mask[:, :PREFILL])
        real = mask[:, :PREFILL] != 0
        assert relative_rms(expected[real], logits[real]) < LIMIT


@torch.no_grad()
def test_router_logits_and_hidden_states_equal_transformers(
    tiny: Path, make_ingot: MakeIngot
) -> None:

    oracle = OlmoeForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids, mask = tokens(512)
    want = oracle(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(np.maximum(mask.cumsum(-1) - 1, 0)),
        output_hidden_states=True,
        output_router_logits=True,
    )
    names = ("router_logits", "hidden_states")
    real = mask != 0
    for target in ("onnx", "ort"):
        out = make_ingot(tiny, target, extra_outputs=names)
        session = open_session(out / "model.onnx")
        feeds = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": np.maximum(mask.cumsum(-1) - 1, 0),
        }
        for state in Manifest.read(out).states:
            feeds[state.input] = np.zeros((len(ids), 2, 0, 16), dtype=np.float32)
        found = dict(
            zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True)
        )
        for index, tensor in enumerate(want.router_logits):
            logits = found[f"router_logits.{index}"]
            assert relative_rms(tensor.numpy()[real.ravel()], logits[real.ravel()]) < LIMIT
        for index, tensor in enumerate(want.hidden_states):
            assert relative_rms(tensor.numpy()[real], found[f"hidden_states.{index}"][real]) < LIMIT


@torch.no_grad()
def test_bare_model_equals_transformers(tiny: Path, make_ingot: MakeIngot) -> None:
    oracle = OlmoeModel.from_pretrained(tiny, dtype=torch.float32)
    ids, mask = tokens(512)
    positions = torch.from_numpy(np.maximum(mask.cumsum(-1) - 1, 0))
    want = oracle(
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), position_ids=positions
    ).last_hidden_state.numpy()
    for target in ("onnx", "ort"):
        session = load(make_ingot(tiny, target, task="features"))
        assert session.manifest.main_output == "last_hidden_state"
        session.reset(len(ids), ids.shape[1])
        found = session.step(ids, mask)
        assert relative_rms(want[mask != 0], found[mask != 0]) < LIMIT


def test_configs_differ_in_their_results(make_checkpoint: MakeCheckpoint) -> None:
    """A field that changed nothing here would make its comparison above prove nothing."""
    ids, mask = tokens(512)
    plain = EagerSession(Checkpoint.open(make_checkpoint()), "generate")
    plain.reset(len(ids), ids.shape[1])
    baseline = plain.step(ids, mask)
    for name, config in CONFIGS.items():
        if not config:
            continue
        session = EagerSession(Checkpoint.open(make_checkpoint(**config)), "generate")
        session.reset(len(ids), ids.shape[1])
        assert relative_rms(baseline, session.step(ids, mask)) > 100 * LIMIT, name
