"""Graphs that are traced once: a trace takes seconds, and many tests start from the same graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ingot.export.capture import Captured, capture
from ingot.export.passes.weights import Weight
from ingot.graphs.layers import Model

Read = Callable[[str, int], torch.Tensor]


class _Trace:
    """One graph; its weights are read by the reader of the copy that reads them."""

    def __init__(
        self, model: Model, precision: torch.dtype, outputs: tuple[str, ...], exact: bool
    ) -> None:
        self._read: Read
        self._captured = capture(
            model,
            lambda name, block: self._read(name, block),
            precision=precision,
            extra_outputs=outputs,
            exact_matrices=exact,
        )

    def copy(self, read: Read) -> Captured:
        model = self._captured.model.clone()
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, Weight):
                value.const_value = self._read_by(value.const_value, read)
        return replace(self._captured, model=model)

    def _read_by(self, weight: Weight, read: Read) -> Weight:
        def block(index: int) -> np.ndarray:
            self._read = read
            return weight.read_block(index)

        assert weight.name is not None
        return Weight(weight.name, tuple(weight.shape.numpy()), weight.dtype, block)


class Traces:
    """``capture`` with a memory: graphs by class of the model, config, precision and outputs.

    Each call gets a copy of its own that reads its weights from its own checkpoint. A test that
    changes what is traced, such as a pass or the model's code, needs ``Traces`` of its own.
    """

    def __init__(self) -> None:
        self._made: dict[Any, _Trace] = {}

    def __call__(
        self,
        model: Model,
        read: Read,
        *,
        precision: torch.dtype = torch.float32,
        extra_outputs: tuple[str, ...] = (),
        exact_matrices: bool = False,
    ) -> Captured:
        key = type(model), repr(model.config), precision, extra_outputs, exact_matrices
        if key not in self._made:
            self._made[key] = _Trace(model, precision, extra_outputs, exact_matrices)
        return self._made[key].copy(read)
