"""One MoeLinear as a model, its inputs, and its formula as a plain loop."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from one_node import one_node

from ingot.plugins import moe_linear as op

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def plain_loop(x: np.ndarray, expert_ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The formula, choice by choice, in float64 and without torch."""
    y = np.zeros((*expert_ids.shape, weights.shape[1]))
    for n, row in enumerate(expert_ids):
        for k, expert in enumerate(row):
            source = x[n] if x.ndim == 2 else x[n, k]
            y[n, k] = weights[expert].astype(np.float64) @ source.astype(np.float64)
    return y


def arguments(
    tokens: int,
    top_k: int,
    experts: int,
    size: int,
    out: int,
    *,
    row_per_choice: bool,
    ids: str,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    if ids == "distinct":
        top_k = min(top_k, experts)
        expert_ids = random.random((tokens, experts)).argsort(-1)[:, :top_k]
    elif ids == "any":
        expert_ids = random.integers(0, experts, (tokens, top_k))
    else:
        assert ids == "one expert"
        expert_ids = np.full((tokens, top_k), experts // 2)
    x = random.normal(size=(tokens, top_k, size) if row_per_choice else (tokens, size))
    weights = random.normal(size=(experts, out, size)) / math.sqrt(size)
    return x.astype(np.float32), expert_ids, weights.astype(np.float32)


def built(x: np.ndarray, weights: ir.Value, *unused: ir.Value) -> ir.Model:
    """The operator as a model with inputs ``x`` (of the array's rank) and ``expert_ids``."""
    op.moe_linear.register_schema()
    dtype = weights.dtype
    x_shape = ["n", "size"] if x.ndim == 2 else ["n", "k", "size"]
    inputs = [ir.val("x", dtype, x_shape), ir.val("expert_ids", INT64, ["n", "k"]), weights]
    y = ir.val("y", dtype, ["n", "k", "out"])
    return one_node(op.function_body(), inputs, [y], unused=unused)
