"""A graph with taps: it computes what it computed without, and shows what eager PyTorch has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakeIngot
from oracle import TARGETS, relative_rms

from ingot.export.ingot import Manifest
from ingot.graphs.checkpoint import Checkpoint
from ingot.runtime.loading import load
from ingot.runtime.session import Floats
from ingot.validate.truth.eager import EagerSession
from ingot.validate.truth.inputs import QUICK, make_inputs
from ingot.validate.truth.recording import Stepper
from ingot.validate.truth.replay import Chosen, Replay, choices
from ingot.validate.truth.taps import TappedSession

# Minutes of tracing; `make test-slow` runs them, and so does CI.
pytestmark = pytest.mark.slow

# Families with their number of routers in two layers.
ROUTERS = {"olmoe": 2, "jetmoe": 4, "granite": 0, "mamba2": 0}
ROUTED = [family for family, count in ROUTERS.items() if count]
TOP_K = 2
# A prefill, a token, several after a past, and a token more.
CALLS = [slice(0, 11), slice(11, 12), slice(12, 15), slice(15, 16)]
SINGLE = [slice(0, 11), *(slice(n, n + 1) for n in range(11, 16))]


class Subject:
    """One checkpoint and its ingots."""

    def __init__(self, folder: Path, ingots: dict[str, Path], task: str) -> None:
        self.ingots = ingots
        self.eager = EagerSession(Checkpoint.open(folder), task, streamed=False)

    def tapped(self, target: str) -> TappedSession:
        return TappedSession(self.ingots[target], Manifest.read(self.ingots[target]))


@pytest.fixture(scope="module")
def subjects(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> Callable[..., Subject]:
    made: dict[tuple[str, str], Subject] = {}

    def make(family: str, task: str = "generate") -> Subject:
        key = family, task
        if key in made:
            return made[key]
        if key == ("olmoe", "generate"):
            folder: Path = request.getfixturevalue("tiny")
            ingots = {target: request.getfixturevalue(f"tiny_{target}") for target in TARGETS}
        else:
            folder = make_checkpoint(family)
            ingots = {target: make_ingot(folder, target, task=task) for target in TARGETS}
        made[key] = Subject(folder, ingots, task)
        return made[key]

    return make


def steps(
    session: Stepper,
    calls: list[slice] = CALLS,
    prepare: Callable[[int], object] = lambda _number: None,
    seed: int = 0,
) -> Iterator[tuple[dict[str, Floats], dict[str, Floats]]]:
    """Outputs and taps, call by call, of two rows of which the second begins with padding."""
    inputs = make_inputs(512, seed, QUICK)
    session.reset(2, 16)
    for number, columns in enumerate(calls):
        prepare(number)
        main = session.step(inputs.input_ids[:, columns], inputs.attention_mask[:, columns])
        yield {"main": main, **session.state()}, session.tapped


def by_row(array: Floats) -> Floats:
    """``[B*T, E]`` or ``[B, T, H]`` -> ``[B, T, ...]``."""
    return array.reshape(2, -1, array.shape[-1])


def chosen(taps: dict[str, Any]) -> list[Chosen]:
    """The experts that were used, router by router."""
    count = sum(name.startswith("router_logits.") for name in taps)
    return [taps[f"chosen_experts.{n}"] for n in range(count)]


def assert_near(expected: dict[str, Floats], found: dict[str, Floats], columns: slice) -> None:
    """Every tap is that of the eager session at real tokens."""
    real = make_inputs(512).attention_mask[:, columns] != 0
    for name, array in found.items():
        if name.startswith("chosen_experts."):
            continue
        assert array.shape == expected[name].shape and array.dtype == np.float32
        want, have = by_row(expected[name])[real], by_row(array)[real]
        assert relative_rms(want, have) < 1e-5, name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ROUTERS)
def test_taps_change_no_bit_of_the_outputs(
    subjects: Callable[..., Subject], family: str, target: str
) -> None:
    subject = subjects(family)
    plain = load(subject.ingots[target])
    for (want, nothing), (found, taps) in zip(
        steps(plain), steps(subject.tapped(target)), strict=True
    ):
        assert nothing == {} != taps
        assert found.keys() == want.keys()
        for name, array in want.items():
            assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ROUTERS)
def test_taps_are_what_eager_pytorch_has(
    subjects: Callable[..., Subject], family: str, target: str
) -> None:
    subject = subjects(family)
    session = subject.tapped(target)
    hidden = [f"hidden_states.{n}" for n in range(3)]
    # Granite's last norm has the head's factor in its weight, so it is no hidden state any more.
    hidden = hidden[:2] if family == "granite" else hidden
    routers = [f"router_logits.{n}" for n in range(ROUTERS[family])]
    assert session.routers == routers
    pairs = zip(steps(subject.eager), steps(session), CALLS, strict=True)
    for (_, expected), (_, found), columns in pairs:
        used = [f"chosen_experts.{n}" for n in range(ROUTERS[family])]
        assert list(found) == [*routers, *hidden, *used] and not session.unread
        assert_near(expected, found, columns)
        for name, mask in zip(routers, chosen(found), strict=True):
            # No two logits are near each other here.
            np.testing.assert_array_equal(mask, choices(found[name], TOP_K))


@pytest.mark.parametrize("target", TARGETS)
def test_the_last_hidden_state_of_features_is_the_main_output(
    subjects: Callable[..., Subject], target: str
) -> None:
    subject = subjects("olmoe", "features")
    session = subject.tapped(target)
    pairs = zip(steps(subject.eager), steps(session), CALLS, strict=True)
    for (main, expected), (found_main, found), columns in pairs:
        assert list(found) == [
            *("router_logits.0", "router_logits.1", "hidden_states.0", "hidden_states.1"),
            *("chosen_experts.0", "chosen_experts.1"),
        ]
        assert_near(expected, found, columns)
        np.testing.assert_array_equal(main["main"], expected["hidden_states.2"])
        assert_near(main, {"main": found_main["main"]}, columns)


@pytest.mark.parametrize("family", ROUTED)
def test_a_step_taken_token_by_token_has_the_taps_of_all(
    subjects: Callable[..., Subject], family: str
) -> None:
    # With caches in one buffer, several tokens of several rows after a past are fed singly.
    session = subjects(family).tapped("ort")
    assert all(state.shared for state in session.manifest.states)
    together = [taps for _, taps in steps(session)]
    singly = [taps for _, taps in steps(session, SINGLE)]
    for name, array in together[2].items():
        by_token = name.startswith(("router_logits.", "chosen_experts."))
        assert array.shape[:-1] == ((6,) if by_token else (2, 3))
        parts = [by_row(call[name]) for call in singly[2:5]]
        np.testing.assert_array_equal(by_row(array), np.concatenate(parts, axis=1))
        # Were it in another order, it would show.
        assert array.dtype == np.bool_ or len(np.unique(array.reshape(6, -1), axis=0)) == 6


def own_choices(session: EagerSession, count: int, seed: int) -> list[list[Chosen]]:
    """The experts of each call and router with some token ids."""
    return [
        [choices(taps[f"router_logits.{n}"], TOP_K) for n in range(count)]
        for _, taps in steps(session, SINGLE, seed=seed)
    ]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ROUTED)
def test_forced_experts_give_what_they_give_in_eager_pytorch(
    subjects: Callable[..., Subject], family: str, target: str
) -> None:
    subject = subjects(family)
    session = subject.tapped(target)
    # Those of other tokens, so that almost all logits have to be moved, and far.
    others = own_choices(subject.eager, ROUTERS[family], seed=1)
    free = [out["main"] for out, _ in steps(session, SINGLE)]
    with Replay() as replay:
        expected = list(steps(subject.eager, SINGLE, lambda number: replay.choose(others[number])))
    found = list(steps(session, SINGLE, lambda number: session.choose(others[number])))
    real = make_inputs(512).attention_mask != 0
    for number, columns in enumerate(SINGLE):
        (want, want_taps), (have, have_taps) = expected[number], found[number]
        for mask, given in zip(chosen(have_taps), others[number], strict=True):
            np.testing.assert_array_equal(mask, given)
        assert_near(want_taps, have_taps, columns)
        assert_near({"main": want["main"]}, {"main": have["main"]}, columns)
        seen = real[:, : columns.stop]
        for name in want.keys() - {"main"}:
            by_position = (side[name].swapaxes(1, 2)[seen] for side in (want, have))
            assert relative_rms(*by_position) < 1e-5, name
        # And it is not what the graph gives of itself.
        here = real[:, columns]
        assert relative_rms(free[number][here], have["main"][here]) > 1e-2
    # Taps show the logits as the router made them, so the first router's are as they were.
    session.choose(None)
    again = list(steps(session, SINGLE))
    first = found[0][1]["router_logits.0"]
    np.testing.assert_array_equal(again[0][1]["router_logits.0"], first)
    for before, (out, _) in zip(free, again, strict=True):
        assert out["main"].tobytes() == before.tobytes()


@pytest.mark.parametrize("family", ROUTED)
def test_forces_the_experts_of_a_step_that_is_taken_token_by_token(
    subjects: Callable[..., Subject], family: str
) -> None:
    session = subjects(family).tapped("ort")
    random = np.random.default_rng(0)
    given = [
        [choices(random.standard_normal(taps[name].shape), TOP_K) for name in session.routers]
        for _, taps in steps(session)
    ]
    for number, (_, taps) in enumerate(steps(session, CALLS, lambda n: session.choose(given[n]))):
        for mask, wanted in zip(chosen(taps), given[number], strict=True):
            np.testing.assert_array_equal(mask, wanted)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ROUTED)
def test_its_own_experts_forced_change_no_bit(
    subjects: Callable[..., Subject], family: str, target: str
) -> None:
    session = subjects(family).tapped(target)
    free = list(steps(session, SINGLE))
    own = [[choices(taps[name], TOP_K) for name in session.routers] for _, taps in free]
    forced = steps(session, SINGLE, lambda number: session.choose(own[number]))
    for (want, want_taps), (have, have_taps) in zip(free, forced, strict=True):
        for name, array in {**want, **want_taps}.items():
            assert {**have, **have_taps}[name].tobytes() == array.tobytes(), name


def test_wants_the_experts_of_every_router(subjects: Callable[..., Subject]) -> None:
    session = subjects("olmoe").tapped("onnx")
    with pytest.raises(ValueError, match="1 choices for 2 routers"):
        session.choose([np.ones((1, 1), dtype=np.bool_)])
