"""A session's token inputs, against loops over rows and the rules of left padding."""

from __future__ import annotations

import itertools
import math
import re
from array import array
from collections import deque
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from ingot.graphs.state import State, key_value_states
from ingot.runtime.session import Ids, SessionError
from ingot.runtime.tokens import OneCall, TokenInputs, no_memory, token_ids

CACHE = key_value_states(0, 2, 4)
FIXED = (State("conv", "past", "present", "float32", ("batch", 3), ("batch", 3), None, False),)
PADDING = (0, 2, 5)
# The second cut is inside the longest padding, and the last call is of one token.
CUTS = (0, 4, 8, 9)


def _rows() -> tuple[Ids, Ids]:
    ids = np.random.default_rng(3).integers(0, 50, (len(PADDING), CUTS[-1]))
    mask = np.ones_like(ids)
    for row, padding in enumerate(PADDING):
        mask[row, :padding] = 0
    return ids, mask


def _fed(states: Sequence[State]) -> list[dict[str, Ids]]:
    ids, mask = _rows()
    inputs = TokenInputs(50, states)
    inputs.reset(len(ids), CUTS[-1])
    fed = []
    for begin, end in itertools.pairwise(CUTS):
        inputs.check(ids[:, begin:end], mask[:, begin:end])
        fed.append(inputs.append(ids[:, begin:end], mask[:, begin:end]))
    return fed


@pytest.mark.parametrize("states", [CACHE, FIXED], ids=["cache", "fixed"])
def test_counts_a_token_s_position_from_the_first_that_is_no_padding(
    states: Sequence[State],
) -> None:
    found = np.concatenate([call["position_ids"] for call in _fed(states)], axis=1)
    for row, padding in enumerate(PADDING):
        assert found[row].tolist() == [0] * padding + [*range(CUTS[-1] - padding)]


@pytest.mark.parametrize(
    ("states", "covers_past"), [(CACHE, True), (FIXED, False)], ids=["cache", "fixed"]
)
def test_masks_the_past_only_where_a_cache_has_it(
    states: Sequence[State], covers_past: bool
) -> None:
    ids, mask = _rows()
    for call, (begin, end) in zip(_fed(states), itertools.pairwise(CUTS), strict=True):
        assert (call["input_ids"] == ids[:, begin:end]).all()
        assert (
            call["attention_mask"].tolist() == mask[:, 0 if covers_past else begin : end].tolist()
        )


def test_takes_each_call_for_itself_without_states() -> None:
    ids, mask = _rows()
    inputs = TokenInputs(50, ())
    inputs.reset(len(ids), CUTS[-1])
    first = inputs.append(ids, mask)
    inputs.check(ids, mask)
    again = inputs.append(ids, mask)
    assert inputs.seen == 0
    assert all((first[name] == again[name]).all() for name in first)


def test_has_room_for_its_capacity_again_after_a_reset() -> None:
    one, inputs = np.ones((1, 1), np.int64), TokenInputs(50, CACHE)
    inputs.reset(1, 2)
    for _ in range(2):
        inputs.check(one, one)
        inputs.append(one, one)
    with pytest.raises(SessionError, match="3 tokens do not fit the session's capacity of 2"):
        inputs.check(one, one)
    inputs.lost = True
    inputs.reset(1, 2)
    inputs.check(one, one)
    assert inputs.seen == 0


@pytest.mark.parametrize(
    ("batch", "capacity"),
    [
        *[(0, 4), (-1, 4), (1, -1), (1.5, 4), (1.0, 4), (1, 4.5), ("1", 4), (1, "4"), (None, 4)],
        *[(1, None), (True, 4), (1, False), (1, 2**31), (2**63, 4), (1, 10**30), (1, 10**5000)],
        *[(math.nan, 4), (1, math.inf), ([1], 4), (1, b"4"), (np.float32(2), 4), (np.True_, 4)],
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_refuses_sizes_that_are_none_and_is_lost(batch: Any, capacity: Any) -> None:
    one, inputs = np.ones((1, 1), np.int64), TokenInputs(50, CACHE)
    inputs.reset(1, 4)
    with pytest.raises(SessionError, match="was asked for; give a batch of at least 1") as caught:
        inputs.reset(batch, capacity)
    assert len(str(caught.value)) < 400
    with pytest.raises(SessionError, match="the state is lost; call reset first"):
        inputs.check(one, one)
    inputs.reset(1, 4)
    inputs.check(one, one)


def test_takes_whole_numbers_of_any_kind_as_sizes() -> None:
    inputs = TokenInputs(50, CACHE)
    kinds: tuple[Any, ...] = (int, np.int8, np.uint16, np.int64, np.uint64)
    for kind in kinds:
        inputs.reset(kind(2), kind(7))
        assert (inputs.batch, inputs.capacity) == (2, 7)
        assert type(inputs.batch) is type(inputs.capacity) is int
    inputs.reset(2**31 - 1, 2**31 - 1)


def test_says_how_much_memory_a_reset_would_take() -> None:
    # Two states of two heads of four float32 numbers: 64 bytes a token.
    error = no_memory(CACHE, 2, 10**9)
    assert "2 sequences of 1000000000 tokens, whose states take 128.0 GB" in str(error)


# Calls of a row, a word each: what a recurrent state may be fed, and what not.
TAKEN = ("111 1 11", "001 1 11", "000 0 01", "000 0 00", "011 1 11")
PADDED = {
    "right": "110",
    "a hole": "101",
    "behind the left": "010",
    "a second turn on the left": "111 011",
    "a second turn, all of it": "011 000",
    "a later token": "001 1 0",
    "the fourth call": "001 1 11 01",
}


def _calls(*rows: str) -> list[Ids]:
    columns = zip(*map(str.split, rows), strict=True)
    return [np.array([list(map(int, part)) for part in parts]) for parts in columns]


def test_takes_padding_before_the_first_token_of_a_recurrent_row() -> None:
    inputs = TokenInputs(50, FIXED)
    inputs.reset(len(TAKEN), 6)
    for mask in _calls(*TAKEN):
        inputs.check(mask, mask)
        inputs.append(mask, mask)


@pytest.mark.parametrize("states", [FIXED, (*CACHE, *FIXED)], ids=["recurrent", "hybrid"])
@pytest.mark.parametrize("row", PADDED.values(), ids=PADDED)
def test_refuses_padding_behind_a_token_of_a_recurrent_row(
    states: Sequence[State], row: str
) -> None:
    *good, bad = _calls("".join("1" if c != " " else " " for c in row), row)
    inputs = TokenInputs(50, states)
    inputs.reset(2, 9)
    for mask in good:
        inputs.check(mask, mask)
        inputs.append(mask, mask)
    with pytest.raises(SessionError, match=r"padding behind the first token of row 1; .*recurrent"):
        inputs.check(bad, bad)
    # Nothing was taken, so the call can be made again.
    whole = np.ones_like(bad)
    inputs.check(whole, whole)
    inputs.reset(2, 9)
    inputs.check(np.sort(bad, axis=1), np.sort(bad, axis=1))


@pytest.mark.parametrize("states", [CACHE, ()], ids=["cache", "none"])
def test_a_cache_takes_padding_anywhere(states: Sequence[State]) -> None:
    inputs = TokenInputs(50, states)
    for row in PADDED.values():
        inputs.reset(1, 9)
        for mask in _calls(row):
            inputs.check(mask, mask)
            inputs.append(mask, mask)


@pytest.mark.parametrize("given", [[[1, 2]], None, "12", 1, ((1,),)], ids=repr)
def test_refuses_what_is_no_array(given: Any) -> None:
    one, inputs = np.ones((1, 2), np.int64), TokenInputs(50, CACHE)
    inputs.reset(1, 4)
    with pytest.raises(SessionError, match=r"input_ids is .* must be a numpy array"):
        inputs.check(given, one)
    with pytest.raises(SessionError, match=r"attention_mask is .* must be a numpy array"):
        inputs.check(one, given)


def test_lets_one_call_in_at_a_time() -> None:
    call = OneCall()
    with call, pytest.raises(SessionError, match=r"busy with a call of another thread.*fork"), call:
        raise AssertionError("two calls are in")
    with pytest.raises(KeyError), call:
        raise KeyError
    with call:
        pass


@pytest.mark.parametrize(
    "given",
    [
        *[[], (), range(0), np.zeros(0, np.int64)],
        *[[3, 4], (3, 4), range(3, 5), [np.int8(3), 4], deque([3, 4]), array("i", [3, 4])],
        *[np.array([3, 4], kind) for kind in ("i1", "u1", "i2", "u4", "i8", "u8", ">i4", object)],
    ],
    ids=repr,
)
def test_reads_token_ids_of_any_sequence_of_whole_numbers(given: Any) -> None:
    found = token_ids(given, "the prompt")
    assert found == ([3, 4] if len(given) else []) and all(type(each) is int for each in found)


@pytest.mark.parametrize(
    "given",
    [
        *[
            None,
            3,
            2.5,
            "34",
            b"34",
            bytearray(b"34"),
            memoryview(b"34"),
            {3: 4},
            {3, 4},
            iter([3]),
        ],
        *[[1.5], [1.0], ["3"], [None], [math.nan], [True], [1, False], [np.True_], [[3]], [b"3"]],
        *[[np.float32(7.9)], [3 + 0j], [3, [4]], [Decimal(3)]],
        *[np.array(values) for values in ([1.0], [True], ["3"], [[3]], 3, [None])],
    ],
    # The representation of some has an address in it.
    ids=lambda value: re.sub("0x[0-9a-f]+", "", repr(value)),
)
def test_refuses_what_is_no_list_of_token_ids(given: Any) -> None:
    with pytest.raises(SessionError, match=r"^the prompt is .* must be a list of token ids"):
        token_ids(given, "the prompt")
