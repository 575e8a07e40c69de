"""Every expert of every layer, run once by forced routing and held against the truth.

It shows wrong weights of an expert that no token chose, and a kernel that chooses by other numbers
than the router's logits: experts that were given and not used are a failure, whatever the margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ingot.export.progress import Advance
from ingot.validate.judge.compare import compare
from ingot.validate.judge.routing import ignored_choices
from ingot.validate.result import FORCED, Routing, TensorResult
from ingot.validate.truth.cache import Recording
from ingot.validate.truth.inputs import Inputs
from ingot.validate.truth.recording import (
    HIDDEN_STATES,
    ROUTER_LOGITS,
    Array,
    Layout,
    Tensors,
    all_router_logits,
    by_router,
    main_run,
    record,
    taken_experts,
)
from ingot.validate.truth.reference import References
from ingot.validate.truth.replay import Chosen, Routers, replayed
from ingot.validate.truth.taps import TappedSession

TAPS = (ROUTER_LOGITS, HIDDEN_STATES)
# Elements of a token from which on it is also compared by itself. An expert may be used by one of a
# call's tokens only, and its error is thinned out by the others.
LEAST_SIZE = 32


class ForcedJudge:
    """Runs every expert on a target's graph and compares all it gives.

    Args:
        routers: of the model.
        layout: of the outputs.
        runs: of ``validate.truth.forced.forced_runs``; without any, nothing comes of it.
        references: of each run.

    Attributes:
        results: of every tensor after every call.
        routing: by mode, whether the experts that were given were used; empty without runs.
        experts: by the number of a router, the experts that were run because they were given,
            ascending.
        unread: by the number of a router, why it cannot be seen which experts were used.
    """

    def __init__(
        self,
        routers: Routers,
        layout: Layout,
        runs: Sequence[Inputs],
        references: Sequence[References],
    ) -> None:
        self._routers = routers
        self._layout = layout
        self._runs = runs
        self._references = references
        self.results: list[TensorResult] = []
        self.routing: dict[str, Routing] = {}
        self.experts: dict[int, tuple[int, ...]] = {}
        self.unread: dict[int, str] = {}

    @property
    def calls(self) -> int:
        """The calls that ``judge`` feeds."""
        return sum(len(inputs.steps) for inputs in self._runs)

    def judge(self, session: TappedSession, advance: Advance = lambda _calls: None) -> None:
        """Feed every run.

        Args:
            session: over the graph.
            advance: told of each finished call.
        """
        self.unread = {session.routers.index(name): why for name, why in session.unread.items()}
        every: list[Recording] = []
        for inputs, reference in zip(self._runs, self._references, strict=True):
            every.append(_recorded(session, self._layout, inputs))
            self.results += _compared(self._layout, inputs, reference, every[-1])
            advance(len(every[-1]))
        if every:
            self._judge_choices([call for calls in every for call in calls])

    def _judge_choices(self, calls: Recording) -> None:
        """Hold what was used in all calls against what was given."""
        given = by_router([masks for inputs in self._runs for masks in inputs.forced])
        expected = [call for reference in self._references for call in reference.expected]
        moved = map(_moved, by_router(map(all_router_logits, expected)), given)
        used = taken_experts(calls)
        # The number of a token's run is told as its row.
        at = [(n, token) for n, inputs in enumerate(self._runs) for token in range(inputs.prefill)]
        agreement = []
        for router, mask in enumerate(given):
            # Where a choice cannot be read, the numbers alone say that the experts were run.
            taken = used.get(router, mask)
            agreement.append(float((mask == taken).all(axis=-1).mean()))
            run = np.flatnonzero((mask & taken).any(axis=0))
            self.experts[router] = tuple(run.tolist())
        ignored = ignored_choices(given, used, list(moved), np.array(at))
        self.routing[FORCED] = Routing(tuple(agreement), (), self._routers.names(), ignored)


def _recorded(session: TappedSession, layout: Layout, inputs: Inputs) -> Recording:
    try:
        return record(session, layout, inputs, lambda n: session.choose(inputs.forced[n]))
    finally:
        session.choose(None)


def _compared(
    layout: Layout, inputs: Inputs, reference: References, found: Recording
) -> list[TensorResult]:
    """All outputs, states and taps; of the last only those that the graph names."""
    results = []
    for number, call in enumerate(main_run(inputs)):
        tensors = {n: a for n, a in found[number].items() if n in reference.truth[number]}
        names = [n for n in reference.truth[number] if n in tensors or not n.startswith(TAPS)]
        whole = _Comparison(layout, reference, number, names, tensors)
        here = whole.results(call.stage)
        floors = {each.name: each.floor for each in here if each.floor is not None}
        wide = [n for n in floors if n.startswith(HIDDEN_STATES) or n == layout.main_output]
        wide = [n for n in wide if not layout.of_rows(n) and tensors[n][0].size >= LEAST_SIZE]
        for token in range(inputs.prefill if wide else 0):
            one = _Comparison(layout, reference, number, wide, tensors, token)
            here += one.results(call.stage, floors)
        results += _worst(here)
    return results


class _Comparison:
    """Some tensors of one call, of all tokens or of one.

    Args:
        layout: of the outputs.
        reference: of the run.
        number: of the call in it.
        names: that are compared.
        found: of the target.
        token: alone; None for all of them.
    """

    def __init__(
        self,
        layout: Layout,
        reference: References,
        number: int,
        names: Sequence[str],
        found: Tensors,
        token: int | None = None,
    ) -> None:
        self._kinds = {name: layout.kind(name) for name in names}
        self._precision = reference.precision
        some = slice(None) if token is None else slice(token, token + 1)
        sides = (r[number] for r in (reference.truth, reference.eager, reference.expected))
        self._truth, self._eager, self._expected, self._found, self._noise = (
            {name: side[name][some] for name in names if name in side}
            for side in (*sides, found, reference.noise[number])
        )

    def results(self, stage: str, floors: Mapping[str, float] | None = None) -> list[TensorResult]:
        """One of each tensor; ``floors`` are those that hold at least."""
        return compare(
            stage,
            self._truth,
            self._eager,
            self._found,
            self._kinds,
            self._precision,
            floors,
            self._expected,
            self._noise,
        )


def _worst(results: Sequence[TensorResult]) -> list[TensorResult]:
    """Of each tensor one result: with a problem, if any has one, and else the highest score."""
    found: dict[str, TensorResult] = {}
    for each in results:
        before = found.setdefault(each.name, each)
        if (bool(each.problem), each.score or 0.0) > (bool(before.problem), before.score or 0.0):
            found[each.name] = each
    return list(found.values())


def _moved(router_logits: Array, chosen: Chosen) -> Array:
    """The logits ``[n, E]`` that make experts the choice."""
    moved: Array = replayed(torch.from_numpy(router_logits), torch.from_numpy(chosen)).numpy()
    return moved
