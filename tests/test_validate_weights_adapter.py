"""What an adapter makes of weights, worked out for a validation, against PEFT's own merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_adapter, merged_model
from conftest import MakeCheckpoint
from safetensors.torch import load_file
from test_graphs_merge import CASES

from ingot.validate.identity.weights_checkpoint import Tensors
from ingot.validate.identity.weights_files import Reader

# Fused, as transformers holds them, against any spelling that a file has.
Weights = dict[str, torch.Tensor]


def bounds(base: Path, adapter: Path, names: list[str]) -> dict[str, tuple[Any, Any]]:
    """The least and the most that every element of some weights may be."""
    tensors = Tensors(base, adapter, names)
    result = {}
    with Reader() as reader:
        source = tensors.source(reader)
        for name in names:
            made = tensors.make(name)
            assert made is not None, name
            columns = made.matrices[2]
            rows = [source.rows(made, p, 0, p.rows, columns) for p in made.parts]
            low, high = (np.concatenate([row[n] for row in rows]) for n in (0, 1))
            result[name] = low.reshape(made.shape), high.reshape(made.shape)
    return result


def check_bounds(base: Path, adapter: Path, oracle: Any) -> None:
    """PEFT's merged weights lie within the bounds, and these are as near as float32 allows."""
    expected: Weights = oracle.state_dict()
    tied = bool(oracle.config.tie_word_embeddings)
    names = [name for name in expected if not (tied and name == "lm_head.weight")]
    names = [name for name in names if "rotary" not in name]
    changed = 0
    for name, (low, high) in bounds(base, adapter, names).items():
        right = expected[name].numpy()
        assert right.shape == low.shape and ((low <= right) & (right <= high)).all(), name
        width = np.abs(high.astype(np.float64) - low).max()
        assert width <= 1e-5 * np.abs(right).max(), name
        changed += width > 0
    assert changed or not any(".lora_" in name for name in load_file(adapter / WEIGHTS))


WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("case", CASES)
def test_holds_what_peft_makes_of_every_weight(
    case: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    family, fields, config = CASES[case]
    base = make_checkpoint(family, **fields)
    adapter = make_adapter(base, tmp_path, **config)
    check_bounds(base, adapter, merged_model(base, adapter))
