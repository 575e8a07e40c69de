"""What the recorded runs say of the tokens of any other run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ingot.validate.truth.cache import Recording
from ingot.validate.truth.recording import (
    CHOSEN_EXPERTS,
    ROUTER_LOGITS,
    Array,
    Call,
    Layout,
    Tensors,
    main_run,
)
from ingot.validate.truth.reference import References
from ingot.validate.truth.runs import Run

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Places:
    """Where some tokens lie in a recording.

    Attributes:
        calls: ``[n]``, the call that recorded each.
        indices: ``[n]``, its index there.
    """

    calls: Numbers
    indices: Numbers

    @cached_property
    def _by_call(self) -> list[tuple[int, Numbers, Numbers]]:
        """Each call that recorded some: its number, which tokens, and their indices there."""
        tokens = {int(call): np.flatnonzero(self.calls == call) for call in np.unique(self.calls)}
        return [(call, here, self.indices[here]) for call, here in tokens.items()]

    def take(self, recording: Recording, name: str, sizes: Sequence[int]) -> Array:
        """One tensor's numbers ``[n, ...]``.

        Args:
            recording: of the calls.
            name: of the tensor.
            sizes: how many tokens each call recorded.
        """
        for call, _, _ in self._by_call:
            array = recording[call][name]
            if len(array) != sizes[call]:
                # One of another shape is left as it is, and fails by it.
                return array
        if not self._by_call:
            nothing: Array = recording[0][name][:0]
            return nothing
        some = recording[self._by_call[0][0]][name]
        found: Array = np.empty((len(self.calls), *some.shape[1:]), dtype=some.dtype)
        for call, here, indices in self._by_call:
            found[here] = recording[call][name][indices]
        return found


class Material:
    """The recorded runs of one set of token ids, and what they say of every run's calls.

    Args:
        layout: of the outputs.
        runs: of ``validate.truth.runs.make_runs``.
        references: of the recorded ones, in order.
    """

    def __init__(
        self, layout: Layout, runs: Sequence[Run], references: Sequence[References]
    ) -> None:
        self.layout = layout
        self.runs = list(runs)
        self.references = list(references)
        recorded = [run for run in runs if run.recorded]
        self._found: dict[tuple[str, int], tuple[_Places, _Places, _Places]] = {}
        self._sources = [_Source(run) for run, _ in zip(recorded, references, strict=True)]

    @property
    def recorded(self) -> list[tuple[Run, References]]:
        """The recorded runs, the main run first."""
        runs = [run for run in self.runs if run.recorded]
        return list(zip(runs, self.references, strict=True))

    def sides(self, run: Run) -> tuple[Recording, Recording, Recording]:
        """The recordings that a run is compared with: expected, truth and eager."""
        references = self.references[run.source]
        return references.expected, references.truth, references.eager

    def noise(self, run: Run) -> Recording:
        """The squared errors by token of several eager runs; see ``validate.truth.noise``."""
        return self.references[run.source].noise

    def cut(
        self,
        run: Run,
        number: int,
        recording: Recording,
        wanted: Callable[[str], bool] = lambda _name: True,
    ) -> Tensors:
        """What a recording says of one call of a run, as if that call had been recorded.

        Args:
            run: one of ``runs``.
            number: of its call.
            recording: one of ``sides(run)``, or ``noise(run)``.
            wanted: which names.

        Returns:
            By name what ``validate.truth.recording.observe`` gives for the call. Of what is by row
            there are the rows ``rows(run, number)``, and none where that is empty.
        """
        if run.recorded:
            return {name: array for name, array in recording[number].items() if wanted(name)}
        source = self._sources[run.source]
        kept, real, ends = self._places(run, number)
        result: Tensors = {}
        for name in filter(wanted, recording[0]):
            if self.layout.of_rows(name):
                if len(ends.calls):
                    result[name] = ends.take(recording, name, source.rows)
            elif name.startswith((ROUTER_LOGITS, CHOSEN_EXPERTS)):
                result[name] = real.take(recording, name, source.real)
            else:
                result[name] = kept.take(recording, name, source.kept)
        return result

    def _places(self, run: Run, number: int) -> tuple[_Places, _Places, _Places]:
        """Of one call the recorded tokens, all real tokens, and the ends of its rows."""
        key = run.name, number
        if key not in self._found:
            call, source = main_run(run.inputs)[number], self._sources[run.source]
            self._found[key] = (
                source.places(run, call, kept=True),
                source.places(run, call, kept=False),
                source.ends(run, call),
            )
        return self._found[key]

    def rows(self, run: Run, number: int) -> list[int]:
        """The rows of a run whose state after a call is known."""
        if run.recorded:
            return list(range(len(run.rows)))
        call = main_run(run.inputs)[number]
        return self._sources[run.source].known(run, call)


class _Source:
    """One recorded run: where its tokens are.

    Attributes:
        real: by call, how many real tokens it has.
        kept: by call, how many of them are recorded.
        rows: by call, its rows.
    """

    def __init__(self, run: Run) -> None:
        inputs = run.inputs
        calls = main_run(inputs)
        shape = (2, *inputs.input_ids.shape)
        self._real = np.full(shape, -1, dtype=np.int64)
        self._kept = np.full(shape, -1, dtype=np.int64)
        self._ends: dict[tuple[int, int], int] = {}
        self.real: list[int] = []
        self.kept: list[int] = []
        self.rows = [len(run.rows)] * len(calls)
        for number, call in enumerate(calls):
            masks = inputs.attention_mask[:, call.columns] != 0, inputs.wanted[:, call.columns]
            tables = (self._real, self.real), (self._kept, self.kept)
            for mask, (table, counts) in zip(masks, tables, strict=True):
                row, column = np.nonzero(mask)
                # Without state a token is in many calls; the first will do.
                new = table[0, row, column + call.columns.start] < 0
                at = row[new], column[new] + call.columns.start
                table[0][at], table[1][at] = number, np.flatnonzero(new)
                counts.append(len(row))
            ends = inputs.attention_mask[:, : call.columns.stop].sum(1).tolist()
            for index, count in enumerate(ends):
                self._ends.setdefault((index, count), number)

    def places(self, run: Run, call: Call, *, kept: bool) -> _Places:
        """Of a call's real tokens, or of those that are recorded."""
        mask = run.inputs.wanted if kept else run.inputs.attention_mask != 0
        row, column = np.nonzero(mask[:, call.columns])
        source = np.array(run.rows)[row], run.columns[:, call.columns][row, column]
        table = self._kept if kept else self._real
        return _Places(table[0][source], table[1][source])

    def _counted(self, run: Run, call: Call) -> list[tuple[int, int]]:
        """By row the source's row, and its tokens after a call."""
        counts = run.inputs.attention_mask[:, : call.columns.stop].sum(1)
        return list(zip(run.rows, map(int, counts), strict=True))

    def known(self, run: Run, call: Call) -> list[int]:
        """The rows that ended after as many tokens in some recorded call."""
        return [row for row, end in enumerate(self._counted(run, call)) if end in self._ends]

    def ends(self, run: Run, call: Call) -> _Places:
        """The ends of those rows."""
        found = [end for end in self._counted(run, call) if end in self._ends]
        calls = np.array([self._ends[end] for end in found], dtype=np.int64)
        return _Places(calls, np.array([row for row, _ in found], dtype=np.int64))
