"""Plain rounding: numbers of a plain loop, and a checkpoint that is read so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ingot.graphs.checkpoint import Checkpoint
from ingot.validate.truth.plain import BlockFormat, plain_checkpoint, plainly_rounded

Array = npt.NDArray[np.float64]


def by_a_loop(weights: Array, form: BlockFormat) -> Array:
    """One block at a time, in float64."""
    result = np.zeros_like(weights)
    for row, numbers in enumerate(weights):
        for begin in range(0, len(numbers), form.block):
            block = numbers[begin : begin + form.block]
            if form.symmetric:
                scale, low = np.abs(block).max() / (2 ** (form.bits - 1) - 1), 0.0
                zero = 0.0
            else:
                low = min(block.min(), 0.0)
                scale = (max(block.max(), 0.0) - low) / (2**form.bits - 1)
                zero = np.rint(-low / scale) if scale else 0.0
            if not scale:
                continue
            steps = np.rint(block / scale)
            if not form.symmetric:
                steps = np.clip(steps + zero, 0, 2**form.bits - 1) - zero
            result[row, begin : begin + form.block] = steps * scale
    return result


@pytest.mark.parametrize("columns", [32, 64, 80, 7])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounds_as_a_plain_loop(bits: int, symmetric: bool, columns: int) -> None:
    random = np.random.default_rng(columns)
    weights = random.standard_t(3, (9, columns)).astype(np.float32)
    weights[2] = 0.0
    weights[3] = np.abs(weights[3])
    weights[4] = -np.abs(weights[4])
    form = BlockFormat(bits, 32, symmetric)
    found = plainly_rounded(torch.from_numpy(weights), form).numpy()
    step = np.abs(weights).max() / (2 ** (bits - 1) - 1)
    difference = np.abs(found - by_a_loop(weights.astype(np.float64), form))
    # In float32 a number in the middle of two steps may go either way.
    assert (difference > 1e-5 * step).sum() <= max(1, weights.size // 100)
    assert difference.max() < 1.01 * step
    np.testing.assert_array_equal(found[2], 0)


def test_keeps_the_shape_of_a_stack_and_takes_half_precision() -> None:
    weights = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1))
    form = BlockFormat(8, 32, True)
    whole = plainly_rounded(weights.bfloat16(), form)
    assert whole.shape == weights.shape and whole.dtype == torch.float32
    torch.testing.assert_close(whole[1], plainly_rounded(weights[1].bfloat16(), form))


def test_a_checkpoint_rounds_what_it_is_told_to_alone(tiny: Path) -> None:
    base = Checkpoint.open(tiny)
    name, other = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate.weight"
    form = BlockFormat(4, 64, False)
    plain = plain_checkpoint(base, {name: form})
    assert torch.equal(plain.read(name), plainly_rounded(base.read(name), form))
    assert not torch.equal(plain.read(name), base.read(name))
    assert torch.equal(plain.read(other), base.read(other))
    assert (plain.dtype(name), plain.dtype(other)) == (torch.float32, base.dtype(other))
    # What is kept of one of them is not taken for another's.
    assert plain.key != plain_checkpoint(base, {name: BlockFormat(4, 32, False)}).key
    assert plain.key != plain_checkpoint(base, {other: form}).key
