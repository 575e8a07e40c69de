"""Expert choices: what is chosen, and what forcing a choice changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
import pytest
import torch
from conftest import MakeCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import ingot.plugins.experts
from ingot.graphs.checkpoint import Checkpoint
from ingot.plugins.experts import route
from ingot.runtime.onnxruntime_session import open_session
from ingot.runtime.session import Floats
from ingot.validate.truth.eager import EagerSession
from ingot.validate.truth.inputs import QUICK, make_inputs
from ingot.validate.truth.replay import (
    CLEAR,
    DOMAIN,
    NUDGE,
    OPERATOR,
    Chosen,
    Replay,
    choices,
    replay_function,
    replayed,
)

Array = npt.NDArray[Any]


def by_route(logits: Array, top_k: int) -> Chosen:
    """The experts that the operator chooses, as a mask."""
    ids, _ = route(torch.from_numpy(logits), top_k, normalize=False)
    mask = np.zeros(logits.shape, dtype=np.bool_)
    np.put_along_axis(mask, ids.numpy(), True, axis=-1)
    return mask


# Few values make ties; the others are what a float can be.
VALUES = [
    st.sampled_from([-1.0, 0.0, 1.0]),
    st.sampled_from([-0.0, 0.0, 1e-40, -1e-40, 2.0**-20]),
    st.floats(-30, 30, width=32),
    st.floats(-(2.0**120), 2.0**120, width=32),
    st.floats(1, 1 + 2.0**-18, width=32),
]


@st.composite
def cases(
    draw: st.DrawFn, dtypes: Sequence[type] = (np.float32, np.float64)
) -> tuple[Array, Chosen, int]:
    """Logits ``[N, E]``, for each token any K experts, and K."""
    rows, experts = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    top_k = draw(st.integers(1, experts))
    value = st.one_of(VALUES) if draw(st.booleans()) else draw(st.sampled_from(VALUES))
    row = st.lists(value, min_size=experts, max_size=experts)
    logits: Array = np.array(
        draw(st.lists(row, min_size=rows, max_size=rows)), draw(st.sampled_from(dtypes))
    )
    mask = np.zeros(logits.shape, dtype=np.bool_)
    for each in mask:
        each[draw(st.permutations(range(experts)))[:top_k]] = True
    return logits, mask, top_k


def plainly_right(row: Array, chosen: Chosen) -> bool:
    """Whether every kernel chooses so: each chosen one is clearly larger, or equal and before."""
    clear = CLEAR * NUDGE * (abs(row).max() + row.dtype.type(1))
    mine, others = np.flatnonzero(chosen), np.flatnonzero(~chosen)
    return all(
        row[one] - row[other] >= clear or (row[one] == row[other] and one < other)
        for one in mine
        for other in others
    )


def moved(logits: Array, chosen: Chosen) -> Array:
    result: Array = replayed(torch.from_numpy(logits), torch.from_numpy(chosen)).numpy()
    return result


@settings(max_examples=100, deadline=None)
@given(cases())
def test_chooses_what_the_operator_does(case: tuple[Array, Chosen, int]) -> None:
    logits, _, top_k = case
    np.testing.assert_array_equal(choices(logits, top_k), by_route(logits, top_k))


@pytest.mark.parametrize("top_k", range(1, 9))
def test_chooses_the_lower_id_among_equals(top_k: int) -> None:
    logits = np.random.default_rng(top_k).integers(-1, 2, (200, 8)).astype(np.float32)
    np.testing.assert_array_equal(choices(logits, top_k), by_route(logits, top_k))
    assert (choices(np.zeros((1, 8)), top_k)[0] == (np.arange(8) < top_k)).all()


@settings(max_examples=250, deadline=None)
@given(cases())
def test_forces_any_choice_and_moves_no_logit_without_need(
    case: tuple[Array, Chosen, int],
) -> None:
    logits, mask, top_k = case
    result = moved(logits, mask)
    assert result.dtype == logits.dtype
    np.testing.assert_array_equal(by_route(result, top_k), mask)
    right = [plainly_right(*pair) for pair in zip(logits, mask, strict=True)]
    assert result[right].tobytes() == logits[right].tobytes()
    for at, (before, after, chosen) in enumerate(zip(logits, result, mask, strict=True)):
        if chosen.all():
            continue
        least, most = float(before[chosen].min()), float(before[~chosen].max())
        # Twice the nudge, since the middle is rounded too.
        nudge = NUDGE * (float(np.abs(before).max()) + 1)
        most_moved = max(0.0, most - least) / 2 + 2 * nudge
        assert np.abs(after.astype(np.float64) - before).max() <= most_moved
        # None is moved away from where it is wanted, and none that stands right is moved.
        assert (after[chosen] >= before[chosen]).all() and (after[~chosen] <= before[~chosen]).all()
        assert float(after[chosen].min()) - float(after[~chosen].max()) > nudge / 2 or right[at]
    # What was forced once is right, ties and all.
    assert moved(result, mask).tobytes() == result.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moves_to_either_side_of_the_midpoint(dtype: type) -> None:
    logits: Array = np.array([[5, 4, 3, 2, 1]], dtype)
    # 2 is wanted for 4: these meet at 3, and 3 is then no longer wanted; 5 and 1 stand right.
    result = moved(logits, np.array([[True, False, False, True, False]]))[0]
    assert result[[0, 3, 4]].tolist() == [5, 3, 1]
    np.testing.assert_array_equal(result[1:3], np.full(2, 3 - (5 + 1) * NUDGE, dtype))


def test_puts_logits_far_enough_apart_for_a_top_k_of_their_softmax() -> None:
    # As ONNX Runtime's MoE takes it.
    random = np.random.default_rng(0)
    for scale in (1e-6, 1e-2, 1.0, 20.0):
        logits = (scale * random.standard_normal((500, 8))).astype(np.float32)
        mask = by_route(random.standard_normal((500, 8)), 3)
        softmax = torch.softmax(torch.from_numpy(moved(logits, mask)), -1).numpy()
        told = np.where(mask, softmax, 1).min(-1) > np.where(mask, 0, softmax).max(-1)
        assert told[(by_route(logits, 3) != mask).any(-1)].all()


def test_moves_what_is_in_order_by_less_than_a_top_k_of_the_softmax_sees() -> None:
    random = np.random.default_rng(1)
    for scale in (1e-6, 1e-2, 1.0, 20.0):
        logits = (scale * random.standard_normal((500, 8))).astype(np.float32)
        # Three of each row are an ulp or two apart, and the first of them is chosen.
        near = np.stack([logits[:, 0], *(np.nextafter(logits[:, 0], -np.inf),) * 2], axis=1)
        near[:, 2] = np.nextafter(near[:, 2], np.float32(-np.inf))
        places = random.permuted(np.tile(np.arange(8), (500, 1)), axis=1)[:, :3]
        np.put_along_axis(logits, places, near, axis=-1)
        mask = logits >= near[:, :1]
        softmax = torch.softmax(torch.from_numpy(moved(logits, mask)), -1).numpy()
        least, most = np.where(mask, softmax, 1).min(-1), np.where(mask, 0, softmax).max(-1)
        assert (least > most)[least > 1e-30].all()


def test_a_tie_is_right_only_where_nothing_else_is_near_it() -> None:
    # The third is an ulp below the tie, and a softmax may make it the first of three equals.
    below = np.nextafter(np.float32(2), np.float32(0))
    logits = np.array([[below, 2, 2, 1]], np.float32)
    chosen = np.array([[False, True, False, False]])
    step = (2 + 1) * NUDGE
    wanted = np.array([[2 - step, 2, 2 - step, 1]], np.float32)
    np.testing.assert_array_equal(moved(logits, chosen), wanted)
    # And so is one above it: with two chosen it is the tie that was turned.
    above = np.nextafter(np.float32(2), np.float32(3))
    logits = np.array([[2, 2, above, 1]], np.float32)
    chosen = np.array([[True, False, True, False]])
    assert moved(logits, chosen)[0, 1] < 2 - step / 2


def test_leaves_a_tie_that_is_right_and_turns_one_that_is_not() -> None:
    logits = np.array([[1, 2, 2, 2]], np.float32)
    right = np.array([[False, True, True, False]])
    np.testing.assert_array_equal(moved(logits, right), logits)
    wrong = np.array([[False, True, False, True]])
    below = 2 - (2 + 1) * NUDGE
    np.testing.assert_array_equal(moved(logits, wrong), np.array([[1, 2, below, 2]], np.float32))


@functools.cache
def replay_model() -> onnx.ModelProto:
    """``Replay`` and nothing else, with its function."""
    floats, bools = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL
    graph = helper.make_graph(
        [helper.make_node(OPERATOR, ["logits", "chosen"], ["moved"], domain=DOMAIN)],
        "replay",
        [
            helper.make_tensor_value_info("logits", floats, ["tokens", "experts"]),
            helper.make_tensor_value_info("chosen", bools, ["tokens_or_one", "experts_or_one"]),
        ],
        [helper.make_tensor_value_info("moved", floats, ["tokens", "experts"])],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(
        graph, functions=[replay_function()], opset_imports=opsets, ir_version=10
    )
    onnx.checker.check_model(model, full_check=True)
    return model


@functools.cache
def on_ort() -> Callable[[Array, Chosen], Array]:
    session = open_session(replay_model().SerializeToString())
    return lambda logits, chosen: session.run(None, {"logits": logits, "chosen": chosen})[0]


@functools.cache
def on_reference() -> Callable[[Array, Chosen], Array]:
    session: Any = onnx.reference.ReferenceEvaluator(replay_model())
    return lambda logits, chosen: session.run(None, {"logits": logits, "chosen": chosen})[0]


@pytest.mark.parametrize("runtime", [on_ort, on_reference])
def test_the_onnx_function_moves_as_torch_does(
    runtime: Callable[[], Callable[[Array, Chosen], Array]],
) -> None:
    run = runtime()

    @settings(max_examples=100, deadline=None)
    @given(cases([np.float32]))
    def check(case: tuple[Array, Chosen, int]) -> None:
        logits, mask, _ = case
        found = run(logits, mask)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, moved(logits, mask))
        # One that chooses all is of any shape that broadcasts, and leaves every number. (ONNX
        # Runtime's Where makes 0 of -0.)
        free = np.ones((1, 1), dtype=np.bool_)
        np.testing.assert_array_equal(run(logits, free), logits)
        assert moved(logits, free).tobytes() == logits.tobytes()

    check()


@pytest.fixture(scope="module")
def folders(tiny: Path, make_checkpoint: MakeCheckpoint) -> dict[str, Path]:
    return {"olmoe": tiny, "jetmoe": make_checkpoint("jetmoe")}


@pytest.fixture(scope="module", params=["olmoe", "jetmoe"])
def eager(request: pytest.FixtureRequest, folders: dict[str, Path]) -> EagerSession:
    return EagerSession(Checkpoint.open(folders[request.param]), "generate", streamed=False)


# Two layers; the second architecture has a router of attention and one of the MLP in each.
ROUTERS = {"OlmoeForCausalLM": 2, "JetMoeForCausalLM": 4}
CALLS = [slice(0, 6), slice(6, 7), slice(7, 9)]


def experts_of(session: EagerSession) -> tuple[int, int]:
    """E and K."""
    config: Any = session.model.config
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return experts, config.num_experts_per_tok


def steps(
    session: EagerSession, prepare: Callable[[int], object] = lambda _number: None
) -> Iterator[dict[str, Floats]]:
    """All that a session gives, call by call."""
    inputs = make_inputs(512, seed=1, plan=QUICK)
    session.reset(2, 9)
    for number, columns in enumerate(CALLS):
        prepare(number)
        ids, mask = inputs.input_ids[:, columns], inputs.attention_mask[:, columns]
        main = session.step(ids, mask)
        yield {"logits": main, **session.state(), **session.tapped}


def router_logits(session: EagerSession, found: dict[str, Floats]) -> list[Floats]:
    count = ROUTERS[type(session.model).__name__]
    assert sum(name.startswith("router_logits.") for name in found) == count
    return [found[f"router_logits.{n}"] for n in range(count)]


def other_experts(session: EagerSession) -> list[list[Chosen]]:
    """Of each call and router, K experts of each token by lot."""
    experts, top_k = experts_of(session)
    random = np.random.default_rng(0)
    return [
        [
            by_route(random.standard_normal((2 * (call.stop - call.start), experts)), top_k)
            for _ in range(ROUTERS[type(session.model).__name__])
        ]
        for call in CALLS
    ]


def test_forcing_its_own_choice_changes_no_bit(eager: EagerSession) -> None:
    free = list(steps(eager))
    _, top_k = experts_of(eager)
    own = [[choices(logits, top_k) for logits in router_logits(eager, call)] for call in free]
    with Replay() as replay:
        forced = list(steps(eager, lambda number: replay.choose(own[number])))
        unforced = list(steps(eager, lambda _number: replay.choose(None)))
    for want, *found in zip(free, forced, unforced, strict=True):
        for other in found:
            assert other.keys() == want.keys()
            for name, array in want.items():
                assert other[name].tobytes() == array.tobytes(), name


def plainly_moved(row: Array, chosen: Chosen) -> Array:
    """``replayed`` of one token, one logit after the other."""
    least = min(value for value, mine in zip(row, chosen, strict=True) if mine)
    most = max(value for value, mine in zip(row, chosen, strict=True) if not mine)
    if plainly_right(row, chosen):
        return row
    middle = (least + most) / np.float32(2)
    below = middle - (abs(row).max() + np.float32(1)) * np.float32(NUDGE)
    pairs = zip(row, chosen, strict=True)
    return np.array([max(v, middle) if mine else min(v, below) for v, mine in pairs], row.dtype)


def test_forcing_others_computes_what_a_router_that_chose_them_would(
    eager: EagerSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = list(steps(eager))
    others = other_experts(eager)
    with Replay() as replay:
        forced = list(steps(eager, lambda number: replay.choose(others[number])))
    waiting = iter([mask for call in others for mask in call])

    def told(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, ...]:
        mask = next(waiting)
        rows = [plainly_moved(*pair) for pair in zip(logits.numpy(), mask, strict=True)]
        instead = torch.from_numpy(np.stack(rows))
        # Ids by the mask alone, the largest of its logits first.
        ids = np.stack(
            [
                sorted(np.flatnonzero(mine), key=lambda e, row=row: -row[e])  # type: ignore[misc]
                for row, mine in zip(rows, mask, strict=True)
            ]
        )
        weights = torch.softmax(instead, -1).gather(-1, torch.from_numpy(ids))
        if normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return torch.from_numpy(ids), weights

    monkeypatch.setattr(ingot.plugins.experts, "route", told)
    expected = list(steps(eager))
    assert next(waiting, None) is None
    for number, (want, found) in enumerate(zip(expected, forced, strict=True)):
        for name, array in want.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert (found["logits"] != free[number]["logits"]).any(axis=-1).all()
        # Taps show the router's logits as it made them.
        assert (choices(found["router_logits.0"], 2) != others[number][0]).any()
    np.testing.assert_array_equal(forced[0]["router_logits.0"], free[0]["router_logits.0"])
