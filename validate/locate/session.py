"""Whether an ingot's session, and not its graph, goes wrong: in what it feeds, keeps or hands out.

The session is driven through the calls of a validation, and beside it the ingot's own graph in a
plain ONNX Runtime session, whose inputs are worked out here from their definition and share no code
with ``runtime.tokens``. Both run the same graph, so what differs is the session's doing.

Of each call the cause is looked for before its effects. What was fed comes first, and of that the
tokens, the mask, and the positions counted from it. Then the states, in the order of the layers: a
state that was rounded between two calls shows where it was handed out after the first, or where
the second made its successor from it, and in everything behind that layer. The main output, which
follows from all of it, comes last: it alone is wrong where the session only hands it out wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.export.ingot import GRAPH, Manifest
from ingot.graphs.state import LOGITS_TO_KEEP, State
from ingot.plugins.errors import IngotError
from ingot.runtime.onnxruntime_session import open_session
from ingot.runtime.operators import libraries
from ingot.runtime.ort import OrtSession
from ingot.runtime.session import Ids, Session
from ingot.validate.judge.kept import ALONE, COUNTS
from ingot.validate.judge.metrics import relative_error
from ingot.validate.locate.calls import Fed, feeds, one_by_one, real_so_far
from ingot.validate.locate.difference import difference
from ingot.validate.locate.graph import Values
from ingot.validate.locate.locate import FLOOR, LIMIT
from ingot.validate.locate.part import run_graph
from ingot.validate.result import SESSION, Location

AFTER = ", after a reset"

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


def locate_session(
    session: Session, folder: Path, calls: Sequence[Fed], capacity: int | None = None
) -> Location | None:
    """Name the first thing that a session feeds or hands out otherwise than its graph asks for.

    Call it where the graph is known to be right: a fault of the graph is on both sides, and is not
    seen. The session is reset, several times, and its graph is loaded a second time.

    Args:
        session: of the ingot.
        folder: the ingot; its hashes are not checked.
        calls: of a run for which its numbers are wrong.
        capacity: tokens that the run gave the session room for; by default those of the calls.

    Returns:
        The first difference, by call: in an input, at a real position (of the mask at any), with
        an infinite ratio; or in a state or the main output at real positions, with the relative RMS
        error over the floor of ``validate.locate.locate``. A missing or unknown state, and another
        shape, are infinitely wrong. None where there is none, and where the graph cannot be run
        beside the session: in bfloat16, or where an engine runs in its place.
    """
    manifest = Manifest.read(folder)
    engine = manifest.engine is not None and not isinstance(session, OrtSession)
    if engine or manifest.precision == "bfloat16":
        return None
    batch = len(calls[0].input_ids)
    capacity = capacity or sum(call.input_ids.shape[1] for call in calls)
    plain = _Plain(folder, manifest, batch, capacity)
    handed: list[tuple[str, Array, bytes]] = []
    # Once more, since what a reset leaves behind shows in a session that was used: for other
    # tokens, since equal calls leave, and write over, equal numbers, and for more rows.
    for again, rows in (("", batch), (AFTER, batch + 1), (AFTER, 0)):
        session.reset(batch, capacity)
        plain.reset()
        found = _first_wrong(session, plain, manifest, calls, handed)
        if found is not None:
            return replace(found, value=f"{found.value}{again}")
        if rows:
            _use(session, calls, rows, capacity)
        for value, array, before in handed:
            if array.tobytes() != before:
                said = "which later calls write over"
                return Location(None, SESSION, value, math.inf, detail=said)
    return _last_wrong(session, plain, manifest, calls)


def _last_wrong(
    session: Session, plain: _Plain, manifest: Manifest, calls: Sequence[Fed]
) -> Location | None:
    """The first call whose last logits alone are others than its graph's, asked for the same."""
    for count in COUNTS if manifest.task == "generate" else ():
        session.reset(*plain.sizes)
        plain.reset()
        for number, (stage, ids, mask) in enumerate(calls):
            try:
                main = session.step(ids, mask, count)
            except IngotError:
                # It refuses what its graph gives.
                return None
            # As a session hands it out, whatever the precision of the graph.
            last = plain.call(calls, number, count)[0][manifest.main_output]
            expected = last.astype(np.float32)
            real = mask[:, -count:] != 0
            value = f"{manifest.main_output} at {stage}, the last {count}{ALONE}"
            if main.shape != expected.shape:
                said = f"shape {list(main.shape)}, expected {list(expected.shape)}"
                return Location(None, SESSION, value, math.inf, detail=said)
            ratio = relative_error(expected[real], main[real], expected[real]) / FLOOR
            if ratio > LIMIT:
                return Location(None, SESSION, value, ratio)
    return None


def _use(session: Session, calls: Sequence[Fed], rows: int, capacity: int) -> None:
    """Make the calls with other tokens, and as many rows."""
    session.reset(rows, capacity)
    for _, ids, mask in calls:
        each = np.arange(rows) % len(ids)
        session.step(np.roll(ids, 1, axis=1)[each], mask[each])
        session.state()


def _first_wrong(
    session: Session,
    plain: _Plain,
    manifest: Manifest,
    calls: Sequence[Fed],
    handed_out: list[tuple[str, Array, bytes]],
) -> Location | None:
    """The first difference; ``handed_out`` takes each call's main output, as it was then."""
    for number, (stage, ids, mask) in enumerate(calls):
        main = session.step(ids, mask)
        handed_out.append((f"{manifest.main_output} at {stage}", main, main.tobytes()))
        expected, last = plain.call(calls, number)
        wrong = _first_fed_wrong(last, session.fed)
        if wrong is not None:
            return Location(None, SESSION, f"{wrong} at {stage}", math.inf)
        seen = real_so_far(calls, number) != 0 if manifest.states else mask != 0
        expected = _real(expected, manifest, seen, mask != 0)
        handed = {**session.state(), manifest.main_output: main}
        for name, array in handed.items():
            if array.dtype != np.float32:
                said = f"dtype {array.dtype}, expected float32"
                return Location(None, SESSION, f"{name} at {stage}", math.inf, detail=said)
        found = _real(handed, manifest, seen, mask != 0)
        for name in [*expected, *(name for name in found if name not in expected)]:
            ratio = _error(expected.get(name), found.get(name)) / FLOOR
            if ratio > LIMIT:
                detail = _detail(name, expected, found) if math.isinf(ratio) else ""
                return Location(None, SESSION, f"{name} at {stage}", ratio, detail=detail)
    return None


def _first_fed_wrong(by_definition: dict[str, Ids], fed: dict[str, Ids]) -> str | None:
    """The first input fed otherwise than by definition.

    Args:
        by_definition: what it should feed.
        fed: by the session; what it does not tell is not judged.
    """
    tokens = by_definition["input_ids"].shape[1]
    real = by_definition["attention_mask"][:, -tokens:] != 0
    for name, expected in by_definition.items():
        if name not in fed:
            continue
        if fed[name].shape != expected.shape:
            return name
        differs = fed[name] != expected
        if differs.any() if name == "attention_mask" else differs[real].any():
            return name
    return None


class _Plain:
    """The ingot's graph in a session of its own: each call's states are the last call's outputs.

    No buffer is shared here. A cache that a session may append to in place enters with room for
    every token, as the operator asks for, and comes back as a new array of the same length.
    """

    def __init__(self, folder: Path, manifest: Manifest, batch: int, capacity: int) -> None:
        self._session = open_session(folder / GRAPH, libraries=libraries(folder, manifest))
        self._manifest = manifest
        optional = self._session.get_overridable_initializers()
        self._taken = {item.name for item in (*self._session.get_inputs(), *optional)}
        self.sizes = batch, capacity
        self.reset()

    def reset(self) -> None:
        """Begin with empty states."""
        states = self._manifest.states
        self._states = {state.input: _empty(state, *self.sizes) for state in states}

    def call(
        self, calls: Sequence[Fed], number: int, count: int = 0
    ) -> tuple[Values, dict[str, Ids]]:
        """What one call gives, and what is fed in it last, where the graph takes it in pieces.

        Args:
            calls: of the run.
            number: of the call.
            count: of how many of its last tokens there are logits; 0 for all.
        """
        states, main = self._manifest.states, self._manifest.main_output
        by_token = self._manifest.by_token
        before = one_by_one(calls[:number], by_token)
        pieces = one_by_one(calls[: number + 1], by_token)
        found: list[Values] = []
        for at in range(len(before), len(pieces)):
            fed = feeds(pieces, at, states)
            if count and len(pieces) == len(before) + 1:
                fed[LOGITS_TO_KEEP] = np.array([count], dtype=np.int64)
            seen = sum(piece.input_ids.shape[1] for piece in pieces[: at + 1])
            found.append(self._run(fed, seen))
        values = found[-1]
        if len(found) > 1:
            values[main] = np.concatenate([each[main] for each in found], axis=1)
        if count and (len(found) > 1 or LOGITS_TO_KEEP not in self._taken):
            values[main] = values[main][:, -count:]
        return values, fed

    def _run(self, feeds: dict[str, Ids], seen: int) -> Values:
        """The states, cut to the tokens seen, and the main output, by name."""
        names = [*(state.output for state in self._manifest.states), self._manifest.main_output]
        taken = {name: array for name, array in feeds.items() if name in self._taken}
        values = run_graph(self._session, names, {**taken, **self._states})
        self._states = {state.input: values[state.output] for state in self._manifest.states}
        for state in self._manifest.states:
            if state.shared and state.axis is not None:
                values[state.output] = values[state.output].take(range(seen), state.axis)
        return values


def _empty(state: State, batch: int, capacity: int) -> Array:
    """A state before the first call: zeros, and a cache of no tokens or with room for all."""
    return np.zeros(state.shape(batch, capacity if state.shared else 0), dtype=state.dtype)


def _real(values: Values, manifest: Manifest, seen: Mask, new: Mask) -> Values:
    """What one call hands out, states first, in float32 and without the places of padding.

    Args:
        values: by name.
        manifest: of the ingot.
        seen: ``[B, S]``, which tokens of the run are real so far.
        new: ``[B, T]``, which of the call are.
    """
    axes = {state.output: state.axis for state in manifest.states}
    result = {}
    for name, array in values.items():
        axis, real = axes.get(name), seen
        if name == manifest.main_output and array.ndim == 3:
            axis, real = 1, new
        if axis is not None:
            moved = np.moveaxis(array, axis, 1)
            array = moved[real] if moved.shape[:2] == real.shape else array
        result[name] = array.astype(np.float32)
    return result


def _detail(name: str, expected: Values, found: Values) -> str:
    """What is wrong where no error says it."""
    if name not in found:
        return "which is not handed out"
    if name not in expected:
        return "which is no state of the graph"
    return difference(expected[name], found[name], expected[name])


def _error(expected: Array | None, found: Array | None) -> float:
    """Relative RMS error, infinite where one side has no such tensor."""
    if expected is None or found is None:
        return math.inf
    return relative_error(expected, found, expected)
