"""How far the weights that an ingot stores are from its checkpoint's, matrix by matrix."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ingot.export.progress import Advance
from ingot.graphs.checkpoint import Checkpoint, stack_height
from ingot.validate.quantisation import WeightError

# Elements that are compared at a time: few enough to stay in a cache.
AT_ONCE = 1 << 17

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass
class _Sums:
    """Sums of squares over the matrices of one kind: of the weights and of each side's errors."""

    matrices: int = 0
    weights: float = 0.0
    stored: float = 0.0
    plain: float = 0.0
    worst: float = -1.0
    name: str = ""


def weight_errors(
    original: Checkpoint,
    stored: Checkpoint,
    plain: Checkpoint | None,
    names: Iterable[str],
    advance: Advance = lambda _bytes: None,
) -> tuple[WeightError, ...]:
    """The errors of some tensors, by layer and kind.

    Args:
        original: the checkpoint.
        stored: the same as an ingot stores it.
        plain: the same as plain rounding leaves it, if that is asked for.
        names: of the tensors that lose something.
        advance: told the bytes of each tensor.
    """
    found: dict[tuple[int | None, str], _Sums] = defaultdict(_Sums)
    for name in names:
        sums = found[place_of(name)]
        for expected, which in _matrices(original, name):
            sides = [
                side.read(name) if which is None else side.read_row(name, which)
                for side in (stored, plain)
                if side is not None
            ]
            size, error, *of_plain = _squares(expected, sides)
            sums.matrices += 1
            sums.weights, sums.stored = sums.weights + size, sums.stored + error
            sums.plain += sum(of_plain)
            relative = _relative(error, size)
            # No comparison with NaN is true; it is worse than any number.
            if math.isnan(relative) or relative > sums.worst:
                sums.worst = relative
                sums.name = name if which is None else f"{name}[{which}]"
        entry = original.entries[name]
        advance(entry.end - entry.begin)
    order = sorted(found, key=lambda place: (place[0] is not None, place[0] or 0))
    return tuple(
        WeightError(
            layer,
            kind,
            sums.matrices,
            _relative(sums.stored, sums.weights),
            sums.worst,
            sums.name,
            None if plain is None else _relative(sums.plain, sums.weights),
        )
        for layer, kind in order
        for sums in (found[layer, kind],)
    )


def place_of(name: str) -> tuple[int | None, str]:
    """The layer of a tensor of the checkpoint, and its kind."""
    found = _LAYER.search(name)
    if found is None:
        return None, name.removesuffix(".weight").rpartition(".")[2]
    return int(found[1]), _NUMBER.sub("", found[2]).removesuffix(".weight")


def _matrices(original: Checkpoint, name: str) -> Iterator[tuple[torch.Tensor, int | None]]:
    """Each matrix of a tensor with its number in a stack; one by itself has none."""
    tensor = original.read(name)
    if stack_height(tuple(tensor.shape)) == 1:
        yield tensor, None
        return
    for number, matrix in enumerate(tensor):
        yield matrix, number


def _squares(expected: torch.Tensor, sides: list[torch.Tensor]) -> list[float]:
    """The sum of squares of a matrix, and of each side's differences from it."""
    result = [0.0] * (1 + len(sides))
    flat, others = expected.reshape(-1), [side.reshape(-1) for side in sides]
    for first in range(0, len(flat), AT_ONCE):
        wide = flat[first : first + AT_ONCE].double()
        result[0] += float(wide @ wide)
        for number, other in enumerate(others):
            moved = other[first : first + AT_ONCE].double() - wide
            result[1 + number] += float(moved @ moved)
    return result


def _relative(error: float, size: float) -> float:
    """RMS of a difference over RMS of the weights, of their squares."""
    if not size:
        return math.inf if error else 0.0
    return math.sqrt(error / size)
