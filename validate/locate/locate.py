"""Where a wrong ingot first goes wrong: the layer, and the node in it.

The canonical graph is captured again from the checkpoint and lowered as the ingot's target was.
That is deterministic, so this *reference* is what the ingot's graph should be, and its values are
paired with the ingot's. Both graphs are then run layer by layer in ONNX Runtime with every value of
the layer as an output. What enters a layer, states included, is the reference's on both sides: each
layer and each call is judged by itself, so that no earlier error, and no router that it turned, can
hide or fake a later one.

Both run in float32, also where the ingot is in half precision (``validate.locate.widen``). Only one
layer's weights are in memory at a time, and nothing is written. What is not in the graph, such as a
session that counts positions wrongly or an engine with a faulty kernel, is not seen here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ingot.export.capture import Captured
from ingot.export.graph import Capture, Recipe
from ingot.export.ingot import Manifest
from ingot.export.request import EXTRA_OUTPUTS
from ingot.graphs.checkpoint import Checkpoint
from ingot.validate.judge.metrics import relative_error
from ingot.validate.locate.graph import AFTER, BEFORE, Graph, Part, Values, of_ingot, of_model
from ingot.validate.locate.pairs import anchors, pair_values
from ingot.validate.result import Location
from ingot.validate.truth.inputs import Inputs

# Relative RMS error of one layer's values that rounding explains. Both sides run the same
# kernels on the same inputs, so right values are nearly always equal to the bit; where a changed
# graph makes ONNX Runtime fuse nodes or split sums otherwise, they are near this. Measured: 2e-7
# between a layer as it is run here and the same without optimizations and on one thread, H = 64.
FLOOR = 1e-6
# A value is bad from this many floors on. The smallest change worth finding is far above: it has
# to move the logits by a multiple of their own floor through all the layers behind it.
LIMIT = 10.0


def locate(
    folder: Path,
    checkpoint: Checkpoint,
    inputs: Inputs,
    calls: int | None = None,
    *,
    capture: Capture | None = None,
) -> Location | None:
    """Name the first layer and the first node of an ingot beyond the floor.

    Args:
        folder: an ingot; its hashes are not checked, and an engine is not run.
        checkpoint: what it was made from.
        inputs: for which its numbers are wrong; two or more calls show a fault in decode.
        calls: only the first so many of ``inputs.steps``, where it is known that one of them fails;
            every layer is run for every call.
        capture: traces the eager graph, ``export.capture.capture`` by default.

    Returns:
        The first bad value, by layer, then by call, then in the order of computation; a node that
        only the ingot has is not named itself, but the first that is wrong behind it. Where all
        values are right, the first node that is missing, or another operator, or has other
        attributes or constants than it should, with a ratio of 0. None where the graph is as it
        should be.
    """
    manifest = Manifest.read(folder)
    captured = _captured(manifest, checkpoint, capture)
    reference = of_model(captured.model, manifest.precision)
    actual = of_ingot(folder, manifest.precision)
    known = _Calls(captured, inputs, manifest.vocab_size, calls)
    pairs = pair_values(reference, actual)
    # In the order of computation.
    for position in sorted(set(reference.positions.values())):
        found = _first_bad(reference, actual, known, pairs, position)
        if found is not None:
            return _location(*found, reference, actual, pairs)
    changed = next((n for n in reference.positions if _differs(reference, actual, pairs, n)), None)
    if changed is not None:
        return _location(changed, 0.0, reference, actual, pairs)
    return None


def _location(
    value: str, ratio: float, reference: Graph, actual: Graph, pairs: Mapping[str, str]
) -> Location:
    """A location by one of the reference's values, in the names of the ingot where it has it."""
    position, node = reference.positions[value], reference.makers[value]
    if value in pairs:
        value = pairs[value]
        node = actual.makers[value]
    layer = None if position in (BEFORE, AFTER) else position
    return Location(layer, node.op_type, value, ratio)


def _differs(reference: Graph, actual: Graph, pairs: Mapping[str, str], value: str) -> bool:
    """Whether the node that makes a value is missing, or does another thing than it should."""
    if value not in pairs:
        return True
    node, found = reference.makers[value], actual.makers[pairs[value]]
    return reference.label(node) != actual.label(found)


def _captured(manifest: Manifest, checkpoint: Checkpoint, capture: Capture | None) -> Captured:
    """The graph as the export makes it, lowered for the ingot's target."""
    # A factor is folded over a hidden state only where that is no output, and what is folded
    # shifts the names behind it, so the reference has the outputs that the ingot has.
    named = {output.name.partition(".")[0] for output in manifest.outputs}
    extra = tuple(name for name in EXTRA_OUTPUTS if name in named)
    recipe = Recipe(manifest.target, manifest.task, manifest.precision, extra)
    return recipe.graph(recipe.open(checkpoint), capture=capture)


class _Calls:
    """What is known of every call: its inputs, and of the reference what later layers read.

    Attributes:
        known: by call, values by name.
        padded: the same with other tokens in the padding; empty where there is no padding. An
            element that differs between the two belongs to padding, wherever its tensor has it.
    """

    def __init__(
        self,
        captured: Captured,
        inputs: Inputs,
        vocab_size: int,
        most: int | None,
    ) -> None:
        self._most = most
        self.states = captured.states
        self._batch = inputs.input_ids.shape[0]
        self.known = self._begin(inputs)
        self.padded: list[Values] = []
        masked = inputs.attention_mask == 0
        if masked.any():
            ids = np.where(masked, (inputs.input_ids + 1) % vocab_size, inputs.input_ids)
            self.padded = self._begin(replace(inputs, input_ids=ids))

    def _begin(self, inputs: Inputs) -> list[Values]:
        """Every call's token inputs, and the states of the first."""
        cached = any(state.axis is not None for state in self.states)
        steps = inputs.steps[: self._most]
        known: list[Values] = [dict(inputs.feeds(at, cached=cached)) for _, at in steps]
        for state in self.states:
            known[0][state.input] = np.zeros(state.shape(self._batch, 0), dtype=np.float32)
        return known

    def keep(self, known: list[Values], call: int, found: Values, kept: Collection[str]) -> None:
        """Note what later layers and the next call read, and forget the states just used."""
        for state in self.states:
            if state.output not in found:
                continue
            # Caches of all layers and calls would fill the memory.
            known[call].pop(state.input, None)
            if call + 1 < len(known):
                known[call + 1][state.input] = found[state.output]
        states = {state.output for state in self.states}
        known[call].update({name: found[name] for name in kept if name not in states})


def _first_bad(
    reference: Graph,
    actual: Graph,
    calls: _Calls,
    pairs: Mapping[str, str],
    position: int,
) -> tuple[str, float] | None:
    """The first value of one position beyond the limit, and its error over the floor.

    Args:
        reference: one side.
        actual: the other.
        calls: what is known of each.
        pairs: of ``pair_values``.
        position: of ``Graph.positions``.
    """
    values = [name for name, where in reference.positions.items() if where == position]
    kept = reference.leaving(position)
    given = calls.known[0]
    there = _in_pairs(given, pairs)
    shared, broken = _computable(actual, [n for n in values if n in pairs], there, pairs)
    expected_part = Part(reference, values, given)
    actual_part = Part(actual, [pairs[name] for name in shared], there)
    for call, known in enumerate(calls.known):
        expected = expected_part.run(known)
        other = expected
        if calls.padded:
            other = expected_part.run(calls.padded[call])
            calls.keep(calls.padded, call, other, kept)
        found = actual_part.run(_in_pairs(known, pairs))
        calls.keep(calls.known, call, expected, kept)
        for name in shared:
            ratio = relative_error(expected[name], found[pairs[name]], other[name]) / FLOOR
            if ratio > LIMIT:
                return name, ratio
    # A value without such a name may be left out without harm; what is computed from it tells.
    named = anchors(reference)
    missing = next((name for name in values if name in named and name not in pairs), None)
    wrong = broken or missing
    return (wrong, math.inf) if wrong else None


def _in_pairs(known: Values, pairs: Mapping[str, str]) -> Values:
    """What is known, by the names of the ingot; without what it has no counterpart of."""
    return {pairs[name]: array for name, array in known.items() if name in pairs}


def _computable(
    graph: Graph, values: Sequence[str], there: Collection[str], pairs: Mapping[str, str]
) -> tuple[list[str], str | None]:
    """The values up to the first whose node reads what is not there at its place, and that one."""
    seen: set[str] = set()
    for index, value in enumerate(values):
        if not graph.walk(pairs[value], there, seen):
            return list(values[:index]), value
    return list(values), None
