"""A failed report gets one place: of the run that failed, or of a check, or a reason for none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest

from ingot.graphs.state import key_value_states
from ingot.runtime.session import Session
from ingot.validate.identity.subject import Subject
from ingot.validate.locate import find
from ingot.validate.locate.calls import Fed, feeds, one_by_one, other_padding
from ingot.validate.locate.find import Run, eager_overflows, failed_run, located, runs_of
from ingot.validate.locate.part import LocateError
from ingot.validate.result import (
    Check,
    Flip,
    Growth,
    Location,
    Report,
    Routing,
    TensorResult,
)
from ingot.validate.truth.inputs import QUICK, make_inputs
from ingot.validate.truth.runs import Traits, make_runs

STATES = key_value_states(0, 2, 4)


def tensor(stage: str, problem: str = "wrong", **more: Any) -> TensorResult:
    return TensorResult(stage, "logits", "logits", None, 1.0, 0.1, 1.0, 8.0, problem, **more)


def report(*tensors: TensorResult, **more: Any) -> Report:
    return Report("ingot", "granite", "ort", "float16", "eager", 0, tensors, **more)


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    """Of two seeds."""
    made = [make_runs(Traits(512), QUICK, seed, context=seed == 0) for seed in (0, 1)]
    first, second = made
    return [*runs_of(first, "seed 0, "), *runs_of(second, "seed 1, ", first=False)]


def chosen(runs: list[Run], *stages: str) -> tuple[str, str]:
    """The name of the run that is repeated, and its last call."""
    run = failed_run(report(*map(tensor, stages), tensor("seed 0, prefill", "")), runs)
    return run.name, run.calls[-1].stage


def test_repeats_the_run_that_failed_up_to_the_first_call_that_did(runs: list[Run]) -> None:
    assert chosen(runs, "seed 0, prefill") == ("", "seed 0, prefill")
    assert chosen(runs, "seed 0, decode 3", "seed 0, decode 2") == ("", "seed 0, decode 2")
    assert chosen(runs, "seed 0, decode 2, replayed") == ("", "seed 0, decode 2")
    assert chosen(runs, "seed 1, decode 2")[0] == "seed 1, main"
    alone = "seed 1, row 0 alone"
    assert chosen(runs, alone) == (alone, alone)
    # A later call of the same run is not taken for the first, whose name it begins with.
    assert chosen(runs, f"{alone}, decode 2, replayed") == (alone, f"{alone}, decode 2")


def test_repeats_all_of_a_run_whose_caches_are_wrong_at_its_end(runs: list[Run]) -> None:
    alone = next(run for run in runs if run.name == "seed 1, row 0 alone")
    name, call = chosen(runs, "seed 1, row 0 alone, all of the caches")
    assert (name, call) == (alone.name, alone.calls[-1].stage) and len(alone.calls) > 2
    assert chosen(runs, "seed 0, all of the caches") == ("", "seed 0, decode 8")


def test_repeats_the_cheapest_run_unless_the_first_prefill_failed(runs: list[Run]) -> None:
    stages = ("seed 0, decode 8", "seed 0, row 2 alone", "seed 1, prefill")
    name, call = chosen(runs, *stages)
    # The main run failed too, so the other needs no name.
    assert (name, call) == ("", "seed 0, row 2 alone")
    assert chosen(runs, *stages, "seed 0, prefill") == ("", "seed 0, prefill")


def test_repeats_the_main_run_where_no_call_failed(runs: list[Run]) -> None:
    assert failed_run(report(tensor("all of the caches")), runs) == runs[0]


def test_repeats_no_run_that_would_fill_the_memory() -> None:
    ids = np.zeros((1, 1 << 13), np.int64)
    run = Run([Fed("prefill", ids, ids + 1)], main=True)
    with pytest.raises(LocateError, match="too long"):
        failed_run(report(tensor("prefill")), [run])


def test_what_is_fed_is_what_its_definition_says() -> None:
    inputs = make_inputs(512, plan=QUICK)
    (run, *_) = runs_of(make_runs(Traits(512), QUICK, 0))
    for number, (_, columns) in enumerate(inputs.steps):
        rows = len(inputs.input_ids)
        calls = [call._replace(input_ids=call.input_ids[:rows]) for call in run.calls]
        calls = [call._replace(attention_mask=call.attention_mask[:rows]) for call in calls]
        found, expected = feeds(calls, number, STATES), inputs.feeds(columns, cached=True)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def test_calls_without_a_state_stand_alone() -> None:
    one = Fed("3 tokens", np.array([[5, 6, 7]]), np.array([[0, 1, 1]]))
    found = feeds([one, one], 1, ())
    assert found["attention_mask"].tolist() == [[0, 1, 1]]
    assert found["position_ids"].tolist() == [[0, 0, 1]]


def test_feeds_a_shared_cache_one_token_at_a_time_after_a_past() -> None:
    ids = np.arange(10).reshape(2, 5)
    calls = [Fed("a", ids[:, :2], ids[:, :2]), Fed("b", ids[:, 2:], ids[:, 2:])]
    assert one_by_one(calls, False) == calls
    found = one_by_one(calls, True)
    assert [(call.stage, call.input_ids.shape[1]) for call in found] == [
        ("a", 2),
        *[("b", 1)] * 3,
    ]
    np.testing.assert_array_equal(np.concatenate([c.input_ids for c in found], axis=1), ids)
    # One row is taken as it is.
    rows = [Fed(s, i[:1], m[:1]) for s, i, m in calls]
    assert [call.input_ids.shape[1] for call in one_by_one(rows, True)] == [2, 3]


def test_other_tokens_stand_in_padding_only() -> None:
    call = Fed("a", np.array([[511, 3]]), np.array([[0, 1]]))
    found = other_padding([call], 512)
    assert found is not None and found[0].input_ids.tolist() == [[0, 3]]
    assert other_padding([call._replace(attention_mask=np.array([[1, 1]]))], 512) is None


class _Manifest:
    states = STATES
    by_token = False


class _Subject:
    manifest, folder = _Manifest(), Path("nowhere")


def place(
    monkeypatch: pytest.MonkeyPatch,
    found: Report,
    locate: Any,
    session: Any = None,
    inside: Sequence[TensorResult] = (),
    *,
    runs_here: bool = True,
) -> Report:
    """The report with its place, where these look for it."""
    monkeypatch.setattr(find, "locate", locate)
    monkeypatch.setattr(find, "locate_session", session or (lambda *_: None))
    return located(found, cast(Subject, _Subject()), _Again(*inside, runs_here=runs_here))


class _Again:
    """Of a model with two layers, the second of which chooses experts."""

    is_eager = True
    layers: ClassVar = {"hidden_states.0": -1, "hidden_states.1": 0, "router_logits.0": 1}
    count = 2

    def __init__(self, *inside: TensorResult, runs_here: bool = True) -> None:
        self._inside, self._runs_here = inside, runs_here

    def runs(self) -> list[Run]:
        return runs_of(make_runs(Traits(512), QUICK, 0))

    def session(self) -> Session | None:
        return cast(Session, object()) if self._runs_here else None

    def inside(self, run: Run) -> tuple[TensorResult, ...]:
        return self._inside


NODE = Location(1, "Cast", "val_3", 0.0)
WRONG = Check("graph", 3, ("layer 1, Cast val_3: there is no such node",), NODE)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("No corresponding Numpy type for Tensor Type.\n  bfloat16"),
        KeyError("val_3"),
        AssertionError(),
    ],
)
def test_whatever_goes_wrong_on_the_way_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: Any) -> None:
        raise error

    found = place(monkeypatch, report(tensor("prefill")), fails)
    assert found.location is None and found.verdict == "failed"
    assert found.unlocated and "\n" not in found.unlocated and "Traceback" not in found.unlocated
    assert str(error).split()[:3] == [] or str(error).split()[0] in found.unlocated
    # What a check says of the place is better than none.
    assert place(monkeypatch, report(tensor("prefill"), checks=(WRONG,)), fails).location == NODE


def test_numbers_come_before_checks_and_the_graph_before_the_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = report(tensor("prefill"), checks=(WRONG,))
    of_graph, of_session = Location(0, "Add", "sum", 20.0), Location(None, "session", "mask", 1.0)
    assert place(monkeypatch, wrong, lambda *_: of_graph).location == of_graph
    found = place(monkeypatch, wrong, lambda *_: None, lambda *_: of_session)
    assert found.location == of_session
    assert place(monkeypatch, wrong, lambda *_: None).location == NODE


def value(name: str, stage: str = "decode 1", layer: int | None = None, problem: str = "w") -> Any:
    return TensorResult(stage, name, "hidden", layer, 1.0, 0.1, 1.0, 8.0, problem)


def test_where_graph_and_session_are_right_the_first_layer_computed_wrongly_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong, right = report(tensor("decode 1")), lambda *_: None
    inside = [
        value("logits"),
        value("hidden_states.2", "prefill"),
        value("hidden_states.2"),
        value("router_logits.0"),
        value("hidden_states.1", problem=""),
    ]
    # The model's only router is in its second layer, and is before what leaves that.
    found = place(monkeypatch, wrong, right, inside=inside)
    place_of_router = Location(1, "kernels", "router_logits.0 at decode 1", 10.0)
    assert found.location == place_of_router
    words = "not in the graph but in what computes it, in layer 1, router_logits.0 at decode 1, "
    assert found.place == f"{words}10x floor"
    state = value("present.1.key", layer=1)
    found = place(monkeypatch, wrong, right, inside=[*inside, state])
    assert found.location and found.location.value == "present.1.key at decode 1"
    found = place(monkeypatch, wrong, right, inside=[*inside, state, value("hidden_states.0")])
    assert found.location and found.location.layer is None
    assert "computes it, outside of the layers, hidden_states.0" in str(found.location)
    # What leaves the last layer is seen behind the final norm, or at the very end.
    found = place(monkeypatch, wrong, right, inside=inside[:3])
    assert str(found.location).endswith(
        "layer 1, hidden_states.2 at prefill, 10x floor, there or behind it"
    )
    found = place(monkeypatch, wrong, right, inside=inside[:1])
    assert str(found.location).endswith(
        "layer 1, logits at decode 1, 10x floor, there or behind it"
    )
    end = value("hidden_states.2", problem="")
    found = place(monkeypatch, wrong, right, inside=[*inside[:1], end])
    assert str(found.location).endswith("outside of the layers, logits at decode 1, 10x floor")
    # What is wrong in a file is the place before that.
    checked = replace(wrong, checks=(WRONG,))
    assert place(monkeypatch, checked, right, inside=inside).location == NODE


def test_held_against_another_ingot_no_kernel_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Again, "is_eager", False)
    wrong = report(tensor("decode 1"))
    found = place(monkeypatch, wrong, lambda *_: None, inside=[value("hidden_states.1")])
    assert (found.verdict, found.place) == ("failed", None)


def test_what_half_precision_hides_is_named_where_float32_shows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where half precision shows it a layer later."""
    wide = value("hidden_states.1", "prefill, in float32")
    found = place(monkeypatch, report(wide), lambda *_: None).location
    assert found == Location(0, "kernels", "hidden_states.1 at prefill, in float32", 10.0)
    late = [value("present.1.key", layer=1)]
    found = place(monkeypatch, report(*late, wide), lambda *_: None, inside=late).location
    assert found and found.layer == 0
    # What is not wrong there is looked for where it is.
    wide = replace(wide, problem="")
    found = place(monkeypatch, report(*late, wide), lambda *_: None, inside=late).location
    assert found and found.value == "present.1.key at decode 1"


def test_what_only_calls_that_are_made_again_show_has_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(*results: TensorResult) -> Location | None:
        return place(monkeypatch, report(*results), lambda *_: None).location

    forked = value("logits", "decode 1, beside a fork")
    threads = value("present.1.key", "prefill, 1 thread", layer=1)
    times = value("present.0.key", "prefill, 5 times", layer=0)
    of_fork = found(forked)
    assert of_fork and (of_fork.operator, of_fork.value) == (
        "session",
        "logits at decode 1, beside a fork",
    )
    assert found(threads) == Location(1, "kernels", "present.1.key at prefill, 1 thread", 10.0)
    # What differs by itself says nothing of a fork.
    raced = found(forked, times)
    assert raced and (raced.layer, raced.operator) == (0, "kernels")


def test_a_session_that_cannot_run_here_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        pytest.fail("there is none")

    wide = value("logits", "prefill, in float32")
    found = place(monkeypatch, report(wide), lambda *_: None, never, runs_here=False).location
    assert found and found.operator == "kernels"


def test_experts_that_fail_have_their_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    flip = Flip(0, 2, 5, (0, 1), (0, 2), 1.0, 0.1)
    wrong = report(value("logits", ""), routing={"free": Routing((0.9,), (flip,))})
    found = place(monkeypatch, wrong, lambda *_: None).location
    assert found == Location(1, "kernels", "the experts of token 5 of row 2", np.inf)
    one = value("hidden_states.1", "experts forced 1")
    found = place(monkeypatch, report(one), lambda *_: None).location
    assert found == Location(0, "kernels", "hidden_states.1 at experts forced 1", 10.0)


def test_says_that_only_what_runs_without_its_inside_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = place(monkeypatch, report(tensor("prefill")), lambda *_: None)
    assert found.location is None and "what runs without them" in str(found.place)


def test_numbers_that_are_right_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        pytest.fail("it was run")

    right = report(tensor("prefill", ""), checks=(WRONG,))
    assert place(monkeypatch, right, never).location == NODE
    grown = replace(right, growth=(Growth("key", 1.0, 9.0, 4.0),))
    assert place(monkeypatch, grown, lambda *_: NODE).location == NODE


def test_says_of_an_overflow_what_eager_pytorch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    overflow = Location(3, "MoE", "moe_3", np.inf, overflow=71000.0)
    one = tensor("prefill", not_finite=("target",))
    found = place(monkeypatch, report(one), lambda *_: overflow)
    begin = "overflow in layer 3, MoE output moe_3: 7.1e+04 is beyond float16's 65504; "
    assert found.place == f"{begin}eager PyTorch in float16 does not overflow"
    both = tensor("prefill", not_finite=("eager", "target"))
    found = place(monkeypatch, report(both), lambda *_: overflow)
    assert found.place == f"{begin}eager PyTorch in float16 overflows too: use --precision bf16"
    assert eager_overflows(report(both)) in str(found.place)


@pytest.mark.parametrize(
    ("location", "words"),
    [
        (
            Location(1, "If", "v", 20.0, "then_branch: Mul output w"),
            "layer 1, If output v, in its ",
        ),
        (Location(None, "Cast", "v", 0.0), "Cast output v, another node than it should be"),
        (
            Location(1, "Add", "v", np.inf, detail="which holds NaN"),
            "Add output v, which holds NaN",
        ),
        (Location(1, "Add", "v", 20.0, run="row 0 alone"), "20x floor, at row 0 alone"),
        (Location(None, "MatMul", "v", np.inf, overflow=7e4), "overflow outside of the layers, "),
        (Location(None, "session", "mask at decode 1", np.inf), "in the session, mask at decode 1"),
    ],
)
def test_says_what_is_wrong_in_words(location: Location, words: str) -> None:
    assert words in str(location)
    assert not {"inf", "nan", "infx"} & set(str(location).replace(",", " ").split())
