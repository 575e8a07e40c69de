"""How far stored weights are off: sums of squares of a plain computation, and the worst by name."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint

from ingot.graphs.checkpoint import Checkpoint
from ingot.validate.truth import weight_errors as subject
from ingot.validate.truth.plain import BlockFormat, plain_checkpoint
from ingot.validate.truth.weight_errors import place_of, weight_errors

FORM, OTHER = BlockFormat(4, 32, True), BlockFormat(8, 32, True)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", (None, "embed_tokens")),
        ("lm_head.weight", (None, "lm_head")),
        ("model.layers.12.self_attn.q_proj.weight", (12, "self_attn.q_proj")),
        ("model.layers.3.mlp.experts.17.up_proj.weight", (3, "mlp.experts.up_proj")),
        ("backbone.layers.0.mixer.in_proj.weight", (0, "mixer.in_proj")),
        ("model.layers.1.mlp.input_linear.weight", (1, "mlp.input_linear")),
    ],
)
def test_knows_layer_and_kind_by_the_name(name: str, place: tuple[int | None, str]) -> None:
    assert place_of(name) == place


def relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    one, other = (tensor.double().numpy() for tensor in (expected, found))
    return float(np.sqrt(((other - one) ** 2).sum() / (one**2).sum()))


@pytest.mark.parametrize("family", ["olmoe", "jetmoe"])
def test_adds_up_the_matrices_of_a_kind_and_names_the_worst(
    family: str, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several pieces of each matrix.
    monkeypatch.setattr(subject, "AT_ONCE", 1000)
    base = Checkpoint.open(make_checkpoint(family))
    names = [name for name in base.entries if "layers.1." in name and "proj" in name]
    names += [name for name in base.entries if "layers.1.mlp." in name and "linear" in name]
    stored = plain_checkpoint(base, dict.fromkeys(names, FORM))
    plain = plain_checkpoint(base, dict.fromkeys(names, OTHER))
    done: list[int] = []
    found = weight_errors(base, stored, plain, names, done.append)
    assert sum(done) == sum(base.entries[n].end - base.entries[n].begin for n in names)
    assert {(each.layer, each.kind) for each in found} == {place_of(name) for name in names}
    for each in found:
        own = [name for name in names if place_of(name) == (each.layer, each.kind)]
        sides = [torch.cat([side.read(n).reshape(-1) for n in own]) for side in (base, stored)]
        assert each.error == pytest.approx(relative(*sides), rel=1e-9)
        other = torch.cat([plain.read(name).reshape(-1) for name in own])
        assert each.plain == pytest.approx(relative(sides[0], other), rel=1e-9)
        matrices = {
            f"{name}[{number}]" if base.read(name).dim() == 3 else name: pair
            for name in own
            for number, pair in enumerate(_matrices(base, stored, name))
        }
        assert each.matrices == len(matrices)
        errors = {name: relative(*pair) for name, pair in matrices.items()}
        assert each.worst == pytest.approx(max(errors.values()), rel=1e-9)
        assert each.name == max(errors, key=errors.__getitem__)


def _matrices(
    base: Checkpoint, stored: Checkpoint, name: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pair = base.read(name), stored.read(name)
    return list(zip(*pair, strict=True)) if pair[0].dim() == 3 else [pair]


def test_one_matrix_that_is_not_finite_is_the_worst_of_its_kind(tiny: Path) -> None:
    base = Checkpoint.open(tiny)
    names = [f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in range(3)]

    class Damaged(Checkpoint):
        def read(self, name: str) -> torch.Tensor:
            tensor = super().read(name).clone()
            tensor[0, 0] = math.nan if name == names[1] else 1.0
            return tensor

    stored = Damaged(base.path, base.config, base.entries, base.digests, base.sizes)
    (found,) = weight_errors(base, stored, None, names)
    assert math.isnan(found.worst) and found.name == names[1]
    assert found.plain is None
