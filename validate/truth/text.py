"""A text through the eager graph over two sets of weights, in the memory of one layer.

The logits of a whole text do not fit into memory, so it is taken in groups of windows. Each group
goes through the one model, whose logits are kept, and then through the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ingot.export.progress import Advance, Stages
from ingot.runtime.session import Ids
from ingot.validate.truth.layerwise import Array, Fed, Layerwise, Side
from ingot.validate.truth.reference import Reference

# Bytes of the logits of a group, in float32.
MOST_BYTES = 1 << 28

# Told the ids ``[B, T]`` of a call, and the logits ``[B, T, V]`` of both sides.
Take = Callable[[Ids, Array, Array], None]


def compare_text(
    one: Reference,
    other: Reference,
    calls: Sequence[Ids],
    take: Take,
    stages: Stages,
) -> None:
    """Feed calls, each from an empty state, to both in float32.

    Args:
        one: the model over the one weights.
        other: over the others.
        calls: token ids ``[B, T]``.
        take: told of each call as it is done.
        stages: shows the steps.
    """
    groups = list(_groups(calls, one.vocab_size))
    graphs = [side.layerwise(torch.float32) for side in (one, other)]
    total = sum(graph.layers for graph in graphs) * len(groups)
    with stages.stage("run eager float32 over the text", total, "steps") as advance:
        for group in groups:
            _compare(graphs, one.main_output, group, take, advance)


def _compare(
    graphs: Sequence[Layerwise], main: str, group: Sequence[Ids], take: Take, advance: Advance
) -> None:
    kept: dict[int, Array] = {}

    def keep(run: int, _number: int, name: str, array: Array) -> None:
        if name == main:
            kept[run] = array

    def compare(run: int, _number: int, name: str, array: Array) -> None:
        if name == main:
            take(group[run], kept.pop(run), array)

    runs = [[Fed(ids, np.ones_like(ids))] for ids in group]
    for graph, each in zip(graphs, (keep, compare), strict=True):
        graph.run([Side(runs, each)], advance)


def _groups(calls: Sequence[Ids], vocab_size: int) -> Iterator[list[Ids]]:
    """Calls together whose logits are within ``MOST_BYTES``, one at least."""
    group: list[Ids] = []
    for ids in calls:
        if group and 4 * vocab_size * (sum(map(np.size, group)) + ids.size) > MOST_BYTES:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group
