"""Scales that are best for the columns of large inputs."""

from __future__ import annotations

import torch

from ingot.export.codecs.blocks import Blocks, Encoded, Floats

# What every column counts at least, as a share of their mean.
DAMPING = 0.01


def encode(blocks: Blocks, rows: Floats, moments: torch.Tensor) -> Encoded:
    """Quantise a matrix, each column's squared error counting by its inputs' mean square.

    Args:
        blocks: the format.
        rows: ``[N, K]``, finite.
        moments: second moments of the inputs, ``[K, K]``, of any size.
    """
    squares = moments.diagonal()
    mean = squares.mean()
    if mean <= 0:
        return blocks.encode(rows)
    return blocks.encode(rows, (squares / mean + DAMPING).numpy())
