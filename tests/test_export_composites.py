"""Operators that are translated without decomposing the program, and those that are not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from kinds import KINDS
from onnx.reference import ReferenceEvaluator
from oracle import every_other_is_slow
from torch import nn
from torch.export import Dim, ExportedProgram

from ingot.export.capture import capture, to_onnx


class Composites(nn.Module):
    """Everything that is renamed, with a conversion that changes nothing as an output."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        low, high = (x.flatten(1) > 0) & (y > 0), (x.flatten(1) > 1) | (y < 0)
        kind = torch.promote_types(x.dtype, torch.float64)
        return (
            low.to(torch.int64),
            x.to(torch.float32),
            high.to(kind).view_as(x),
        )


class InPlace(nn.Module):
    """Adds to what it then reads."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = x.flatten(1) * 1
        total.add_(y)
        return total * 2


class Unknown(nn.Module):
    """An operator that is translated only as those it is made of."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.huber_loss(x.flatten(1), y, reduction="none")


@pytest.mark.parametrize("graph", [Composites, InPlace, Unknown])
def test_computes_what_pytorch_does(graph: Callable[[], nn.Module]) -> None:
    module = graph().eval()
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 4), torch.randn(2, 12)
    program = torch.export.export(
        module, inputs, dynamic_shapes=({0: Dim.AUTO}, {0: Dim.AUTO}), strict=False
    )
    made = to_onnx(program).model_proto
    more = torch.randn(5, 3, 4), torch.randn(5, 12)
    expected = module(*more)
    expected = expected if isinstance(expected, tuple) else (expected,)
    names = [value.name for value in made.graph.input]
    feeds = {name: value.numpy() for name, value in zip(names, more, strict=True)}
    found = ReferenceEvaluator(made).run(None, feeds)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize("family", every_other_is_slow(KINDS))
def test_no_family_is_traced_twice(
    family: str,
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the program is decomposed")

    monkeypatch.setattr(ExportedProgram, "run_decompositions", refuse)
    make_ingot(make_checkpoint(family), "onnx", capture=capture, precision="fp32")
