"""Weights in panels for tests of the CPU kernels, and what they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ingot.plugins.cpu.panels import (
    Bytes,
    Floats,
    Format,
    Whole,
    pack_floats,
    pack_whole,
    scales_stored,
)

FORMATS = (
    Format("float32"),
    Format("bfloat16"),
    *(
        Format(numbers, block, zero_points)
        for numbers in ("int8", "int4")
        for block, zero_points in ((32, False), (32, True), (64, True), (128, False))
    ),
)
TARGETS = ("avx512-vnni", "avx512", "avx2", "sse2", "neon", "neon_without_aes", "reference")


def drawn(form: Format, rows: int, columns: int, seed: int) -> tuple[Bytes, Floats]:
    """A weight ``[rows, columns]`` in panels, and what it stands for."""
    rng = np.random.default_rng(seed)
    if not form.block:
        matrix = rng.standard_normal((rows, columns)).astype(np.float32)
        if form.numbers == "bfloat16":
            matrix = (matrix.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return pack_floats(form, matrix), matrix
    # What lies behind the last column has no part in any product, whatever it is.
    blocks = -(-columns // form.block)
    numbers = rng.integers(0, 1 << form.bits, (rows, blocks, form.block), np.uint8)
    scales = scales_stored((rng.uniform(0.1, 2, (rows, blocks)) / form.middle).astype(np.float32))
    zeros = rng.integers(0, 1 << form.bits, (rows, blocks), np.uint8) if form.zero_points else None
    zero = form.middle if zeros is None else zeros[..., None].astype(int)
    matrix = ((numbers.astype(int) - zero) * scales[..., None]).astype(np.float32)
    data = pack_whole(form, Whole(numbers, scales, zeros))
    return data, np.ascontiguousarray(matrix.reshape(rows, -1)[:, :columns])


def rounded(x: npt.NDArray[Any], form: Format) -> npt.NDArray[np.float64]:
    """x ``[N, K]`` as products with such a weight may round it.

    In int8 by blocks, each with the scale of its largest number; or in bfloat16.
    """
    if form.numbers == "float32":
        return x.astype(np.float64)
    x = x.astype(np.float32)
    if form.numbers == "bfloat16":
        return torch.from_numpy(x).bfloat16().double().numpy()
    block = form.block
    result = np.zeros(x.shape)
    for begin in range(0, x.shape[1], block):
        part = x[:, begin : begin + block]
        most = np.abs(part).max(axis=1, keepdims=True)
        inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
        whole = np.rint(part * inverse)
        result[:, begin : begin + block] = whole.astype(np.float64) * (most / np.float32(127))
    return result
