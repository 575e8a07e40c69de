"""One scan of Mamba2 as a model, its inputs, and the recurrence in float64."""

# The paper's matrices keep their capital names.
# ruff: noqa: N806

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from one_node import one_node, weight
from text_graph import Arrays

from ingot.plugins import mamba2_scan

Results = tuple[np.ndarray, np.ndarray]
# Hm, Pm, G and Ns.
Sizes = tuple[int, int, int, int]

FLOAT = ir.DataType.FLOAT
CHUNK = 8
NO_LIMITS = (0.0, math.inf)


def scan_shapes(sizes: Sizes) -> dict[str, list[int | str]]:
    """Every input of the operator, for Hm, Pm, G and Ns."""
    heads, head_size, groups, states = sizes
    return {
        "x": ["b", "t", heads, head_size],
        "dt": ["b", "t", heads],
        "A": [heads],
        "B": ["b", "t", groups, states],
        "C": ["b", "t", groups, states],
        "D": [heads],
        "dt_bias": [heads],
        "past_states.0.ssm": ["b", heads, head_size, states],
        "mask": ["b", "t"],
    }


def scan_model(
    sizes: Sizes,
    limits: tuple[float, float] = NO_LIMITS,
    constants: Arrays | None = None,
    unknown: tuple[str, ...] = (),
) -> ir.Model:
    """One scan and its function body; ``constants`` are weights, ``unknown`` inputs of any size."""
    shapes = scan_shapes(sizes)
    inputs = [
        weight(name, constants[name])
        if constants and name in constants
        else ir.val(name, FLOAT, ["u", *shape[1:-1], "n"] if name in unknown else shape)
        for name, shape in shapes.items()
    ]
    outputs = [
        ir.val("y", FLOAT, shapes["x"]),
        ir.val("present_states.0.ssm", FLOAT, shapes["past_states.0.ssm"]),
    ]
    attributes = {"chunk_size": CHUNK, "dt_min": limits[0], "dt_max": limits[1]}
    return one_node(mamba2_scan.function_body(), inputs, outputs, attributes)


def recurrence(arrays: Arrays, limits: tuple[float, float] = NO_LIMITS) -> Results:
    """The scan, token by token, in float64."""
    x, dt, A, B, C, D, dt_bias, S, mask = (a.astype(np.float64) for a in arrays.values())
    step = mask[..., None] * np.clip(np.logaddexp(0, dt + dt_bias), *limits)
    heads_of_group = x.shape[2] // B.shape[2]
    B, C = (np.repeat(array, heads_of_group, axis=2) for array in (B, C))
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        read = (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        S = np.exp(step[:, t] * A)[..., None, None] * S + read
        y[:, t] = (S * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t]
    return y, S


def scan_inputs(
    sizes: Sizes, batch: int, tokens: int, *, padding: str = "none", seed: int = 0
) -> Arrays:
    random = np.random.default_rng(seed)
    named = {"b": batch, "t": tokens}
    arrays = {
        name: random.normal(size=[named[d] if isinstance(d, str) else d for d in shape])
        for name, shape in scan_shapes(sizes).items()
    }
    # Most steps between 0.01 and 1: a memory of a few tokens and of many.
    arrays["A"] = -random.uniform(0.1, 4, size=sizes[0])
    arrays["dt_bias"] = random.uniform(-4, 0, size=sizes[0])
    mask = np.ones((batch, tokens))
    if padding == "left":
        for row in range(batch):
            mask[row, : (row + 1) * tokens // (batch + 1)] = 0
    elif padding == "holes":
        mask = (random.uniform(size=mask.shape) < 0.6).astype(np.float64)
    arrays["mask"] = mask
    return {name: array.astype(np.float32) for name, array in arrays.items()}
