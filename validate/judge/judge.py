"""One set of token ids: a target's numbers held against the eager graph's, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ingot.export.progress import Advance
from ingot.plugins.errors import IngotError
from ingot.validate.judge.compare import compare
from ingot.validate.judge.metrics import errors
from ingot.validate.judge.routing import (
    compare_choices,
    doubtful,
    first_flips,
    ignored_choices,
)
from ingot.validate.result import Routing, TensorResult
from ingot.validate.truth.cache import Recording
from ingot.validate.truth.inputs import Inputs
from ingot.validate.truth.recording import (
    CHOSEN_EXPERTS,
    HIDDEN_STATES,
    ROUTER_LOGITS,
    Array,
    Call,
    Layout,
    Places,
    Stepper,
    Tensors,
    all_chosen_experts,
    all_router_logits,
    collect_whole,
    main_run,
    observe,
    places,
    record,
    row_run,
    select,
    split_run,
    whole,
)
from ingot.validate.truth.reference import References
from ingot.validate.truth.replay import Routers, choices
from ingot.validate.truth.taps import TappedSession

Mask = npt.NDArray[np.bool_]

CACHES = "all of the caches"
FREE, REPLAYED = "free", "replayed"
NEVER = np.iinfo(np.int64).max


def _ignore(_calls: int) -> None:
    pass


@dataclass(frozen=True)
class Piece:
    """A part of the prefill that is fed by itself.

    Attributes:
        calls: one after the other; the last is compared.
        tokens: by call, which of the prefill's real tokens it has.
        rows: of the batch.
    """

    calls: Sequence[Call]
    tokens: Sequence[Mask]
    rows: Sequence[int]


def pieces(inputs: Inputs) -> list[Piece]:
    """The prefill in two pieces, at the end of a chunk and off it; and each row alone.

    A state must carry over whatever the call boundaries are, and a padded row must compute what it
    computes alone.
    """
    if not inputs.stateful:
        return []
    row_of, position_of = places(inputs, main_run(inputs)[0]).T
    rows = range(len(inputs.input_ids))
    splits = [split for split in inputs.splits if split < inputs.prefill]
    return [
        Piece(split_run(inputs, split), [position_of < split, position_of >= split], rows)
        for split in splits
    ] + [Piece([row_run(inputs, row)], [row_of == row], [row]) for row in rows]


@dataclass
class Observed:
    """What a target gives.

    Attributes:
        main: of the main run.
        whole: the caches at its end; see ``validate.truth.recording.collect_whole``.
        pieces: of each piece its calls.
    """

    main: Recording
    whole: Tensors
    pieces: list[list[Tensors]] = field(default_factory=list)


class Judge:
    """Compares what sessions of one target give with the references.

    Args:
        routers: of the model.
        references: what the eager graphs give for the inputs.
        layout: of the outputs.
        inputs: that are fed.

    Attributes:
        routing: the experts' choices held against the truth's, by mode: ``free`` where the target
            chose, ``replayed`` where the truth's choices were forced.
    """

    def __init__(
        self, routers: Routers, references: References, layout: Layout, inputs: Inputs
    ) -> None:
        self.routers = routers
        self.references = references
        self.layout = layout
        self.inputs = inputs
        self._free: list[TensorResult] = []
        self._inside: list[TensorResult] = []
        self.routing: dict[str, Routing] = {}
        self._calls = main_run(inputs)
        self._pieces = pieces(inputs)
        self._places = [places(inputs, call) for call in self._calls]
        self._recordings = (references.expected, references.truth, references.eager)
        self._floors = _usual_floors(references)
        self._flips: list[dict[int, int]] = [{} for _ in self._calls]
        self._piece_flips: list[dict[int, int]] = [{} for _ in self._pieces]

    @property
    def results(self) -> list[TensorResult]:
        """One result of every tensor after every call: of free runs, and then of the rest."""
        return self._free + self._inside

    @property
    def calls(self) -> int:
        """The calls that ``run`` feeds."""
        return len(self._calls) + sum(len(piece.calls) for piece in self._pieces)

    def run(self, session: Stepper, advance: Advance = _ignore) -> Observed:
        """Feed every stage to a session that chooses its experts itself."""
        main = record(session, self.layout, self.inputs, advance=advance)
        end = collect_whole(self.layout, self.inputs, self._calls, session.state())
        found = Observed(main, end)
        for piece in self._pieces:
            found.pieces.append([])
            for call in piece.calls:
                found.pieces[-1].append(observe(session, self.layout, self.inputs, call))
                advance(1)
        return found

    def judge_graph(
        self, session: TappedSession, found: Observed, advance: Advance = _ignore
    ) -> None:
        """Judge the graph's hidden states; with routers, all tensors under the truth's experts.

        Args:
            session: over the target's graph.
            found: what it gave when it chose itself.
            advance: told of each finished call.

        Raises:
            IngotError: the graph does not name all its routers.
        """
        expected = len(all_router_logits(self.references.truth[0]))
        if len(session.routers) != expected:
            raise IngotError(
                f"the graph names {len(session.routers)} routers and the model has {expected}; it "
                "was made by another version: export it again."
            )
        if not session.routers:
            for number, call in enumerate(self._calls):
                taps = {n: a for n, a in found.main[number].items() if is_tap(n)}
                self._inside += self._compare(call.stage, number, taps, wanted=is_tap)
            return
        self._note_flips(found)
        replayed = found.main
        # Without a flip it would compute the same once more.
        if self.routing[FREE].flips:
            truth = self.references.truth
            replayed = record(
                session,
                self.layout,
                self.inputs,
                lambda n: session.choose(self.routers.chosen(truth[n], self.inputs, n)),
                advance,
            )
            session.choose(None)
        self.routing[REPLAYED] = self._replayed(replayed, forced=bool(self.routing[FREE].flips))
        for number, call in enumerate(self._calls):
            self._inside += self._compare(f"{call.stage}, {REPLAYED}", number, replayed[number])

    def exclude_doubtful(self) -> None:
        """Leave tokens out of ``judge_session`` from where rounding may have turned a choice.

        For a target whose routers cannot be seen, such as an engine: any choice whose margin
        rounding explains may have been another there.
        """
        expected, truth, eager = map(_by_router, self._recordings)
        at = np.concatenate(self._places)
        flips = doubtful(expected, truth, eager, at, self.routers.top_k)
        self._flips = [flips for _ in self._calls]
        self._piece_flips = [flips for _ in self._pieces]

    def judge_session(self, found: Observed) -> None:
        """Judge what a session gave when it chose its experts itself.

        Tokens are left out from where a flip that rounding explains changed their numbers; with the
        truth's experts they were judged by ``judge_graph``.
        """
        for number, call in enumerate(self._calls):
            main, flips = found.main[number], self._flips[number]
            self._free += self._compare(call.stage, number, main, flips, wanted=is_no_tap)
        if found.whole:
            self._free += self._compare_whole(found.whole)
        for piece, calls, flips in zip(self._pieces, found.pieces, self._piece_flips, strict=True):
            stage = piece.calls[-1].stage
            self._free += self._compare(stage, 0, calls[-1], flips, wanted=is_no_tap, piece=piece)

    def _compare(
        self,
        stage: str,
        number: int,
        found: Tensors,
        flips: Mapping[int, int] = {},
        *,
        wanted: Callable[[str], bool] = lambda name: not is_choice(name),
        piece: Piece | None = None,
    ) -> list[TensorResult]:
        """Compare one call with a recorded one, or with a piece of it.

        Args:
            stage: named in the results.
            number: of the recorded call.
            found: of the target.
            flips: by row, where tokens are left out from.
            wanted: which names are compared; a tap only where the target has it.
            piece: of the recorded call.
        """
        at = self._places[number]
        tokens = np.ones(len(at), dtype=np.bool_) if piece is None else piece.tokens[-1]
        rows = range(len(self.inputs.input_ids)) if piece is None else piece.rows
        sides = [select(self.layout, side[number], tokens, rows) for side in self._recordings]
        names = [n for n in sides[0] if wanted(n) and (n in found or is_no_tap(n))]
        names += [name for name in found if name not in sides[0] and wanted(name)]
        return self._results(stage, names, at[tokens], rows, [*sides, found], flips)

    def _compare_whole(self, found: Tensors) -> list[TensorResult]:
        """The caches at the end of the main run, with all that its calls added."""
        at = np.concatenate(self._places)
        rows = range(len(self.inputs.input_ids))
        sides = [whole(self.layout, side) for side in self._recordings]
        return self._results(CACHES, list(sides[0]), at, rows, [*sides, found], self._flips[-1])

    def _results(
        self,
        stage: str,
        names: Sequence[str],
        at: Places,
        rows: Sequence[int],
        sides: Sequence[Tensors],
        flips: Mapping[int, int],
    ) -> list[TensorResult]:
        """Compare expected, truth, eager and target where no flip changed the numbers."""
        keep = np.array([flips.get(row, NEVER) > position for row, position in at], dtype=np.bool_)
        kept_rows = [index for index, row in enumerate(rows) if row not in flips]
        names = [n for n in names if kept_rows or not self.layout.of_rows(n)]
        names = [n for n in names if keep.any() or self.layout.of_rows(n)]
        if flips and not names:
            return []
        expected, truth, eager, found = (
            select(self.layout, {n: side[n] for n in names if n in side}, keep, kept_rows)
            for side in sides
        )
        kinds = {name: self.layout.kind(name) for name in names}
        precision = self.references.precision
        return compare(stage, truth, eager, found, kinds, precision, self._floors, expected)

    def _note_flips(self, found: Observed) -> None:
        """What the target's own choices are, and from where on they changed its numbers."""
        self.routing[FREE] = self._routing(found.main)
        self._flips = [first_flips(self.routing[FREE]) for _ in self._calls]
        if not self.inputs.stateful:
            # Each call stands alone.
            every = (*self._recordings, found.main)
            self._flips = [
                first_flips(self._choices([[side[n]] for side in every], [at]))
                for n, at in enumerate(self._places)
            ]
        for index, (piece, calls) in enumerate(zip(self._pieces, found.pieces, strict=True)):
            sides = [
                [select(self.layout, side[0], tokens, piece.rows) for tokens in piece.tokens]
                for side in self._recordings
            ]
            at = [self._places[0][tokens] for tokens in piece.tokens]
            self._piece_flips[index] = first_flips(self._choices([*sides, calls], at))

    def _routing(self, found: Recording, *, forced: bool = False) -> Routing:
        """The choices of a main run."""
        return self._choices([*self._recordings, found], self._places, forced=forced)

    def _choices(
        self, sides: Sequence[Recording], at: Sequence[Places], *, forced: bool = False
    ) -> Routing:
        """The choices in some calls, of which the sides are expected, truth, eager and target."""
        expected, truth, eager, found = map(_by_router, sides)
        names = self.routers.names()
        top_k = self.routers.top_k
        place = np.concatenate(at)
        chosen = [choices(logits, top_k) for logits in found]
        if not forced:
            # What the kernels took tells it better than the logits they were given.
            for router, used in _used(sides[-1]).items():
                chosen[router] = used
        return compare_choices(expected, truth, eager, chosen, place, top_k, names, forced=forced)

    def _replayed(self, found: Recording, *, forced: bool) -> Routing:
        """The choices of a main run in which the truth's experts were used.

        Args:
            found: what the target gave.
            forced: whether they were forced, and not its own.
        """
        result = self._routing(found, forced=True)
        if not forced:
            return result
        expected = _by_router(self._recordings[1])
        wanted = [choices(logits, self.routers.top_k) for logits in expected]
        at = np.concatenate(self._places)
        return replace(result, ignored=ignored_choices(wanted, _used(found), expected, at))


def _by_router(calls: Recording) -> list[Array]:
    """Each router's logits ``[n, E]`` over all calls."""
    return [np.concatenate(each) for each in zip(*map(all_router_logits, calls), strict=True)]


def _used(calls: Recording) -> dict[int, Array]:
    """The experts ``[n, E]`` that kernels took over all calls, by router."""
    found = [all_chosen_experts(call) for call in calls]
    return {router: np.concatenate([each[router] for each in found]) for router in found[0]}


def _usual_floors(references: References) -> dict[str, float]:
    """Eager PyTorch's relative RMS error over all calls of the main run, by tensor."""
    squares: dict[str, list[float]] = {}
    for truth, eager in zip(references.truth, references.eager, strict=True):
        for name, want in truth.items():
            if want.size:
                error = errors(want, eager[name]).relative_rms
                squares.setdefault(name, []).append(error**2)
    return {name: float(np.sqrt(np.mean(found))) for name, found in squares.items()}


def is_tap(name: str) -> bool:
    """Whether it is a value inside of a graph, and not one of its outputs or states."""
    return name.startswith((ROUTER_LOGITS, HIDDEN_STATES))


def is_choice(name: str) -> bool:
    """Whether it says which experts were used; it is compared as such, and is no number."""
    return name.startswith(CHOSEN_EXPERTS)


def is_no_tap(name: str) -> bool:
    """Whether it is an output or a state of a graph, and no value inside of it."""
    return not is_tap(name) and not is_choice(name)
