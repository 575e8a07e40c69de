"""Second moments of what matrices are multiplied with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

import torch

from ingot.export.calibration.products import Products
from ingot.export.calibration.walk import Batch, Walk

# With how many tokens' weight the mean over all experts counts beside an expert's own, as a share
# of its inputs' number: the moments of fewer tokens than inputs do not span them.
PRIOR = 0.25


class Moments:
    """``sum(x x^T)`` over the inputs of each matrix, and how many there were.

    Attributes:
        together: names of matrices that are to have one format.
    """

    def __init__(self) -> None:
        self.together: set[tuple[str, ...]] = set()
        self._sums: dict[tuple[str, int], torch.Tensor] = {}
        self._counts: defaultdict[tuple[str, int], int] = defaultdict(int)

    def see(self, name: str, expert: int, inputs: torch.Tensor) -> None:
        """Add inputs ``[n, K]``.

        Args:
            name: of the matrix.
            expert: its number in a stack, else 0.
            inputs: float32.
        """
        key = name, expert
        size = inputs.shape[-1]
        if key not in self._sums:
            self._sums[key] = torch.zeros(size, size)
        self._sums[key].addmm_(inputs.T, inputs)
        self._counts[key] += len(inputs)

    def of(self, name: str, expert: int = 0) -> torch.Tensor:
        """``[K, K]`` of one matrix: of an expert its own and its stack's mean.

        Raises:
            KeyError: nothing of it, nor of its stack, was seen.
        """
        stack = [key for key in self._sums if key[0] == name]
        own = self._sums.get((name, expert))
        if own is not None and len(stack) == 1:
            return own
        total = sum(self._sums[key] for key in stack)
        if not isinstance(total, torch.Tensor):
            raise KeyError(name)
        mean = total / sum(self._counts[key] for key in stack)
        prior = PRIOR * len(mean)
        return mean if own is None else own + prior * mean

    def leave_out(self, names: Collection[str]) -> None:
        """Forget what was seen of some matrices."""
        for key in [key for key in self._sums if key[0] in names]:
            del self._sums[key], self._counts[key]

    def groups(self) -> list[tuple[str, ...]]:
        """All that were seen, those that are to have one format together."""
        joined = {name: group for group in self.together for name in group}
        return list(dict.fromkeys(joined.get(name, (name,)) for name in self.names()))

    def names(self) -> list[str]:
        """Of all that were seen, in the order of their first inputs."""
        return list(dict.fromkeys(name for name, _ in self._sums))


def of_layer(walk: Walk, number: int, batches: Sequence[Batch]) -> Moments:
    """Of the matrices of a layer, routers left out.

    Args:
        walk: the model, the layer's weights loaded.
        number: of the layer.
        batches: before the layer; they stay there.
    """
    moments, routers = Moments(), set[str]()
    for batch in batches:
        with Products(walk.model, moments.see) as products:
            _, logits = walk.through(number, batch)
        routers |= products.routers(logits)
        moments.together |= products.together
    moments.leave_out(routers)
    return moments


def of_head(walk: Walk, batches: Sequence[Batch]) -> Moments:
    """Of the head.

    Args:
        walk: the model, its head loaded.
        batches: behind the last layer.
    """
    moments = Moments()
    for batch in batches:
        with Products(walk.model, moments.see):
            walk.logits(batch.x)
    return moments
