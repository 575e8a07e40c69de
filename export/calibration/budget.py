"""Which format each weight is stored in, so that a model fits a number of bits a weight.

Of each weight, or of those that are to be stored alike, some format costs less at the output and
takes more bytes. What is asked for is the choice of the least cost in all that fits: a knapsack
with one thing to be taken of each kind (Kellerer, Pferschy and Pisinger 2004, chapter 11).

The weights are gone through one after the other, and of the choices for those so far only such are
kept as no other undercuts in bytes and in cost. That is exact while there are few of them. Beyond
``MOST`` those are kept that are nearest to the line of the best exchange: each weight's formats
have a lower convex hull, the best steps along all hulls are taken as far as the bytes go, and the
first that does not fit says what a byte is worth. What is nearest to that line includes what the
steps alone come to, which is within one step of the best.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ingot.export.codecs.blocks import Blocks
from ingot.export.quantization import BLOCKS
from ingot.export.request import ExportError
from ingot.graphs.checkpoint import stack_height

Shape = tuple[int, ...]
# Names of weights that are stored alike.
Group = tuple[str, ...]
# Of a format: its bytes, and what it costs.
Option = tuple[int, float]

# Choices that are kept of the weights so far.
MOST = 4096


def fitted(
    effects: Mapping[Group, Mapping[Blocks, float]], shapes: Mapping[str, Shape], budget: float
) -> dict[Group, Blocks]:
    """The format of each weight, by the names of those that are stored alike.

    Args:
        effects: what each format costs, of the same weights; nothing is known of how they relate.
        shapes: of the weights, ``[N, K]`` or ``[E, N, K]``.
        budget: bits a weight, scales and zero points included, over all of the weights.

    Raises:
        ExportError: less than the smallest formats take.
    """
    options = {
        group: [(_bytes(blocks, group, shapes), cost) for blocks, cost in formats.items()]
        for group, formats in effects.items()
    }
    weights = sum(_count(shape) for shape in shapes.values())
    least = sum(min(sizes)[0] for sizes in options.values())
    allowed = int(budget * weights / 8)
    if least > allowed:
        sizes = {blocks.size for formats in effects.values() for blocks in formats}
        raise ExportError(
            f"--bits {budget:g} is less than these weights take at the least, "
            f"{least * 8 / weights:.3f} bits each with their scales; give more"
            f"{'' if max(BLOCKS) in sizes else ', or larger blocks'}."
        )
    places = _least_cost(list(options.values()), allowed)
    return {
        group: list(formats)[place]
        for (group, formats), place in zip(effects.items(), places, strict=True)
    }


def _least_cost(options: Sequence[Sequence[Option]], allowed: int) -> list[int]:
    """Which option of each is taken; the smallest of all together fit."""
    rest = sum(min(each)[0] for each in options)
    worth = _worth(options, allowed - rest)
    used, cost = np.zeros(1, np.int64), np.zeros(1)
    kept: list[npt.NDArray[np.int64]] = []
    for each in options:
        rest -= min(each)[0]
        sizes, costs = (np.array(column) for column in zip(*each, strict=True))
        used, cost = (used[:, None] + sizes).reshape(-1), (cost[:, None] + costs).reshape(-1)
        kept.append(_undercut_by_none(used, cost, allowed - rest, worth))
        used, cost = used[kept[-1]], cost[kept[-1]]
    at, places = int(cost.argmin()), []
    for each, found in zip(reversed(options), reversed(kept), strict=True):
        at, place = divmod(int(found[at]), len(each))
        places.append(place)
    return places[::-1]


def _undercut_by_none(
    used: npt.NDArray[np.int64], cost: npt.NDArray[np.float64], allowed: int, worth: float
) -> npt.NDArray[np.int64]:
    """The places of the choices to keep, in the order of their bytes."""
    order = np.lexsort((cost, used))
    order = order[used[order] <= allowed]
    before = np.minimum.accumulate(cost[order])
    order = order[np.append(True, before[1:] < before[:-1])]
    if len(order) > MOST:
        off = cost[order] + worth * used[order]
        order = order[np.sort(np.argpartition(off, MOST)[:MOST])]
    result: npt.NDArray[np.int64] = order
    return result


def _worth(options: Iterable[Sequence[Option]], left: int) -> float:
    """What a byte saves where they are all spent; 0 where all steps fit.

    Args:
        options: of each weight.
        left: bytes that are there beyond the smallest options.
    """
    for worth, more in sorted((step for each in options for step in _steps(each)), reverse=True):
        if more > left:
            return worth
        left -= more
    return 0.0


def _steps(options: Sequence[Option]) -> Iterator[tuple[float, int]]:
    """Along the lower convex hull what a byte saves, and how many there are; the best first."""
    size, cost = min(options)
    while better := [
        ((cost - less) / (more - size), more, less)
        for more, less in options
        if more > size and less < cost
    ]:
        worth, more, less = max(better)
        yield worth, more - size
        size, cost = more, less


def _bytes(blocks: Blocks, group: Group, shapes: Mapping[str, Shape]) -> int:
    return sum(
        stack_height(shape) * blocks.nbytes(shape[-2], shape[-1])
        for shape in (shapes[name] for name in group)
    )


def _count(shape: Shape) -> int:
    return stack_height(shape) * shape[-2] * shape[-1]
