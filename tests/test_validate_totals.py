"""The figures of one report, of several sets of token ids: against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ingot.validate.judge import totals
from ingot.validate.judge.growth import GROWTH_LIMIT
from ingot.validate.judge.limits import TIE_LIMIT
from ingot.validate.result import Flip, Growth, Routing, TensorResult
from ingot.validate.truth.recording import Array
from ingot.validate.truth.replay import Routers

FLOOR = 1e-7


def judge(
    results: Sequence[TensorResult] = (),
    routing: Mapping[str, Routing] | None = None,
    references: Any = None,
    top_k: int = 2,
    logits: Sequence[Array] = (),
) -> Any:
    """What is read of a ``Judge``."""
    return SimpleNamespace(
        results=list(results),
        routing=routing or {},
        references=[references],
        compared=[references],
        logits=list(logits),
        routers=Routers((1, 1), top_k),
    )


def tensor(
    stage: str,
    name: str = "logits",
    score: float | None = 1.0,
    floor: float | None = FLOOR,
    kind: str = "logits",
) -> TensorResult:
    error = None if score is None or floor is None else score * floor
    return TensorResult(stage, name, kind, None, error, floor, 1.0, 8.0)


def flip(token: int) -> Flip:
    return Flip(0, 1, token, (0, 1), (0, 2), 1e-9, 1e-6)


# --- tensors


def test_one_seed_is_not_named_and_several_are() -> None:
    one, other = judge([tensor("prefill"), tensor("decode 1")]), judge([tensor("prefill", "x")])
    assert totals.tensors([one], range(4, 5)) == tuple(one.results)
    found = totals.tensors([one, other], range(4, 6))
    assert [(t.stage, t.name) for t in found] == [
        ("seed 4, prefill", "logits"),
        ("seed 4, decode 1", "logits"),
        ("seed 5, prefill", "x"),
    ]
    assert [t.error for t in found] == [t.error for t in [*one.results, *other.results]]


def test_a_main_output_that_is_one_number_in_all_calls_proves_nothing() -> None:
    zeros, some = np.zeros((2, 5)), np.arange(10.0).reshape(2, 5)

    def found(*calls: Array, seeds: int = 1) -> list[str]:
        truth = [{"logits": call, "present.0.key": zeros} for call in calls]
        one = judge(references=SimpleNamespace(truth=truth))
        one.layout = SimpleNamespace(main_output="logits", kind=lambda _name: "logits")
        return [each.problem for each in totals.constant_main([one] * seeds)]

    said = ["every element of the reference is 0.0, which proves nothing"]
    assert found(zeros, zeros) == found(zeros, seeds=2) == said
    # A token that is embedded as zero, and others.
    assert found(zeros, some) == found(some) == []
    # One number is no constant: the only label of a classifier.
    assert found(some[:1, :1]) == []


# --- routing


def test_agreement_is_the_mean_over_seeds_and_flips_are_all() -> None:
    names = ("layer 0", "layer 1")
    first = {
        "free": Routing((1.0, 0.5), (flip(3), flip(4)), names),
        "replayed": Routing((1.0, 1.0), (), names),
    }
    second = {
        "free": Routing((0.5, 0.75), (flip(9),), names),
        "replayed": Routing((0.0, 1.0), (flip(1),), names),
    }
    found = totals.routing([judge(routing=first), judge(routing=second)])
    assert found == {
        "free": Routing((0.75, 0.625), (flip(3), flip(4), flip(9)), names),
        "replayed": Routing((0.5, 1.0), (flip(1),), names),
    }
    assert all(type(share) is float for each in found.values() for share in each.agreement)
    assert totals.routing([judge(routing=first)]) == first
    assert totals.routing([judge(), judge()]) == {}


# --- growth


def decode(first: float, last: float, kind: str = "logits", ending: str = "") -> list[TensorResult]:
    """Eight steps whose quarters have these scores."""
    scores = [first] * 2 + [1.0] * 4 + [last] * 2
    return [
        tensor(f"decode {number + 1}{ending}", kind, score, kind=kind)
        for number, score in enumerate(scores)
    ]


def only(*judges: Any) -> Growth:
    (found,) = totals.worst_growth(judges)
    return found


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_seeds_the_one_that_grows_most_counts(order: int) -> None:
    judges = [judge(decode(*ends)) for ends in ((1.0, 2.0), (2.0, 10.0), (3.0, 6.0))][::order]
    found = only(*judges)
    assert (found.first, found.last) == pytest.approx((2, 10))
    assert found.problem


def test_each_kind_has_its_own_worst_seed() -> None:
    one = judge(decode(1.0, 2.0) + decode(1.0, 3.0, "key"))
    other = judge(decode(1.0, 3.0) + decode(1.0, 2.0, "key"))
    found = totals.worst_growth([one, other])
    assert [(each.kind, round(each.ratio, 9)) for each in found] == [("logits", 3), ("key", 3)]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_no_later_seed_hides_an_error_that_is_no_number(order: int, wrong: float) -> None:
    others = [judge(decode(1.0, 10.0)), judge(decode(1.0, 2.0))]
    judges = [judge(decode(1.0, wrong)), *others][::order]
    found = only(*judges)
    assert not math.isfinite(found.ratio)
    assert found.problem


@pytest.mark.parametrize("order", [1, -1])
def test_no_harmless_growth_hides_one_that_fails(order: int) -> None:
    # From a tenth of eager's own error to nine: more, and still below it.
    harmless, fails = judge(decode(0.1, 0.9)), judge(decode(1.0, 5.0))
    assert only(harmless).ratio > only(fails).ratio > GROWTH_LIMIT
    assert not only(harmless).problem and only(fails).problem
    assert only(*[harmless, fails][::order]) == only(fails)


def test_growth_is_that_under_the_truths_experts_where_there_are_routers() -> None:
    free, replayed = decode(1.0, 8.0), decode(1.0, 2.0, ending=", replayed")
    assert only(judge(free)).ratio == pytest.approx(8)
    assert only(judge(free + replayed, {"free": Routing((1.0,), ())})).ratio == pytest.approx(2)
    assert totals.worst_growth([judge(free[:7])]) == ()


# --- hidden states


def test_a_hidden_states_error_is_the_rms_over_calls_and_seeds() -> None:
    def state(number: int, score: float | None, floor: float | None = FLOOR) -> TensorResult:
        return tensor("prefill", f"hidden_states.{number}", score, floor, "hidden")

    one = judge([tensor("prefill"), state(10, 1.0), state(9, 2.0), state(0, 0.0)])
    other = judge([state(9, 14.0, 2 * FLOOR), state(0, 0.0), state(10, 7.0)])
    # Of a model of ten layers that counts from what enters the first.
    layers = {f"hidden_states.{number}": number - 1 for number in range(10)}
    found = totals.hidden([one, other], layers, 10)
    # In the order of the layers' numbers, and not of their letters.
    names = ["hidden_states.0", "hidden_states.9", "hidden_states.10"]
    assert [state.name for state in found] == names
    assert [(state.layer, state.normed) for state in found] == [(-1, False), (8, False), (9, True)]
    expected = [
        (0.0, FLOOR),
        (math.sqrt((2**2 + 28**2) / 2) * FLOOR, math.sqrt((1 + 4) / 2) * FLOOR),
        (5 * FLOOR, FLOOR),
    ]
    figures = [(state.error, state.floor) for state in found]
    assert np.array(figures) == pytest.approx(np.array(expected))
    assert totals.hidden([judge([tensor("prefill")])], layers, 10) == ()


def test_a_hidden_state_that_was_not_compared_has_no_error() -> None:
    results = [tensor("prefill", "hidden_states.0", score) for score in (1.0, None)]
    (found,) = totals.hidden([judge(results)], {"hidden_states.0": 0}, 1)
    assert math.isnan(found.error) and found.floor == pytest.approx(FLOOR)


# --- the router's margin


def truth_of(*calls: Mapping[str, Array]) -> Any:
    return SimpleNamespace(truth=list(calls))


def test_the_margin_is_the_smallest_of_all_calls_and_seeds() -> None:
    def logits(*last: float) -> Array:
        return np.array([[9.0, 5.0, next_best, -3.0] for next_best in last])

    one = truth_of({"router_logits.0": logits(4.0), "router_logits.1": logits(3.0, 2.0)})
    other = truth_of({"router_logits.0": logits(1.0)}, {"router_logits.0": logits(0.0, 4.75)})
    assert totals.margin([judge(references=one)]) == 1.0
    assert totals.margin([judge(references=one), judge(references=other)]) == 0.25
    # Nothing is chosen of four out of four, nor without routers.
    assert totals.margin([judge(references=one, top_k=4)]) is None
    assert totals.margin([judge(references=truth_of({}))]) is None


# --- next tokens


def sides(expected: Array, noise: float = 0.0, tokens: Sequence[int] = (2, 1)) -> Any:
    """Recordings of some calls; eager is off by ``noise`` everywhere."""
    parts = np.split(expected, np.cumsum(tokens)[:-1])
    recording = [{"logits": part} for part in parts]
    eager = [{"logits": (part + noise).astype(np.float32)} for part in parts]
    return SimpleNamespace(expected=recording, truth=recording, eager=eager)


def test_next_tokens_are_those_of_all_calls_and_seeds() -> None:
    zero = np.zeros((3, 2))
    # Probabilities of 1/4 and 3/4 where the truth has 1/2: the divergence is log(2 / sqrt(3)).
    other = np.array([[0.0, math.log(3)]])
    first = judge(references=sides(zero), logits=[np.zeros((2, 2)), other])
    both = np.concatenate([other, np.zeros((2, 2))])
    second = judge(references=sides(zero, tokens=(3,)), logits=[both])
    found = totals.next_tokens([first, second])
    assert found is not None and found.tokens == 6
    assert found.kl == pytest.approx((0, 0, 0, 0) + (math.log(2 / math.sqrt(3)),) * 2)
    assert found.top1_agreement == pytest.approx(4 / 6)
    # Equal logits are a tie, whatever rounding is.
    assert found.near_ties == 2


def test_a_tie_is_what_rounding_explains() -> None:
    noise = 0.01
    rows = np.array([[TIE_LIMIT * noise * share, 0.0] for share in (0.98, 1.02)])
    references = sides(rows, noise, (2,))
    found = totals.next_tokens([judge(references=references, logits=[rows[:, ::-1]])])
    assert found is not None
    assert (found.top1_agreement, found.near_ties) == (0, 1)


def test_another_ingot_is_expected_and_eagers_noise_is_against_the_truth() -> None:
    truth = np.array([[1.0, 0.0]])
    references = sides(truth, 0.001, (1,))
    references.expected = [{"logits": np.array([[0.0, 3.0]])}]
    found = totals.next_tokens([judge(references=references, logits=[truth])])
    assert found is not None
    # Not the truth's likeliest, and by far more than a tie.
    assert (found.top1_agreement, found.near_ties) == (0, 0)
    assert found.kl_max > 1


@pytest.mark.parametrize("shape", [(2, 3), (1, 2), (2, 2, 1)])
def test_logits_of_another_shape_have_no_distribution(shape: tuple[int, ...]) -> None:
    references = sides(np.zeros((3, 2)))
    good = [np.zeros((2, 2)), np.zeros((1, 2))]
    assert totals.next_tokens([judge(references=references, logits=good)]) is not None
    wrong = [np.zeros(shape), good[1]]
    assert totals.next_tokens([judge(references=references, logits=wrong)]) is None
