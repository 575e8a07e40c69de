"""transformers as the outside oracle: what every architecture's tests have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from ingot.export.codecs.blocks import Blocks
from ingot.export.ingot import Manifest
from ingot.graphs.checkpoint import CONFIG, SINGLE, Checkpoint, CheckpointError
from ingot.graphs.family import find_family
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.runtime.generate import generate
from ingot.runtime.loading import load
from ingot.runtime.session import Session, SessionError
from ingot.validate.truth.eager import EagerSession

WAYS = ("eager", "onnx", "ort")
TARGETS = ("onnx", "ort")
PREFILL, DECODE = 13, 6
PADDING = (0, 4, 9)
LIMIT = 1e-4
# What stays in float32 by the end of its name in transformers: no matrix, or a router's.
KEPT = (
    "norm.weight",
    "bias",
    "A_log",
    ".D",
    "conv1d.weight",
    "gate.weight",
    "router.layer.weight",
    "router.weight",
)


def every_other_is_slow(configs: Iterable[str]) -> list[Any]:
    """Parameters of ``subject``: tracing each takes seconds, and so half of them are slow."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (at % 2)) for at, name in enumerate(configs)
    ]


def all_but_some_are_slow(configs: Iterable[str], fast: int = 1) -> list[Any]:
    """The same where most of what is computed is tested with a relative as well."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (at >= fast))
        for at, name in enumerate(configs)
    ]


class Subject:
    """One config: the folder, transformers' model of it, and our three ways to run it."""

    def __init__(self, name: str, folder: Path, make_ingot: MakeIngot) -> None:
        self.name = name
        self.folder = folder
        # from_pretrained returns a model in evaluation mode.
        self.oracle: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.ingots = {target: make_ingot(folder, target) for target in TARGETS}
        self.manifest = Manifest.read(self.ingots["onnx"])
        self.sessions: dict[str, Session | EagerSession] = {
            "eager": EagerSession(Checkpoint.open(folder), "generate"),
            **{target: load(ingot) for target, ingot in self.ingots.items()},
        }


def relative_rms(expected: np.ndarray, actual: np.ndarray) -> float:
    difference = actual.astype(np.float64) - expected
    return float(np.sqrt((difference**2).mean() / (expected.astype(np.float64) ** 2).mean()))


def logits(ingot: Path) -> np.ndarray:
    """Of ``tokens``, the padding left out, by the session that a user gets."""
    session = load(ingot, allow_failed=True)
    ids, mask = tokens(Manifest.read(ingot).vocab_size)
    session.reset(len(ids), ids.shape[1])
    return np.asarray(session.step(ids, mask)[mask != 0])


class NarrowActivations(TorchFunctionMode):
    """What is multiplied by matrices is rounded to bfloat16 first, but what routers read."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.kept = {
            parameter.data_ptr()
            for name, parameter in model.named_parameters()
            if name.endswith(KEPT)
        }

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.nn.functional.linear and args[1].data_ptr() not in self.kept:
            args = (args[0].bfloat16().float(), *args[1:])
        return function(*args, **(kwargs or {}))


def of_transformers(
    checkpoint: Path,
    stored: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    narrow: bool = False,
) -> np.ndarray:
    """The same by transformers in float32, over matrices as ``stored`` makes them but routers'.

    Args:
        checkpoint: a folder.
        stored: a matrix as it is stored.
        narrow: see ``NarrowActivations``.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if stored is not None:
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith(KEPT):
                parameter.data = stored(parameter.data)
    ids, mask = tokens(model.config.vocab_size)
    with torch.inference_mode(), NarrowActivations(model) if narrow else nullcontext():
        found = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    return np.asarray(found.logits.numpy()[mask != 0])


def rounded(form: Blocks) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rounds a matrix, or a stack of them, row by row."""

    def stored(matrix: torch.Tensor) -> torch.Tensor:
        rows = matrix.numpy().reshape(-1, matrix.shape[-1])
        wide = form.decode(form.encode(rows), rows.shape[1])
        return torch.from_numpy(wide.reshape(matrix.shape).copy())

    return stored


def tokens(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of three rows with different left padding."""
    random = np.random.default_rng(3)
    ids = random.integers(0, vocab_size, (len(PADDING), PREFILL + DECODE))
    mask = np.ones_like(ids)
    for row, padding in enumerate(PADDING):
        mask[row, :padding] = 0
    return ids, mask


@torch.no_grad()
def oracle_steps(
    model: Any, ids: np.ndarray, mask: np.ndarray, *, whole: bool = False
) -> list[dict[str, np.ndarray]]:
    """transformers with its own cache: a prefill, then one token at a time.

    Args:
        model: of transformers.
        ids: ``[B, T]``.
        mask: ``[B, T]``.
        whole: each step is a prefill of all before it; transformers' decode of a scan takes no
            notice of ``time_step_limit``.
    """
    cache: Any = DynamicCache(config=model.config)
    results = []
    at = 0
    for count in (PREFILL, *[1] * DECODE):
        end = at + count
        begin = at
        if whole:
            cache, begin = DynamicCache(config=model.config), 0
        seen = torch.from_numpy(mask[:, :end])
        positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, begin:]
        out = model(
            torch.from_numpy(ids[:, begin:end]),
            attention_mask=seen,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        # What transformers writes in place later on.
        found = {"logits": out.logits[:, -count:].numpy().copy()}
        for index, layer in enumerate(cache.layers):
            if hasattr(layer, "keys"):
                found[f"present.{index}.key"] = layer.keys.numpy().copy()
                found[f"present.{index}.value"] = layer.values.numpy().copy()
            else:
                conv = layer.conv_states[0]
                # transformers keeps one column more than the next convolution reads.
                found[f"present_states.{index}.conv"] = conv[:, :, 1:].numpy().copy()
                found[f"present_states.{index}.ssm"] = layer.recurrent_states[0].numpy().copy()
        results.append(found)
        at = end
    return results


def check_logits_and_states(subject: Subject, way: str) -> None:
    """Every step of prefill and cached decode, logits and every state."""
    ids, mask = tokens(512)
    whole = "time_step_limit" in subject.name
    expected = oracle_steps(subject.oracle, ids, mask, whole=whole)
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
            pair = want[name], array
            if name.startswith("present."):
                # transformers forgets what its window has passed.
                kept = want[name].shape[2]
                assert kept == end or "window" in subject.name
                array = array[:, :, -kept:]
                # Of padding a cache holds anything.
                real_keys = seen[:, -kept:]
                pair = want[name].swapaxes(1, 2)[real_keys], array.swapaxes(1, 2)[real_keys]
            assert array.shape == want[name].shape
            assert relative_rms(*pair) < LIMIT, name
        at = end


def check_cached_decode(subject: Subject, way: str) -> None:
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


def check_greedy_generation(subject: Subject, way: str) -> None:
    prompt = [11, 205, 7, 300, 42, 8, 99, 501, 3]
    ids = torch.tensor([prompt])
    expected = subject.oracle.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=32,
        do_sample=False,
        # Its decode of a scan takes no notice of the field.
        use_cache="time_step_limit" not in subject.name,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    session = load(subject.ingots[way])
    made = [step[0] for step in generate(session, [prompt], max_new_tokens=32)]
    assert len(made) == 32
    assert made == expected


def check_padded_batch(subject: Subject, way: str) -> None:
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


# Three rows over calls of 7, 1 and 4 tokens: whole; padded on the right, padding alone, padded on
# the left; padded on the left, with holes, padded on the right.
ANYWHERE = (
    "1111111 1 1111",
    "1111000 0 0011",
    "0011011 1 1010",
)


@torch.no_grad()
def check_padding_anywhere(subject: Subject, way: str) -> None:
    """A cache takes padding wherever it stands: each row is what transformers says of it alone.

    A recurrent state takes it before a row's first token.
    """
    if subject.name == "rope dynamic":
        pytest.skip("dynamic frequencies depend on the longest row of the batch, by definition")
    calls = [
        np.array([list(map(int, part)) for part in parts])
        for parts in zip(*map(str.split, ANYWHERE), strict=True)
    ]
    mask = np.concatenate(calls, axis=1)
    ids = np.random.default_rng(8).integers(0, 512, mask.shape)
    session = subject.sessions[way]
    session.reset(*ids.shape)
    if any(state.axis is None for state in subject.manifest.states):
        # A convolution's window would take it, so no session does.
        if isinstance(session, EagerSession):
            pytest.skip("the graph by itself computes padding as a token that was all zeros")
        with pytest.raises(SessionError, match="padding behind the first token of row 1"):
            session.step(ids[:, : calls[0].shape[1]], calls[0])
        return
    at, found = 0, []
    for call in calls:
        end = at + call.shape[1]
        found.append(session.step(ids[:, at:end], call))
        at = end
    together = np.concatenate(found, axis=1)
    for row, real in enumerate(mask != 0):
        expected = subject.oracle(torch.from_numpy(ids[row : row + 1, real])).logits.numpy()[0]
        assert relative_rms(expected, together[row, real]) < LIMIT, row


@torch.no_grad()
def check_last_logits(subject: Subject, way: str) -> None:
    """Of the last tokens alone, after a prompt and after a turn of several, as transformers has."""
    if subject.name == "rope dynamic":
        pytest.skip("dynamic frequencies depend on the longest row of the batch, by definition")
    ids, mask = tokens(512)
    session = subject.sessions[way]
    for kept in (1, 3):
        session.reset(*ids.shape)
        ends = (PREFILL, PREFILL + DECODE)
        parts = [slice(0, ends[0]), slice(*ends)]
        found = [session.step(ids[:, part], mask[:, part], kept) for part in parts]
        for end, logits in zip(ends, found, strict=True):
            assert logits.shape == (len(ids), kept, 512)
            for row, padding in enumerate(PADDING):
                alone = torch.from_numpy(ids[row : row + 1, padding:end])
                expected = subject.oracle(alone, logits_to_keep=kept).logits.numpy()
                assert relative_rms(expected[0], logits[row]) < LIMIT
        # Of no more than there are.
        assert session_of_one(session).step(ids[:1, :2], mask[:1, :2], 5).shape == (1, 2, 512)


def session_of_one(session: Session | EagerSession) -> Session | EagerSession:
    session.reset(1, 2)
    return session


class AgainstTransformers:
    """What every architecture is held to; a subclass in a file with a fixture ``subject``.

    Attributes:
        model_type: Hugging Face's name.
        configs: of the preset ``tiny``, each with another field; the first has none.
    """

    model_type: str
    configs: Mapping[str, Mapping[str, Any]]

    @pytest.mark.parametrize("way", WAYS)
    def test_logits_and_every_state_equal_transformers(self, subject: Subject, way: str) -> None:
        check_logits_and_states(subject, way)

    @pytest.mark.parametrize("way", WAYS)
    def test_cached_decode_equals_full_prefill(self, subject: Subject, way: str) -> None:
        check_cached_decode(subject, way)

    @pytest.mark.parametrize("way", TARGETS)
    def test_greedy_generation_is_identical(self, subject: Subject, way: str) -> None:
        check_greedy_generation(subject, way)

    @pytest.mark.parametrize("way", WAYS)
    def test_last_logits_alone_equal_transformers(self, subject: Subject, way: str) -> None:
        check_last_logits(subject, way)

    @pytest.mark.parametrize("way", WAYS)
    def test_padded_batch_equals_each_row_alone(self, subject: Subject, way: str) -> None:
        check_padded_batch(subject, way)

    @pytest.mark.parametrize("way", WAYS)
    def test_states_take_padding_anywhere(self, subject: Subject, way: str) -> None:
        check_padding_anywhere(subject, way)

    @torch.no_grad()
    def test_bare_model_equals_transformers(
        self, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
    ) -> None:
        folder = make_checkpoint(self.model_type)
        ids, mask = tokens(512)
        positions = torch.from_numpy(np.maximum(mask.cumsum(-1) - 1, 0))
        oracle: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
        want = oracle(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), position_ids=positions
        ).last_hidden_state.numpy()
        session = load(make_ingot(folder, "onnx", task="features"))
        session.reset(len(ids), ids.shape[1])
        assert relative_rms(want[mask != 0], session.step(ids, mask)[mask != 0]) < LIMIT

    @torch.no_grad()
    def test_a_classifier_scores_what_transformers_has_of_each_rows_last_token(
        self, tmp_path: Path, make_ingot: MakeIngot
    ) -> None:
        """transformers has a class for some of them, which does this with its bare model too."""
        family = find_family(self.model_type)
        if "classify" not in family.tasks:
            pytest.skip("the family has no such task")
        config = {**preset_config(family, "tiny"), "num_labels": 3}
        write_checkpoint(tmp_path, family, config, task="classify", seed=7)
        score = load_file(tmp_path / SINGLE)["score.weight"]
        oracle: Any = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
        ids, mask = tokens(512)
        # Padded on the right as well.
        mask[1, -3:] = 0
        session = load(make_ingot(tmp_path, "onnx", task="classify"))
        session.reset(len(ids), ids.shape[1])
        found = session.step(ids, mask)
        assert found.shape == (len(ids), 3)
        for row, real in enumerate(mask != 0):
            hidden = oracle(torch.from_numpy(ids[row : row + 1, real])).last_hidden_state
            assert relative_rms((hidden[:, -1] @ score.T).numpy(), found[row : row + 1]) < LIMIT

    def test_ignoring_a_field_would_show(self, make_checkpoint: MakeCheckpoint) -> None:
        """The same weights without it: no difference would make its comparison above empty."""
        ids, mask = tokens(512)
        preset = preset_config(find_family(self.model_type), "tiny")
        for name, config in list(self.configs.items())[1:]:
            folder = make_checkpoint(self.model_type, **config)
            given = json.loads((folder / CONFIG).read_text())
            results = []
            for fields in (config, {field: preset.get(field) for field in config}):
                (folder / CONFIG).write_text(json.dumps({**given, **fields}))
                try:
                    session = EagerSession(Checkpoint.open(folder), "generate")
                except CheckpointError:
                    # Other weights would be needed, which is a difference.
                    break
                session.reset(len(ids), ids.shape[1])
                results.append(session.step(ids, mask)[mask != 0])
            if len(results) == 2:
                assert relative_rms(*results) > 100 * LIMIT, name
