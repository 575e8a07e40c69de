"""Which weights get more bits than the others, so that a model fits a number of bits a weight."""

from __future__ import annotations

from collections.abc import Mapping

from ingot.export.codecs.blocks import Blocks
from ingot.export.request import ExportError
from ingot.graphs.checkpoint import stack_height

Shape = tuple[int, ...]


def raised(
    effects: Mapping[tuple[str, ...], float],
    shapes: Mapping[str, Shape],
    low: Blocks,
    high: Blocks,
    budget: float,
) -> tuple[str, ...]:
    """The weights that are stored in ``high``, all others in ``low``.

    Those come first that lose most by a byte that they save, as long as what they take fits.

    Args:
        effects: what it costs to store weights in ``low``, by the names of those that are to be
            stored alike.
        shapes: of the same weights, ``[N, K]`` or ``[E, N, K]``.
        low: the format of fewer bits.
        high: that of more.
        budget: bits a weight, scales and zero points included, over all of the weights.

    Raises:
        ExportError: less than ``low`` takes.
    """
    weights = sum(_count(shape) for shape in shapes.values())
    used = sum(_bytes(low, shape) for shape in shapes.values())
    allowed = budget * weights / 8
    if used > allowed:
        raise ExportError(
            f"--bits {budget:g} is less than int{low.bits} in blocks of {low.size} takes, "
            f"{used * 8 / weights:.3f} bits a weight with its scales; give more, or larger blocks."
        )
    more = {
        group: sum(_bytes(high, shapes[name]) - _bytes(low, shapes[name]) for name in group)
        for group in effects
    }
    result: list[str] = []
    for group in sorted(effects, key=lambda group: -effects[group] / more[group]):
        if used + more[group] <= allowed:
            used += more[group]
            result += group
    return tuple(result)


def _count(shape: Shape) -> int:
    return stack_height(shape) * shape[-2] * shape[-1]


def _bytes(blocks: Blocks, shape: Shape) -> int:
    return stack_height(shape) * blocks.nbytes(shape[-2], shape[-1])
