"""An eager graph that calibration tokens walk through, layer by layer.

Weights are read when their layer is reached, and are gone behind it, so that memory holds one layer
however large the model is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ingot.export.graph import Opened
from ingot.graphs.checkpoint import set_parameter, stack_height
from ingot.graphs.layers import Step

# Told of each finished layer.
Advance = Callable[[int], None]

# Tokens that go through a layer together.
AT_ONCE = 2048


@dataclass
class Batch:
    """Some sequences on their way.

    Attributes:
        ids: ``[B, T]``.
        x: the hidden state so far, ``[B, T, H]``.
        step: what all layers are given.
    """

    ids: torch.Tensor
    x: torch.Tensor
    step: Step


class Walk:
    """A model of its own, on the meta device but for what is loaded.

    Args:
        opened: the checkpoint, in float32.
    """

    def __init__(self, opened: Opened) -> None:
        self.model = copy.deepcopy(opened.model)
        self._read = opened.read
        self._modules = {id(module): name for name, module in self.model.named_modules()}
        self.layers = self.model.decoder.by_layer()
        embeddings = [
            name for name, module in self.model.named_modules() if isinstance(module, nn.Embedding)
        ]
        self.tables = [f"{name}.weight" for name in embeddings]
        self.head = self.model.head_table
        inside = tuple(self._prefix(number) for number in range(len(self.layers)))
        self._small = [
            name
            for name, _ in self.model.named_parameters()
            if not name.startswith(inside) and name not in (*self.tables, self.head)
        ]

    @property
    def tied(self) -> bool:
        """Whether the head is a table as well."""
        return self.head in self.tables

    def _prefix(self, number: int) -> str:
        """What the names of a layer's parameters begin with."""
        return f"{self._modules[id(self.layers[number][0])]}."

    def names(self, number: int) -> list[str]:
        """The parameters of a layer."""
        layer, _ = self.layers[number]
        return [self._prefix(number) + name for name, _ in layer.named_parameters()]

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a parameter."""
        return tuple(self.model.get_parameter(name).shape)

    def original(self, name: str, expert: int = 0) -> torch.Tensor:
        """One matrix as the checkpoint has it; of any other parameter the whole."""
        return self._read(name, expert)

    def load(self, names: Sequence[str]) -> None:
        """Read parameters whole."""
        for name in names:
            shape = self.shape(name)
            height = stack_height(shape)
            if height == 1:
                # Copied: what is read may be a map of the file, and this may be written to.
                value = self._read(name, 0).clone()
            else:
                value = torch.empty(shape)
                for expert in range(height):
                    value[expert] = self._read(name, expert)
            set_parameter(self.model, name, value)

    def unload(self, names: Sequence[str]) -> None:
        """Let go of parameters."""
        for name in names:
            set_parameter(self.model, name, self.model.get_parameter(name).to("meta"))

    def put(self, name: str, expert: int, matrix: npt.NDArray[np.float32]) -> None:
        """Put other numbers in a loaded matrix's place; the parameter stays the same object."""
        parameter = self.model.get_parameter(name).data
        place = parameter[expert] if stack_height(tuple(parameter.shape)) > 1 else parameter
        place.copy_(torch.from_numpy(matrix))

    def begin(self, sequences: npt.NDArray[np.int64]) -> Iterator[Batch]:
        """What enters the first layer; embeddings are to be loaded.

        Args:
            sequences: token ids ``[n, T]``.
        """
        self.load(self._small)
        count, length = sequences.shape
        rows = max(1, AT_ONCE // length)
        for first in range(0, count, rows):
            ids = torch.from_numpy(sequences[first : first + rows].copy())
            yield Batch(ids, *self.enter(ids))

    def enter(self, ids: torch.Tensor) -> tuple[torch.Tensor, Step]:
        """What enters the first layer of ids ``[B, T]``, and what all layers are given."""
        ones = torch.ones_like(ids)
        return self.model.decoder.begin(ids, ones, ones.cumsum(-1) - 1)

    def through(self, number: int, batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """One batch through one loaded layer: what comes out ``[B, T, H]``, and router logits."""
        layer, states = self.layers[number]
        rows = len(batch.ids)
        past = tuple(torch.zeros(state.shape(rows, 0)) for state in states)
        out = layer(batch.x, batch.step, past)
        return out.x, out.router_logits

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The end of the model, its head loaded: ``[B, T, H]`` -> ``[B, T, V]``."""
        return self.model.head(self.last(x), torch.ones(x.shape[:2], dtype=torch.int64))

    def last(self, x: torch.Tensor) -> torch.Tensor:
        """The final norm: ``[B, T, H]`` -> the same."""
        last, _ = self.model.decoder.end((*[x.new_empty(0)] * len(self.layers), x))
        return last
