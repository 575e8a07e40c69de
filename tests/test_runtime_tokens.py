"""A session's token inputs, against loops over rows and the rules of left padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from ingot.graphs.state import State, key_value_states
from ingot.runtime.session import Ids, SessionError
from ingot.runtime.tokens import TokenInputs

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
