"""What a judge leaves out for a flip, and what it does not; with numbers made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import played
import pytest
from conftest import MakeIngot
from played import HIDDEN, KEY, ROUTERS, SSM, Played, Table, token

from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.family import find_family
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.validate.counting import Recorder
from ingot.validate.judge.judge import CACHES, FREE, REPLAYED, Judge
from ingot.validate.result import TensorResult
from ingot.validate.run import validate_ingot
from ingot.validate.truth.inputs import QUICK
from ingot.validate.truth.material import Material
from ingot.validate.truth.recording import record
from ingot.validate.truth.reference import Reference, References
from ingot.validate.truth.replay import Routers
from ingot.validate.truth.runs import recorded_run, row_run, split_run
from ingot.validate.truth.taps import TappedSession

NOISE = 1e-6
# Rounding explains a margin of 32 times the noise.
NEAR, FAR = 1e-5, 1e-2
STAGES = ["prefill", "decode 1", "decode 2", "decode 3"]
SPLITS = [
    *("split 16", "split 16+3", f"split 16+3, {CACHES}"),
    *("split 11", "split 11+8", f"split 11+8, {CACHES}"),
]
PIECES = [*SPLITS, "row 0 alone", "row 1 alone"]

CHOOSING = Routers(by_layer=(1, 1), top_k=2)

Place = tuple[int, int]


def truth(margins: dict[Place, float] | None = None) -> Table:
    """Random numbers; each router prefers the experts 0 and 1 by 1.5, or by a margin of 1 over 2.

    Args:
        margins: of the first router at some places.
    """
    random = np.random.default_rng(0)
    result = {n: random.standard_normal((played.IDS, *size)) for n, size in played.SIZES.items()}
    for name in ROUTERS:
        result[name] = np.tile([5.0, 3.5, 2.0, 0.0], (played.IDS, 1))
    for place, margin in (margins or {}).items():
        result[ROUTERS[0]][token(*place), 2] = 3.5 - margin
    return result


def near(table: Table, seed: int, noise: float = NOISE) -> Table:
    """The same in float32, but for rounding."""
    random = np.random.default_rng(seed)
    return {
        name: (array + noise * random.standard_normal(array.shape)).astype(np.float32)
        for name, array in table.items()
    }


def flipped(table: Table, *places: Place, router: int = 0) -> Table:
    """With the experts 0 and 2 chosen at some places."""
    result = {**table, ROUTERS[router]: table[ROUTERS[router]].copy()}
    for place in places:
        logits = result[ROUTERS[router]][token(*place)]
        # Apart by more than a float32 rounds to.
        logits[[1, 2]] = min(logits[1:3]) - 1e-6, max(logits[1:3]) + 1e-6
    return result


def wrong(table: Table, *places: Place, names: tuple[str, ...] = ("logits", KEY)) -> Table:
    """With other numbers at some places."""
    result = {**table, **{name: table[name].copy() for name in names}}
    for place in places:
        for name in names:
            result[name][token(*place)] += 1
    return result


def judged(
    session: Played, want: Table, *, eager: Table | None = None, classifier: bool = False
) -> Judge:
    """A judge that has seen all that the session gives."""
    judge = Judge(CHOOSING, material(want, eager or near(want, 1), classifier=classifier))
    recorder = Recorder(session, stateful=not classifier)
    judge.judge_graph(cast(TappedSession, session), recorder=recorder)
    return judge


def material(want: Table, eager: Table, *, classifier: bool = False) -> Material:
    """The main run, the prefill in pieces, and each row's by itself."""
    inputs, layout = played.inputs(classifier=classifier), played.layout(classifier=classifier)
    exact, rounded = (
        record(Played(table, classifier=classifier), layout, inputs) for table in (want, eager)
    )
    main = recorded_run("main", inputs, 0)
    runs = [main]
    if not classifier:
        runs += [split_run(main, sizes, "split") for sizes in ((16, 3), (11, 8))]
        runs += [row_run(main, f"row {row} alone", row, (19 - 7 * row,)) for row in range(2)]
    return Material(layout, runs, [References("float32", exact, rounded, exact)])


def problems(judge: Judge) -> list[tuple[str, str]]:
    """But those of a piece's caches at its end, which say again what its calls say."""
    failed = [(result.stage, result.name) for result in judge.results if result.problem]
    return [(stage, name) for stage, name in failed if not stage.endswith(f", {CACHES}")]


def stages(judge: Judge) -> list[str]:
    return list(dict.fromkeys(result.stage for result in judge.results))


def replayed_stages() -> list[str]:
    return [f"{stage}, replayed" for stage in STAGES]


def test_passes_what_is_right_and_compares_all_of_it() -> None:
    want = truth()
    session = Played(near(want, 2))
    judge = judged(session, want)
    assert problems(judge) == []
    # Without a flip nothing is run again.
    assert session.chosen == [] and session._run == 4
    outputs = ["logits", KEY, SSM]
    expected = [(stage, name) for stage in STAGES for name in outputs]
    expected += [(CACHES, KEY)]
    for first, last, caches in (SPLITS[:3], SPLITS[3:]):
        # After so few tokens no state of the second kind was recorded.
        expected += [(first, "logits"), (first, KEY), *((last, name) for name in outputs)]
        expected += [(caches, KEY)]
    expected += [(stage, name) for stage in PIECES[6:] for name in outputs]
    inside = [*outputs, *ROUTERS, HIDDEN]
    expected += [(stage, name) for stage in replayed_stages() for name in inside]
    assert [(result.stage, result.name) for result in judge.results] == expected
    assert judge.calls == 4 + 2 + 2 + 1 + 1
    assert {mode: found.agreement for mode, found in judge.routing.items()} == {
        FREE: (1.0, 1.0),
        REPLAYED: (1.0, 1.0),
    }
    assert judge.routing[FREE].names == ("layer 0", "layer 1")


AT = (0, 20)


@pytest.mark.parametrize(
    ("place", "failing"),
    [
        ((0, 20), []),
        ((0, 21), []),
        ((0, 19), ["decode 1", CACHES]),
        ((0, 18), ["prefill", CACHES, "split 16+3", "split 11+8", "row 0 alone"]),
        ((1, 18), ["prefill", CACHES, "split 16+3", "split 11+8", "row 1 alone"]),
        ((1, 20), ["decode 2", CACHES]),
        ((1, 21), ["decode 3", CACHES]),
    ],
)
def test_leaves_out_the_tokens_from_an_explained_flip_on_and_no_other(
    place: Place, failing: list[str]
) -> None:
    want = truth({AT: NEAR})
    right = near(want, 2)
    judge = judged(Played(wrong(flipped(right, AT), place), right), want)
    (flip,) = judge.routing[FREE].flips
    assert (flip.row, flip.token, flip.fails) == (*AT, False)
    expected = [(stage, name) for stage in failing for name in ("logits", KEY)]
    assert problems(judge) == [p for p in expected if p != (CACHES, "logits")]
    # Of every stage something is left, and with the truth's experts all of it.
    assert stages(judge) == [*STAGES, CACHES, *PIECES, *replayed_stages()]


@pytest.mark.parametrize("place", [(0, 20), (0, 21), (1, 21)])
def test_without_the_flip_it_fails(place: Place) -> None:
    want = truth({AT: NEAR})
    judge = judged(Played(wrong(near(want, 2, 1e-7), place)), want)
    assert judge.routing[FREE].flips == ()
    assert (f"decode {place[1] - 18}", "logits") in problems(judge)


@pytest.mark.parametrize("place", [(0, 3), (0, 19), AT, (0, 21), (1, 21)])
def test_with_the_truth_s_experts_it_covers_every_token(place: Place) -> None:
    want = truth({AT: NEAR})
    right = near(want, 2)
    free = flipped(right, AT)
    for name in played.SIZES:
        session = Played(free, wrong(right, place, names=(name,)))
        judge = judged(session, want)
        stage = "prefill" if place[1] < 19 else f"decode {place[1] - 18}"
        # Of what has no tokens, only the last of a call is there to see.
        seen = name != SSM or place[1] > 18
        assert problems(judge) == [(f"{stage}, replayed", name)] * seen, name


def test_forces_the_truth_s_experts_on_real_tokens_and_none_on_padding() -> None:
    want = truth({AT: NEAR})
    right = near(want, 2)
    session = Played(flipped(right, AT), right)
    judge = judged(session, want)
    assert judge.routing[REPLAYED].flips == ()
    *calls, last = session.chosen
    assert last is None and len(calls) == 4
    for call, tokens in zip(calls, (38, 2, 2, 2), strict=True):
        assert call is not None and [mask.shape for mask in call] == [(tokens, 4)] * 2
        for mask in call:
            padding = np.arange(tokens) // 19 + np.arange(tokens) % 19 / 100
            real = np.ones(tokens, np.bool_) if tokens == 2 else (padding < 1) | (padding >= 1.07)
            assert mask[~real].all()
            assert (mask[real] == np.array([True, True, False, False])).all()


def test_a_flip_that_is_not_explained_fails_and_leaves_nothing_out() -> None:
    want = truth({AT: FAR})
    right = near(want, 2)
    judge = judged(Played(flipped(right, AT), right), want)
    assert [flip.fails for flip in judge.routing[FREE].flips] == [True]
    assert problems(judge) == []
    judge = judged(Played(wrong(flipped(right, AT), (0, 21)), right), want)
    assert problems(judge) == [("decode 3", "logits"), ("decode 3", KEY), (CACHES, KEY)]


def test_one_that_is_not_explained_undoes_another_s_excuse() -> None:
    want = truth({AT: NEAR, (1, 3 + 7): FAR})
    right = near(want, 2)
    for places, failing in (([AT], False), ([AT, (1, 10)], True)):
        judge = judged(Played(wrong(flipped(right, *places), (0, 21)), right), want)
        assert (("decode 3", "logits") in problems(judge)) == failing


def test_forced_experts_excuse_no_later_router() -> None:
    # The first router's flip changed nothing where the experts were forced.
    want = truth({AT: NEAR})
    right = near(want, 2)
    both = flipped(flipped(right, AT), (0, 21), router=1)
    judge = judged(Played(both, both), want)
    assert [flip.fails for flip in judge.routing[FREE].flips] == [False, False]
    assert [flip.fails for flip in judge.routing[REPLAYED].flips] == [False, True]


def test_what_has_no_tokens_is_left_out_with_its_row() -> None:
    want = truth({AT: NEAR})
    right = near(want, 2)
    for row, failing in ((0, []), (1, [("decode 3", SSM)])):
        table = wrong(flipped(right, AT), (row, 21), names=(SSM,))
        assert problems(judged(Played(table, right), want)) == failing


def test_a_stage_of_flipped_tokens_alone_is_left_out() -> None:
    places = [(0, 20), (1, 20)]
    want = truth(dict.fromkeys(places, NEAR))
    right = near(want, 2)
    judge = judged(Played(flipped(right, *places), right), want)
    assert problems(judge) == []
    free = [stage for stage in stages(judge) if stage in STAGES]
    assert free == ["prefill", "decode 1"]
    assert stages(judge)[-4:] == replayed_stages()


@pytest.mark.parametrize(
    ("run", "flip", "place", "failing"),
    [
        (1, (0, 17), (0, 17), []),
        (1, (0, 17), (0, 18), []),
        (1, (0, 17), (0, 16), ["split 16+3"]),
        (1, (0, 17), (1, 18), ["split 16+3"]),
        # In the first of two calls, of which the second is compared.
        (1, (0, 3), (0, 16), []),
        (2, (1, 8), (1, 11), []),
        (2, (1, 8), (0, 11), ["split 11+8"]),
        (3, (0, 10), (0, 10), []),
        (3, (0, 10), (0, 9), ["row 0 alone"]),
        (4, (1, 12), (1, 18), []),
        (4, (1, 12), (1, 11), ["row 1 alone"]),
    ],
)
def test_a_piece_has_flips_of_its_own(
    run: int, flip: Place, place: Place, failing: list[str]
) -> None:
    want = truth({flip: NEAR})
    right = near(want, 2, 1e-7)
    piece = wrong(flipped(right, flip), place)
    judge = judged(Played(right, right, runs={run: piece}), want)
    assert judge.routing[FREE].flips == ()
    assert problems(judge) == [(stage, name) for stage in failing for name in ("logits", KEY)]
    # Elsewhere the same is no excuse.
    other = 1 + run % 2
    shared = {run: flipped(right, flip), other: wrong(right, (flip[0], 18))}
    judge = judged(Played(right, right, runs=shared), want)
    last = ["split 16+3", "split 11+8", "row 0 alone", "row 1 alone"][other - 1]
    assert {stage for stage, _ in problems(judge)} == {last}


def test_a_row_alone_that_flips_at_once_is_left_out() -> None:
    want = truth({(1, 7): NEAR})
    right = near(want, 2, 1e-7)
    piece = wrong(flipped(right, (1, 7)), (1, 9))
    judge = judged(Played(right, right, runs={4: piece}), want)
    assert problems(judge) == []
    assert [stage for stage in stages(judge) if stage in PIECES] == PIECES[:-1]
    # With the truth's experts it was judged all the same.
    assert "row 1 alone, replayed" in stages(judge)
    judge = judged(Played(right, wrong(right, (1, 9)), runs={4: piece}), want)
    assert problems(judge) == [("row 1 alone, replayed", name) for name in ("logits", KEY)]


def test_what_a_piece_does_to_the_cache_before_it_is_seen_at_its_end() -> None:
    class Spoils(Played):
        def state(self) -> dict[str, np.ndarray]:
            found = super().state()
            if self._run == 1 and self._seen.shape[1] == 19:
                found[KEY] = found[KEY].copy()
                found[KEY][0, :, 3] += 1
            return found

    want = truth()
    failed = [r for r in judged(Spoils(near(want, 2)), want).results if r.problem]
    assert [(r.stage, r.name) for r in failed] == [(SPLITS[2], KEY)]


def test_a_flip_of_the_main_run_excuses_no_piece() -> None:
    want = truth({(0, 17): NEAR})
    right = near(want, 2, 1e-7)
    main = wrong(flipped(right, (0, 17)), (0, 18))
    judge = judged(Played(right, right, runs={0: main}), want)
    assert len(judge.routing[FREE].flips) == 1 and problems(judge) == []
    judge = judged(Played(wrong(right, (0, 18)), right, runs={0: main}), want)
    assert {stage for stage, _ in problems(judge)} == {"split 16+3", "split 11+8", "row 0 alone"}


def test_a_small_tensor_takes_the_usual_floor_of_the_run() -> None:
    want = truth()
    eager = near(want, 1, 1e-4)
    # By chance exact in one call.
    for place in ((0, 20), (1, 20)):
        eager["logits"][token(*place)] = want["logits"][token(*place)]
    judge = judged(Played(near(want, 2, 1e-4)), want, eager=eager)
    assert problems(judge) == []
    found = {result.stage: result for result in judge.results if result.name == "logits"}
    errors = [
        float(np.sqrt(np.mean((eager["logits"][ids] - want["logits"][ids]) ** 2)))
        / float(np.sqrt(np.mean(want["logits"][ids] ** 2)))
        for ids in ([*range(19), *range(107, 119)], [19, 119], [20, 120], [21, 121])
    ]
    usual = float(np.sqrt(np.mean(np.square(errors))))
    assert found["decode 2"].floor == pytest.approx(usual, rel=1e-6)
    assert found["decode 1"].floor == pytest.approx(max(usual, errors[1]), rel=1e-6)


class Other(Played):
    """Hands out something else."""

    def __init__(self, table: Table, **changes: object) -> None:
        super().__init__(table)
        self.changes = changes

    def state(self) -> dict[str, np.ndarray]:
        found = super().state()
        if "drop" in self.changes:
            del found[str(self.changes["drop"])]
        if "add" in self.changes:
            found[str(self.changes["add"])] = found[KEY]
        if "cut" in self.changes:
            found[str(self.changes["cut"])] = found[str(self.changes["cut"])][..., :-1]
        return found


EVERYWHERE = [*STAGES, *(s for s in PIECES if CACHES not in s), *replayed_stages()]


@pytest.mark.parametrize(
    ("changes", "name", "problem"),
    [
        ({"drop": KEY}, KEY, "the target has no such output"),
        ({"drop": SSM}, SSM, "the target has no such output"),
        ({"cut": SSM}, SSM, "shape [2, 3], expected [2, 4]"),
        ({"cut": KEY}, KEY, "shape [31, 2, 2], expected [31, 2, 3]"),
    ],
)
def test_fails_a_state_that_is_missing_or_of_another_shape(
    changes: dict[str, str], name: str, problem: str
) -> None:
    want = truth()
    judge = judged(Other(near(want, 2), **changes), want)
    # The caches at the end are judged where there are any.
    whole = [(CACHES, KEY), (CACHES, "all outputs")] if changes == {"cut": KEY} else []
    # And no state of the second kind is known of the first pieces.
    known = [s for s in EVERYWHERE if name == KEY or s not in ("split 16", "split 11")]
    assert sorted(problems(judge)) == sorted([*((stage, name) for stage in known), *whole])
    first = next(result for result in judge.results if result.problem)
    assert first.problem == problem and first.error is None


def test_fails_an_output_that_the_reference_has_not() -> None:
    want = truth()
    table = {**near(want, 2), "hidden_states.1": near(want, 3)[HIDDEN]}
    failed = [result for result in judged(Played(table), want).results if result.problem]
    assert [(r.stage, r.name) for r in failed] == [
        (stage, "hidden_states.1") for stage in replayed_stages()
    ]
    assert {result.problem for result in failed} == {"the reference has no such output"}


def test_a_tap_that_the_target_has_not_is_no_fault() -> None:
    want = truth()
    table = {name: array for name, array in near(want, 2).items() if name != HIDDEN}
    judge = judged(Played(table), want)
    assert problems(judge) == []
    assert HIDDEN not in {result.name for result in judge.results}


def test_without_routers_hidden_states_are_judged_as_they_are() -> None:
    want = {name: array for name, array in truth().items() if name not in ROUTERS}
    right = near(want, 2)
    session = Played(right)
    judge = judged(session, want)
    assert problems(judge) == [] and judge.routing == {} and session.chosen == []
    taps = [(r.stage, r.name) for r in judge.results if r.name == HIDDEN]
    assert taps == [(stage, HIDDEN) for stage in STAGES]
    judge = judged(Played(wrong(right, (0, 20), names=(HIDDEN,))), want)
    assert problems(judge) == [("decode 2", HIDDEN)]


def test_a_classifier_s_row_with_a_flip_is_left_out() -> None:
    place = (0, 10)
    want = truth({place: NEAR})
    right = near(want, 2)
    for row, failing in ((0, []), (1, [("20 tokens", "logits")])):
        table = wrong(flipped(right, place), (row, 19), names=("logits",))
        session = Played(table, right, classifier=True)
        judge = judged(session, want, classifier=True)
        assert {flip.fails for flip in judge.routing[FREE].flips} == {False}
        assert problems(judge) == failing
        lengths = [f"{n} tokens" for n in range(19, 23)]
        assert stages(judge) == [*lengths, *(f"{n}, replayed" for n in lengths)]


@pytest.mark.parametrize(
    ("place", "failing"),
    [
        ((0, 17), []),
        ((0, 21), []),
        ((0, 16), ["prefill", CACHES, "split 16+3", "split 11+8", "row 0 alone"]),
        ((1, 21), ["decode 3", CACHES]),
    ],
)
def test_an_engine_is_not_judged_from_a_doubtful_choice_on(
    place: Place, failing: list[str]
) -> None:
    want = truth({(0, 17): NEAR})
    judge = Judge(CHOOSING, material(want, near(want, 1)))
    judge.exclude_doubtful()
    judge.judge_session(Recorder(Played(wrong(near(want, 2), place))))
    expected = [(stage, name) for stage in failing for name in ("logits", KEY)]
    assert problems(judge) == [p for p in expected if p != (CACHES, "logits")]
    assert judge.routing == {}


@pytest.mark.slow
def test_half_precision_flips_and_passes(tmp_path: Path, make_ingot: MakeIngot) -> None:
    family = find_family("jetmoe")
    write_checkpoint(tmp_path, family, preset_config(family, "tiny"), seed=0)
    folder = make_ingot(tmp_path, "trt", precision="fp16", builder="none")
    reference = Reference(Checkpoint.open(tmp_path), "generate", "float16")
    # Rounding decides which seeds have any; the first has on the machine where this was written.
    for seed in range(8):
        report = validate_ingot(folder, reference, plan=QUICK, seed=seed)
        assert report.failures == []
        flips = report.routing[FREE].flips
        if flips:
            break
    else:
        pytest.fail("no seed has a flip")
    own = [flip for flip in flips if not flip.follows]
    assert own and all(flip.margin <= flip.explained for flip in own)
    assert min(report.routing[FREE].agreement) < 1

    def compared(stage: str) -> set[str]:
        found: list[TensorResult] = [t for t in report.tensors if t.stage == stage]
        return {tensor.name for tensor in found if tensor.error is not None}

    states = {f"present.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")}
    inside = {f"router_logits.{n}" for n in range(4)} | {f"hidden_states.{n}" for n in range(3)}
    for stage in ["prefill", *(f"decode {n}" for n in range(1, 9))]:
        assert compared(f"{stage}, replayed") == {"logits", *states, *inside}
