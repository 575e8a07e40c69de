"""One set of token ids: a target's numbers held against the eager graph's, run by run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ingot.export.progress import Advance
from ingot.plugins.errors import IngotError
from ingot.validate.counting import Fed, Recorder
from ingot.validate.judge.compare import compare
from ingot.validate.judge.floors import usual_floors
from ingot.validate.judge.limits import ROUNDOFF
from ingot.validate.judge.routing import (
    compare_choices,
    doubtful,
    first_flips,
    ignored_choices,
)
from ingot.validate.result import Ignored, Routing, TensorResult
from ingot.validate.truth.cache import Recording
from ingot.validate.truth.material import Material
from ingot.validate.truth.recording import (
    CHOSEN_EXPERTS,
    HIDDEN_STATES,
    ROUTER_LOGITS,
    Array,
    Call,
    Places,
    Stepper,
    Tensors,
    all_router_logits,
    by_router,
    collect_whole,
    main_run,
    observe,
    places,
    taken_experts,
    whole,
)
from ingot.validate.truth.reference import References
from ingot.validate.truth.replay import Routers, choices, forced_choices
from ingot.validate.truth.runs import LONG, MAIN, Run
from ingot.validate.truth.taps import TappedSession

Mask = npt.NDArray[np.bool_]

CACHES = "all of the caches"
FREE, REPLAYED = "free", "replayed"
NEVER = np.iinfo(np.int64).max


def _ignore(_calls: int) -> None:
    pass


@dataclass
class Observed:
    """What a target gives in one run.

    Attributes:
        calls: one after the other.
        whole: the caches at the end, where they are compared; see
            ``validate.truth.recording.collect_whole``.
        fed: what the calls were, where they were recorded for the coverage.
    """

    calls: Recording
    whole: Tensors
    fed: list[Fed] = field(default_factory=list)


@dataclass
class Flips:
    """Where the target's own choices are others than the truth's in one run.

    Attributes:
        routing: all of them.
        first: by call, by row the first column from which on they changed the numbers.
    """

    routing: Routing
    first: list[dict[int, int]]


class Judge:
    """Compares what sessions of one target give with the references.

    Args:
        routers: of the model.
        material: the runs that are fed and what they are compared with.

    Attributes:
        references: of the recorded runs.
        routing: the experts' choices held against the truth's, by mode: ``free`` where the target
            chose, ``replayed`` where the truth's choices were forced.
        chosen: by router, the experts that it chose by itself for some token.
        experts: by router, how many it has.
        logits: the main output of every call of the recorded runs, of the session that was judged.
        states: how many states were given back, and how many of them compared.
    """

    def __init__(self, routers: Routers, material: Material) -> None:
        self.routers = routers
        self.material = material
        self.layout = material.layout
        self.references = material.references
        self.routing: dict[str, Routing] = {}
        self.chosen: list[set[int]] = [set() for _ in routers.names()]
        self.experts = [
            logits.shape[1] for logits in all_router_logits(self.references[0].truth[0])
        ]
        self.logits: list[Array] = []
        self.states = [0, 0]
        self._free: list[TensorResult] = []
        self._again: list[TensorResult] = []
        self._inside: list[TensorResult] = []
        self._floors = [usual_floors(references) for references in self.references]
        self._flips: dict[int, list[dict[int, int]]] = {}
        # By run and call, the tokens that were judged with the truth's experts.
        self._replayed: dict[tuple[int, int], int] = {}

    @property
    def results(self) -> list[TensorResult]:
        """One result of every tensor after every call: of free runs, and then of the rest."""
        return self._free + self._again + self._inside

    @property
    def compared(self) -> list[References]:
        """What the calls behind ``logits`` are compared with."""
        return [each for run, each in self.material.recorded if run.name in (MAIN, LONG)]

    @property
    def calls(self) -> int:
        """The calls of all runs."""
        return sum(len(run.inputs.steps) for run in self.material.runs)

    def observe(self, session: Stepper, run: Run, advance: Advance = _ignore) -> Observed:
        """Feed one run to a session that chooses its experts itself."""
        return self._observe(session, run, lambda _number: None, advance)

    def judge_graph(
        self, session: TappedSession, advance: Advance = _ignore, recorder: Recorder | None = None
    ) -> None:
        """Judge the graph's hidden states; with routers, all tensors under the truth's experts.

        A run in which no expert is another is not run again: it would compute the same once more.

        Args:
            session: over the target's graph.
            advance: told of each finished call.
            recorder: of the same session, where no other session of the target is judged: then
                what it gives when it chooses itself is judged as well.

        Raises:
            IngotError: the graph does not name all its routers.
        """
        expected = len(all_router_logits(self.references[0].truth[0]))
        if len(session.routers) != expected:
            raise IngotError(
                f"the graph names {len(session.routers)} routers and the model has {expected}; it "
                "was made by another version: export it again."
            )
        free: list[Routing] = []
        replayed: list[Routing] = []
        for index, run in enumerate(self.material.runs):
            found = self.observe(session if recorder is None else recorder, run, advance)
            if not session.routers:
                if run.recorded:
                    taps = [{n: a for n, a in call.items() if is_tap(n)} for call in found.calls]
                    for number, call in enumerate(main_run(run.inputs)):
                        stage, some = call.stage, taps[number]
                        self._inside += self._compare(run, stage, number, some, wanted=is_tap)
            else:
                self._note_chosen(found)
                flips = self._flipped(run, found.calls)
                self._flips[index] = flips.first
                if run.recorded or any(flip.fails for flip in flips.routing.flips):
                    free.append(flips.routing)
                if flips.routing.flips or run.recorded:
                    replayed.append(self._judge_replayed(session, index, run, found, flips))
            if recorder is not None:
                self._judge_free(index, run, found)
        if session.routers:
            self.routing = {FREE: _merged(free), REPLAYED: _merged(replayed)}

    def judge_session(self, session: Recorder, advance: Advance = _ignore) -> None:
        """Judge what a session gives when it chooses its experts itself.

        Tokens are left out from where a flip that rounding explains changed their numbers; with the
        truth's experts they were judged by ``judge_graph``.
        """
        for index, run in enumerate(self.material.runs):
            self._judge_free(index, run, self.observe(session, run, advance))

    def exclude_doubtful(self) -> None:
        """Leave tokens out of ``judge_session`` from where rounding may have turned a choice.

        For a target whose routers cannot be seen, such as an engine: any choice whose margin
        rounding explains may have been another there.
        """
        for index, run in enumerate(self.material.runs):
            sides = [self._by_call(run, s, of_router) for s in self.material.sides(run)]
            expected, truth, eager = map(_by_router, sides)
            at = [places(run.inputs, call) for call in main_run(run.inputs)]
            first = doubtful(expected, truth, eager, np.concatenate(at), self.routers.top_k)
            self._flips[index] = [first for _ in at]
            for router, logits in enumerate(expected):
                self._choose(router, choices(logits, self.routers.top_k))

    def judge_inside(self, session: TappedSession, run: Run) -> list[TensorResult]:
        """Every tensor of one run and every value between its layers, with the truth's experts.

        Unlike ``judge_graph`` of any run, also one of which nothing was recorded.
        """
        found = self._observe_forced(session, run)
        calls = enumerate(main_run(run.inputs))
        return [r for n, call in calls for r in self._compare(run, call.stage, n, found.calls[n])]

    def floor(self, run: Run, name: str) -> float:
        """What eager PyTorch usually errs by in a tensor of a run."""
        floor = self._floors[run.source].get(name, 0.0)
        # Of a call in which it overflows there is no error.
        precision = self.references[run.source].precision
        return max(floor if np.isfinite(floor) else 0.0, ROUNDOFF[precision])

    def add(self, results: Iterable[TensorResult]) -> None:
        """Results of what is judged elsewhere, such as calls that are repeated."""
        self._again += results

    def compare_call(
        self, run: Run, stage: str, number: int, found: Tensors
    ) -> tuple[list[TensorResult], int]:
        """Compare one call of a run all of whose experts are the truth's.

        Returns:
            The results, and how many tokens they are about.
        """
        results = self._compare(run, stage, number, found, wanted=is_no_tap)
        return results, self._kept(run, number)

    def force(self, session: TappedSession, run: Run, number: int) -> None:
        """Force the truth's experts on the next call, which is one of a run."""
        truth = self.material.sides(run)[1]
        logits = all_router_logits(self.material.cut(run, number, truth, of_router))
        call = main_run(run.inputs)[number]
        real = (run.inputs.attention_mask[:, call.columns] != 0).reshape(-1)
        session.choose(forced_choices(logits, real, self.routers.top_k))

    def _observe(
        self,
        session: Stepper,
        run: Run,
        prepare: Callable[[int], object],
        advance: Advance,
    ) -> Observed:
        calls = main_run(run.inputs)
        found = Observed([], {})
        for number, call in enumerate(calls):
            prepare(number)
            found.calls.append(observe(session, self.layout, run.inputs, call))
            if isinstance(session, Recorder):
                found.fed.append(session.calls[-1])
            advance(1)
        if run.whole:
            found.whole = collect_whole(self.layout, run.inputs, calls, session.state())
        return found

    def _observe_forced(self, session: TappedSession, run: Run) -> Observed:
        """Feed one run with the truth's experts."""
        found = self._observe(
            session, run, lambda number: self.force(session, run, number), _ignore
        )
        session.choose(None)
        return found

    def _judge_free(self, index: int, run: Run, found: Observed) -> None:
        """What a session gave in one run when it chose its experts itself."""
        calls = main_run(run.inputs)
        flips = self._flips.get(index, [{} for _ in calls])
        for number, call in enumerate(calls):
            some = {name: a for name, a in found.calls[number].items() if is_no_tap(name)}
            self._free += self._compare(run, call.stage, number, some, flips[number])
            if run.recorded and run.name in (MAIN, LONG):
                self.logits.append(found.calls[number][self.layout.main_output])
            if found.fed:
                fed = found.fed[number]
                fed.free += self._kept(run, number, flips[number])
                fed.replayed += self._replayed.get((index, number), 0)
                fed.recorded += int(run.inputs.wanted[:, call.columns].sum())
        if found.whole:
            self._free += self._compare_whole(run, found.whole, flips[-1])

    def _judge_replayed(
        self, session: TappedSession, index: int, run: Run, found: Observed, flips: Flips
    ) -> Routing:
        """One run with the truth's experts; as it was, where they are the target's own."""
        again = found
        if flips.routing.flips:
            again = self._observe_forced(session, run)
        for number, call in enumerate(main_run(run.inputs)):
            stage = f"{call.stage}, {REPLAYED}"
            self._inside += self._compare(run, stage, number, again.calls[number])
            self._replayed[index, number] = self._kept(run, number)
        routing = self._routing(run, again.calls, forced=True)
        if not flips.routing.flips:
            return routing
        return replace(routing, ignored=self._ignored(run, again.calls))

    def _kept(self, run: Run, number: int, flips: Mapping[int, int] = {}) -> int:
        """How many tokens of a call are compared."""
        at = _kept_places(run, main_run(run.inputs)[number])
        return sum(flips.get(int(row), NEVER) > int(column) for row, column in at)

    def _compare(
        self,
        run: Run,
        stage: str,
        number: int,
        found: Tensors,
        flips: Mapping[int, int] = {},
        *,
        wanted: Callable[[str], bool] = lambda name: not is_choice(name),
    ) -> list[TensorResult]:
        """Compare one call of a run with what was recorded.

        Args:
            run: that was fed.
            stage: named in the results.
            number: of the call.
            found: of the target.
            flips: by row, where tokens are left out from.
            wanted: which names are compared; a tap only where the target has it.
        """
        call = main_run(run.inputs)[number]
        known = self.material.rows(run, number)
        # What is expected is most often the truth itself.
        cut = {id(side): self.material.cut(run, number, side) for side in self._sides(run)}
        sides = [cut[id(side)] for side in self._sides(run)]
        every = len(run.rows)
        for name in found:
            if self.layout.of_rows(name):
                self.states[0] += every
                self.states[1] += sum(row not in flips for row in known)
        names = [n for n in sides[0] if wanted(n) and (n in found or is_no_tap(n))]
        unknown = [name for name in found if name not in sides[0] and wanted(name)]
        # Of a state that no recorded call has nothing is known.
        names += [name for name in unknown if not self.layout.of_rows(name) or run.recorded]
        found = {
            name: array[known] if self.layout.of_rows(name) and len(array) == every else array
            for name, array in found.items()
        }
        at = {True: places(run.inputs, call), False: _kept_places(run, call)}
        return self._results(run, stage, names, at, known, [*sides, found], flips)

    def _compare_whole(
        self, run: Run, found: Tensors, flips: Mapping[int, int]
    ) -> list[TensorResult]:
        """The caches at the end of a run, with all that its calls added."""
        calls = main_run(run.inputs)
        at = np.concatenate([places(run.inputs, call) for call in calls])

        def is_cache(name: str) -> bool:
            return self.layout.axis(name) is not None

        sides = [whole(self.layout, self._by_call(run, s, is_cache)) for s in self._sides(run)]
        names = list(sides[0])
        stage = CACHES if run is self.material.runs[0] else f"{run.name}, {CACHES}"
        return self._results(run, stage, names, {True: at, False: at}, [], [*sides, found], flips)

    def _results(
        self,
        run: Run,
        stage: str,
        names: Sequence[str],
        at: Mapping[bool, Places],
        rows: Sequence[int],
        sides: Sequence[Tensors],
        flips: Mapping[int, int],
    ) -> list[TensorResult]:
        """Compare expected, truth, eager and target where no flip changed the numbers.

        Args:
            run: that was fed.
            stage: named in the results.
            names: that are compared.
            at: row and column of each token: of routers' logits (True), and of all else.
            rows: of what is by row.
            sides: expected, truth, eager, its noise, and target.
            flips: by row, where tokens are left out from.
        """
        keep = {
            routers: np.array([flips.get(row, NEVER) > column for row, column in some], np.bool_)
            for routers, some in at.items()
        }
        kept_rows = [index for index, row in enumerate(rows) if row not in flips]

        def some_left(name: str) -> bool:
            if self.layout.of_rows(name):
                return bool(kept_rows)
            return bool(keep[of_router(name)].any())

        names = [name for name in names if some_left(name)]
        if not names:
            return []

        def select(name: str, array: Array) -> Array:
            if self.layout.of_rows(name):
                return array[kept_rows] if len(array) == len(rows) else array
            tokens = keep[of_router(name)]
            # One of another length is left as it is, and fails by its shape.
            return array[tokens] if len(array) == len(tokens) else array

        expected, truth, eager, noise, found = (
            {name: select(name, side[name]) for name in names if name in side} for side in sides
        )
        kinds = {name: self.layout.kind(name) for name in names}
        precision, floors = self.references[run.source].precision, self._floors[run.source]
        return compare(stage, truth, eager, found, kinds, precision, floors, expected, noise)

    def _sides(self, run: Run) -> tuple[Recording, ...]:
        """What a run is compared with: expected, truth, eager and its noise."""
        return *self.material.sides(run), self.material.noise(run)

    def _by_call(self, run: Run, recording: Recording, wanted: Callable[[str], bool]) -> Recording:
        calls = range(len(run.inputs.steps))
        return [self.material.cut(run, number, recording, wanted) for number in calls]

    def _note_chosen(self, found: Observed) -> None:
        for router, used in enumerate(self._used(found.calls)):
            self._choose(router, used)

    def _choose(self, router: int, used: Array) -> None:
        """Take note of the experts ``[n, E]`` of some tokens."""
        self.chosen[router] |= set(np.flatnonzero(used.any(axis=0)).tolist())

    def _used(self, calls: Recording) -> list[Array]:
        """By router the experts ``[n, E]`` of some calls.

        What the kernels took tells it better than the logits they were given, where it is known.
        """
        found = [choices(logits, self.routers.top_k) for logits in _by_router(calls)]
        for router, used in taken_experts(calls).items():
            found[router] = used
        return found

    def _ignored(self, run: Run, calls: Recording) -> tuple[Ignored, ...]:
        """Where the truth's experts were forced and not used."""
        truth = _by_router(self._by_call(run, self.material.sides(run)[1], of_router))
        wanted = [choices(logits, self.routers.top_k) for logits in truth]
        at = np.concatenate([places(run.inputs, call) for call in main_run(run.inputs)])
        return ignored_choices(wanted, taken_experts(calls), truth, at)

    def _flipped(self, run: Run, found: Recording) -> Flips:
        """What the target's own choices are, and from where on they changed its numbers."""
        routing = self._routing(run, found)
        calls = main_run(run.inputs)
        if run.inputs.stateful:
            return Flips(routing, [first_flips(routing)] * len(calls))
        # Each call stands alone.
        return Flips(
            routing,
            [first_flips(self._routing(run, found, range(n, n + 1))) for n in range(len(calls))],
        )

    def _routing(
        self, run: Run, found: Recording, numbers: range | None = None, *, forced: bool = False
    ) -> Routing:
        """The choices in some calls of a run, by default in all."""
        numbers = range(len(found)) if numbers is None else numbers
        calls = main_run(run.inputs)
        sides = [
            [self.material.cut(run, number, side, of_router) for number in numbers]
            for side in self.material.sides(run)
        ]
        expected, truth, eager = map(_by_router, sides)
        calls_of_it = [found[number] for number in numbers]
        # Of forced experts only what the logits say by themselves.
        own = [choices(logits, self.routers.top_k) for logits in _by_router(calls_of_it)]
        own = own if forced else self._used(calls_of_it)
        at = np.concatenate([places(run.inputs, calls[number]) for number in numbers])
        names, top_k = self.routers.names(), self.routers.top_k
        return compare_choices(expected, truth, eager, own, at, top_k, names, forced=forced)


def _merged(found: Sequence[Routing]) -> Routing:
    """The choices of several runs as one, by run equally."""
    agreement = np.mean([each.agreement for each in found], axis=0)
    flips = tuple(flip for each in found for flip in each.flips)
    ignored = tuple(router for each in found for router in each.ignored)
    return Routing(tuple(map(float, agreement)), flips, found[0].names, ignored)


def _kept_places(run: Run, call: Call) -> Places:
    """Row and column of each recorded token of a call, row by row."""
    found = np.argwhere(run.inputs.wanted[:, call.columns])
    result: Places = found + np.array((0, call.columns.start))
    return result


def _by_router(calls: Recording) -> list[Array]:
    """Each router's logits ``[n, E]`` over all calls."""
    return by_router(map(all_router_logits, calls))


def of_router(name: str) -> bool:
    """Whether it is a router's logits."""
    return name.startswith(ROUTER_LOGITS)


def is_tap(name: str) -> bool:
    """Whether it is a value inside of a graph, and not one of its outputs or states."""
    return name.startswith((ROUTER_LOGITS, HIDDEN_STATES))


def is_choice(name: str) -> bool:
    """Whether it says which experts were used; it is compared as such, and is no number."""
    return name.startswith(CHOSEN_EXPERTS)


def is_no_tap(name: str) -> bool:
    """Whether it is an output or a state of a graph, and no value inside of it."""
    return not is_tap(name) and not is_choice(name)
