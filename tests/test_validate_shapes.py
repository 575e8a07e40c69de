"""For each shape of use a fault that shows in no other: it fails, and a right session passes.

The session plays what a table says of each token, so nothing but the fault is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import played
import pytest
from played import HIDDEN, KEY, ROUTERS, SSM, Played, Table

from ingot.runtime.session import Floats, Ids, SessionError
from ingot.validate.counting import Recorder
from ingot.validate.coverage import Coverage
from ingot.validate.covered import coverage
from ingot.validate.judge.again import judge_repeats, judge_threads
from ingot.validate.judge.judge import Judge
from ingot.validate.truth.inputs import QUICK, Plan
from ingot.validate.truth.material import Material
from ingot.validate.truth.recording import record
from ingot.validate.truth.reference import References
from ingot.validate.truth.replay import Routers
from ingot.validate.truth.runs import Traits, make_runs
from ingot.validate.truth.taps import TappedSession

NONE, CHOOSING = Routers((0, 0), 0), Routers((1, 1), 2)
CACHES = Traits(played.IDS, context=4096)
SCAN = Traits(played.IDS, cached=False, recurrent=True, chunk=8, width=5)
CLASSIFIER = Traits(played.IDS, stateful=False, cached=False, context=4096)


class Session(Played):
    """Right, but in calls for which ``wrong`` says so: there every token is off.

    Attributes:
        seen: ``[B, S]``, the mask of all columns so far.
        turns: the columns of each call so far, the present one included.
        padded: ``[B]``, whether a call was all padding in the row.
    """

    def __init__(
        self, table: Table, wrong: Callable[[Session], object], *, classifier: bool = False
    ) -> None:
        super().__init__(table, table, classifier=classifier)
        self.wrong = wrong

    def reset(self, batch: int, capacity: int) -> None:
        super().reset(batch, capacity)
        self.seen: Ids = np.zeros((batch, 0), np.int64)
        self.turns: list[int] = []
        self.padded = np.zeros(batch, np.bool_)

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        self.seen = np.concatenate((self.seen, attention_mask), axis=1)
        self.turns.append(input_ids.shape[1])
        main = super().step(input_ids, attention_mask, logits_to_keep)
        # As good as the end of each row, wherever padding stands.
        if self.classifier:
            last = attention_mask.shape[1] - 1 - attention_mask[:, ::-1].argmax(1)
            main = self.table["logits"][input_ids[np.arange(len(last)), last]]
        wrong = np.asarray(self.wrong(self))
        self.padded |= ~attention_mask.any(axis=1)
        rows = np.broadcast_to(wrong, len(input_ids))
        return main + rows.reshape(-1, *[1] * (main.ndim - 1)).astype(np.float32)

    @property
    def paddings(self) -> Ids:
        return np.asarray((self.seen == 0).sum(axis=1))

    @property
    def alone(self) -> bool:
        return len(self.seen) == 1

    @property
    def tokens(self) -> int:
        return self.turns[-1]

    @property
    def past(self) -> int:
        return len(self.turns) - 1

    @property
    def turn(self) -> bool:
        return self.past > 0 and self.turns[-2] == 1 and self.tokens > 1


def right(_session: Session) -> bool:
    return False


def table(*, routers: bool = False, state: bool = False) -> Table:
    random = np.random.default_rng(0)
    names = ["logits", HIDDEN, SSM if state else KEY, *(ROUTERS if routers else ())]
    found = {n: random.standard_normal((played.IDS, *played.SIZES[n])) for n in names}
    for name in ROUTERS if routers else ():
        found[name] = np.tile([5.0, 3.5, 2.0, 0.0], (played.IDS, 1))
    return found


def near(want: Table, seed: int) -> Table:
    random = np.random.default_rng(seed)
    return {
        name: (array + 1e-6 * random.standard_normal(array.shape)).astype(np.float32)
        for name, array in want.items()
    }


def judge_of(traits: Traits, want: Table, routers: Routers = NONE, plan: Plan = QUICK) -> Judge:
    classifier = not traits.stateful
    layout = played.layout(classifier=classifier)
    runs = make_runs(traits, plan, 0)
    references = []
    for run in runs:
        if run.recorded:
            exact, rounded = (
                record(Session(side, right, classifier=classifier), layout, run.inputs)
                for side in (want, near(want, 1))
            )
            references.append(References("float32", exact, rounded, exact))
    return Judge(routers, Material(layout, runs, references))


def failing(traits: Traits, wrong: Callable[[Session], object]) -> set[str]:
    """The stages that fail."""
    want = table(state=traits.recurrent)
    judge = judge_of(traits, want)
    session = Session(near(want, 2), wrong, classifier=not traits.stateful)
    judge.judge_session(Recorder(session, traits.stateful))
    return {result.stage for result in judge.results if result.problem}


@pytest.mark.parametrize("traits", [CACHES, SCAN, CLASSIFIER])
def test_a_right_session_passes(traits: Traits) -> None:
    assert failing(traits, right) == set()


TURNS = {2: "chat, then 2 tokens", 3: "chat, then 3 tokens", 9: "chat, then 9 tokens"}


@pytest.mark.parametrize(
    ("traits", "wrong", "stages"),
    [
        # Decode of one sequence, which is what every chat does.
        (CACHES, lambda s: s.alone and s.tokens == 1 and s.past, {"chat, decode 1"}),
        (SCAN, lambda s: s.alone and s.tokens == 1 and s.past, {"chat, decode 1"}),
        (CACHES, lambda s: s.alone and s.tokens == 1 and not s.past, {"row 2 alone"}),
        (CACHES, lambda s: s.turns == [1, 1], {"row 2 alone, decode 1"}),
        *((CACHES, lambda s, n=n: s.turn and s.tokens == n, {TURNS[n]}) for n in TURNS),
        (CACHES, lambda s: s.turn and s.alone, {"chat, then 9 tokens", "long, then 33 tokens"}),
        (SCAN, lambda s: s.turn and s.tokens > 8, {"long, then 9 tokens"}),
        # A piece of so few tokens, and a prompt of more than three chunks.
        (SCAN, lambda s: s.tokens == 2 and not s.past, {"split 2"}),
        (SCAN, lambda s: s.tokens == 4 and s.past, {"split 2+4"}),
        (SCAN, lambda s: s.tokens > 24 and not s.past, {"long"}),
        (SCAN, lambda s: s.tokens > 24 and s.past, {"long split 2+27"}),
        # Paddings.
        (SCAN, lambda s: s.padded, {"padding first, then 2 tokens", "split 2+4+13"}),
        (SCAN, lambda s: s.padded if s.alone else False, {"padding first, decode 1"}),
        (CACHES, lambda s: s.paddings >= 8, {"prefill", "every row padded"}),
        (CACHES, lambda s: s.paddings.min() > 0 and not s.alone, {"every row padded"}),
        (CACHES, lambda s: (s.seen[:, -1] == 0).any() and s.past == 0, {"right padding"}),
        (
            CACHES,
            lambda s: ((np.diff(s.seen) < 0).any(axis=1)) & (s.seen[:, 0] == 0),
            {"padding within"},
        ),
        # Rows and length.
        (CACHES, lambda s: len(s.seen) == 2, {"split 11+8"}),
        (SCAN, lambda s: np.arange(len(s.seen)) > 3, {"every row padded"}),
        (SCAN, lambda s: s.turn and not s.alone, {"every row padded, then 2 tokens"}),
        (CACHES, lambda s: np.arange(len(s.seen)) > 1, {"prefill", "decode 1"}),
        (CACHES, lambda s: s.seen.shape[1] > 128, {"long", "long, decode 1"}),
        (CACHES, lambda s: s.seen.shape[1] > 256, {"long", "long split 2+257"}),
        # Tiles that are full.
        (CACHES, lambda s: s.alone and s.tokens % 16 == 0, {"whole tiles"}),
        (SCAN, lambda s: s.alone and s.tokens == 8, {"whole tiles"}),
        *(
            (CACHES, lambda s, n=n: s.seen.shape[1] == n and s.past, {f"whole tiles, decode {d}"})
            for n, d in ((65, 1), (128, 2), (129, 3), (256, 4), (257, 5))
        ),
        (CACHES, lambda s: len(s.seen) == 4, {"four rows", "four rows, decode 1"}),
        (CACHES, lambda s: s.seen.size % 64 == 0 and not s.past, {"four rows", "whole tiles"}),
        (CLASSIFIER, lambda s: s.seen.size % 64 == 0, {"long, 64 tokens"}),
        (CLASSIFIER, lambda s: len(s.seen) == 4, {"four rows"}),
        # Without state.
        (CLASSIFIER, lambda s: s.seen[:, -1] == 0, {"right padding", "padding on both sides"}),
        (CLASSIFIER, lambda s: s.seen[:, 0] == 0, {"19 tokens", "every row padded"}),
        (CLASSIFIER, lambda s: s.paddings.min() > 0, {"every row padded"}),
        (CLASSIFIER, lambda s: s.seen.sum() == 1, {"row 2 alone"}),
        (CLASSIFIER, lambda s: s.alone, {"row 0 alone", "long"}),
        (CLASSIFIER, lambda s: s.seen.shape[1] > 200, {"long"}),
        (CLASSIFIER, lambda s: np.arange(len(s.seen)) == 2, {"19 tokens", "right padding"}),
    ],
)
def test_a_fault_of_one_shape_fails(
    traits: Traits, wrong: Callable[[Session], object], stages: set[str]
) -> None:
    found = failing(traits, wrong)
    assert stages <= found
    # And what is of another shape passes.
    every = len([stage for run in make_runs(traits, QUICK, 0) for stage in run.inputs.steps])
    assert len(found) < every


# --- what flips hide


def test_a_fault_that_flips_hide_shows_with_the_truths_experts() -> None:
    """A router near a tie at the first token: nothing of any run is left to the free comparison."""
    want = table(routers=True)
    want[ROUTERS[0]][:, 2] = 3.5 - 1e-5
    own = near(want, 2)
    flipped = {**own, ROUTERS[0]: own[ROUTERS[0]].copy()}
    flipped[ROUTERS[0]][:, [1, 2]] = 3.4, 3.6

    class Flips(Session):
        def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
            self.table, self.forced = flipped, own
            return super().step(input_ids, attention_mask, logits_to_keep)

    for wrong, expected in (
        (right, set()),
        # The second piece of a prompt.
        (
            lambda s: s.past == 1 and s.tokens > 1 and s.turns[0] == 16,
            {"split 16+3, replayed"},
        ),
    ):
        judge = judge_of(CACHES, want, CHOOSING)
        session = Flips(own, wrong)
        recorder = Recorder(session)
        judge.judge_graph(cast(TappedSession, session), recorder=recorder)
        assert {result.stage for result in judge.results if result.problem} == expected
        found = coverage(CACHES, recorder.calls, [judge], {})
        judged = {part.name: part for part in found.parts}
        # Nothing is called short that was judged so, and nothing says the session was.
        assert found.short == (
            "equal calls give equal bits: no such call was made",
            "another number of threads: no such call was made",
        )
        assert judged["decode of one sequence"].how == "replayed"
        assert judged["decode of one sequence"].tokens > 0
        (left,) = [each for each in found.left_out if "rounding" in each.why]
        assert left.count == left.of and left.what == "tokens"


# --- the same calls again


class Races(Session):
    """One number of one call in five is off by an ulp."""

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        main = super().step(input_ids, attention_mask, logits_to_keep).copy()
        self.count = getattr(self, "count", 0) + 1
        if self.count == 7:
            main[0, -1, 0] = np.nextafter(main[0, -1, 0], np.float32(9))
        return main


def test_equal_calls_that_differ_in_one_bit_fail() -> None:
    want = table()
    for kind, wrong in ((Session, []), (Races, ["prefill, 5 times"])):
        judge = judge_of(CACHES, want)
        recorder = Recorder(kind(near(want, 2), right))
        judge_repeats(judge, recorder)
        problems = [(r.stage, r.name, r.problem) for r in judge.results if r.problem]
        assert [(stage, name) for stage, name, _ in problems] == [(s, "logits") for s in wrong]
        assert all("threads race for a result" in problem for *_, problem in problems)
        assert len(recorder.calls) == 12
        assert {call.purpose for call in recorder.calls} == {"repeat"}
        assert len(judge.results) == 2 * 2


class OneBuffer(Session):
    """Hands out the same array from each call of one shape."""

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        main = super().step(input_ids, attention_mask, logits_to_keep)
        self.buffers = getattr(self, "buffers", {})
        kept = self.buffers.setdefault(main.shape, main)
        kept[...] = main
        return cast(Floats, kept)


def test_what_a_later_call_writes_over_fails() -> None:
    """Though equal calls write equal numbers, and each is compared before the next."""
    judge = judge_of(CACHES, want := table())
    judge_repeats(judge, Recorder(OneBuffer(near(want, 2), right)))
    problems = [(r.stage, r.name, r.problem) for r in judge.results if r.problem]
    assert [each[:2] for each in problems] == [
        ("prefill, 5 times", "logits"),
        ("decode 1, 5 times", "logits"),
    ]
    assert all("which write over it" in problem for *_, problem in problems)


class Forks(Session):
    """What forks, into a session of its own."""

    def fork(self) -> Session:
        return Session(self.table, right)


class SharesItsState(Forks):
    """What its fork does, it goes on from."""

    def fork(self) -> Session:
        def touch(_fork: Session) -> bool:
            self.wrong = lambda _session: True
            return False

        return Session(self.table, touch)


class RefusesAfterItsFork(Forks):
    """It counts the rows of its fork."""

    forked = False

    def fork(self) -> Session:
        self.forked = True
        return super().fork()

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        if self.forked and input_ids.shape[1] == 1:
            raise SessionError("input_ids [3, 1] must be [1, tokens].")
        return super().step(input_ids, attention_mask, logits_to_keep)


@pytest.mark.parametrize(
    ("kind", "failing"), [(Forks, False), (SharesItsState, True), (RefusesAfterItsFork, True)]
)
def test_a_fork_that_changes_its_session_fails(kind: type[Session], failing: bool) -> None:
    judge = judge_of(SCAN, want := table(state=True))
    judge_repeats(judge, Recorder(kind(near(want, 2), right)))
    assert len([r for r in judge.results if r.stage == "prefill, beside a fork"]) == 2
    problems = {(r.stage, r.problem.split(" that")[0]) for r in judge.results if r.problem}
    said = {("decode 1, beside a fork", "a fork of the session")}
    assert problems == (said if failing else set())


class NeedsAllItsRoom(Session):
    """Right as long as nearly all of its room is used."""

    def reset(self, batch: int, capacity: int) -> None:
        super().reset(batch, capacity)
        self.room = capacity


def test_a_fault_of_unused_room_fails() -> None:
    judge = judge_of(CACHES, want := table())
    wrong = NeedsAllItsRoom(near(want, 2), lambda s: cast(NeedsAllItsRoom, s).room > 400)
    judge.judge_session(Recorder(wrong))
    failed = {result.stage.split(",")[0] for result in judge.results if result.problem}
    assert failed == {"chat"}


def test_a_fault_with_another_number_of_threads_fails() -> None:
    want = table()
    for wrong, stages in ((right, []), (lambda s: s.past == 1, ["decode 1, 2 threads"])):
        judge = judge_of(CACHES, want)
        recorder = Recorder(Session(near(want, 2), wrong))
        judge_threads(judge, recorder, 2)
        assert [r.stage for r in judge.results if r.problem] == stages
        assert [call.purpose for call in recorder.calls] == ["threads"] * 3


# --- coverage is of calls, and not of a plan


def covered(
    traits: Traits,
    leave_out: Callable[[str], bool] = lambda _name: False,
    plan: Plan = QUICK,
) -> Coverage:
    want = table(state=traits.recurrent)
    judge = judge_of(traits, want, plan=plan)
    judge.material.runs = [r for r in judge.material.runs if not leave_out(r.name)]
    recorder = Recorder(Session(near(want, 2), right, classifier=not traits.stateful))
    recorder.stateful = traits.stateful
    judge.judge_session(recorder)
    judge_repeats(judge, recorder)
    judge_threads(judge, recorder, 1)
    return coverage(traits, recorder.calls, [judge], {})


@pytest.mark.parametrize("plan", [QUICK, Plan(prefill=21, decode=3)])
@pytest.mark.parametrize("traits", [CACHES, SCAN, CLASSIFIER])
def test_all_that_is_asked_by_default_is_covered(traits: Traits, plan: Plan) -> None:
    found = covered(traits, plan=plan)
    assert found.short == () and {part.how for part in found.parts} == {"session"}
    assert (
        found.rows == ((1, 2, 3, 4, 5) if traits.stateful else (1, 2, 3, 4))
        and found.vocab_size == played.IDS
    )
    assert "left" in found.paddings and ("right" in found.paddings) == traits.anywhere
    assert found.chunks == (4 if traits.chunk else 0)
    assert all(type(part.tokens) is int for part in found.parts)


ONE_ROW = ("row", "chat", "padding first", "long", "whole tiles")


@pytest.mark.parametrize(
    ("traits", "names", "parts"),
    [
        (
            CACHES,
            ONE_ROW,
            {
                "a prompt of one sequence",
                "decode of one sequence",
                "a prompt of one token",
                "decode after a prompt of one token",
                *(f"a turn of {n} tokens after decode steps" for n in (2, 3, 9)),
                "padding before the prompt is a call of its own",
                "a prompt of more than 256 tokens",
            },
        ),
        (CACHES, ("right padding", "padding within"), {"padding on the right"}),
        (CACHES, ("every row padded", "padding within", "a tile"), {"padding in every row"}),
        (CACHES, ("split", "long split"), {"a prompt in pieces"}),
        (
            SCAN,
            ("every row padded", "a tile of padding"),
            {"a turn of several sequences", "more than 4 sequences", "padding in every row"},
        ),
        (SCAN, ("padding first",), {"padding before the prompt is a call of its own"}),
        (
            SCAN,
            ("long", "chat", "row 1", "whole tiles"),
            {"a prompt of more than three chunks", "a turn of more than a chunk"},
        ),
        (
            CACHES,
            ("whole tiles",),
            {
                "a prompt of 64 tokens, or a multiple",
                "decode of the last of 64 tokens, or a multiple",
            },
        ),
        (SCAN, ("whole tiles",), {"a prompt of 8 tokens, or a multiple"}),
        (CLASSIFIER, ("long",), {"a prompt of 64 tokens, or a multiple"}),
        (CACHES, ("four",), {"4 sequences"}),
        (CLASSIFIER, ("four",), {"4 rows"}),
        (CLASSIFIER, ("row",), {"one row", "one token"}),
        (CLASSIFIER, ("right", "padding on"), {"padding on the right"}),
    ],
)
def test_what_was_not_called_is_not_covered(
    traits: Traits, names: tuple[str, ...], parts: set[str]
) -> None:
    found = covered(traits, lambda name: name.startswith(names))
    missing = {part.name for part in found.parts if not part.covered}
    assert parts - {"one row"} <= missing
    assert all("no such call was made" in each for each in found.short)


def test_says_what_was_not_asked() -> None:
    found = covered(CACHES)
    assert found.not_asked == (
        "sequences of 296 to 4096 tokens",
        "batches of more than 5 rows",
        f"{played.IDS - found.ids} of {played.IDS} token ids",
    )
    endless = covered(SCAN).not_asked[0]
    assert endless == "sequences of more than 41 tokens"
    assert found.summary()["not_asked"] == list(found.not_asked)
