"""A text through two sets of weights: the logits that a session over each gives, group by group."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.runtime.session import Floats, Ids
from ingot.validate.truth import text as subject
from ingot.validate.truth.eager import EagerSession
from ingot.validate.truth.plain import BlockFormat, plain_checkpoint
from ingot.validate.truth.reference import Reference
from ingot.validate.truth.text import compare_text

ROUNDED = ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight")


@pytest.mark.parametrize("most", [1, 512 * 4 * 24, 1 << 28])
def test_gives_every_call_of_both(tiny: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "MOST_BYTES", most)
    base = Checkpoint.open(tiny)
    plain = plain_checkpoint(base, dict.fromkeys(ROUNDED, BlockFormat(4, 32, True)))
    one = Reference(base, "generate")
    random = np.random.default_rng(2)
    calls = [random.integers(0, 512, shape) for shape in ((2, 9), (2, 9), (1, 5), (1, 30), (1, 1))]
    found: list[tuple[Ids, Floats, Floats]] = []
    compare_text(one, one.of_weights(plain), calls, lambda *each: found.append(each), Stages())
    assert [ids.tolist() for ids, _, _ in found] == [ids.tolist() for ids in calls]
    sides = [EagerSession(weights, "generate", streamed=False) for weights in (base, plain)]
    for ids, *logits in found:
        for session, got in zip(sides, logits, strict=True):
            session.reset(len(ids), ids.shape[1])
            torch.testing.assert_close(
                torch.from_numpy(got), torch.from_numpy(session.step(ids, np.ones_like(ids)))
            )
    assert not np.allclose(found[0][1], found[0][2])
