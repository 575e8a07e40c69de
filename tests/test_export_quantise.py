"""Weights in whole numbers, exported: what ONNX Runtime computes from them, and what is said."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from oracle import relative_rms, tokens
from transformers import AutoModelForCausalLM

from ingot.export.codecs.blocks import Blocks
from ingot.export.ingot import Manifest
from ingot.runtime.loading import load

FAMILIES = ("granite", "jetmoe", "mamba2", "olmoe")
# What stays in float32 by the end of its name in transformers: no matrix, or a router's.
KEPT = ("norm.weight", "bias", "A_log", ".D", "conv1d.weight", "gate.weight", "router.layer.weight")
# Sizes that no block fills: of hidden states, of experts, of vocabularies.
ODD = {
    "granite": {"hidden_size": 72, "intermediate_size": 90, "vocab_size": 251},
    "olmoe": {"hidden_size": 72, "intermediate_size": 50, "vocab_size": 251},
    "jetmoe": {"hidden_size": 72, "intermediate_size": 50, "vocab_size": 251},
    "mamba2": {"hidden_size": 72, "num_heads": 9, "head_dim": 16, "n_groups": 1, "vocab_size": 251},
}


def logits(ingot: Path) -> np.ndarray:
    session = load(ingot, allow_failed=True)
    ids, mask = tokens(Manifest.read(ingot).vocab_size)
    session.reset(len(ids), ids.shape[1])
    return np.asarray(session.step(ids, mask)[mask != 0])


def of_transformers(checkpoint: Path, blocks: Blocks) -> np.ndarray:
    """The logits of transformers in float32 over matrices that are rounded row by row."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith(KEPT):
            rows = parameter.detach().numpy().reshape(-1, parameter.shape[-1])
            wide = blocks.decode(blocks.encode(rows), rows.shape[1])
            parameter.data = torch.from_numpy(wide.reshape(parameter.shape).copy())
    ids, mask = tokens(model.config.vocab_size)
    with torch.inference_mode():
        found = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    return np.asarray(found.logits.numpy()[mask != 0])


@pytest.mark.parametrize("odd", [False, True], ids=["tiny", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_kernels_compute_with_the_rounded_weights(
    family: str, odd: bool, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint(family, **(ODD[family] if odd else {}))
    for size, symmetric in itertools.product((32, 64, 128), (True, False)):
        ingot = make_ingot(
            checkpoint, "ort", weights="int4", block=size, symmetric=symmetric, accuracy="exact"
        )
        expected = of_transformers(checkpoint, Blocks(4, size, symmetric))
        error = relative_rms(expected, logits(ingot))
        assert error < 4e-6, (size, symmetric)
