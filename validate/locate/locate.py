"""Where a wrong ingot first goes wrong: the layer, and the node in it.

The canonical graph is captured again from the checkpoint and lowered as the ingot's target was.
That is deterministic, so this *reference* is what the ingot's graph should be, and its values are
paired with the ingot's. Both graphs are then run layer by layer in ONNX Runtime with every value of
the layer as an output. What enters a layer, states included, is the reference's on both sides: each
layer and each call is judged by itself, so that no earlier error, and no router that it turned, can
hide or fake a later one.

Both run in float32, also where the ingot is in half precision (``validate.locate.widen``); what is
then beyond float16, and so is infinite in the ingot, is an overflow. Only one layer's weights are
in memory at a time, and nothing is written. What is not in the graph, such as a session that counts
positions wrongly or an engine with a faulty kernel, is not seen here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx

from ingot.plugins.errors import IngotError
from ingot.validate.identity.checks import Subject
from ingot.validate.judge.metrics import relative_error
from ingot.validate.locate.calls import Fed
from ingot.validate.locate.difference import difference
from ingot.validate.locate.graph import AFTER, BEFORE, Graph, Values, of_ingot, of_model
from ingot.validate.locate.inside import differs, first_inside
from ingot.validate.locate.known import Known
from ingot.validate.locate.overflow import beyond, halves, reader_of_infinite
from ingot.validate.locate.pairs import anchors, pair_values
from ingot.validate.locate.part import LocateError, Part
from ingot.validate.result import Location

# Relative RMS error of one layer's values that rounding explains. Both sides run the same
# kernels on the same inputs, so right values are nearly always equal to the bit; where a changed
# graph makes ONNX Runtime fuse nodes or split sums otherwise, they are near this. Measured: 2e-7
# between a layer as it is run here and the same without optimizations and on one thread, H = 64.
FLOOR = 1e-6
# A value is bad from this many floors on. The smallest change worth finding is far above: it has
# to move the logits by a multiple of their own floor through all the layers behind it.
LIMIT = 10.0


@dataclass(frozen=True)
class Bad:
    """A value that is not as it should be.

    Attributes:
        value: the reference's name of it.
        ratio: its error over the floor.
        detail: what is wrong with it, where that is no error; see ``result.Location``.
        overflow: the largest number that it should hold, where that is beyond float16.
    """

    value: str
    ratio: float
    detail: str = ""
    overflow: float | None = None


def locate(subject: Subject, calls: Sequence[Fed]) -> Location | None:
    """Name the first layer and the first node of an ingot beyond the floor.

    Args:
        subject: the ingot; its hashes are not checked, and an engine is not run.
        calls: of a run whose numbers are wrong, up to the first that fails, where that is known:
            every layer is run for every call. Two or more show a fault in decode.

    Returns:
        The first bad value, by layer, then by call, then in the order of computation; where it is
        wrong by what it reads, and that is a node that only the ingot has, that node. Where all
        values are right, the first that overflows float16, or else the first node that is missing,
        or another operator, or has other attributes, constants or branches than it should, with a
        ratio of 0. None where the graph is as it should be.

    Raises:
        LocateError: the ingot's graph cannot be run, which says up to where it could.
    """
    reference = of_model(subject.captured.model, subject.manifest.precision)
    actual = of_ingot(subject.folder, subject.manifest.precision)
    known = Known(subject.captured.states, calls, subject.manifest.vocab_size)
    search = _Search(reference, actual, known)
    # In the order of computation.
    for position in sorted(set(reference.positions.values())):
        bad = search.first_bad(position)
        # What overflows before is equal on both sides; it is infinite in the ingot all the same.
        first = search.overflow or bad
        if first is not None:
            return search.location(first)
    if reference.precision == "float16" and (infinite := reader_of_infinite(reference)):
        value, weight = infinite
        return search.location(Bad(value, math.inf, f"whose {weight} is beyond float16's 65504"))
    changed = next((name for name in reference.positions if search.differs(name)), None)
    if changed is not None:
        return search.location(Bad(changed, 0.0))
    return None


class _Search:
    """Two graphs, which value of one is which of the other, and what enters their layers."""

    def __init__(self, reference: Graph, actual: Graph, known: Known) -> None:
        self.reference = reference
        self.actual = actual
        self.known = known
        self.pairs = pair_values(reference, actual)
        self.taken = set(self.pairs.values())
        self.overflow: Bad | None = None
        self._halves = halves(actual)

    def location(self, bad: Bad) -> Location:
        """A location by one of the reference's values, in the ingot's names where it has it.

        Where its node does what it should, but reads a node that only the ingot has, it is that.
        """
        value, inside, detail = bad.value, "", bad.detail
        node = self.reference.makers.get(value)
        position = self.reference.positions.get(value, self.actual.positions.get(value, AFTER))
        if value in self.pairs or node is None:
            value = self.pairs.get(value, value)
            found = self.actual.makers[value]
            extra = None
            if node is not None and not differs(self.reference, node, self.actual, found):
                extra = self._only_here_before(found)
            if extra is not None:
                value, position = extra, self.actual.positions[extra]
                found, detail = self.actual.makers[extra], "which should not be there"
            elif node is not None:
                inside = first_inside(self.reference, node, self.actual, found, self.pairs)
            node = found
        layer = None if position in (BEFORE, AFTER) else position
        return Location(layer, node.op_type, value, bad.ratio, inside, detail, bad.overflow)

    def _only_here_before(self, node: onnx.NodeProto) -> str | None:
        """The first of the values on the way to a node that only the ingot has, in one layer."""
        first: str | None = None
        while True:
            before = [
                name
                for name in self.actual.variables(node)
                if name in self.actual.positions
                and name not in self.taken
                and self.actual.positions[name]
                == self.actual.positions.get(first or name, self.actual.positions[name])
            ]
            if not before:
                return first
            first = before[0]
            node = self.actual.makers[first]

    def differs(self, value: str) -> bool:
        """Whether the node that makes a value is missing, or does another thing than it should."""
        if value not in self.pairs:
            return True
        node, found = self.reference.makers[value], self.actual.makers[self.pairs[value]]
        return differs(self.reference, node, self.actual, found)

    def first_bad(self, position: int) -> Bad | None:
        """The first value of one position (of ``Graph.positions``) beyond the limit.

        ``overflow`` is then the first value there that overflows, if none before did.
        """
        reference, pairs = self.reference, self.pairs
        values = [name for name, where in reference.positions.items() if where == position]
        there = self._in_pairs(self.known.calls[0])
        shared, broken = self._computable([n for n in values if n in pairs], there)
        expected = Part(reference, values, self.known.calls[0])
        found, error = self._part(shared, self._only_here(position, there), there)
        bad = self._compared(expected, found, reference.leaving(position))
        if bad is not None:
            return bad
        if error is not None:
            raise error
        # A value without such a name may be left out without harm; what is computed from it tells.
        named = anchors(reference)
        missing = next((name for name in values if name in named and name not in pairs), None)
        if broken is not None:
            return Bad(broken, math.inf, "computed from another value than it should be")
        return None if missing is None else Bad(missing, math.inf, "which the graph does not have")

    def _compared(self, expected: Part, found: Part, kept: Collection[str]) -> Bad | None:
        """The first bad value of two parts, over all calls.

        Args:
            expected: of the reference.
            found: the ingot's.
            kept: what later layers read.
        """
        for call, given in enumerate(self.known.calls):
            want = expected.run(given)
            try:
                have = found.run(self._in_pairs(given))
            except LocateError as error:
                raise LocateError(f"{self.known.stages[call]}: {error}") from error
            other = self.known.keep(call, expected, want, kept)
            for name in expected.values:
                value = self.pairs.get(name, "")
                if value not in have or name not in want:
                    continue
                arrays = want[name], have[value], other[name]
                over = beyond(*arrays, half=value in self._halves)
                ratio = relative_error(*arrays) / FLOOR
                if math.isinf(ratio):
                    return Bad(name, ratio, difference(*arrays), over)
                if ratio > LIMIT:
                    return Bad(name, ratio)
                if over is not None:
                    self.overflow = self.overflow or Bad(name, math.inf, "", over)
            for value in (value for value in found.values if value not in self.taken):
                over = beyond(have[value], have[value], have[value], half=True)
                if over is not None:
                    self.overflow = self.overflow or Bad(value, math.inf, "", over)
        return None

    def _only_here(self, position: int, there: Collection[str]) -> list[str]:
        """The ingot's values of one position that only it has, and that may overflow."""
        values = [n for n in self._halves - self.taken if self.actual.positions.get(n) == position]
        return [value for value in values if self.actual.walk(value, there, set())]

    def _part(
        self, shared: list[str], more: list[str], there: Values
    ) -> tuple[Part, LocateError | None]:
        """The longest begin of some values that the ingot's graph can be run for.

        Args:
            shared: the reference's values.
            more: values of the ingot alone, where it can be run for all.
            there: what the ingot's graph is given.

        Returns:
            The part, and an error that names the first value that it cannot be run for, if there
            is one.
        """

        def tried(count: int) -> tuple[Part | None, IngotError | None]:
            values = [self.pairs[name] for name in shared[:count]]
            values += more if count == len(shared) else []
            try:
                part = Part(self.actual, values, there)
                part.run(there)
            except IngotError as error:
                return None, error
            return part, None

        best, failed = tried(len(shared))
        if best is not None:
            return best, None
        least, most = 0, len(shared)
        while most - least > 1:
            middle = (least + most) // 2
            part, error = tried(middle)
            if part is None:
                most, failed = middle, error
            else:
                least, best = middle, part
        place = self.location(Bad(shared[most - 1], math.inf))
        sentence = f"{place.node}: {failed}"
        return best or Part(self.actual, [], there), LocateError(sentence)

    def _in_pairs(self, known: Values) -> Values:
        """What is known, by the names of the ingot; without what it has no counterpart of."""
        return {self.pairs[name]: array for name, array in known.items() if name in self.pairs}

    def _computable(
        self, values: Sequence[str], there: Collection[str]
    ) -> tuple[list[str], str | None]:
        """Values up to the first whose node reads what is not there at its place, and that one."""
        seen: set[str] = set()
        for index, value in enumerate(values):
            if not self.actual.walk(self.pairs[value], there, seen):
                return list(values[:index]), value
        return list(values), None
