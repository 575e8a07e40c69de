"""What sessions compute when they are fed a validation's inputs, kept call by call.

A recording holds real tokens only, since what a session computes for padding means nothing: of a
tensor by token ``[n, ...]`` in the order of ``places``, and of a cache the positions that a call
added. Of long calls it holds some tokens (``Inputs.wanted``), but every token's router logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ingot.export.ingot import Manifest
from ingot.graphs.state import State
from ingot.runtime.session import Floats, Ids
from ingot.validate.truth.cache import Recording
from ingot.validate.truth.inputs import Inputs

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Places = npt.NDArray[np.int64]

ROUTER_LOGITS = "router_logits."
HIDDEN_STATES = "hidden_states."
# Masks of the experts that were used, ``[n, E]``; see ``validate.truth.probes``.
CHOSEN_EXPERTS = "chosen_experts."

# Elements of a state of fixed size that are kept a row and call; the states of a model of a few
# billion parameters would not fit in memory for every decode step. An error's RMS over so many is
# within a hundredth of that over all.
MOST_ELEMENTS = 2**15


class Stepper(Protocol):
    """What is compared: anything that takes tokens and has state.

    Attributes:
        tapped: see ``runtime.session.Session``.
    """

    tapped: dict[str, Floats]

    def reset(self, batch: int, capacity: int) -> None: ...

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats: ...

    def state(self) -> dict[str, Floats]: ...


@dataclass(frozen=True)
class Call:
    """One call of a run.

    Attributes:
        stage: its name in a report.
        columns: of the inputs, which it feeds.
    """

    stage: str
    columns: slice


class Layout:
    """Which outputs a graph has, and how each lies.

    Args:
        manifest: of an ingot of the graph.
        states: the eager graph's; a damaged ingot's manifest may lack some, and have others.
    """

    def __init__(self, manifest: Manifest, states: Iterable[State]) -> None:
        self.main_output = manifest.main_output
        known: list[State] = [*manifest.states, *states]
        self._axes = {state.output: state.axis for state in known}
        self._kinds = {state.output: str(state.kind) for state in known}
        self._kinds[self.main_output] = "logits" if self.main_output == "logits" else "hidden"
        # A classifier has one output a row, and not one a token.
        main = next(item for item in manifest.outputs if item.name == self.main_output)
        self._of_rows = {name for name, axis in self._axes.items() if axis is None}
        self._of_rows |= {self.main_output} if len(main.shape) < 3 else set()

    def kind(self, name: str) -> str:
        """``logits``, ``hidden``, ``router`` or the kind of a state."""
        return "router" if name.startswith(ROUTER_LOGITS) else self._kinds.get(name, "hidden")

    def axis(self, name: str) -> int | None:
        """The axis along which a cache grows; None of any other output."""
        return self._axes.get(name)

    def of_rows(self, name: str) -> bool:
        """Whether it is ``[B, ...]``, and not by token."""
        return name in self._of_rows


def numbered(names: Iterable[str], prefix: str) -> list[str]:
    """The names of one kind of tap, in the order of their numbers; a graph has others like them."""
    found = [n for n in names if n.startswith(prefix) and n.removeprefix(prefix).isdecimal()]
    return sorted(found, key=lambda name: int(name.removeprefix(prefix)))


def all_router_logits(tensors: Tensors) -> list[Array]:
    """The router logits ``[n, E]`` of one call, in the order the routers run."""
    return [tensors[name] for name in numbered(tensors, ROUTER_LOGITS)]


def all_chosen_experts(tensors: Tensors) -> dict[int, Array]:
    """The experts ``[n, E]`` that were used in one call, by the number of the router.

    Only those that could be read, of a graph with taps.
    """
    names = numbered(tensors, CHOSEN_EXPERTS)
    return {int(name.removeprefix(CHOSEN_EXPERTS)): tensors[name] for name in names}


def by_router(calls: Iterable[Sequence[Array]]) -> list[Array]:
    """What each router has in some calls ``[n, E]``, of which each lists it in their order."""
    return [np.concatenate(each) for each in zip(*calls, strict=True)]


def taken_experts(calls: Sequence[Tensors]) -> dict[int, Array]:
    """The experts ``[n, E]`` that kernels took over all calls, by router, where it is known."""
    found = [all_chosen_experts(call) for call in calls]
    return {router: np.concatenate([each[router] for each in found]) for router in found[0]}


def main_run(inputs: Inputs) -> list[Call]:
    """The calls of a run."""
    return [Call(stage, columns) for stage, columns in inputs.steps]


def fed(inputs: Inputs, call: Call) -> tuple[Ids, Ids]:
    """Token ids and mask of a call."""
    return inputs.input_ids[:, call.columns], inputs.attention_mask[:, call.columns]


def places(inputs: Inputs, call: Call) -> Places:
    """``[n, 2]``: row and column of each real token of a call, row by row."""
    real = np.argwhere(fed(inputs, call)[1] != 0)
    result: Places = real + np.array((0, call.columns.start))
    return result


def collect(layout: Layout, inputs: Inputs, call: Call, tensors: Mapping[str, Array]) -> Tensors:
    """What is kept of one call's outputs, states and taps."""
    real = fed(inputs, call)[1] != 0
    kept = inputs.wanted[:, call.columns]
    result: Tensors = {}
    for name, array in tensors.items():
        axis = layout.axis(name)
        if axis is not None:
            result[name] = _added(array, axis, call, kept)
        elif layout.of_rows(name):
            result[name] = array if name == layout.main_output else _thinned(array)
        elif name.startswith((ROUTER_LOGITS, CHOSEN_EXPERTS)):
            result[name] = array[real.reshape(-1)]
        elif array.shape[:2] == kept.shape:
            result[name] = array[kept]
        else:
            # Of a state that nobody knows, or misshapen; it fails by its name or its shape.
            result[name] = array
    return result


def _added(cache: Array, axis: int, call: Call, kept: npt.NDArray[np.bool_]) -> Array:
    """The positions ``[n, Hkv, D]`` that a call added to a cache; they are its last."""
    if cache.shape[axis] != call.columns.stop:
        # One of another length is left as it is, and fails by its shape.
        return cache
    added = call.columns.stop - call.columns.start
    return np.moveaxis(cache, axis, 1)[:, -added:][kept]


def record(
    session: Stepper,
    layout: Layout,
    inputs: Inputs,
    prepare: Callable[[int], object] = lambda _number: None,
    advance: Callable[[int], None] = lambda _calls: None,
) -> Recording:
    """Feed a run to a session and keep what it gives, its taps included.

    Args:
        session: reset at the begin of the run.
        layout: of the outputs.
        inputs: to feed.
        prepare: told the number of each call before it.
        advance: told of each finished call.
    """
    recording: Recording = []
    for number, call in enumerate(main_run(inputs)):
        prepare(number)
        recording.append(observe(session, layout, inputs, call))
        advance(1)
    return recording


def observe(session: Stepper, layout: Layout, inputs: Inputs, call: Call) -> Tensors:
    """Feed one call to a session, after a reset where a run begins, and keep what it gives."""
    ids, mask = fed(inputs, call)
    if call.columns.start == 0:
        session.reset(len(ids), inputs.capacity)
    main = session.step(ids, mask)
    tensors = {layout.main_output: main, **session.state(), **session.tapped}
    return collect(layout, inputs, call, tensors)


def collect_whole(
    layout: Layout, inputs: Inputs, calls: Sequence[Call], state: Mapping[str, Array]
) -> Tensors:
    """The caches ``[n, Hkv, D]`` after some calls, ordered as the calls were."""
    result: Tensors = {}
    for name, cache in state.items():
        axis = layout.axis(name)
        if axis is None:
            continue
        if cache.shape[axis] != calls[-1].columns.stop:
            result[name] = cache
            continue
        by_position = np.moveaxis(cache, axis, 1)
        parts = [by_position[:, c.columns][fed(inputs, c)[1] != 0] for c in calls]
        result[name] = np.concatenate(parts)
    return result


def whole(layout: Layout, recording: Recording) -> Tensors:
    """The caches ``[n, Hkv, D]`` of a recording after its last call, ordered as the calls were."""
    names = [name for name in recording[0] if layout.axis(name) is not None]
    return {name: np.concatenate([call[name] for call in recording]) for name in names}


def _thinned(array: Array) -> Array:
    """Elements of a large state at even distances, ``[B, k]``; a small one as it is."""
    rows = array.reshape(len(array), -1)
    if rows.shape[1] <= MOST_ELEMENTS:
        return array
    # Odd, so that it meets every residue of sizes that are powers of two.
    kept = np.ascontiguousarray(rows[:, :: rows.shape[1] // MOST_ELEMENTS | 1])
    # A sum with NaN or infinity is none, so one outside of what is kept is seen all the same.
    kept[~np.isfinite(rows.sum(axis=1, dtype=np.float64)), 0] = np.nan
    return kept
