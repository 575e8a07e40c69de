"""What is right passes, whatever the token ids: every family, in every precision that runs here."""

from __future__ import annotations

import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot

from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.names import FAMILIES
from ingot.validate.run import validate_ingot
from ingot.validate.truth.reference import Reference

SEEDS = 4
# bfloat16 has no runtime without a GPU.
WAYS = {
    "onnx": {"target": "onnx"},
    "ort": {"target": "ort"},
    "float16": {"target": "trt", "precision": "fp16", "builder": "none"},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_passes_on_every_seed(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, family: str, way: str
) -> None:
    torch.set_num_threads(1)
    folder = make_checkpoint(family)
    ingot = make_ingot(folder, **WAYS[way])
    precision = "float16" if way == "float16" else "float32"
    reference = Reference(Checkpoint.open(folder), "generate", precision)
    failures = {}
    worst = 0.0
    flips = 0
    for seed in range(SEEDS):
        report = validate_ingot(ingot, reference, seed=seed)
        worst = max(worst, *(tensor.score or 0.0 for tensor in report.tensors))
        flips += sum(len(routing.flips) for routing in report.routing.values())
        if report.failures:
            failures[seed] = report.failures
    print(f"{family} {way}: worst score {worst:.2f}, {flips} flips")
    assert failures == {}
