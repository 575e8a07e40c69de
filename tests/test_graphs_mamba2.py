"""Mamba2 against transformers on the same folder: eager, ``onnx`` and ``ort``, field by field."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import MakeCheckpoint, MakeIngot
from forgetful import Forgetful
from oracle import (
    DECODE,
    LIMIT,
    PADDING,
    PREFILL,
    TARGETS,
    WAYS,
    Subject,
    check_cached_decode,
    check_greedy_generation,
    check_last_logits,
    every_other_is_slow,
    relative_rms,
    tokens,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, Mamba2ForCausalLM, Mamba2Model
from transformers import Mamba2Config as OracleConfig

from ingot.export.ingot import Manifest, TensorInfo
from ingot.graphs.checkpoint import Checkpoint, load_parameters
from ingot.graphs.config import ConfigError
from ingot.graphs.layers import Step
from ingot.graphs.mamba2 import FAMILY, Mamba2Config
from ingot.graphs.preset import preset_config, random_weight
from ingot.graphs.state import Kind, State
from ingot.runtime.generate import generate
from ingot.runtime.loading import load
from ingot.runtime.onnxruntime_session import open_session
from ingot.runtime.session import Floats, Ids, SessionError
from ingot.runtime.tokens import TokenInputs
from ingot.validate.run import validate_ingot
from ingot.validate.truth.eager import EagerSession
from ingot.validate.truth.inputs import make_inputs
from ingot.validate.truth.recording import Stepper
from ingot.validate.truth.reference import Reference

# Each turns on another field; the numbers are such that ignoring the field changes the result. One
# layer shows a field as well as two do and is traced in half the time, but may repeat its tokens.
CONFIGS: dict[str, dict[str, Any]] = {
    "two groups, tied": {"num_hidden_layers": 2},
    "one group": {"num_hidden_layers": 2, "n_groups": 1, "state_size": 32},
    "one group a head": {"n_groups": 8},
    # Every field of the released Codestral Mamba, in its proportions; no prefill fills a chunk.
    "Codestral": {
        "num_heads": 16,
        "head_dim": 8,
        "n_groups": 8,
        "chunk_size": 32,
        "intermediate_size": 128,
        "tie_word_embeddings": False,
        "norm_before_gate": True,
        "rescale_prenorm_residual": False,
        "time_step_init_scheme": "random",
        "time_step_limit": [0.0, math.inf],
        "time_step_rank": 4,
        "time_step_scale": 1.0,
    },
    "untied": {"tie_word_embeddings": False},
    "use_bias": {"use_bias": True},
    "no convolution bias": {"use_conv_bias": False},
    "hidden_act": {"hidden_act": "gelu"},
    "time_step_limit": {"time_step_limit": [0.02, 0.1]},
    "conv_kernel 2": {"conv_kernel": 2},
    "conv_kernel 5": {"conv_kernel": 5},
    "expand 4, odd sizes": {
        "expand": 4,
        "hidden_size": 35,
        "num_heads": 4,
        "head_dim": 35,
        "state_size": 11,
    },
    "layer_norm_epsilon": {"num_hidden_layers": 2, "layer_norm_epsilon": 0.05},
    "chunk_size": {"chunk_size": 4},
    "no norm in the mixer": {"rms_norm": False, "tie_word_embeddings": False},
    "one head": {"num_heads": 1, "head_dim": 128, "n_groups": 1},
}
BASE = "two groups, tied"
LAYERS = 2
VOCAB = 512
TOTAL = PREFILL + DECODE
# First and last column of every call.
CALLS = [(0, PREFILL), *((column, column + 1) for column in range(PREFILL, TOTAL))]

Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]


class GateAlone(nn.Module):
    """What ``rms_norm: false`` means; transformers does not know the field."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return x * F.silu(gate)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more to a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def subjects(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> Callable[[str], Subject]:
    """``subjects(name)``: the config of that name, made once."""

    @functools.cache
    def make(name: str) -> Subject:
        config = {"num_hidden_layers": 1, **CONFIGS[name]}
        subject = Subject(name, make_checkpoint("mamba2", **config), make_ingot)
        # Its cached step does not clamp the time step, as its prefill does.
        subject.oracle.generation_config.use_cache = "time_step_limit" not in config
        if not config.get("rms_norm", True):
            for layer in subject.oracle.backbone.layers:
                layer.mixer.norm = GateAlone()
        return subject

    return make


@pytest.fixture(scope="module", params=every_other_is_slow(CONFIGS))
def subject(request: pytest.FixtureRequest, subjects: Callable[[str], Subject]) -> Subject:
    return subjects(request.param)


def states_of(cache: Any, kernel: int) -> Arrays:
    """transformers' states by our names."""
    found = {}
    for index, layer in enumerate(cache.layers):
        conv = layer.conv_states[0]
        assert conv.shape[-1] == kernel
        # The oldest of its columns has no part in any later token.
        found[f"present_states.{index}.conv"] = conv[..., 1:].numpy().copy()
        found[f"present_states.{index}.ssm"] = layer.recurrent_states[0].numpy().copy()
    return found


@torch.no_grad()
def prefill(model: Any, ids: Ids) -> Arrays:
    """transformers' logits and states after one call over rows without padding.

    It masks the *input* of a projection, whose bias then leaks from padding into the convolution
    of the first tokens; without padding there is nothing to leak.
    """
    out = model(torch.from_numpy(ids), use_cache=True)
    return {
        "logits": out.logits.numpy(),
        **states_of(out.cache_params, model.config.conv_kernel),
    }


@pytest.fixture(scope="module")
def expected(subject: Subject) -> list[list[Arrays]]:
    """For every call and every row: its new logits and the states after it, of the row alone.

    Each call's come from a prefill of all that came before; see ``subjects``.
    """
    ids, _ = tokens(VOCAB)
    calls = []
    for begin, end in CALLS:
        rows = []
        for row, padding in enumerate(PADDING):
            found = prefill(subject.oracle, ids[row : row + 1, padding:end])
            found["logits"] = found["logits"][:, max(begin - padding, 0) :]
            rows.append(found)
        calls.append(rows)
    return calls


def assert_close(want: Arrays, found: Arrays, where: Any = "") -> None:
    assert found.keys() == want.keys()
    for name, array in want.items():
        assert found[name].shape == array.shape, (where, name)
        assert relative_rms(array, found[name]) < LIMIT, (where, name)


def zeros(
    states: tuple[State, ...], batch: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """The states before the first token; a scan's is float32 whatever the weights are."""
    dtypes = {"conv": dtype, "ssm": torch.float32}
    return tuple(
        torch.zeros([batch, *map(int, state.input_shape[1:])], dtype=dtypes[state.kind])
        for state in states
    )


def run(session: Stepper, ids: Ids, mask: Ids, cuts: tuple[int, ...] = ()) -> Arrays:
    """All logits and the last states of a batch that is fed in pieces."""
    session.reset(*ids.shape)
    ends = [*cuts, ids.shape[1]]
    begins = [0, *cuts]
    pieces = [
        session.step(ids[:, begin:end], mask[:, begin:end])
        for begin, end in zip(begins, ends, strict=True)
    ]
    return {"logits": np.concatenate(pieces, axis=1), **session.state()}


def real(found: Arrays, mask: Ids) -> Arrays:
    """Without the logits of padding, which mean nothing."""
    return {**found, "logits": found["logits"][mask != 0]}


def logits_of(folder: Path) -> Floats:
    ids, mask = tokens(VOCAB)
    session = EagerSession(Checkpoint.open(folder), "generate")
    return real(run(session, ids, mask), mask)["logits"]


# The numbers


@pytest.mark.parametrize("way", WAYS)
def test_every_row_of_a_padded_batch_equals_transformers_on_it_alone(
    subject: Subject, expected: list[list[Arrays]], way: str
) -> None:
    ids, mask = tokens(VOCAB)
    session = subject.sessions[way]
    session.reset(*ids.shape)
    for (begin, end), rows in zip(CALLS, expected, strict=True):
        logits = session.step(ids[:, begin:end], mask[:, begin:end])
        states = session.state()
        for row, want in enumerate(rows):
            alone = slice(row, row + 1)
            found = {"logits": logits[alone, mask[row, begin:end] != 0]}
            found |= {name: array[alone] for name, array in states.items()}
            assert_close(want, found, (begin, row))


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_cached_decode_equals_that_of_transformers(subject: Subject, way: str) -> None:
    config = CONFIGS[subject.name]
    if "time_step_limit" in config and config["time_step_limit"][0] > 0:
        pytest.skip("transformers' cached step does not clamp the time step")
    ids, mask = tokens(VOCAB)
    if config.get("use_bias"):
        # A padded batch of transformers is not its rows alone; see `prefill`.
        mask = np.ones_like(mask)
    cache: Any = DynamicCache(config=subject.oracle.config)
    session = subject.sessions[way]
    session.reset(*ids.shape)
    for begin, end in CALLS:
        out = subject.oracle(
            torch.from_numpy(ids[:, begin:end]),
            attention_mask=torch.from_numpy(mask[:, :end]),
            cache_params=cache,
            use_cache=True,
        )
        want = {"logits": out.logits.numpy(), **states_of(cache, subject.oracle.config.conv_kernel)}
        found = {"logits": session.step(ids[:, begin:end], mask[:, begin:end]), **session.state()}
        assert_close(real(want, mask[:, begin:end]), real(found, mask[:, begin:end]), begin)


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
    ids, mask = tokens(VOCAB)
    session = subject.sessions[way]
    together = run(session, ids, mask)
    for row, padding in enumerate(PADDING):
        rows = slice(row, row + 1)
        alone = run(session, ids[rows, padding:], mask[rows, padding:])
        found = {name: array[rows] for name, array in together.items()}
        assert_close(alone, {**found, "logits": found["logits"][:, padding:]}, row)


@pytest.mark.parametrize("way", WAYS)
def test_two_calls_equal_one_wherever_they_part(subject: Subject, way: str) -> None:
    """Also where a row's first call is padding alone, or is shorter than the convolution."""
    ids, mask = tokens(VOCAB)
    session = subject.sessions[way]
    whole = real(run(session, ids, mask), mask)
    for cut in range(1, TOTAL):
        assert_close(whole, real(run(session, ids, mask, (cut,)), mask), cut)


@pytest.mark.parametrize("name", [BASE, "chunk_size"])
def test_every_length_around_the_chunks_equals_transformers(
    subjects: Callable[[str], Subject], name: str
) -> None:
    subject = subjects(name)
    longest = 2 * subject.oracle.config.chunk_size + 2
    ids = np.random.default_rng(4).integers(0, VOCAB, (2, longest))
    for length in range(1, longest + 1):
        want = prefill(subject.oracle, ids[:, :length])
        for way in WAYS:
            found = run(subject.sessions[way], ids[:, :length], np.ones_like(ids[:, :length]))
            assert_close(want, found, (length, way))


def test_error_does_not_grow_over_a_long_run(subjects: Callable[[str], Subject]) -> None:
    subject = subjects(BASE)
    prompt, steps = 10, 300
    ids = np.random.default_rng(5).integers(0, VOCAB, (1, prompt + steps))
    want = prefill(subject.oracle, ids)
    cuts = tuple(range(prompt, prompt + steps))
    found = run(subject.sessions["ort"], ids, np.ones_like(ids), cuts)
    assert_close(want, found)
    # An error that the last tokens alone have would be lost among all.
    assert relative_rms(want["logits"][:, -10:], found["logits"][:, -10:]) < LIMIT


# Padding


@pytest.mark.parametrize("way", WAYS)
def test_a_call_of_padding_alone_leaves_the_state_of_its_row(
    subject: Subject, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan's: the convolution's window takes the padding, so sessions refuse such a call."""
    monkeypatch.setattr(TokenInputs, "_check_padding", lambda self, mask: None)
    ids, mask = tokens(VOCAB)
    session = subject.sessions[way]
    session.reset(*ids.shape)
    session.step(ids[:, :PREFILL], mask[:, :PREFILL])
    before = session.state()
    padding = np.ones_like(ids[:, PREFILL:])
    padding[1] = 0
    session.step(ids[:, PREFILL:], padding)
    after = session.state()
    for name in before:
        if not name.endswith(".ssm"):
            continue
        if way == "eager":
            np.testing.assert_array_equal(after[name][1], before[name][1])
        assert relative_rms(before[name][1], after[name][1]) < 1e-6
        for row in (0, 2):
            assert relative_rms(before[name][row], after[name][row]) > 100 * LIMIT


# Rows of two calls: padded on the right, padded on the left once more, padding alone, a hole.
BEHIND_A_TOKEN = ("111110 1111", "111111 0111", "001111 0000", "110111 1111")


@pytest.mark.parametrize("way", TARGETS)
@pytest.mark.parametrize("row", BEHIND_A_TOKEN)
def test_refuses_padding_behind_a_token_and_goes_on(
    subjects: Callable[[str], Subject], way: str, row: str
) -> None:
    calls = [np.array([[1] * len(part), [*map(int, part)]]) for part in row.split()]
    good = [np.ones_like(calls[0]) if "0" in row[1:6].lstrip("0") else calls[0]]
    good.append(np.ones_like(calls[1]))
    ids = np.random.default_rng(11).integers(0, VOCAB, (2, 10))
    session = subjects(BASE).sessions[way]
    expected = run(session, ids, np.concatenate(good, axis=1), (6,))
    session.reset(2, 10)
    found, at = [], 0
    for call, right in zip(calls, good, strict=True):
        columns = slice(at, at + call.shape[1])
        if not np.array_equal(call, right):
            with pytest.raises(SessionError, match="padding behind the first token of row 1"):
                session.step(ids[:, columns], call)
        found.append(session.step(ids[:, columns], right))
        at = columns.stop
    # What was refused has left no trace.
    np.testing.assert_array_equal(expected["logits"], np.concatenate(found, axis=1))
    for name, array in session.state().items():
        np.testing.assert_array_equal(expected[name], array)


@pytest.mark.parametrize("way", WAYS)
def test_ids_of_padding_do_not_matter_at_all(subject: Subject, way: str) -> None:
    ids, mask = tokens(VOCAB)
    others = np.where(mask == 0, VOCAB - 1 - ids, ids)
    assert (others != ids).any()
    first, second = (
        real(run(subject.sessions[way], i, mask, (PREFILL,)), mask) for i in (ids, others)
    )
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array)


# The graph


@pytest.mark.parametrize("target", TARGETS)
def test_takes_and_gives_what_the_contract_says(subject: Subject, target: str) -> None:
    c = subject.oracle.config
    channels = c.expand * c.hidden_size + 2 * c.n_groups * c.state_size
    shapes: dict[Kind, tuple[int | str, ...]] = {
        "conv": ("batch", channels, c.conv_kernel - 1),
        "ssm": ("batch", c.num_heads, c.head_dim, c.state_size),
    }
    layers = range(c.num_hidden_layers)
    kinds = [(layer, kind) for layer in layers for kind in shapes]
    inputs: dict[str, tuple[int | str, ...]] = {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "sequence"),
        "logits_to_keep": (1,),
        **{f"past_states.{layer}.{kind}": shapes[kind] for layer, kind in kinds},
    }
    outputs = {
        "logits": ("batch", "kept_sequence", VOCAB),
        **{f"present_states.{layer}.{kind}": shapes[kind] for layer, kind in kinds},
    }
    manifest = Manifest.read(subject.ingots[target])
    assert manifest.inputs == tuple(
        TensorInfo(name, "int64" if index < 3 else "float32", shape)
        for index, (name, shape) in enumerate(inputs.items())
    )
    assert manifest.outputs == tuple(TensorInfo(n, "float32", s) for n, s in outputs.items())
    assert manifest.states == tuple(
        State(
            kind=kind,
            input=f"past_states.{layer}.{kind}",
            output=f"present_states.{layer}.{kind}",
            dtype="float32",
            input_shape=shapes[kind],
            output_shape=shapes[kind],
            axis=None,
            shared=False,
        )
        for layer, kind in kinds
    )
    assert manifest.generation["context_length"] is None
    # And so says the graph itself.
    model = onnx.load(subject.ingots[target] / "model.onnx", load_external_data=False)
    for values, promised in ((model.graph.input, inputs), (model.graph.output, outputs)):
        found = {
            value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in values
        }
        assert found == promised


def test_the_onnx_ingot_holds_one_scan_and_one_convolution_a_layer(subject: Subject) -> None:
    model = onnx.load(subject.ingots["onnx"] / "model.onnx", load_external_data=False)
    operators = Counter((node.domain, node.op_type) for node in model.graph.node)
    c = subject.oracle.config
    layers = c.num_hidden_layers
    assert operators["ingot", "Mamba2Scan"] == operators["", "Conv"] == layers
    assert {domain for domain, _ in operators} == {"", "ingot"}
    assert [(f.domain, f.name) for f in model.functions] == [("ingot", "Mamba2Scan")]
    assert len(model.functions[0].node) > 10
    low, high = c.time_step_limit
    for node in model.graph.node:
        if node.op_type == "Mamba2Scan":
            given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert given == {
                "chunk_size": c.chunk_size,
                "dt_min": pytest.approx(low),
                "dt_max": pytest.approx(high),
            }


def test_generates_without_a_longest_context(subjects: Callable[[str], Subject]) -> None:
    session = load(subjects(BASE).ingots["ort"])
    steps = generate(session, [[11, 205, 7]], max_new_tokens=10**9)
    assert len(list(islice(steps, 40))) == 40


@torch.no_grad()
def test_bare_model_and_hidden_states_equal_transformers(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    folder = make_checkpoint("mamba2")
    oracle: Any = Mamba2Model.from_pretrained(folder, dtype=torch.float32)
    ids, mask = tokens(VOCAB)
    want = oracle(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        output_hidden_states=True,
        use_cache=True,
    )
    # Every layer's output, then the final norm's; the embedding is not among them.
    expected = {f"hidden_states.{i}": t.numpy() for i, t in enumerate(want.hidden_states)}
    assert len(expected) == LAYERS + 1
    expected["last_hidden_state"] = want.last_hidden_state.numpy()
    states = states_of(want.cache_params, oracle.config.conv_kernel)

    eager = EagerSession(Checkpoint.open(folder), "features")
    past = zeros(eager.states, len(ids))
    out = eager.model(torch.from_numpy(ids), torch.from_numpy(mask), torch.empty(0), past)
    found = {f"hidden_states.{i}": t.numpy() for i, t in enumerate(out.hidden_states)}
    found["last_hidden_state"] = out.main.numpy()
    found |= {s.output: t.numpy() for s, t in zip(eager.states, out.present, strict=True)}
    runs = {"eager": found}

    for target in TARGETS:
        folder_out = make_ingot(folder, target, task="features", extra_outputs=("hidden_states",))
        manifest = Manifest.read(folder_out)
        assert (manifest.task, manifest.main_output) == ("features", "last_hidden_state")
        session = open_session(folder_out / "model.onnx")
        feeds = {"input_ids": ids, "attention_mask": mask}
        feeds |= {s.input: p.numpy() for s, p in zip(eager.states, past, strict=True)}
        names = [output.name for output in session.get_outputs()]
        runs[target] = dict(zip(names, session.run(None, feeds), strict=True))
        # The session leaves the further outputs aside.
        alone = load(folder_out)
        alone.reset(*ids.shape)
        assert (
            relative_rms(expected["last_hidden_state"][mask != 0], alone.step(ids, mask)[mask != 0])
            < LIMIT
        )

    for way, found in runs.items():
        assert found.keys() == expected.keys() | states.keys(), way
        for name, array in expected.items():
            assert relative_rms(array[mask != 0], found[name][mask != 0]) < LIMIT, (way, name)
        assert_close(states, {name: found[name] for name in states}, way)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_compute_in_float32(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, dtype: torch.dtype
) -> None:
    folder = make_checkpoint("mamba2", dtype=dtype, num_hidden_layers=1)
    subject = Subject(str(dtype), folder, make_ingot)
    ids, _ = tokens(VOCAB)
    want = prefill(subject.oracle, ids)
    for way, session in subject.sessions.items():
        found = run(session, ids, np.ones_like(ids), (PREFILL,))
        assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
        assert_close(want, found, way)


class OfOurs(nn.Module):
    """Our mixer in transformers' block, at the start of a sequence."""

    def __init__(self, mixer: nn.Module, past: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.mixer = mixer
        self.past = past

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        mixed: torch.Tensor = self.mixer(x, Step(real=x.new_ones(x.shape[:2])), self.past).x
        return mixed


@torch.no_grad()
def test_residual_in_fp32_is_the_residuals_dtype(make_checkpoint: MakeCheckpoint) -> None:
    """In float32 the field changes nothing, so here all weights are bfloat16.

    Both sides run our mixers and norms: those round in other places than transformers' do, which
    in bfloat16 is more than the rounding of the residual that is compared here.
    """
    # Deep enough for that rounding to add up.
    folder = make_checkpoint("mamba2", num_hidden_layers=8)
    ids = torch.from_numpy(tokens(VOCAB)[0])
    ours, theirs = {}, {}
    for wide in (True, False):
        _edit_config(folder, {"residual_in_fp32": wide})
        checkpoint = Checkpoint.open(folder)
        model: Any = FAMILY.build(checkpoint.config, "generate")
        weights = FAMILY.weight_map(model, checkpoint, "generate")
        load_parameters(model, checkpoint, weights, torch.bfloat16)
        past = zeros(model.states, len(ids), torch.bfloat16)
        ours[wide] = model(ids, torch.ones_like(ids), torch.empty(0), past)
        oracle: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        for layer, own in zip(oracle.backbone.layers, model.backbone.layers, strict=True):
            layer.norm, layer.mixer = own.norm, OfOurs(own.mixer, past[:2])
        theirs[wide] = oracle(ids, output_hidden_states=True)

    for wide, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        # The final norm is not the residual.
        layers, want = ours[wide].hidden_states[:-1], theirs[wide].hidden_states[:-1]
        for index, (found, array) in enumerate(zip(layers, want, strict=True)):
            assert found.dtype == array.dtype == dtype
            assert torch.equal(found, array), index
        same, other = (
            relative_rms(theirs[field].logits.numpy(), ours[wide].main.float().numpy())
            for field in (wide, not wide)
        )
        assert same < other / 2
        # The states keep their own dtypes whatever the residual's.
        for spec, state in zip(model.states, ours[wide].present, strict=True):
            assert state.dtype == (torch.bfloat16 if spec.kind == "conv" else torch.float32)


# The config


def _edit_config(folder: Path, fields: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != BASE])
def test_configs_differ_in_their_results(make_checkpoint: MakeCheckpoint, name: str) -> None:
    """A field that changed nothing here would make its comparison above prove nothing."""
    one_layer = {"num_hidden_layers": 1}
    results = [
        logits_of(make_checkpoint("mamba2", **{**CONFIGS[n], **one_layer})) for n in (BASE, name)
    ]
    if name == "chunk_size":
        # It says how to cut the scan, and has no part in what the scan means.
        np.testing.assert_array_equal(results[1], results[0])
    else:
        assert relative_rms(results[0], results[1]) > 100 * LIMIT


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("hidden_act", {"hidden_act": "silu"}),
        ("time_step_limit", {"time_step_limit": [0.0, math.inf]}),
        # Either end of the range has its part.
        ("time_step_limit", {"time_step_limit": [0.0, 0.1]}),
        ("time_step_limit", {"time_step_limit": [0.02, math.inf]}),
        ("layer_norm_epsilon", {"layer_norm_epsilon": 1e-5}),
        # The weights have the same shapes where groups times states is the same.
        ("one group", {"n_groups": 2, "state_size": 16}),
        ("one group a head", {"n_groups": 4, "state_size": 32}),
        ("use_bias", {"use_bias": False}),
        ("no convolution bias", {"use_conv_bias": True}),
        ("untied", {"tie_word_embeddings": True}),
        ("no norm in the mixer", {"rms_norm": True}),
    ],
)
def test_ignoring_the_field_would_show(
    make_checkpoint: MakeCheckpoint, name: str, instead: dict[str, Any]
) -> None:
    """The same weights without the field: no difference would make the comparisons above empty."""
    folder, other = (
        make_checkpoint("mamba2", **{**CONFIGS[name], **fields}) for fields in ({}, instead)
    )
    # Some fields add a weight or take one away.
    weights, others = (load_file(path / "model.safetensors") for path in (folder, other))
    kept = {weight: weights.get(weight, others[weight]) for weight in others}
    assert all(kept[weight].shape == others[weight].shape for weight in others)
    save_file(kept, other / "model.safetensors", metadata={"format": "pt"})
    assert relative_rms(logits_of(folder), logits_of(other)) > 100 * LIMIT


@pytest.mark.parametrize("index", range(2 * LAYERS))
def test_forgetting_one_state_would_show(subjects: Callable[[str], Subject], index: int) -> None:
    """Decays and convolution are such that every state matters to the next token."""
    subject = subjects(BASE)
    ids, mask = tokens(VOCAB)
    forgetful = Forgetful(EagerSession(Checkpoint.open(subject.folder), "generate"), index)
    want, found = (
        run(session, ids, mask, (PREFILL,))["logits"][:, PREFILL]
        for session in (subject.sessions["eager"], forgetful)
    )
    assert relative_rms(want, found) > 10 * LIMIT


def test_absent_fields_take_transformers_defaults() -> None:
    ours, theirs = Mamba2Config.read({"model_type": "mamba2"}), OracleConfig()
    for name in Mamba2Config.__dataclass_fields__.keys() - {"facts"}:
        # transformers always norms.
        expected = True if name == "rms_norm" else getattr(theirs, name)
        assert getattr(ours, name) == expected, name
    assert ours.mixer.inner_size == theirs.expand * theirs.hidden_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expand": 3}, "expand 3 times hidden_size 64 is 192, but num_heads 8 .* 128"),
        ({"head_dim": 15}, "head_dim 15 is 120"),
        ({"intermediate_size": 127}, "intermediate_size is 127; .* only 128"),
        ({"n_groups": 3}, "num_heads 8 is not a multiple of n_groups 3"),
        ({"n_groups": 16}, "num_heads 8 is not a multiple of n_groups 16"),
        ({"conv_kernel": 1}, "conv_kernel is 1; it must be at least 2"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"use_mlp": True}, "use_mlp is True"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
    ],
)
def test_refuses_what_it_does_not_implement(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mamba2Config.read({**preset_config(FAMILY, "tiny"), **fields})


@pytest.mark.parametrize(
    "limit",
    [
        "0.1",
        '"0.02, 0.1"',
        "{}",
        "[]",
        "[0.1]",
        "[0.0, 0.1, 0.2]",
        '["low", "high"]',
        '["0.02", "0.1"]',
        "[null, 0.1]",
        "[false, 0.1]",
        "[[0.0], [0.1]]",
        "[0.1, 0.02]",
        "[-0.1, 0.1]",
        "[0.0, -Infinity]",
        "[Infinity, Infinity]",
        "[NaN, 0.1]",
        "[0.0, NaN]",
        '[0.0, {"__float__": "NaN"}]',
        '[0.0, {"__float__": "-Infinity"}]',
        '[0.0, {"float": "Infinity"}]',
    ],
)
def test_refuses_a_malformed_time_step_limit(limit: str) -> None:
    raw = json.loads(f'{{"time_step_limit": {limit}}}')
    with pytest.raises(ConfigError, match="time_step_limit is "):
        Mamba2Config.read({**preset_config(FAMILY, "tiny"), **raw})


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("[0.0, Infinity]", (0.0, math.inf)),
        ('[0.0, {"__float__": "Infinity"}]', (0.0, math.inf)),
        ("[0, 1]", (0.0, 1.0)),
        ("[0.02, 0.1]", (0.02, 0.1)),
        ("null", (0.0, math.inf)),
    ],
)
def test_accepts_each_spelling_of_time_step_limit(
    limit: str, expected: tuple[float, float]
) -> None:
    raw = json.loads(f'{{"time_step_limit": {limit}}}')
    read = Mamba2Config.read({**preset_config(FAMILY, "tiny"), **raw})
    assert read.time_step_limit == expected


def test_accepts_fields_that_draw_new_weights() -> None:
    config = preset_config(FAMILY, "tiny")
    fields = {
        "initializer_range": 0.5,
        "rescale_prenorm_residual": True,
        "time_step_floor": 1e-3,
        "time_step_init_scheme": "random",
        "time_step_max": 0.5,
        "time_step_min": 0.01,
        "time_step_rank": 256,
        "time_step_scale": 2.0,
    }
    assert Mamba2Config.read({**config, **fields}) == Mamba2Config.read(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_transformers_writes(tmp_path: Path, name: str) -> None:
    raw = {**preset_config(FAMILY, "tiny"), **CONFIGS[name]}
    OracleConfig(**raw).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    if "time_step_limit" not in CONFIGS[name]:
        # JSON has no infinity.
        assert '"__float__": "Infinity"' in text
    assert Mamba2Config.read(json.loads(text)) == Mamba2Config.read(raw)


@pytest.mark.parametrize("task", ["generate", "features"])
@torch.no_grad()
def test_reads_the_weights_that_transformers_writes(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, task: str
) -> None:
    """The bare model writes its names without a prefix."""
    classes: dict[str, Any] = {"generate": Mamba2ForCausalLM, "features": Mamba2Model}
    oracle = classes[task].from_pretrained(make_checkpoint("mamba2"), dtype=torch.float32)
    oracle.save_pretrained(tmp_path)
    ids, _ = tokens(VOCAB)
    session = EagerSession(Checkpoint.open(tmp_path), task)
    session.reset(*ids.shape)
    found = session.step(ids, np.ones_like(ids))
    assert relative_rms(oracle(torch.from_numpy(ids))[0].numpy(), found) < LIMIT


def test_computes_a_norm_that_is_stored_whatever_rms_norm_says_as_transformers_does(
    make_checkpoint: MakeCheckpoint,
) -> None:
    folder = make_checkpoint("mamba2")
    _edit_config(folder, {"rms_norm": False})
    ids = np.random.default_rng(2).integers(0, 512, (2, 11))
    oracle: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(ids)).logits.numpy()
    session = EagerSession(Checkpoint.open(folder), "generate")
    session.reset(*ids.shape)
    assert relative_rms(expected, session.step(ids, np.ones_like(ids))) < LIMIT


# Presets


@pytest.mark.parametrize("preset", ["tiny", "small", "full"])
def test_presets_have_the_size_that_transformers_says(preset: str) -> None:
    fields = FAMILY.presets[preset]
    model = FAMILY.build(fields, "generate")
    with torch.device("meta"):
        oracle: Any = Mamba2ForCausalLM(OracleConfig(**fields))
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    theirs = {name: tuple(p.shape) for name, p in oracle.named_parameters()}
    assert ours == theirs
    total = sum(parameter.numel() for parameter in model.parameters())
    if preset == "full":
        # The released Mamba2-2.7B.
        assert 2.70e9 < total < 2.71e9


def test_seeded_weights_remember() -> None:
    """Decays and time steps as new models draw them; other numbers would forget at once, or never.

    The ranges are those of arXiv:2405.21060's code: A from 1 to 16, time steps from 0.001 to 0.1.
    """
    a = -random_weight(FAMILY, "backbone.layers.0.mixer.A_log", (4096,), 7).exp()
    step = F.softplus(random_weight(FAMILY, "backbone.layers.0.mixer.dt_bias", (4096,), 7))
    for values, low, high in ((a, -16.0, -1.0), (step, 1e-3, 0.1)):
        assert low - 1e-4 * abs(low) <= values.min() and values.max() <= high + 1e-4 * abs(high)
        # All of the range is used.
        assert values.max() - values.min() > 0.9 * (high - low)
    # The time steps are spread over both decades alike.
    assert 0.4 < (step < 0.01).float().mean() < 0.6


@torch.no_grad()
@pytest.mark.parametrize("layers", [2, 16])
def test_activations_of_a_seeded_checkpoint_are_lively(
    make_checkpoint: MakeCheckpoint, layers: int
) -> None:
    # Measured in transformers: this is a property of the weights, not of our graph.
    folder = make_checkpoint("mamba2", num_hidden_layers=layers)
    oracle: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(np.random.default_rng(6).integers(0, VOCAB, (4, 32)))
    out = oracle(ids, output_hidden_states=True)
    for depth, hidden in enumerate(out.hidden_states):
        assert 0.3 < hidden.square().mean().sqrt() < 8, depth
    # A layer that adds next to nothing could be left out unnoticed.
    for before, after in zip(out.hidden_states, out.hidden_states[1:-1], strict=False):
        assert (after - before).square().mean().sqrt() > 0.1 * before.square().mean().sqrt()
    assert 0.3 < out.logits.std() < 5


# Validation


# Of the others, a validation compares what the tests above compare with transformers.
VALIDATED = [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in (BASE, "chunk_size")))
    for name in CONFIGS
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", VALIDATED)
def test_validation_passes(subjects: Callable[[str], Subject], name: str, target: str) -> None:
    subject = subjects(name)
    reference = Reference(Checkpoint.open(subject.folder), "generate")
    report = validate_ingot(subject.ingots[target], reference)
    assert (report.verdict, report.failures) == ("passed", [])
    # The state of one chunk must have reached the next.
    inputs = make_inputs(VOCAB, chunk_size=reference.chunk_size)
    assert inputs.prefill > subject.oracle.config.chunk_size
    states = [state.output for state in Manifest.read(subject.ingots[target]).states]
    stages = dict.fromkeys(tensor.stage for tensor in report.tensors)
    main = ["prefill", *(f"decode {number}" for number in range(1, 33))]
    assert list(stages)[: len(main)] == main
    for stage in main:
        layers = len(reference.routers.by_layer)
        hidden = [f"hidden_states.{n}" for n in range(layers + 1) if " " not in stage]
        names = [tensor.name for tensor in report.tensors if tensor.stage == stage]
        assert names[: 1 + len(states)] == ["logits", *states]
        assert set(hidden) <= set(names)
    assert all(t.score is not None and t.score < 6 for t in report.tensors)
    assert report.router_margin is None
