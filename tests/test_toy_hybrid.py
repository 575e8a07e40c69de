"""An architecture that mixes kinds of layers, through everything the product does with one.

The expected numbers are those of a plain loop in float64 over the checkpoint's tensors: one row at
a time, without padding, one token after another, each with its own recurrence and list of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import toy_hybrid
from conftest import MakeCheckpoint, MakeIngot
from damage import one_percent, with_weight
from located import main_calls, subject
from oracle import DECODE, LIMIT, PADDING, PREFILL, TARGETS, WAYS, relative_rms, tokens
from safetensors.numpy import load_file

from ingot.export.ingot import Manifest
from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.layers import Mixed
from ingot.runtime.generate import generate
from ingot.runtime.loading import load
from ingot.runtime.session import Session
from ingot.runtime.triton_lint import lint
from ingot.runtime.triton_plan import Settings
from ingot.runtime.triton_repository import write_repository
from ingot.validate.locate.locate import locate
from ingot.validate.run import validate_ingot
from ingot.validate.truth.eager import EagerSession
from ingot.validate.truth.inputs import QUICK, Plan, make_inputs
from ingot.validate.truth.reference import Reference, RoutersError

Vector = npt.NDArray[np.float64]
CONFIG = toy_hybrid.FAMILY.presets["tiny"]
SCANS, ATTENTIONS = (0, 2), (1, 3)
HIDDEN, HEADS, KEY_HEADS, SIZE, TOP_K = 32, 4, 2, 8, 2
SCAN_HEADS, SCAN_SIZE, GROUPS, STATES, WIDTH = 4, 16, 2, 8, 4
INNER, CHANNELS = SCAN_HEADS * SCAN_SIZE, SCAN_HEADS * SCAN_SIZE + 2 * GROUPS * STATES
VOCAB = 512
PROMPTS = [[17, 300, 5, 9, 204, 77, 31], [4, 88], [250, 6, 43, 12]]


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with toy_hybrid.registered():
        yield


@pytest.fixture(scope="module")
def checkpoint(registered: None, make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("toy_hybrid")


@pytest.fixture(scope="module")
def ingots(checkpoint: Path, make_ingot: MakeIngot) -> dict[str, Path]:
    return {target: make_ingot(checkpoint, target) for target in TARGETS}


@pytest.fixture(scope="module")
def sessions(checkpoint: Path, ingots: dict[str, Path]) -> dict[str, Session | EagerSession]:
    eager = EagerSession(Checkpoint.open(checkpoint), "generate")
    return {"eager": eager, **{target: load(ingot) for target, ingot in ingots.items()}}


# The plain loop


def _sigmoid(x: Vector) -> Vector:
    return 1 / (1 + np.exp(-x))


def _norm(x: Vector, weight: Vector) -> Vector:
    result: Vector = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight
    return result


class Loop:
    """One sequence, token by token."""

    def __init__(self, checkpoint: Path) -> None:
        found = load_file(checkpoint / "model.safetensors")
        self.weights = {name: array.astype(np.float64) for name, array in found.items()}
        self.seen = 0
        self.keys: dict[int, list[Vector]] = {layer: [] for layer in ATTENTIONS}
        self.values: dict[int, list[Vector]] = {layer: [] for layer in ATTENTIONS}
        self.window = {layer: np.zeros((CHANNELS, WIDTH - 1)) for layer in SCANS}
        self.memory = {layer: np.zeros((SCAN_HEADS, SCAN_SIZE, STATES)) for layer in SCANS}

    def step(self, token: int) -> Vector:
        """The next token -> its logits."""
        w = self.weights
        x = w["model.embed_tokens.weight"][token]
        for layer, count in enumerate(CONFIG["routers"]):
            at = f"model.layers.{layer}"
            normed = _norm(x, w[f"{at}.norm.weight"])
            mix = self._scan if layer in SCANS else self._attention
            x = x + mix(layer, f"{at}.mixer", normed)
            for number in range(count):
                x = x + self._experts(f"{at}.experts.{number}", x)
        self.seen += 1
        logits: Vector = w["lm_head.weight"] @ _norm(x, w["model.norm.weight"])
        return logits

    def _scan(self, layer: int, at: str, x: Vector) -> Vector:
        w = self.weights
        gate, xbc, dt = np.split(w[f"{at}.in_proj.weight"] @ x, [INNER, INNER + CHANNELS])
        window = np.concatenate((self.window[layer], xbc[:, None]), axis=1)
        self.window[layer] = window[:, 1:]
        mixed = (window * w[f"{at}.conv1d.weight"][:, 0]).sum(1) + w[f"{at}.conv1d.bias"]
        mixed = mixed * _sigmoid(mixed)
        inputs = mixed[:INNER].reshape(SCAN_HEADS, SCAN_SIZE)
        into, out_of = mixed[INNER:].reshape(2, GROUPS, STATES)
        y = np.empty((SCAN_HEADS, SCAN_SIZE))
        for head in range(SCAN_HEADS):
            group = head * GROUPS // SCAN_HEADS
            step = math.log1p(math.exp(dt[head] + w[f"{at}.dt_bias"][head]))
            decay = math.exp(-step * math.exp(w[f"{at}.A_log"][head]))
            memory = decay * self.memory[layer][head]
            memory += step * np.outer(inputs[head], into[group])
            self.memory[layer][head] = memory
            y[head] = memory @ out_of[group] + w[f"{at}.D"][head] * inputs[head]
        gated = (y.reshape(-1) * gate * _sigmoid(gate)).reshape(GROUPS, -1)
        normed = _norm(gated, np.ones(gated.shape[1])).reshape(-1) * w[f"{at}.norm.weight"]
        result: Vector = w[f"{at}.out_proj.weight"] @ normed
        return result

    def _rotated(self, x: Vector) -> Vector:
        angles = self.seen * 10000.0 ** (-np.arange(0, SIZE, 2) / SIZE)
        first, second = x[:, : SIZE // 2], x[:, SIZE // 2 :]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=1)

    def _attention(self, layer: int, at: str, x: Vector) -> Vector:
        query, key, value = (
            (self.weights[f"{at}.{which}_proj.weight"] @ x).reshape(-1, SIZE) for which in "qkv"
        )
        self.keys[layer].append(self._rotated(key))
        self.values[layer].append(value)
        keys, values = np.stack(self.keys[layer]), np.stack(self.values[layer])
        out = np.empty((HEADS, SIZE))
        for head, each in enumerate(self._rotated(query)):
            shared = head * KEY_HEADS // HEADS
            scores = np.exp(keys[:, shared] @ each / math.sqrt(SIZE))
            out[head] = scores / scores.sum() @ values[:, shared]
        result: Vector = self.weights[f"{at}.o_proj.weight"] @ out.reshape(-1)
        return result

    def _experts(self, at: str, x: Vector) -> Vector:
        w = self.weights
        x = _norm(x, w[f"{at}.norm.weight"])
        scores = np.exp(w[f"{at}.router.weight"] @ x)
        chosen = np.argsort(-scores)[:TOP_K]
        y = np.zeros(HIDDEN)
        for expert in chosen:
            gate, up = np.split(w[f"{at}.gate_up"][expert] @ x, 2)
            inner = gate * _sigmoid(gate) * up
            y += scores[expert] / scores[chosen].sum() * (w[f"{at}.down"][expert] @ inner)
        return y

    def states(self) -> dict[str, Vector]:
        """By the names that the graph has, without the batch."""
        result: dict[str, Vector] = {}
        for layer in range(len(CONFIG["layer_types"])):
            if layer in SCANS:
                result[f"present_states.{layer}.conv"] = self.window[layer]
                result[f"present_states.{layer}.ssm"] = self.memory[layer]
            else:
                for kind, cache in (("key", self.keys), ("value", self.values)):
                    result[f"present.{layer}.{kind}"] = np.stack(cache[layer], axis=1)
        return result


# What it is compared with


def test_its_states_interleave_and_only_caches_share_buffers(ingots: dict[str, Path]) -> None:
    for target, ingot in ingots.items():
        states = Manifest.read(ingot).states
        assert [state.kind for state in states] == ["conv", "ssm", "key", "value"] * 2
        assert [state.input for state in states[2:5]] == [
            "past_key_values.1.key",
            "past_key_values.1.value",
            "past_states.2.conv",
        ]
        grows = [state.axis is not None for state in states]
        assert grows == [False, False, True, True] * 2
        assert [state.shared for state in states] == [target == "ort" and each for each in grows]


@pytest.mark.parametrize("way", WAYS)
def test_computes_what_a_plain_loop_does(
    way: str, checkpoint: Path, sessions: dict[str, Session | EagerSession]
) -> None:
    ids, mask = tokens(VOCAB)
    session = sessions[way]
    session.reset(*ids.shape)
    loops = [Loop(checkpoint) for _ in PADDING]
    at = 0
    for count in (PREFILL, *[1] * DECODE):
        end = at + count
        logits = session.step(ids[:, at:end], mask[:, at:end])
        state = session.state()
        for row, (loop, padding) in enumerate(zip(loops, PADDING, strict=True)):
            expected = [loop.step(token) for token in ids[row, max(at, padding) : end]]
            assert relative_rms(np.stack(expected), logits[row, -len(expected) :]) < LIMIT
            assert state.keys() == loop.states().keys()
            for name, want in loop.states().items():
                found = state[name][row]
                found = found[:, padding:] if "states" not in name else found
                assert found.shape == want.shape
                assert relative_rms(want, found) < LIMIT, name
        at = end


@pytest.mark.parametrize("way", WAYS)
def test_decodes_what_a_prefill_of_all_gives(
    way: str, sessions: dict[str, Session | EagerSession]
) -> None:
    ids, mask = tokens(VOCAB)
    session = sessions[way]
    session.reset(*ids.shape)
    full = session.step(ids, mask)
    session.reset(*ids.shape)
    # Off a chunk's end, and several tokens at once for several rows.
    cuts = [0, 5, PREFILL, *range(PREFILL + 1, ids.shape[1] + 1)]
    pieces = [session.step(ids[:, a:b], mask[:, a:b]) for a, b in pairwise(cuts)]
    real = mask != 0
    assert relative_rms(full[real], np.concatenate(pieces, axis=1)[real]) < LIMIT


def test_takes_all_states_or_none_and_refuses_another_number(checkpoint: Path) -> None:
    model = EagerSession(Checkpoint.open(checkpoint), "generate").model
    ids = torch.ones((1, 3), dtype=torch.int64)
    zeros = [torch.zeros(state.shape(1, 0)) for state in model.states]
    alone = model(ids, ids, ids, ())
    assert torch.equal(alone.main, model(ids, ids, ids, tuple(zeros)).main)
    for past in (zeros[:-1], [*zeros, zeros[0]]):
        with pytest.raises(ValueError, match=f"has 8 states and was given {len(past)}; give all"):
            model(ids, ids, ids, tuple(past))


def test_refuses_facts_that_tell_of_other_routers(
    checkpoint: Path, ingots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = toy_hybrid.ToyLayer.forward

    def forgets(self: toy_hybrid.ToyLayer, *given: Any) -> Mixed:
        found = forward(self, *given)
        return found._replace(router_logits=found.router_logits[:1])

    monkeypatch.setattr(toy_hybrid.ToyLayer, "forward", forgets)
    reference = Reference(Checkpoint.open(checkpoint), "generate")
    with pytest.raises(RoutersError, match=r"logits of 3 routers.* of 4, by layer \[1, 2, 0, 1\]"):
        validate_ingot(ingots["onnx"], reference, plan=QUICK)


def test_reads_every_weight_once_a_call_where_it_streams(
    checkpoint: Path, sessions: dict[str, Session | EagerSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Checkpoint.open(checkpoint)
    streamed, loaded = EagerSession(opened, "generate", streamed=True), sessions["eager"]
    names: list[str] = []
    read = Checkpoint.read

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", counted)
    ids, mask = tokens(VOCAB)
    for session in (streamed, loaded):
        session.reset(*ids.shape)
    for columns in (slice(0, PREFILL), slice(PREFILL, PREFILL + 1)):
        names.clear()
        found = streamed.step(ids[:, columns], mask[:, columns])
        of_layers = [name for name in opened.entries if ".layers." in name]
        assert sorted(names) == sorted(of_layers)
        assert np.array_equal(found, loaded.step(ids[:, columns], mask[:, columns]))
        assert {name for name, p in streamed.model.named_parameters() if p.is_meta} == set(
            of_layers
        )


@pytest.mark.parametrize("target", TARGETS)
def test_passes_its_validation(target: str, checkpoint: Path, ingots: dict[str, Path]) -> None:
    reference = Reference(Checkpoint.open(checkpoint), "generate")
    # More than a chunk, since its layers say that some of them scan.
    assert reference.chunk_size == 8
    assert reference.routers.names() == (
        "layer 0",
        "layer 1, router 0",
        "layer 1, router 1",
        "layer 3",
    )
    report = validate_ingot(ingots[target], reference, Stages(), plan=QUICK)
    assert report.verdict == "passed", report.tensors
    names = {tensor.name for tensor in report.tensors}
    assert names >= {state.output for state in Manifest.read(ingots[target]).states}
    assert {tensor.kind for tensor in report.tensors} >= {"conv", "ssm", "key", "value", "router"}


def _generated(session: Session, prompts: list[list[int]], count: int) -> list[list[int]]:
    steps = list(generate(session, prompts, max_new_tokens=count))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("target", TARGETS)
def test_generates_what_a_plain_loop_does(
    target: str, checkpoint: Path, ingots: dict[str, Path]
) -> None:
    expected = []
    for prompt in PROMPTS:
        loop, row = Loop(checkpoint), []
        logits = [loop.step(token) for token in prompt][-1]
        for _ in range(24):
            row.append(int(logits.argmax()))
            logits = loop.step(row[-1])
        expected.append(row)
    assert all(len(set(row)) > 3 for row in expected)
    assert _generated(load(ingots[target]), PROMPTS, 24) == expected


@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        pytest.param("layers.1.mixer.o_proj.weight", 1, marks=pytest.mark.slow),
        pytest.param("layers.2.mixer.conv1d.bias", 2, marks=pytest.mark.slow),
    ],
)
def test_a_fault_is_located_in_its_layer(
    weight: str, layer: int, checkpoint: Path, ingots: dict[str, Path], tmp_path: Path
) -> None:
    damaged = with_weight(ingots["onnx"], tmp_path / "damaged", weight, one_percent)
    inputs = make_inputs(VOCAB, plan=Plan(decode=2), chunk_size=8)
    found = locate(subject(damaged, Checkpoint.open(checkpoint)), main_calls(inputs))
    assert found is not None and found.layer == layer


@pytest.mark.parametrize("target", TARGETS)
def test_a_triton_repository_has_no_problems(
    target: str, ingots: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("tritonclient.grpc")
    write_repository(ingots[target], tmp_path / "models", Settings(capacity=64))
    assert lint(tmp_path / "models") == []
