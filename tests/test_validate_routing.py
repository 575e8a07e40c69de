"""Expert choices of a target against the truth's: which flips are excused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ingot.validate.judge.limits import FLIP_LIMIT
from ingot.validate.judge.routing import (
    compare_choices,
    doubtful,
    first_flips,
    ignored_choices,
    least_margin,
)
from ingot.validate.result import Flip, Ignored, Routing
from ingot.validate.truth.replay import choices

Array = npt.NDArray[Any]

# {0, 1} by a margin of 1.5 over 2.
PLAIN = [6.0, 3.5, 2.0, 0.0]
SWAPPED = [6.0, 2.0, 3.5, 0.0]
NAMES = ("first", "second", "third")


def case(
    flips: Sequence[tuple[int, int, int]],
    *,
    error: float = 1.5 / FLIP_LIMIT,
    forced: bool = False,
    expected: Sequence[float] = PLAIN,
) -> Routing:
    """Three routers, two rows of the positions 3 to 7; a target that differs at some places.

    Args:
        flips: router, row and position of each.
        error: of every eager logit, up or down.
        forced: of ``compare_choices``.
        expected: logits of each token, from which the truth's are far.
    """
    places = np.array([(row, position) for row in range(2) for position in range(3, 8)])
    want = [np.tile(np.array(expected, np.float64), (10, 1)) for _ in NAMES]
    # Its margins are others, and must not be the ones that count.
    truth = [logits * 4 for logits in want]
    signs = np.where(np.arange(40).reshape(10, 4) % 3, 1.0, -1.0)
    eager = [(logits + error * signs).astype(np.float64) for logits in truth]
    target = [np.tile(choices(np.array([PLAIN]), 2), (10, 1)) for _ in NAMES]
    for router, row, position in flips:
        target[router][row * 5 + position - 3] = choices(np.array([SWAPPED]), 2)[0]
    return compare_choices(want, truth, eager, target, places, 2, NAMES, forced=forced)


def test_counts_the_tokens_that_agree() -> None:
    assert case([]) == Routing((1.0, 1.0, 1.0), (), NAMES)
    assert case([(1, 0, 4)]).agreement == (1.0, 0.9, 1.0)
    assert case([(1, 0, 4), (1, 1, 4), (2, 1, 3)]).agreement == (1.0, 0.8, 0.9)


def test_tells_what_was_chosen_where_and_by_what_margin() -> None:
    (flip,) = case([(1, 1, 6)], error=1.0).flips
    assert flip == Flip(1, 1, 6, (0, 1), (0, 2), 1.5, FLIP_LIMIT, follows=False)


@pytest.mark.parametrize(("factor", "fails"), [(0.0, True), (0.999, True), (1.001, False)])
def test_excuses_a_flip_that_eager_s_own_error_explains(factor: float, fails: bool) -> None:
    (flip,) = case([(0, 0, 3)], error=factor * 1.5 / FLIP_LIMIT).flips
    assert flip.explained == pytest.approx(factor * 1.5)
    assert flip.fails == fails


def test_takes_the_error_of_the_router_itself() -> None:
    logits = np.array([PLAIN])
    noisy = [logits + 1.0, logits + 2.0]
    swapped = [choices(np.array([SWAPPED]), 2)] * 2
    found = compare_choices([logits] * 2, [logits] * 2, noisy, swapped, np.array([(0, 0)]), 2, ())
    assert [flip.explained for flip in found.flips] == [FLIP_LIMIT, 2 * FLIP_LIMIT]


def test_a_flip_follows_one_of_an_earlier_router_at_or_before_it() -> None:
    after = [(1, 0, 5), (1, 0, 6), (1, 0, 7), (2, 0, 5)]
    # The same router's other tokens, what came before, and the other row did not see it.
    by_itself = [(0, 0, 5), (0, 0, 6), (1, 0, 4), (1, 1, 6), (2, 1, 5)]
    found = case([*after, *by_itself], error=0.0)
    follows = {(f.router, f.row, f.token): f.follows for f in found.flips}
    assert follows == {**dict.fromkeys(after, True), **dict.fromkeys(by_itself, False)}
    assert [f.fails for f in found.flips] == [not f.follows for f in found.flips]


def test_a_flip_follows_the_first_of_several() -> None:
    found = case([(0, 0, 6), (1, 0, 4), (2, 0, 4), (2, 0, 3)], error=0.0)
    assert [(f.router, f.token, f.follows) for f in found.flips] == [
        *((0, 6, False), (1, 4, False)),
        *((2, 3, False), (2, 4, True)),
    ]


def test_no_flip_follows_where_the_experts_were_forced() -> None:
    flips = [(0, 0, 3), (1, 0, 5), (2, 0, 7)]
    assert [f.fails for f in case(flips, error=0.0).flips] == [True, False, False]
    assert [f.fails for f in case(flips, error=0.0, forced=True).flips] == [True] * 3


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_margin_or_an_error_that_is_no_number_explains_nothing() -> None:
    (flip,) = case([(1, 0, 4)], error=np.nan).flips
    assert flip.fails
    infinite = [np.inf, np.inf, np.inf, 0.0]
    (flip,) = case([(1, 0, 4)], expected=infinite, error=1e9).flips[:1]
    assert np.isnan(flip.margin) and flip.fails
    # Nor does a target without numbers agree with anything.
    logits = np.array([PLAIN])
    nothing = choices(np.array([[np.nan, np.nan, 1.0, 2.0]]), 2)
    found = compare_choices([logits], [logits], [logits], [nothing], np.array([(0, 0)]), 2, ())
    assert [flip.fails for flip in found.flips] == [True]


def test_all_of_the_experts_are_no_choice() -> None:
    logits = [np.array([PLAIN, SWAPPED])]
    chosen = [np.ones((2, 4), np.bool_)]
    found = compare_choices(logits, logits, logits, chosen, np.zeros((2, 2), int), 4, ())
    assert found == Routing((1.0,), (), ())


def test_an_expert_whose_weight_rounds_to_nothing_is_no_choice() -> None:
    # A softmax in float32 makes zeros of the last two, and a top k of it cannot tell them apart.
    logits = [np.array([[150.0, 2.0, 1.0, 140.0]])]
    at = np.zeros((1, 2), int)

    def flips(chosen: list[bool], top_k: int) -> int:
        found = compare_choices(logits, logits, logits, [np.array([chosen])], at, top_k, ())
        return len(found.flips)

    assert flips([True, False, False, True], 3) == flips([True, False, True, True], 3) == 0
    assert flips([True, False, False, False], 2) == 1
    assert flips([True, True, False, False], 2) == 1


def test_tells_where_forced_experts_were_not_used() -> None:
    at = np.array([(0, 3), (1, 4)])
    logits = [np.array([PLAIN, SWAPPED])] * 3
    forced = [choices(each, 2) for each in logits]
    assert ignored_choices(forced, {0: forced[0], 2: forced[2]}, logits, at) == ()
    one_more = forced[0] | [[False, False, False, False], [False, True, False, False]]
    one_less = forced[0] & [[True, False, True, True]]
    found = ignored_choices(forced, {0: one_more, 1: forced[1], 2: one_less}, logits, at)
    assert found == (
        Ignored(0, 1, 4, (0, 2), (0, 1, 2), 1),
        Ignored(2, 0, 3, (0, 1), (0,), 1),
    )
    routing = Routing((1.0,) * 3, (), NAMES, found)
    assert len(routing.problems) == 2 and routing.problems[1].startswith("third: token 3 of row 0")


def test_tells_from_where_on_a_row_is_another() -> None:
    assert first_flips(case([])) == {}
    found = case([(0, 0, 6), (1, 0, 4), (2, 1, 7), (2, 0, 5)], error=1.0)
    assert first_flips(found) == {0: 4, 1: 7}
    # One that fails excuses nothing, not even what is left out for others.
    assert first_flips(case([(0, 0, 6), (2, 1, 7)], error=0.0)) == {}


def test_tells_where_another_choice_could_be_explained() -> None:
    places = np.array([(row, position) for row in range(2) for position in range(3, 8)])

    def logits(margins: list[float]) -> Array:
        return np.array([[5.0, 3.5, 3.5 - margin, 0.0] for margin in margins])

    def doubted(*routers: dict[int, float], error: float = 0.25 / FLIP_LIMIT) -> dict[int, int]:
        made = [logits([changed.get(at, 1.0) for at in range(10)]) for changed in routers]
        far = [4 * each for each in made]
        return doubtful(made, far, [each + error for each in far], places, 2)

    assert doubted({}, {}) == {}
    assert doubted({}, {}, error=0.999 / FLIP_LIMIT) == {}
    assert doubted({}, {}, error=1.001 / FLIP_LIMIT) == {0: 3, 1: 3}
    assert doubted({2: 0.1, 3: 0.1}, {}) == {0: 5}
    # The first of all routers, by row.
    assert doubted({2: 0.1, 9: 0.0}, {1: 0.1, 8: 0.2}) == {0: 4, 1: 6}
    assert doubted({2: 0.26}, {3: 0.24}) == {0: 6}
    # With all of the experts there is no choice.
    tie = [logits([0.0] * 10)]
    assert doubtful(tie, tie, tie, places, 4) == {}


def test_finds_the_least_margin_of_a_choice() -> None:
    one = np.array([[5.0, 3.5, 2.0, 0.0], [1.0, 4.0, 2.0, 3.0]])
    two = np.array([[0.25, 0.0, 9.0, -9.0]])
    assert least_margin([one, two], 2) == 0.25
    assert least_margin([two, one], 2) == 0.25
    assert least_margin([one], 2) == 1.0
    assert least_margin([one], 1) == 1.0
    assert least_margin([one, np.zeros((3, 4))], 3) == 0.0
    assert least_margin([one, two], 4) is None
    assert least_margin([], 2) is None
