"""OLMoE against transformers on the same folder: eager, ``onnx`` and ``ort``, field by field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from transformers import DynamicCache, OlmoeForCausalLM, OlmoeModel

from export.capture import Captured, capture
from export.ingot import Manifest
from graphs.checkpoint import Checkpoint
from runtime.generate import generate
from runtime.session import Session, load
from validate.eager import EagerSession

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
PREFILL, DECODE = 13, 6
PADDING = (0, 4, 9)
LIMIT = 1e-4


def capture_once() -> Callable[..., Captured]:
    """``capture`` that traces the first model it gets and returns copies of that from then on."""
    made: list[Captured] = []

    def capture_or_copy(*arguments: Any, **options: Any) -> Captured:
        if not made:
            made.append(capture(*arguments, **options))
        return replace(made[0], model=made[0].model.clone())

    return capture_or_copy


class Subject:
    """One config: the folder, transformers' model of it, and our three ways to run it."""

    def __init__(self, name: str, folder: Path, make_ingot: MakeIngot) -> None:
        self.name = name
        self.folder = folder
        # from_pretrained returns a model in evaluation mode.
        self.oracle: Any = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
        # Tracing costs seconds, and both targets start from the same canonical graph.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("export.build.capture", capture_once())
            self.ingots = {target: make_ingot(folder, target) for target in ("onnx", "ort")}
        self.sessions: dict[str, Session | EagerSession] = {
            "eager": EagerSession(Checkpoint.open(folder), "generate"),
            **{target: load(ingot) for target, ingot in self.ingots.items()},
        }


@pytest.fixture(scope="module", params=CONFIGS)
def subject(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> Subject:
    return Subject(request.param, make_checkpoint(**CONFIGS[request.param]), make_ingot)


def relative_rms(expected: np.ndarray, actual: np.ndarray) -> float:
    difference = actual.astype(np.float64) - expected
    return float(np.sqrt((difference**2).mean() / (expected.astype(np.float64) ** 2).mean()))


def tokens(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of three rows with different left padding."""
    random = np.random.default_rng(3)
    ids = random.integers(0, vocab_size, (len(PADDING), PREFILL + DECODE))
    mask = np.ones_like(ids)
    for row, padding in enumerate(PADDING):
        mask[row, :padding] = 0
    return ids, mask


@torch.no_grad()
def oracle_steps(model: Any, ids: np.ndarray, mask: np.ndarray) -> list[dict[str, np.ndarray]]:
    """transformers with its own cache: a prefill, then one token at a time."""
    cache: Any = DynamicCache(config=model.config)
    results = []
    at = 0
    for count in (PREFILL, *[1] * DECODE):
        end = at + count
        seen = torch.from_numpy(mask[:, :end])
        positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, at:]
        out = model(
            torch.from_numpy(ids[:, at:end]),
            attention_mask=seen,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        found = {"logits": out.logits.numpy()}
        for index, layer in enumerate(cache.layers):
            found[f"present.{index}.key"] = layer.keys.numpy()
            found[f"present.{index}.value"] = layer.values.numpy()
        results.append(found)
        at = end
    return results


@pytest.mark.parametrize("way", ["eager", "onnx", "ort"])
def test_logits_and_caches_equal_transformers(subject: Subject, way: str) -> None:
    ids, mask = tokens(512)
    expected = oracle_steps(subject.oracle, ids, mask)
    session = subject.sessions[way]
    session.reset(len(ids), ids.shape[1])
    at = 0
    for want, count in zip(expected, (PREFILL, *[1] * DECODE), strict=True):
        end = at + count
        real, seen = mask[:, at:end] != 0, mask[:, :end] != 0
        logits = session.step(ids[:, at:end], mask[:, at:end])
        assert relative_rms(want["logits"][real], logits[real]) < LIMIT
        state = session.state()
        assert state.keys() == want.keys() - {"logits"}
        for name, array in state.items():
            assert array.shape == want[name].shape
            want_real = want[name].swapaxes(1, 2)[seen]
            assert relative_rms(want_real, array.swapaxes(1, 2)[seen]) < LIMIT, name
        at = end


@pytest.mark.parametrize("way", ["eager", "onnx", "ort"])
def test_cached_decode_equals_full_prefill(subject: Subject, way: str) -> None:
    if subject.name == "rope dynamic":
        pytest.skip("dynamic frequencies depend on the length of each call, by definition")
    ids, mask = tokens(512)
    session = subject.sessions[way]
    session.reset(len(ids), ids.shape[1])
    full = session.step(ids, mask)
    session.reset(len(ids), ids.shape[1])
    pieces = [session.step(ids[:, :PREFILL], mask[:, :PREFILL])]
    for column in range(PREFILL, PREFILL + DECODE):
        pieces.append(session.step(ids[:, column : column + 1], mask[:, column : column + 1]))
    real = mask != 0
    assert relative_rms(full[real], np.concatenate(pieces, axis=1)[real]) < LIMIT


@pytest.mark.parametrize("way", ["onnx", "ort"])
def test_greedy_generation_is_identical(subject: Subject, way: str) -> None:
    prompt = [11, 205, 7, 300, 42, 8, 99, 501, 3]
    ids = torch.tensor([prompt])
    expected = subject.oracle.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    session = load(subject.ingots[way])
    made = [step[0] for step in generate(session, [prompt], max_new_tokens=32)]
    assert len(made) == 32
    assert made == expected


@pytest.mark.parametrize("way", ["eager", "onnx", "ort"])
def test_padded_batch_equals_each_row_alone(subject: Subject, way: str) -> None:
    if subject.name == "rope dynamic":
        pytest.skip("dynamic frequencies depend on the longest row of the batch, by definition")
    ids, mask = tokens(512)
    session = subject.sessions[way]
    session.reset(len(ids), ids.shape[1])
    together = session.step(ids, mask)
    for row, padding in enumerate(PADDING):
        session.reset(1, ids.shape[1])
        alone = session.step(ids[row : row + 1, padding:], mask[row : row + 1, padding:])
        assert relative_rms(alone[0], together[row, padding:]) < LIMIT


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
    import onnxruntime

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
        session = onnxruntime.InferenceSession(out / "model.onnx")
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
