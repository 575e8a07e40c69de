"""Several calls of a run fed as one: the same tokens behind the same ones, in a few long calls.

What a call computes for a token does not depend on where calls are cut, but for its rounding. So
what is wanted of each token alone, and not to the bit, costs a few calls and not one a token. What
is by row, such as a state of fixed size, is known after the last of the joined calls only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.validate.truth.cache import Recording
from ingot.validate.truth.inputs import Inputs
from ingot.validate.truth.recording import ROUTER_LOGITS, Layout, collect, main_run
from ingot.validate.truth.replay import Chosen

Array = npt.NDArray[Any]

# Columns of a joined call; a longer one of the run's own stays as it is.
MOST_COLUMNS = 512
# Calls that are joined where there are states of fixed size, so that some are known.
MOST_RECURRENT = 8


@dataclass(frozen=True)
class Joined:
    """A run whose calls are joined.

    Attributes:
        inputs: the same tokens in fewer calls, without experts of their own.
        parts: by joined call the numbers of the run's.
        source: the run.
    """

    inputs: Inputs
    parts: tuple[range, ...]
    source: Inputs

    def chosen(self, number: int, of_call: Callable[[int], Sequence[Chosen]]) -> list[Chosen]:
        """The experts ``[B*T, E]`` of one joined call, router by router.

        Args:
            number: of the joined call.
            of_call: gives those of a call of the run.
        """
        rows = len(self.inputs.input_ids)
        by_call = [of_call(each) for each in self.parts[number]]
        return [
            np.concatenate([mask.reshape(rows, -1, mask.shape[-1]) for mask in masks], axis=1)
            .reshape(-1, masks[0].shape[-1])
            .copy()
            for masks in zip(*by_call, strict=True)
        ]

    def collected(self, layout: Layout, number: int, name: str, array: Array) -> Array:
        """What is kept of one tensor of a joined call.

        Returns:
            Of a tensor by token ``[n, ...]``, ordered as the run's calls are; of one by row what
            ``collect`` gives.
        """
        found = collect(layout, self.inputs, main_run(self.inputs)[number], {name: array})[name]
        if layout.of_rows(name) or len(self.parts[number]) == 1:
            return found
        result: Array = found[np.concatenate(list(self._places(number, name)))]
        return result

    def expected(self, layout: Layout, number: int, name: str, recording: Recording) -> Array:
        """What ``collected`` would have given, of a recording of the run."""
        calls = self.parts[number]
        if layout.of_rows(name) or len(calls) == 1:
            return recording[calls[-1]][name]
        return np.concatenate([recording[call][name] for call in calls])

    def by_call(self, layout: Layout, found: Recording, otherwise: Recording) -> Recording:
        """What is kept of the joined calls, as of the run's calls.

        Args:
            layout: of the outputs.
            found: by joined call and name an array ``[n, ...]``, ordered as by ``collected``.
            otherwise: by call of the run what stands in for what is not known after it.
        """
        result: Recording = []
        for number, calls in enumerate(self.parts):
            arrays = found[number]
            result += [dict(otherwise[call]) for call in calls]
            for name, array in arrays.items():
                if layout.of_rows(name) or len(calls) == 1:
                    result[-1][name] = array
                    continue
                stops = np.cumsum([len(otherwise[call][name]) for call in calls])
                for call, part in zip(calls, np.split(array, stops[:-1]), strict=True):
                    result[call][name] = part
        return result

    def scaled(self, layout: Layout, found: Recording, plain: Recording, own: Recording) -> None:
        """Take from squared errors what a long call's kernels round more than those of short ones.

        Args:
            layout: of the outputs.
            found: squared errors ``[n]`` by joined call, in another order of the sums; changed.
            plain: the same in the order of the run itself.
            own: by call of the run, its squared errors.
        """
        for number, calls in enumerate(self.parts):
            for name, array in found[number].items():
                if layout.of_rows(name) or len(calls) == 1:
                    continue
                short, long = self.expected(layout, number, name, own), plain[number][name]
                some = (short > 0) & (long > 0) & np.isfinite(short) & np.isfinite(long)
                if some.any():
                    # The usual token's: one that rounding is amplified at says nothing of kernels.
                    found[number][name] = array * min(1.0, np.median(short[some] / long[some]))

    def _places(self, number: int, name: str) -> Iterator[npt.NDArray[np.int64]]:
        """By call of the run, where its tokens are among those of a joined one."""
        inputs, columns = self.inputs, main_run(self.inputs)[number].columns
        every = name.startswith(ROUTER_LOGITS)
        mask = (inputs.attention_mask != 0 if every else inputs.wanted)[:, columns]
        places = (np.cumsum(mask) - 1).reshape(mask.shape)
        calls = main_run(self.source)
        for part in self.parts[number]:
            own = calls[part].columns
            here = slice(own.start - columns.start, own.stop - columns.start)
            yield places[:, here][mask[:, here]]


def join(inputs: Inputs, *, recurrent: bool, switch: int | None = None) -> Joined:
    """The calls of a run, joined as far as that changes nothing but rounding.

    Args:
        inputs: the run; without state every call begins at the first token, and none is joined.
        recurrent: whether there are states of fixed size.
        switch: see ``graphs.config.Facts.switch_length``; a call beyond it stays by itself.
    """
    calls = main_run(inputs)
    parts: list[range] = []
    for number, call in enumerate(calls):
        length = int(inputs.attention_mask[:, : call.columns.stop].sum(1).max(initial=0))
        last = parts[-1] if parts else range(0)
        width = call.columns.stop - calls[last.start].columns.start
        alone = (
            not inputs.stateful
            or not last
            or width > MOST_COLUMNS
            or (switch is not None and length > switch)
            # A prompt is a long call already, and the state behind it is known as well.
            or last.start == 0
            or (recurrent and len(last) >= MOST_RECURRENT)
        )
        if alone:
            parts.append(range(number, number + 1))
        else:
            parts[-1] = range(last.start, number + 1)
    # The name of a call and its end, as ``Inputs.calls`` has them.
    ends = tuple((calls[part[-1]].stage, calls[part[-1]].columns.stop) for part in parts)
    return Joined(replace(inputs, calls=ends, forced=()), tuple(parts), inputs)
