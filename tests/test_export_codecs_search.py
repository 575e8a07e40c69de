"""The search for scales, against all ranges there are; nothing else turns what it finds."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest

from ingot.export.codecs import blocks as blocks_module
from ingot.export.codecs.blocks import Bits, Blocks, Floats
from ingot.export.codecs.search import search


def best_of_all(block: np.ndarray, counts: np.ndarray, bits: int, symmetric: bool) -> float:
    """The least error of many scales and of every zero point, in float64, one block at a time."""
    most = 2**bits - 1
    width = block.max() - block.min() if not symmetric else 2 * np.abs(block).max()
    least = np.inf
    for zero in [most // 2 + 1] if symmetric else range(most + 1):
        for steps in np.linspace(most * 0.5, most * 2.2, 300):
            for sign in (1, -1) if symmetric else (1,):
                scale = sign * width / steps
                moved = np.clip(np.rint(block / scale) + zero, 0, most) - zero
                below = (counts * moved**2).sum()
                fitted = (counts * block * moved).sum() / below if below else 0.0
                least = min(least, (counts * (block - fitted * moved) ** 2).sum())
    return float(least)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_is_near_the_best_of_all_ranges(symmetric: bool, weighted: bool) -> None:
    random = np.random.default_rng(11)
    blocks = random.standard_t(5, (32, 12)).astype(np.float32)
    counts = random.lognormal(0, 1, blocks.shape).astype(np.float32)
    if not weighted:
        counts[:] = 1
    found = search(blocks.copy(), 4, symmetric, counts if weighted else None)
    zeros = np.full(12, 8.0) if found.zeros is None else found.zeros
    decoded = (found.numbers - zeros).astype(np.float64) * found.scales
    errors = (counts * (decoded - blocks) ** 2).sum(axis=0)
    least = [
        best_of_all(block.astype(np.float64), count.astype(np.float64), 4, symmetric)
        for block, count in zip(blocks.T, counts.T, strict=True)
    ]
    assert errors.sum() < (1.04 if weighted else 1.015) * sum(least)
    # And none by much: a block that was left out of the search would be off by more.
    assert (errors < 1.3 * np.array(least)).all()


@pytest.mark.parametrize(
    "format_",
    [
        Blocks(bits, 32, symmetric)
        for bits, symmetric in itertools.product(get_args(Bits), (True, False))
    ],
    ids=str,
)
def test_finds_the_same_whatever_is_searched_with_it(
    format_: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(3)
    weights: Floats = random.standard_t(4, (37, 100)).astype(np.float32)
    importance = random.lognormal(0, 1, 100).astype(np.float32)
    for counts in (None, importance):
        found = []
        for at_once, threads in ((1 << 15, "1"), (1, "2"), (1000, "2")):
            monkeypatch.setattr(blocks_module, "AT_ONCE", at_once)
            monkeypatch.setenv("OMP_NUM_THREADS", threads)
            found.append(format_.encode(weights, counts))
        alone = [format_.encode(row[None], counts) for row in weights]
        for other in found[1:]:
            np.testing.assert_array_equal(found[0].data, other.data)
            np.testing.assert_array_equal(found[0].scales, other.scales)
        np.testing.assert_array_equal(found[0].data, np.concatenate([e.data for e in alone]))
        np.testing.assert_array_equal(found[0].scales, np.concatenate([e.scales for e in alone]))


def test_a_block_of_which_nothing_counts_is_still_near() -> None:
    weights = np.random.default_rng(5).standard_normal((4, 96)).astype(np.float32)
    importance = np.ones(96, np.float32)
    importance[32:64] = 0.0
    found = Blocks(4, 32).decode(Blocks(4, 32).encode(weights, importance), 96)
    assert ((found - weights) ** 2).mean() < 0.02


def test_importance_of_any_size_finds_the_same() -> None:
    random = np.random.default_rng(6)
    weights = random.standard_normal((4, 64)).astype(np.float32)
    importance = random.lognormal(0, 1, 64).astype(np.float32)
    plain = Blocks(4, 32).encode(weights, importance)
    for power in (-60, 60):
        scaled = Blocks(4, 32).encode(weights, importance * np.float32(2.0**power))
        np.testing.assert_array_equal(scaled.data, plain.data)
        np.testing.assert_array_equal(scaled.scales, plain.scales)
