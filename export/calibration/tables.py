"""What the rows of a table do to the output: the second moments of its gradient.

A table's row ``w`` that is stored as ``v`` moves the output's distribution by a KL of half of
``(w - v)^T M (w - v)`` in all later positions together, with ``M = mean(g g^T)`` over its uses,
where ``g`` is the gradient, by what was looked up, of the log-probability of tokens that are drawn
from the model's own distribution (the Fisher information; Martens 2014, arXiv:1412.1193). Where the
table is the head as well, its rows move their own logits too, by the second moments of what they
are multiplied with. Both count as often as the token does, so the two add up to one matrix, which
stands for inputs' moments where the table's numbers are chosen.

Gradients go back through the model a layer at a time, from inputs that are kept, so memory holds
one layer here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ingot.export.calibration.scan import scan
from ingot.export.calibration.walk import Batch, Walk
from ingot.export.graph import Opened
from ingot.plugins.mamba2_scan import mamba2_scan
from ingot.plugins.registry import OPERATORS

# Tokens that gradients are taken of.
TOKENS = 4096
SEED = 0


class _Differentiable(TorchFunctionMode):
    """Computes what PyTorch can differentiate, and begins to at what is looked up in a table.

    Attributes:
        found: what was looked up last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = torch.empty(0)
        self._eager = {each.overload: each.eager for each in OPERATORS.values()}
        self._eager[mamba2_scan.overload] = scan

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = self._eager.get(func, func)(*args, **(kwargs or {}))
        if func is F.embedding:
            self.found = result.detach().requires_grad_()
            return self.found
        return result


def table_moments(opened: Opened, sequences: npt.NDArray[np.int64]) -> torch.Tensor:
    """M ``[H, H]`` of a model's table, float32.

    Args:
        opened: the checkpoint, in float32, of a model that ends with logits.
        sequences: token ids ``[n, T]``.
    """
    walk = Walk(opened)
    some = sequences[:: max(1, sequences.size // TOKENS)]
    total = torch.zeros(0)
    with torch.no_grad():
        walk.load(walk.tables)
        batches = list(walk.begin(some))
        inputs = _forward(walk, batches)
        slopes = _at_head(walk, batches)
        if walk.tied:
            total = _behind_the_last(walk, batches)
        for number in reversed(range(len(walk.layers))):
            walk.load(walk.names(number))
            for place, batch in enumerate(batches):
                batch.x = inputs[number][place]
                slopes[place] = _back(walk, number, batch, slopes[place])
            walk.unload(walk.names(number))
        for batch, slope in zip(batches, slopes, strict=True):
            rows = _at_table(walk, batch, slope).flatten(0, -2)
            total = rows.T @ rows + (total if total.numel() else 0)
    return total / some.size


def _forward(walk: Walk, batches: list[Batch]) -> list[list[torch.Tensor]]:
    """By layer and batch what enters it; the batches come out behind the last."""
    result = []
    for number in range(len(walk.layers)):
        walk.load(walk.names(number))
        result.append([batch.x for batch in batches])
        for batch in batches:
            batch.x, _ = walk.through(number, batch)
        walk.unload(walk.names(number))
    return result


def _at_head(walk: Walk, batches: list[Batch]) -> list[torch.Tensor]:
    """The gradient by what enters the final norm, of tokens that are drawn."""
    generator = torch.Generator().manual_seed(SEED)
    if walk.head:
        walk.load([walk.head])
    result = []
    for batch in batches:
        with torch.enable_grad(), _Differentiable():
            x = batch.x.detach().requires_grad_()
            likely = walk.logits(x).flatten(0, -2).log_softmax(-1)
            drawn = torch.multinomial(likely.detach().exp(), 1, generator=generator)
            (slope,) = torch.autograd.grad(likely.gather(-1, drawn).sum(), x)
        result.append(slope)
    return result


def _behind_the_last(walk: Walk, batches: list[Batch]) -> torch.Tensor:
    """``sum(x x^T)`` of what the head is multiplied with, and logits behind it."""
    result = torch.zeros(0)
    table = walk.model.get_parameter(walk.head)
    for batch in batches:
        x = walk.last(batch.x).flatten(0, -2)
        plain = F.linear(x, table)
        # A factor may stand behind the head.
        factor = (walk.logits(batch.x).flatten(0, -2) * plain).sum() / (plain * plain).sum()
        x = x * factor
        result = x.T @ x + (result if result.numel() else 0)
    return result


def _back(walk: Walk, number: int, batch: Batch, slope: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad(), _Differentiable():
        batch.x = batch.x.detach().requires_grad_()
        out, _ = walk.through(number, batch)
        found: torch.Tensor = torch.autograd.grad(out, batch.x, slope)[0]
    return found


def _at_table(walk: Walk, batch: Batch, slope: torch.Tensor) -> torch.Tensor:
    """The gradient by what was looked up: a factor may stand behind the table."""
    with torch.enable_grad(), _Differentiable() as mode:
        x, _ = walk.enter(batch.ids)
        found: torch.Tensor = torch.autograd.grad(x, mode.found, slope)[0]
    return found
