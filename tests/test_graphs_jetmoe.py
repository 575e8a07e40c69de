"""JetMoE against transformers on the same folder: eager, ``onnx`` and ``ort``, field by field."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
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
from transformers import (
    AutoModelForCausalLM,
    JetMoeForCausalLM,
    JetMoeForSequenceClassification,
    JetMoeModel,
)
from transformers import JetMoeConfig as OracleConfig
from transformers.models.jetmoe.modeling_jetmoe import load_balancing_loss_func

from ingot.export.ingot import WEIGHTS, Manifest
from ingot.graphs.checkpoint import Checkpoint, CheckpointError
from ingot.graphs.config import ConfigError
from ingot.graphs.family import active_parameters, find_family
from ingot.graphs.jetmoe import FAMILY, JetMoeConfig
from ingot.graphs.layers import load_balancing_loss
from ingot.graphs.names import FAMILIES
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.plugins.errors import IngotError
from ingot.runtime.generate import generate
from ingot.runtime.loading import load
from ingot.runtime.onnxruntime_session import open_session
from ingot.runtime.session import Floats, Ids, Session, SessionError
from ingot.validate.run import validate_ingot
from ingot.validate.truth.eager import EagerSession
from ingot.validate.truth.recording import Stepper
from ingot.validate.truth.reference import Reference

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
# Each turns on another field; the numbers are such that ignoring the field changes the result.
CONFIGS: dict[str, dict[str, Any]] = {
    "two of four experts, tied": {},
    "untied": {"tie_word_embeddings": False},
    "kv_channels": {"kv_channels": 24},
    "kv_channels 12, no kernel for it": {"kv_channels": 12},
    "num_key_value_heads": {"num_key_value_heads": 3},
    "three of eight experts": {"num_local_experts": 8, "num_experts_per_tok": 3},
    "every expert chosen": {"num_experts_per_tok": 4},
    "one expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "activation_function": {"activation_function": "gelu"},
    "rms_norm_eps": {"rms_norm_eps": 0.2},
    "rope yarn": {"rope_parameters": {**YARN, "rope_theta": 100.0}},
}
LAYERS = 2


@pytest.fixture(scope="module", params=every_other_is_slow(CONFIGS))
def subject(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> Subject:
    folder = make_checkpoint("jetmoe", **CONFIGS[request.param])
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


def test_greedy_generation_does_not_repeat_itself(subject: Subject) -> None:
    """One token over and over would be identical for many wrong graphs."""
    steps = generate(load(subject.ingots["ort"]), [[11, 205, 7, 300]], max_new_tokens=32)
    assert len({step[0] for step in steps}) > 5


@pytest.mark.parametrize("way", WAYS)
def test_padded_batch_equals_each_row_alone(subject: Subject, way: str) -> None:
    check_padded_batch(subject, way)


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_takes_padding_anywhere(subject: Subject, way: str) -> None:
    check_padding_anywhere(subject, way)


def test_the_kernels_are_swapped_where_they_are_right(subject: Subject) -> None:
    operators = Manifest.read(subject.ingots["ort"]).graph["operators"]
    silu = subject.name != "activation_function"
    kernel = "no kernel" not in subject.name
    assert "MoeLinear" not in operators
    assert operators.get("MoE", 0) == (LAYERS if silu else 0)
    assert operators.get("MoeDispatch", 0) == (0 if silu else LAYERS)
    assert operators.get("GroupQueryAttention", 0) == (LAYERS if kernel else 0)
    assert operators.get("Attention", 0) == (0 if kernel else LAYERS)
    assert operators.get("FusedMatMul", 0) == (subject.name != "untied")
    functions = {name for _, name, _ in ir.load(subject.ingots["ort"] / "model.onnx").functions}
    assert functions == (set() if silu else {"MoeDispatch"})


def test_the_onnx_ingot_holds_the_operators_and_their_bodies(subject: Subject) -> None:
    model = ir.load(subject.ingots["onnx"] / "model.onnx")
    found = Counter(node.op_type for node in model.graph if node.domain == "ingot")
    assert found == {"MoeLinear": 2 * LAYERS, "MoeDispatch": LAYERS}
    assert {name for _, name, _ in model.functions} == found.keys()
    assert all(len(function) > 10 for function in model.functions.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_compute_in_float32(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, dtype: torch.dtype
) -> None:
    subject = Subject(str(dtype), make_checkpoint("jetmoe", dtype=dtype), make_ingot)
    ids, mask = tokens(512)
    expected = oracle_steps(subject.oracle, ids, mask)[0]["logits"]
    for session in subject.sessions.values():
        session.reset(len(ids), ids.shape[1])
        logits = session.step(ids[:, :PREFILL], mask[:, :PREFILL])
        real = mask[:, :PREFILL] != 0
        assert relative_rms(expected[real], logits[real]) < LIMIT


def _torch_inputs(ids: np.ndarray, mask: np.ndarray) -> dict[str, torch.Tensor]:
    arrays = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(-1) - 1, 0),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@torch.no_grad()
def test_router_logits_and_hidden_states_equal_transformers(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    folder = make_checkpoint("jetmoe")
    oracle: Any = JetMoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids, mask = tokens(512)
    inputs = _torch_inputs(ids, mask)
    want = oracle(**inputs, output_hidden_states=True, output_router_logits=True)
    expected = {f"hidden_states.{i}": t.numpy() for i, t in enumerate(want.hidden_states)}
    for index, logits in enumerate(_once_each(want.router_logits)):
        expected[f"router_logits.{index}"] = logits.numpy().reshape(*ids.shape, -1)
    assert len(expected) == (LAYERS + 1) + 2 * LAYERS
    for target in TARGETS:
        out = make_ingot(folder, target, extra_outputs=("router_logits", "hidden_states"))
        session = open_session(out / "model.onnx")
        states = Manifest.read(out).states
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        feeds |= {s.input: np.zeros((len(ids), 2, 0, 16), dtype=np.float32) for s in states}
        names = [output.name for output in session.get_outputs()]
        assert set(names) == {"logits", *(state.output for state in states), *expected}
        found = dict(zip(names, session.run(None, feeds), strict=True))
        for name, array in expected.items():
            ours = found[name].reshape(array.shape)
            assert relative_rms(array[mask != 0], ours[mask != 0]) < LIMIT, (target, name)


def _once_each(router_logits: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """transformers records the attention's router twice a layer: [attention, attention, mlp]."""
    assert len(router_logits) == 3 * LAYERS
    assert all(
        torch.equal(first, second)
        for first, second in zip(router_logits[::3], router_logits[1::3], strict=True)
    )
    return tuple(logits for index, logits in enumerate(router_logits) if index % 3)


@pytest.mark.parametrize("config", [{}, CONFIGS["three of eight experts"]])
@torch.no_grad()
def test_aux_loss_equals_transformers(
    make_checkpoint: MakeCheckpoint, config: dict[str, Any]
) -> None:
    folder = make_checkpoint("jetmoe", **config)
    oracle: Any = JetMoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids, mask = tokens(512)
    inputs = _torch_inputs(ids, mask)
    want = oracle(**inputs, output_router_logits=True)
    padding = inputs["attention_mask"]
    experts, top_k = oracle.config.num_local_experts, oracle.config.num_experts_per_tok

    eager: Any = EagerSession(Checkpoint.open(folder), "generate").model
    out = eager(**inputs, past=())
    recorded: Any = _once_each(want.router_logits)
    once: Any = load_balancing_loss_func(recorded, experts, top_k, padding)
    torch.testing.assert_close(eager.aux_loss(out, padding), once, rtol=1e-5, atol=0)
    # The one that transformers returns counts the attention's routers twice.
    attention, mlp = out.router_logits[::2], out.router_logits[1::2]
    twice = tuple(t for a, m in zip(attention, mlp, strict=True) for t in (a, a, m))
    ours = load_balancing_loss(twice, top_k, padding)
    torch.testing.assert_close(ours, want.aux_loss, rtol=1e-5, atol=0)
    # The padding, and which routers count how often, would show.
    unmasked = load_balancing_loss(out.router_logits, top_k, torch.ones_like(padding))
    for other in (unmasked, want.aux_loss):
        assert abs(other / once - 1) > 1e-4


@torch.no_grad()
def test_bare_model_equals_transformers(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    folder = make_checkpoint("jetmoe")
    oracle: Any = JetMoeModel.from_pretrained(folder, dtype=torch.float32)
    ids, mask = tokens(512)
    want = oracle(**_torch_inputs(ids, mask)).last_hidden_state.numpy()
    for target in TARGETS:
        session = load(make_ingot(folder, target, task="features"))
        assert session.manifest.main_output == "last_hidden_state"
        session.reset(len(ids), ids.shape[1])
        found = session.step(ids, mask)
        assert relative_rms(want[mask != 0], found[mask != 0]) < LIMIT


def _logits(folder: Path) -> Floats:
    ids, mask = tokens(512)
    session = EagerSession(Checkpoint.open(folder), "generate")
    session.reset(len(ids), ids.shape[1])
    result: Floats = session.step(ids, mask)[mask != 0]
    return result


def _edit(folder: Path, fields: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("activation_function", {"activation_function": "silu"}),
        ("rms_norm_eps", {"rms_norm_eps": 1e-6}),
        ("rope yarn", {"rope_parameters": None}),
        ("rope yarn", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        ("two of four experts, tied", {"num_experts_per_tok": 1}),
        ("three of eight experts", {"num_experts_per_tok": 2}),
        # The weights have the same shapes for 3 heads of 16 and for 2 of 24.
        ("num_key_value_heads", {"num_key_value_heads": 2, "kv_channels": 24}),
        ("kv_channels", {"num_key_value_heads": 4, "kv_channels": 12}),
    ],
)
def test_ignoring_the_field_would_show(
    make_checkpoint: MakeCheckpoint, name: str, instead: dict[str, Any]
) -> None:
    """The same weights without the field: no difference would make the comparisons above empty."""
    folder = make_checkpoint("jetmoe", **CONFIGS[name])
    result = _logits(folder)
    _edit(folder, instead)
    assert relative_rms(result, _logits(folder)) > 100 * LIMIT


@torch.no_grad()
def test_rms_norm_eps_is_the_final_norms_alone(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint("jetmoe", **CONFIGS["rms_norm_eps"])
    ids, mask = tokens(512)
    oracle: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    want = oracle(**_torch_inputs(ids, mask)).logits.numpy()[mask != 0]
    assert relative_rms(want, _logits(folder)) < LIMIT
    # The layers reading the field too would show.
    monkeypatch.setattr("ingot.graphs.jetmoe.LAYER_NORM_EPS", 0.2)
    assert relative_rms(want, _logits(folder)) > 100 * LIMIT


def test_absent_fields_take_transformers_defaults() -> None:
    theirs: Any = OracleConfig()
    ours = JetMoeConfig.read({"model_type": "jetmoe"})
    for name in JetMoeConfig.__dataclass_fields__:
        if name not in ("rope", "facts"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.facts.num_labels == theirs.num_labels
    assert ours.rope.dim == theirs.head_dim
    assert ours.rope.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.max_position_embeddings == theirs.max_position_embeddings


@pytest.mark.parametrize("config", [{}, *CONFIGS.values()])
def test_reads_what_transformers_writes(tmp_path: Path, config: dict[str, Any]) -> None:
    raw = {**preset_config(FAMILY, "tiny"), **config}
    OracleConfig(**raw).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    # It writes what follows from other fields as well.
    assert written["num_attention_heads"] > 0
    assert JetMoeConfig.read(written) == JetMoeConfig.read(raw)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than num_local_experts 4"),
        ({"num_attention_heads": 8}, r"num_attention_heads is 8; .* supports only 4"),
        ({"head_dim": 32}, "head_dim is 32; .* supports only 16"),
        ({"kv_channels": 15}, "even head size"),
        ({"activation_function": "mish"}, "activation_function is 'mish'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_labels": 4, "id2label": {"0": "a", "1": "b", "2": "c"}}, "num_labels is 4; .* 3"),
    ],
)
def test_refuses_what_it_does_not_implement(fields: dict[str, Any], message: str) -> None:
    config = preset_config(FAMILY, "tiny")
    JetMoeConfig.read({**config, "num_attention_heads": 4, "head_dim": 16})
    with pytest.raises(ConfigError, match=message):
        JetMoeConfig.read({**config, **fields})


def test_the_full_preset_has_the_released_size() -> None:
    total, active = active_parameters(FAMILY.build(FAMILY.presets["full"], "generate"))
    with torch.device("meta"):
        oracle: Any = JetMoeForCausalLM(OracleConfig(**FAMILY.presets["full"]))
    shapes = [parameter.shape for parameter in oracle.parameters()]
    assert total == sum(shape.numel() for shape in shapes)
    # 2 of the 8 experts' matrices serve one token.
    experts = sum(shape.numel() for shape in shapes if len(shape) == 3)
    assert active == total - experts * 6 // 8
    assert 8.5e9 < total < 8.6e9
    embedding = oracle.config.vocab_size * oracle.config.hidden_size
    assert 2.2e9 < active - embedding < 2.3e9


# Classification

LABELS = {"0": "calm", "1": "happy", "2": "sad"}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "three named labels": {"id2label": LABELS, "label2id": {v: int(k) for k, v in LABELS.items()}},
    "two labels by default": {},
}
LENGTHS = (15, 1, 9)


@dataclass(frozen=True)
class Classifier:
    """A classifier's folder, its label names, transformers' model of it and our three ways."""

    folder: Path
    labels: tuple[str, ...]
    oracle: Any
    ingots: dict[str, Path]
    sessions: dict[str, Session | EagerSession]


def _write_classifier(folder: Path, **config: Any) -> Path:
    merged = {**preset_config(FAMILY, "tiny"), **config}
    write_checkpoint(folder, FAMILY, merged, task="classify", seed=7)
    return folder


@pytest.fixture(scope="module", params=CLASSIFIERS)
def classifier(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_ingot: MakeIngot,
) -> Classifier:
    config = CLASSIFIERS[request.param]
    folder = _write_classifier(tmp_path_factory.mktemp("classifier"), **config)
    oracle = JetMoeForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    ingots = {target: make_ingot(folder, target, task="classify") for target in TARGETS}
    sessions: dict[str, Session | EagerSession] = {
        "eager": EagerSession(Checkpoint.open(folder), "classify"),
        **{target: load(ingot) for target, ingot in ingots.items()},
    }
    names = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    return Classifier(folder, tuple(names.values()), oracle, ingots, sessions)


def _batch(lengths: tuple[int, ...], side: str) -> tuple[Ids, Ids]:
    """Rows of those lengths padded on one side; 0 pads, and no real token is 0."""
    random = np.random.default_rng(5)
    ids = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        real = slice(length) if side == "right" else slice(max(lengths) - length, None)
        ids[row, real] = random.integers(1, 512, length)
        mask[row, real] = 1
    return ids, mask


def _classify(session: Stepper, ids: Ids, mask: Ids) -> Floats:
    session.reset(*ids.shape)
    return session.step(ids, mask)


BATCHES = {
    "left padding": _batch(LENGTHS, "left"),
    "right padding": _batch(LENGTHS, "right"),
    "no padding": _batch((11, 11, 11), "left"),
    "one row": _batch((13,), "left"),
    "one token": _batch((1,), "left"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_classifies_as_transformers_does(classifier: Classifier, batch: str, way: str) -> None:
    ids, mask = BATCHES[batch]
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    want = classifier.oracle(**given).logits.numpy()
    assert want.shape == (len(ids), len(classifier.labels))
    # Rows alike would hide one row's logits in another's place.
    assert len(ids) == 1 or relative_rms(want, np.roll(want, 1, axis=0)) > 100 * LIMIT
    found = _classify(classifier.sessions[way], ids, mask)
    assert found.shape == want.shape
    for row in range(len(ids)):
        assert relative_rms(want[row], found[row]) < LIMIT, row


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", ["left padding", "right padding", "no padding"])
def test_classifies_each_row_as_if_alone(classifier: Classifier, batch: str, way: str) -> None:
    ids, mask = BATCHES[batch]
    session = classifier.sessions[way]
    together = _classify(session, ids, mask)
    for row, real in enumerate(mask != 0):
        alone = _classify(session, ids[row : row + 1, real], mask[row : row + 1, real])
        assert relative_rms(alone[0], together[row]) < LIMIT


@pytest.mark.parametrize("way", WAYS)
def test_takes_each_call_of_a_classifier_for_itself(classifier: Classifier, way: str) -> None:
    session = classifier.sessions[way]
    calls = [_batch(lengths, "left") for lengths in ((12, 3), (5, 5), (2, 12), (12, 3))]
    alone = [_classify(session, ids, mask) for ids, mask in calls]
    # Room for the longest call and not for their sum: nothing may add up.
    session.reset(2, 12)
    for (ids, mask), expected in zip(calls, alone, strict=True):
        np.testing.assert_array_equal(session.step(ids, mask), expected)
        assert session.state() == {}
    if way == "eager":
        return
    with pytest.raises(SessionError, match="13 tokens do not fit"):
        session.step(*_batch((13, 13), "left"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_classifiers_ingot_says_what_it_is(classifier: Classifier, target: str) -> None:
    manifest = Manifest.read(classifier.ingots[target])
    assert (manifest.task, manifest.main_output) == ("classify", "logits")
    assert manifest.states == ()
    assert {item.name: item.shape for item in manifest.inputs} == {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "sequence"),
        "position_ids": ("batch", "sequence"),
    }
    shape = ("batch", len(classifier.labels))
    assert [(item.name, item.shape) for item in manifest.outputs] == [("logits", shape)]
    assert manifest.labels == classifier.labels
    theirs = classifier.oracle.config.id2label
    assert manifest.labels == tuple(theirs[number] for number in sorted(theirs))
    assert manifest.parameters == sum(p.numel() for p in classifier.oracle.parameters())


@pytest.mark.parametrize("target", TARGETS)
def test_refuses_to_generate_with_a_classifier(classifier: Classifier, target: str) -> None:
    with pytest.raises(SessionError, match="exported for the task 'classify' and cannot generate"):
        next(generate(load(classifier.ingots[target]), [[1, 2, 3]], max_new_tokens=1))


@pytest.mark.parametrize("target", TARGETS)
def test_validation_passes_a_classifier(classifier: Classifier, target: str) -> None:
    reference = Reference(Checkpoint.open(classifier.folder), "classify")
    for seed in range(3):
        report = validate_ingot(classifier.ingots[target], reference, seed=seed)
        assert (report.verdict, report.failures) == ("passed", [])
        # Every length from the prefill's to the last, and one output each; and all that is inside.
        steps = [(f"{length} tokens", "logits") for length in range(19, 28)]
        assert [(t.stage, t.name) for t in report.tensors][: len(steps)] == steps
        inside = [t.name for t in report.tensors if t.stage == "19 tokens, replayed"]
        routers = {f"router_logits.{n}" for n in range(4)}
        assert set(inside) == {"logits", *routers, *(f"hidden_states.{n}" for n in range(3))}
        assert all(t.score is not None and t.score < 5 for t in report.tensors)


@pytest.mark.parametrize("target", TARGETS)
def test_validation_fails_a_classifier_with_a_damaged_head(
    classifier: Classifier, target: str, tmp_path: Path
) -> None:
    damaged = shutil.copytree(classifier.ingots[target], tmp_path / "ingot")
    raw = bytearray((damaged / WEIGHTS).read_bytes())
    size = int.from_bytes(raw[:8], "little")
    start, end = json.loads(raw[8 : 8 + size])["score.weight"]["data_offsets"]
    # The sign of the first of all weights, in the last of its four bytes.
    assert end - start == 4 * 64 * len(classifier.labels)
    raw[8 + size + start + 3] ^= 0x80
    (damaged / WEIGHTS).write_bytes(raw)
    reference = Reference(Checkpoint.open(classifier.folder), "classify")
    report = validate_ingot(damaged, reference, verify=False)
    assert report.verdict == "failed"
    assert report.failures[0].startswith("19 tokens, logits: the error ")


def test_refuses_a_checkpoint_of_another_task(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, classifier: Classifier
) -> None:
    with pytest.raises(CheckpointError, match=r"score\.weight \[2, 64\] is missing"):
        make_ingot(make_checkpoint("jetmoe"), "onnx", task="classify")
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        make_ingot(classifier.folder, "onnx")


def test_takes_the_bare_model_out_of_a_classifier(classifier: Classifier) -> None:
    eager = EagerSession(Checkpoint.open(classifier.folder), "features")
    ids, mask = BATCHES["no padding"]
    found = _classify(eager, ids, mask)[:, -1] @ classifier.oracle.score.weight.detach().numpy().T
    want = _classify(classifier.sessions["eager"], ids, mask)
    assert relative_rms(want, found) < LIMIT


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if "classify" not in find_family(name).tasks]
)
def test_other_families_refuse_to_classify(name: str) -> None:
    family = find_family(name)
    with pytest.raises(IngotError, match=f"{name} has no task 'classify'; it has: generate"):
        family.build(preset_config(family, "tiny"), "classify")
