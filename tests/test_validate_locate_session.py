"""Each small wrong in a session over a right graph is found: the call, and what was wrong first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from damage import copied, with_engine
from kinds import KINDS
from located import main_calls

from ingot.export.ingot import Manifest
from ingot.graphs.family import find_family
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.runtime.loading import load
from ingot.runtime.ort import OrtSession
from ingot.runtime.session import Floats, Ids, Session
from ingot.runtime.tokens import TokenInputs
from ingot.validate.locate.session import locate_session
from ingot.validate.result import Location
from ingot.validate.truth.inputs import Inputs, make_inputs

# Minutes of tracing; `make test-slow` runs them, and so does CI.
pytestmark = pytest.mark.slow

# Every graph with a fault in what it is fed: a cache that grows, a shared one, a fixed state.
SUBJECTS = (("olmoe", "onnx"), ("olmoe", "ort"), ("mamba2", "ort"))
MIDDLE = {"olmoe": "present.1.value", "mamba2": "present_states.1.ssm"}
FIRST = {"olmoe": "present.0.key", "mamba2": "present_states.0.conv"}

GetIngot = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def ingot(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> GetIngot:
    """``ingot(family, target)``, made when first asked for."""
    checkpoints: dict[str, Path] = {}
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, target: str) -> Path:
        if (family, target) not in made:
            if family not in checkpoints:
                checkpoints[family] = make_checkpoint(family)
            made[family, target] = make_ingot(checkpoints[family], target)
        return made[family, target]

    return get


def unpadded() -> Inputs:
    inputs = make_inputs(512)
    return replace(inputs, attention_mask=np.ones_like(inputs.attention_mask))


class PositionsOffByOneInDecode(TokenInputs):
    def append(self, input_ids: Ids, attention_mask: Ids) -> dict[str, Ids]:
        later = int(self.seen > 0)
        feeds = super().append(input_ids, attention_mask)
        return {**feeds, "position_ids": feeds["position_ids"] + later}


class CountsPadding(TokenInputs):
    def append(self, input_ids: Ids, attention_mask: Ids) -> dict[str, Ids]:
        feeds = super().append(input_ids, attention_mask)
        columns = np.arange(self.mask.shape[1])[-input_ids.shape[1] :]
        return {**feeds, "position_ids": np.broadcast_to(columns, input_ids.shape)}


class ShowsOnePaddingToken(TokenInputs):
    def append(self, input_ids: Ids, attention_mask: Ids) -> dict[str, Ids]:
        feeds = super().append(input_ids, attention_mask)
        mask = feeds["attention_mask"].copy()
        mask[:, :-1] |= mask[:, 1:]
        return {**feeds, "attention_mask": mask}


class ForgetsThePastInItsMask(TokenInputs):
    """The mask is as long as it should be, and all of the past is visible."""

    def append(self, input_ids: Ids, attention_mask: Ids) -> dict[str, Ids]:
        feeds = super().append(input_ids, attention_mask)
        mask = np.ones_like(feeds["attention_mask"])
        mask[:, -input_ids.shape[1] :] = attention_mask
        return {**feeds, "attention_mask": mask}


class FeedsRowsSwapped(TokenInputs):
    def append(self, input_ids: Ids, attention_mask: Ids) -> dict[str, Ids]:
        return super().append(input_ids[::-1], attention_mask)


class PositionsOfPaddingAreHigh(TokenInputs):
    """Not a fault: no real token sees them."""

    def append(self, input_ids: Ids, attention_mask: Ids) -> dict[str, Ids]:
        feeds = super().append(input_ids, attention_mask)
        positions = np.where(attention_mask == 0, 3, feeds["position_ids"])
        return {**feeds, "position_ids": positions}


def feeding(ingot: Path, tokens: type[TokenInputs]) -> OrtSession:
    """A session whose graph gets what such a counter makes."""
    manifest = Manifest.read(ingot)
    session = OrtSession(ingot, manifest)
    session._tokens = tokens(manifest.vocab_size, manifest.states)
    return session


def rounded(value: onnxruntime.OrtValue) -> onnxruntime.OrtValue:
    wide = torch.from_numpy(value.numpy().copy())
    narrow = wide.to(torch.bfloat16).to(wide.dtype)
    return onnxruntime.OrtValue.ortvalue_from_numpy(narrow.numpy())


class KeepsAStateInBfloat16(OrtSession):
    def _run(self, input_ids: Ids, attention_mask: Ids, kept: int) -> Floats:
        result = super()._run(input_ids, attention_mask, kept)
        self.round()
        return result

    def round(self) -> None:
        name = MIDDLE[self.manifest.model_type].replace("present.", "past_key_values.")
        name = name.replace("present_states.", "past_states.")
        self._state[name] = rounded(self._state[name])


class FeedsAStateInBfloat16(KeepsAStateInBfloat16):
    """Handed out in full, and rounded on the way into the next call."""

    def _run(self, input_ids: Ids, attention_mask: Ids, kept: int) -> Floats:
        if self._tokens.seen:
            self.round()
        return OrtSession._run(self, input_ids, attention_mask, kept)


class SwapsRows(OrtSession):
    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        return super().step(input_ids, attention_mask, logits_to_keep)[::-1]


class SwapsRowsOfStates(OrtSession):
    def state(self) -> dict[str, Floats]:
        return {name: array[::-1] for name, array in super().state().items()}


class DropsAState(OrtSession):
    def state(self) -> dict[str, Floats]:
        middle = MIDDLE[self.manifest.model_type]
        return {name: array for name, array in super().state().items() if name != middle}


class AddsAState(OrtSession):
    def state(self) -> dict[str, Floats]:
        return {**super().state(), "present.9.key": np.ones((2, 3), np.float32)}


class TurnsNanInDecode(OrtSession):
    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        logits = super().step(input_ids, attention_mask, logits_to_keep)
        return logits if input_ids.shape[1] > 1 else logits * np.float32(np.nan)


class WidensItsOutput(OrtSession):
    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        return cast(
            Floats, super().step(input_ids, attention_mask, logits_to_keep).astype(np.float64)
        )


class WidensAState(OrtSession):
    def state(self) -> dict[str, Floats]:
        found, middle = super().state(), MIDDLE[self.manifest.model_type]
        return {**found, middle: cast(Floats, found[middle].astype(np.float64))}


class HasOneBuffer(OrtSession):
    """For all calls whose output has one shape."""

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        main = super().step(input_ids, attention_mask, logits_to_keep)
        self.buffers = getattr(self, "buffers", {})
        kept = self.buffers.setdefault(main.shape, main)
        kept[...] = main
        return cast(Floats, kept)


class HandsOutItsRoom(OrtSession):
    """A shared cache with the place of tokens to come."""

    def state(self) -> dict[str, Floats]:
        states = self.manifest.states
        return {state.output: self._state[state.input].numpy() for state in states}


class ScramblesPadding(OrtSession):
    """Right wherever a token is; padding may hold anything."""

    def reset(self, batch: int, capacity: int) -> None:
        super().reset(batch, capacity)
        self.mask: Ids = np.zeros((batch, 0), np.int64)

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        self.mask = np.concatenate((self.mask, attention_mask), axis=1)
        logits = super().step(input_ids, attention_mask, logits_to_keep)
        padding = attention_mask[:, -logits_to_keep:, None] == 0
        return np.where(padding, np.float32(np.nan), logits)

    def state(self) -> dict[str, Floats]:
        padding = self.mask[:, None, :, None] == 0
        found = super().state()
        return {name: np.where(padding, np.float32(9), array) for name, array in found.items()}


class Wrapped:
    """A session that does not tell what it fed."""

    def __init__(self, inner: Session, every_token: bool = False) -> None:
        self.inner = inner
        self.every_token = every_token
        self.fed: dict[str, Ids] = {}
        self.tapped: dict[str, Floats] = {}

    def reset(self, batch: int, capacity: int) -> None:
        self.inner.reset(batch, capacity)

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        mask = np.ones_like(attention_mask) if self.every_token else attention_mask
        return self.inner.step(input_ids, mask, logits_to_keep)

    def state(self) -> dict[str, Floats]:
        return self.inner.state()


def check(found: Location | None, value: str, least: float = math.inf) -> None:
    assert found is not None
    assert (found.layer, found.operator, found.value) == (None, "session", value)
    assert found.ratio >= least


@pytest.mark.parametrize(("family", "target"), SUBJECTS)
@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (ShowsOnePaddingToken, "attention_mask at prefill"),
        (FeedsRowsSwapped, "input_ids at prefill"),
    ],
)
def test_finds_what_is_fed_wrong(
    ingot: GetIngot, family: str, target: str, tokens: type[TokenInputs], value: str
) -> None:
    folder = ingot(family, target)
    check(locate_session(feeding(folder, tokens), folder, main_calls()), value)


@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (PositionsOffByOneInDecode, "position_ids at decode 1"),
        (CountsPadding, "position_ids at prefill"),
        (ForgetsThePastInItsMask, "attention_mask at decode 1"),
    ],
)
def test_finds_what_only_attention_reads(
    ingot: GetIngot, target: str, tokens: type[TokenInputs], value: str
) -> None:
    folder = ingot("olmoe", target)
    check(locate_session(feeding(folder, tokens), folder, main_calls()), value)


@pytest.mark.parametrize(("family", "target"), SUBJECTS)
@pytest.mark.parametrize(
    "tokens", [CountsPadding, ShowsOnePaddingToken, ForgetsThePastInItsMask, TokenInputs]
)
def test_a_fault_of_padding_needs_padding(
    ingot: GetIngot, family: str, target: str, tokens: type[TokenInputs]
) -> None:
    folder = ingot(family, target)
    assert locate_session(feeding(folder, tokens), folder, main_calls(unpadded())) is None


@pytest.mark.parametrize(("family", "target"), SUBJECTS)
@pytest.mark.parametrize(
    ("kind", "stage"), [(KeepsAStateInBfloat16, "prefill"), (FeedsAStateInBfloat16, "decode 1")]
)
def test_finds_a_state_that_is_rounded(
    ingot: GetIngot, family: str, target: str, kind: type[OrtSession], stage: str
) -> None:
    """Where it first shows, though the logits and the layers behind it are wrong as well."""
    folder = ingot(family, target)
    found = locate_session(kind(folder, Manifest.read(folder)), folder, main_calls())
    check(found, f"{MIDDLE[family]} at {stage}", 500)
    assert found is not None and found.ratio < 10_000


@pytest.mark.parametrize(("family", "target"), SUBJECTS)
@pytest.mark.parametrize(
    ("kind", "values", "least"),
    [
        (SwapsRows, dict.fromkeys(FIRST, "logits at prefill"), 1e5),
        (SwapsRowsOfStates, {f: f"{name} at prefill" for f, name in FIRST.items()}, 1e5),
        (DropsAState, {f: f"{name} at prefill" for f, name in MIDDLE.items()}, math.inf),
        (AddsAState, dict.fromkeys(FIRST, "present.9.key at prefill"), math.inf),
        (TurnsNanInDecode, dict.fromkeys(FIRST, "logits at decode 1"), math.inf),
        (WidensItsOutput, dict.fromkeys(FIRST, "logits at prefill"), math.inf),
        (WidensAState, {f: f"{name} at prefill" for f, name in MIDDLE.items()}, math.inf),
        (HasOneBuffer, dict.fromkeys(FIRST, "logits at prefill"), math.inf),
    ],
)
def test_finds_what_is_handed_out_wrong(
    ingot: GetIngot,
    family: str,
    target: str,
    kind: type[OrtSession],
    values: dict[str, str],
    least: float,
) -> None:
    folder = ingot(family, target)
    found = locate_session(kind(folder, Manifest.read(folder)), folder, main_calls())
    check(found, values[family], least)


def test_finds_a_shared_cache_that_is_not_cut(ingot: GetIngot) -> None:
    folder = ingot("olmoe", "ort")
    session = HandsOutItsRoom(folder, Manifest.read(folder))
    check(locate_session(session, folder, main_calls()), "present.0.key at prefill")


def test_judges_a_session_that_does_not_tell_what_it_fed(ingot: GetIngot) -> None:
    folder = ingot("olmoe", "ort")
    right = cast(Session, Wrapped(load(folder)))
    wrong = cast(Session, Wrapped(load(folder), every_token=True))
    assert locate_session(right, folder, main_calls()) is None
    check(locate_session(wrong, folder, main_calls()), "present.0.key at prefill", 1e4)


@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize("family", KINDS)
def test_finds_nothing_in_a_right_session(ingot: GetIngot, family: str, target: str) -> None:
    folder = ingot(family, target)
    session = load(folder)
    assert locate_session(session, folder, main_calls()) is None
    # Whatever it was used for before.
    assert locate_session(session, folder, main_calls(make_inputs(512, seed=1))) is None


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_padding_may_hold_anything(ingot: GetIngot, target: str) -> None:
    folder = ingot("olmoe", target)
    scrambled = ScramblesPadding(folder, Manifest.read(folder))
    assert locate_session(scrambled, folder, main_calls()) is None
    high = feeding(folder, PositionsOfPaddingAreHigh)
    assert locate_session(high, folder, main_calls()) is None


@pytest.mark.parametrize("family", ["mamba2", "olmoe"])
def test_runs_a_float16_graph(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, family: str
) -> None:
    folder = make_ingot(make_checkpoint(family), "trt", builder="none", precision="fp16")
    session = load(folder, graph_only=True)
    assert locate_session(session, folder, main_calls()) is None
    rounds = KeepsAStateInBfloat16(folder, Manifest.read(folder))
    found = locate_session(rounds, folder, main_calls())
    check(found, f"{MIDDLE[family]} at prefill", 500)


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_runs_a_graph_without_state(tmp_path: Path, make_ingot: MakeIngot, target: str) -> None:
    family = find_family("jetmoe")
    config = {**preset_config(family, "tiny"), "num_labels": 2}
    write_checkpoint(tmp_path, family, config, task="classify", seed=3)
    folder = make_ingot(tmp_path, target, task="classify")
    inputs = make_inputs(512, stateful=False)
    assert locate_session(load(folder), folder, main_calls(inputs)) is None
    counts = feeding(folder, CountsPadding)
    check(locate_session(counts, folder, main_calls(inputs)), "position_ids at 19 tokens")
    swaps = SwapsRows(folder, Manifest.read(folder))
    check(locate_session(swaps, folder, main_calls(inputs)), "logits at 19 tokens", 1e5)


def test_runs_no_graph_that_the_session_does_not(ingot: GetIngot, tmp_path: Path) -> None:
    """Of bfloat16, or one that an engine runs instead; not even the session is touched."""
    untouched = cast(Session, object())
    graph = ingot("olmoe", "onnx")
    folder = with_engine(graph, tmp_path / "engine")
    for other in (copied(graph, tmp_path / "half", precision="bfloat16"), folder):
        assert locate_session(untouched, other, main_calls()) is None
    # The graph beside an engine, which is what runs where there is no GPU.
    session = SwapsRows(folder, Manifest.read(folder))
    check(locate_session(session, folder, main_calls()), "logits at prefill", 1e5)
