"""Recordings: every number of every real token, and of no other, in the order of their places."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import played
import pytest
from played import HIDDEN, KEY, ROUTERS, SSM, Played, Table

from ingot.validate.truth.inputs import Inputs
from ingot.validate.truth.recording import (
    MOST_ELEMENTS,
    Call,
    _thinned,
    collect_whole,
    main_run,
    places,
    record,
    whole,
)


def table() -> Table:
    """Every number tells whose it is: the token's id, and after the point the place in it."""
    ids = np.arange(played.IDS, dtype=np.float32)
    result = {}
    for name, size in played.SIZES.items():
        within = np.arange(np.prod(size), dtype=np.float32).reshape(size) / 8
        result[name] = ids.reshape(-1, *(1 for _ in size)) + within
    return result


def tokens_of(array: np.ndarray) -> list[tuple[int, int]]:
    """Row and column of the tokens whose numbers these are, each whole."""
    within = array - array.reshape(len(array), -1)[:, 0].reshape(-1, *[1] * (array.ndim - 1))
    expected = np.arange(within[0].size).reshape(within.shape[1:]) / 8
    assert (within == expected).all()
    ids = array.reshape(len(array), -1)[:, 0]
    return [(int(number) // 100, int(number) % 100) for number in ids]


PREFILL = [(0, n) for n in range(19)] + [(1, n) for n in range(7, 19)]


def listed(inputs: Inputs, call: Call) -> list[tuple[int, int]]:
    return [(int(row), int(column)) for row, column in places(inputs, call)]


def test_places_are_those_of_real_tokens_row_by_row() -> None:
    inputs = played.inputs()
    prefill, *decode = main_run(inputs)
    assert listed(inputs, prefill) == PREFILL
    assert [listed(inputs, call) for call in decode] == [[(0, n), (1, n)] for n in (19, 20, 21)]
    assert [call.stage for call in decode] == ["decode 1", "decode 2", "decode 3"]


def test_a_recording_holds_what_each_call_added() -> None:
    inputs, layout = played.inputs(), played.layout()
    told: list[int] = []
    done: list[int] = []
    found = record(Played(table()), layout, inputs, told.append, done.append)
    assert (told, done) == ([0, 1, 2, 3], [1, 1, 1, 1])
    for number, (call, tensors) in enumerate(zip(main_run(inputs), found, strict=True)):
        assert list(tensors) == ["logits", KEY, SSM, *ROUTERS, HIDDEN]
        for name in ["logits", KEY, *ROUTERS, HIDDEN]:
            assert tensors[name].shape[1:] == played.SIZES[name]
            assert tokens_of(tensors[name]) == listed(inputs, call), (number, name)
        # What has no tokens is of the last one of each row.
        assert tokens_of(tensors[SSM]) == [(0, 18 + number), (1, 18 + number)]


def test_of_a_long_call_some_tokens_are_kept_and_all_router_logits() -> None:
    whole_inputs, layout = played.inputs(), played.layout()
    kept = np.zeros(whole_inputs.input_ids.shape, np.bool_)
    kept[:, [3, 12, 18, 20]] = True
    inputs = replace(whole_inputs, kept=kept)
    recording = record(Played(table()), layout, inputs)
    every = record(Played(table()), layout, whole_inputs)
    some = [[(0, 3), (0, 12), (0, 18), (1, 12), (1, 18)], [], [(0, 20), (1, 20)], []]
    for at, found, all_of_it in zip(some, recording, every, strict=True):
        for name in ["logits", KEY, HIDDEN]:
            assert (tokens_of(found[name]) if at else list(found[name])) == at
        for name in [*ROUTERS, SSM]:
            np.testing.assert_array_equal(found[name], all_of_it[name])


def test_whole_caches_are_ordered_as_the_calls_were() -> None:
    inputs, layout, session = played.inputs(), played.layout(), Played(table())
    recording = record(session, layout, inputs)
    calls = main_run(inputs)
    at_end = collect_whole(layout, inputs, calls, session.state())
    of_calls = whole(layout, recording)
    assert at_end.keys() == of_calls.keys() == {KEY}
    order = [place for call in calls for place in listed(inputs, call)]
    assert tokens_of(at_end[KEY]) == tokens_of(of_calls[KEY]) == order


def test_a_cache_of_another_length_stays_as_it_is() -> None:
    class Longer(Played):
        def state(self) -> dict[str, np.ndarray]:
            found = super().state()
            return {**found, KEY: np.concatenate([found[KEY], found[KEY][:, :, :1]], axis=2)}

    inputs, layout, session = played.inputs(), played.layout(), Longer(table())
    found = record(session, layout, inputs)
    assert [call[KEY].shape for call in found] == [(2, 2, n + 1, 3) for n in (19, 20, 21, 22)]
    end = collect_whole(layout, inputs, main_run(inputs), session.state())
    assert end[KEY].shape == (2, 2, 23, 3)


def test_what_nobody_knows_stays_as_it_is() -> None:
    """A state of no axis that is known, and of another shape than tokens have."""

    class More(Played):
        def state(self) -> dict[str, np.ndarray]:
            return {**super().state(), "present.9.key": np.ones((2, 3, 4, 5), np.float32)}

    found = record(More(table()), played.layout(), played.inputs())
    assert {call["present.9.key"].shape for call in found} == {(2, 3, 4, 5)}


def test_a_classifier_has_one_output_a_row_and_begins_anew_with_every_call() -> None:
    inputs, layout = played.inputs(classifier=True), played.layout(classifier=True)
    session = Played(table(), classifier=True)
    found = record(session, layout, inputs)
    assert [call.stage for call in main_run(inputs)] == [f"{n} tokens" for n in range(19, 23)]
    for number, (call, tensors) in enumerate(zip(main_run(inputs), found, strict=True)):
        assert list(tensors) == ["logits", *ROUTERS, HIDDEN]
        assert tokens_of(tensors["logits"]) == [(0, 18 + number), (1, 18 + number)]
        real = [(0, n) for n in range(19 + number)] + [(1, n) for n in range(7, 19 + number)]
        assert listed(inputs, call) == real
        for name in [*ROUTERS, HIDDEN]:
            assert tokens_of(tensors[name]) == real
    # One reset a call.
    assert session._run == 3 and session._seen.shape == (2, 22)


def test_tells_what_a_tensor_is() -> None:
    layout = played.layout()
    names = ["logits", KEY, SSM, ROUTERS[1], HIDDEN]
    assert [layout.kind(n) for n in names] == ["logits", "key", "ssm", "router", "hidden"]
    assert [layout.axis(n) for n in names] == [None, 2, None, None, None]
    assert [layout.of_rows(n) for n in names] == [False, False, True, False, False]
    assert played.layout(classifier=True).of_rows("logits")


def test_a_small_state_is_kept_whole() -> None:
    state = np.zeros((2, 8, MOST_ELEMENTS // 8), np.float32)
    assert _thinned(state) is state


# Elements of a row of the state, as heads, size and width; not all of them powers of two.
LARGE = [(32, 64, 128), (24, 64, 128), (128, 64, 16), (1, 1, MOST_ELEMENTS + 1), (80, 64, 128)]


@pytest.mark.parametrize("shape", LARGE)
def test_a_large_state_keeps_elements_of_every_residue(shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape))
    state = np.arange(2 * size, dtype=np.float64).reshape(2, *shape)
    kept = _thinned(state)
    assert kept.ndim == 2 and len(kept) == 2
    assert MOST_ELEMENTS / 2 < kept.shape[1] <= 2 * MOST_ELEMENTS
    # Each row has its own elements, the same of all.
    np.testing.assert_array_equal(kept[1] - size, kept[0])
    place = kept[0].astype(np.int64)
    assert (np.diff(place) == place[1]).all()
    # Every head, and every index of the last axis; whatever power of two they are.
    for width in (2, 16, 64, 128):
        assert len(np.unique(place % width)) == width
    assert len(np.unique(place // (size // shape[0]))) == shape[0]
    # A sample's RMS is near that of all.
    random = np.random.default_rng(0).standard_normal((2, *shape))
    for row, sample in zip(random, _thinned(random), strict=True):
        assert np.sqrt((sample**2).mean()) == pytest.approx(np.sqrt((row**2).mean()), rel=0.03)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 2, 100_001, 262_143])
def test_a_number_that_is_none_shows_wherever_it_is(bad: float, place: int) -> None:
    state = np.random.default_rng(0).standard_normal((3, 32, 64, 128)).astype(np.float32)
    right = _thinned(state)
    state.reshape(3, -1)[1, place] = bad
    before = state.copy()
    found = _thinned(state)
    assert not np.isfinite(found[1]).all()
    # The other rows are as they were, and so is the session's own state.
    np.testing.assert_array_equal(found[[0, 2]], right[[0, 2]])
    np.testing.assert_array_equal(state, before)


def test_two_infinities_do_not_hide_each_other() -> None:
    state = np.ones((1, 32, 64, 128), np.float32)
    state[0, 0, 0, 1], state[0, 0, 0, 2] = np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(_thinned(state)).all()
    # And numbers that are large are no fault: their sum is none of float32.
    assert np.isfinite(_thinned(np.full((1, 32, 64, 128), 3e38, np.float32))).all()
