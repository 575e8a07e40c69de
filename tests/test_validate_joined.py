"""Several calls fed as one: every token is where its own call has it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ingot.graphs.state import State
from ingot.validate.truth.inputs import Inputs, Plan, make_inputs
from ingot.validate.truth.joined import MOST_COLUMNS, MOST_RECURRENT, join
from ingot.validate.truth.recording import Layout, Tensors, collect, main_run

_GROWS = ("batch", 2, "past", 4), ("batch", 2, "total", 4)
CACHE = State("key", "past.k", "present.k", "float32", *_GROWS, 2, False)
SSM = State("ssm", "past.s", "present.s", "float32", ("batch", 3), ("batch", 3), None, False)
INPUTS = make_inputs(512, 0, Plan(decode=5), rows=3)
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def layout() -> Layout:
    main = SimpleNamespace(name="logits", shape=("batch", "sequence", 7))
    manifest: Any = SimpleNamespace(main_output="logits", states=[CACHE, SSM], outputs=[main])
    return Layout(manifest, [])


def tensors(inputs: Inputs, stop: int, start: int) -> Tensors:
    """Numbers of a call, each token's being its own."""
    rows, total = inputs.input_ids.shape
    table = np.arange(rows * total, dtype=np.float32).reshape(rows, total)
    logits = table[:, start:stop, None] + np.zeros(7, dtype=np.float32)
    cache = np.broadcast_to(table[:, None, :stop, None], (rows, 2, stop, 4)).copy()
    router = table[:, start:stop].reshape(-1, 1) * np.ones((1, 3), dtype=np.float32)
    state = table[:, stop - 1 : stop] * np.ones((1, 3), dtype=np.float32)
    return {"logits": logits, "present.k": cache, "present.s": state, "router_logits.0": router}


def recorded(layout: Layout, inputs: Inputs) -> list[Tensors]:
    return [
        collect(layout, inputs, call, tensors(inputs, call.columns.stop, call.columns.start))
        for call in main_run(inputs)
    ]


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_gives_every_call_its_own_tokens(layout: Layout, recurrent: bool, cut: bool) -> None:
    kept = RANDOM.random(INPUTS.input_ids.shape) < 0.5
    inputs = replace(INPUTS, kept=kept) if cut else INPUTS
    wanted = recorded(layout, inputs)
    joined = join(inputs, recurrent=recurrent)
    assert len(joined.parts) == 2
    found = []
    for number, call in enumerate(main_run(joined.inputs)):
        made = tensors(inputs, call.columns.stop, call.columns.start)
        found.append({n: joined.collected(layout, number, n, a) for n, a in made.items()})
        for name, array in found[-1].items():
            expected = joined.expected(layout, number, name, wanted)
            np.testing.assert_array_equal(array, expected, err_msg=name)
    otherwise = [{name: array - 1000 for name, array in call.items()} for call in wanted]
    ends = {part[-1] for part in joined.parts}
    for number, given in enumerate(joined.by_call(layout, found, otherwise)):
        known = {name: name != "present.s" or number in ends for name in given}
        for name, array in given.items():
            side = wanted if known[name] else otherwise
            np.testing.assert_array_equal(array, side[number][name], err_msg=f"{number} {name}")


def test_gives_every_token_its_experts() -> None:
    rows, total = INPUTS.input_ids.shape
    table = RANDOM.random((rows, total, 4)) < 0.5
    calls = main_run(INPUTS)
    joined = join(INPUTS, recurrent=False)
    (found,) = joined.chosen(1, lambda n: [table[:, calls[n].columns].reshape(-1, 4)])
    np.testing.assert_array_equal(found, table[:, INPUTS.prefill :].reshape(-1, 4))
    assert joined.chosen(0, lambda _number: []) == []


def test_feeds_the_same_tokens() -> None:
    for recurrent in (False, True):
        joined = join(INPUTS, recurrent=recurrent)
        stops = [call.columns.stop for call in main_run(joined.inputs)]
        assert stops[-1] == INPUTS.input_ids.shape[1]
        assert [n for part in joined.parts for n in part] == list(range(len(main_run(INPUTS))))


def test_leaves_calls_apart_that_compute_something_else() -> None:
    ends = tuple((f"call {stop}", stop) for stop in (19, 20, 21, 22, 23, 24))
    inputs = replace(INPUTS, calls=ends)
    # The longest row is as long as its columns.
    assert join(inputs, recurrent=False, switch=21).parts == (
        range(1),
        range(1, 3),
        *(range(number, number + 1) for number in (3, 4, 5)),
    )
    alone = replace(INPUTS, stateful=False, calls=ends)
    assert all(len(part) == 1 for part in join(alone, recurrent=False).parts)


def test_keeps_calls_short_and_some_states_known() -> None:
    long = make_inputs(512, 0, Plan(decode=2 * MOST_RECURRENT + 1))
    ends = tuple((f"call {stop}", stop) for stop in (4, 9, 9 + MOST_COLUMNS - 8, 600, 601))
    wide = replace(make_inputs(512, 0, Plan(prefill=600, decode=1)), calls=ends)
    assert join(wide, recurrent=False).parts == (range(1), range(1, 3), range(3, 5))
    sizes = [len(part) for part in join(long, recurrent=True).parts]
    assert sizes == [1, MOST_RECURRENT, MOST_RECURRENT, 1]


def test_takes_what_long_calls_round_more_from_the_usual_token(layout: Layout) -> None:
    joined = join(INPUTS, recurrent=False)
    own = [{"logits": RANDOM.random(len(call["logits"]))} for call in recorded(layout, INPUTS)]
    plain = [{"logits": 4 * joined.expected(layout, n, "logits", own)} for n in range(2)]
    plain[1]["logits"][0] *= 1000
    found = [{"logits": 2 * call["logits"]} for call in plain]
    first, rest = (call["logits"].copy() for call in found)
    joined.scaled(layout, found, plain, own)
    np.testing.assert_array_equal(found[0]["logits"], first)
    np.testing.assert_allclose(found[1]["logits"], rest / 4)
