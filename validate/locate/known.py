"""What is known of every call of a run while a graph is computed layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from ingot.graphs.state import State
from ingot.validate.locate.calls import Fed, feeds, other_padding
from ingot.validate.locate.graph import Values
from ingot.validate.locate.part import Part


class Known:
    """The inputs of every call, and of the reference what later layers and calls read.

    Args:
        states: of the graph.
        calls: of the run.
        vocab_size: ids are below it.

    Attributes:
        calls: values by name, call by call.
        stages: the calls' names.
    """

    def __init__(self, states: Sequence[State], calls: Sequence[Fed], vocab_size: int) -> None:
        self._states = states
        self.stages = [call.stage for call in calls]
        self.calls = self._begin(calls)
        # The same with other tokens in the padding. An element that differs between the two belongs
        # to padding, wherever its tensor has it.
        padded = other_padding(calls, vocab_size)
        self._padded = None if padded is None else self._begin(padded)

    def _begin(self, calls: Sequence[Fed]) -> list[Values]:
        """Every call's token inputs, and the states of the first."""
        known: list[Values] = [
            dict(feeds(calls, number, self._states)) for number in range(len(calls))
        ]
        batch = len(calls[0].input_ids)
        for state in self._states:
            known[0][state.input] = np.zeros(state.shape(batch, 0), dtype=np.float32)
        return known

    def keep(self, call: int, part: Part, found: Values, kept: Collection[str]) -> Values:
        """Note what a part of the reference gives in one call, and run it with the other padding.

        Args:
            call: its number; it must be the next of this part.
            part: of the reference.
            found: what it gives.
            kept: what later layers read.

        Returns:
            What it gives with other tokens in the padding; ``found`` where there is none.
        """
        other = found
        if self._padded is not None:
            other = part.run(self._padded[call])
            self._keep(self._padded, call, other, kept)
        self._keep(self.calls, call, found, kept)
        return other

    def _keep(self, known: list[Values], call: int, found: Values, kept: Collection[str]) -> None:
        for state in self._states:
            if state.output not in found:
                continue
            # Caches of all layers and calls would fill the memory.
            known[call].pop(state.input, None)
            if call + 1 < len(known):
                known[call + 1][state.input] = found[state.output]
        states = {state.output for state in self._states}
        known[call].update({name: found[name] for name in kept if name not in states})
