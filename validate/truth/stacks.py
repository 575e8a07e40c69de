"""The experts of one layer as wide as operators compute in, for all calls that go through it.

An operator widens the experts that it is asked for, in every call again. Where each layer serves
many calls, of a token or a few mostly, that takes longer than the products. So a stack is widened
as it is read, where it fits. The next layer's is put in the same memory: to touch a page for the
first time costs as much as to fill it several times.
"""

from __future__ import annotations

import math

import torch

from ingot.graphs.checkpoint import Checkpoint, Part, assemble
from ingot.validate.truth.eager import free_memory

# Bytes of the stacks of one layer that are held wide: room for the largest layer of a released
# checkpoint here, OLMoE-1B-7B's with 3.2 GB in float64 (JetMoE-8B's takes 2.8 GB), beside which
# there is no session yet. Of a larger one the stacks that do not fit are kept as they are stored.
MOST_WIDE = 2**32


class Stacks:
    """Reads the stacks of one layer after another.

    Args:
        checkpoint: the weights.
        precision: of activations.
    """

    def __init__(self, checkpoint: Checkpoint, precision: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._wide = torch.promote_types(precision, torch.float32)
        self._held: dict[str, torch.Tensor] = {}
        # Of a small machine half of what is free, as for a session.
        self._room = min(MOST_WIDE, free_memory() // 2)

    def read(
        self, name: str, parts: tuple[Part, ...], shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """One stack; what was read under the same name before is overwritten.

        Args:
            name: of the parameter within its layer.
            parts: what it is made of.
            shape: ``[E, ...]``.
            dtype: that each number is rounded to.

        Returns:
            The stack in the dtype that operators compute in, or in ``dtype`` where that would take
            too much memory.
        """
        if self._as_stored(parts, dtype) or (out := self._memory(name, shape)) is None:
            return assemble(self._checkpoint, parts, shape, dtype)
        at = 0
        for part in parts:
            some = self._checkpoint.read(part.name).reshape(-1)
            out[at : at + len(some)] = some.to(dtype)
            at += len(some)
        return out.reshape(shape)

    def _as_stored(self, parts: tuple[Part, ...], dtype: torch.dtype) -> bool:
        """Whether the stack is one tensor as wide as it is wanted, of which no copy is needed."""
        return len(parts) == 1 and self._checkpoint.dtype(parts[0].name) == dtype == self._wide

    def _memory(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Room for a wide stack; None where there is none."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is not None and len(held) == size:
            return held
        # Of another kind of layer.
        self._held.pop(name, None)
        taken = sum(each.nbytes for each in self._held.values())
        if taken + size * self._wide.itemsize > self._room:
            return None
        self._held[name] = torch.empty(size, dtype=self._wide)
        return self._held[name]
