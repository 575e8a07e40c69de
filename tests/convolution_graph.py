"""One causal convolution, as ``graphs.mamba2`` captures to, and its definition in float64."""

from __future__ import annotations

import math

import numpy as np
from text_graph import Arrays

Results = tuple[np.ndarray, np.ndarray]

SILU = "sigmoid = Sigmoid (convolved) activated = Mul (convolved, sigmoid)"
ACTIVATIONS = {
    "silu": SILU,
    "gelu": "activated = Gelu (convolved)",
    "gelu_tanh": 'activated = Gelu <approximate = "tanh"> (convolved)',
    "relu": "activated = Relu (convolved)",
}
# Channels of the convolution where no test asks for others.
C = 6


def convolution_text(
    channels: int = C, width: int = 4, activation: str = "silu", bias: bool = True
) -> str:
    """A causal convolution as ``graphs.mamba2`` captures to, its weights still inputs."""
    return f"""
    <ir_version: 10, opset_import: ["" : 23]>
    one_convolution (
        float[b, t, {channels}] x,
        float[b, {channels}, {width - 1}] past,
        float[{channels}, 1, {width}] kernel
        {f", float[{channels}] bias" if bias else ""}
    ) => (float[b, t, {channels}] y, float[b, {channels}, {width - 1}] present) {{
        start = Constant <value = int64[1] {{{1 - width}}}> ()
        end = Constant <value = int64[1] {{9223372036854775807}}> ()
        axis = Constant <value = int64[1] {{2}}> ()
        step = Constant <value = int64[1] {{1}}> ()
        columns = Transpose <perm = [0, 2, 1]> (x)
        window = Concat <axis = -1> (past, columns)
        convolved = Conv <group = {channels}, pads = [0, 0], strides = [1], dilations = [1]>
            (window, kernel {", bias" if bias else ""})
        {ACTIVATIONS[activation]}
        y = Transpose <perm = [0, 2, 1]> (activated)
        present = Slice (window, start, end, axis, step)
    }}
    """


def kernel_and_bias(channels: int = C, width: int = 4, bias: bool = True) -> Arrays:
    random = np.random.default_rng(width)
    arrays = {"kernel": random.normal(size=(channels, 1, width))}
    if bias:
        arrays["bias"] = random.normal(size=channels)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def activate(name: str, v: np.ndarray) -> np.ndarray:
    """Each activation in float64."""
    gate: np.ndarray
    if name == "silu":
        gate = 1 / (1 + np.exp(-v))
    elif name == "gelu":
        gate = np.reshape([(1 + math.erf(n / math.sqrt(2))) / 2 for n in v.flat], v.shape)
    elif name == "gelu_tanh":
        gate = (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2
    else:
        gate = np.heaviside(v, 0)
    result: np.ndarray = v * gate
    return result


def causal(x: np.ndarray, past: np.ndarray, weights: Arrays, activation: str) -> Results:
    """The convolution, tap by tap, in float64, and the new state."""
    kernel = weights["kernel"].astype(np.float64)
    window = np.concatenate([past.swapaxes(1, 2), x], axis=1)
    taps = range(kernel.shape[2])
    y = sum(window[:, w : w + x.shape[1]] * kernel[:, 0, w] for w in taps)
    y = y + weights.get("bias", np.zeros(1))
    return activate(activation, y), window[:, x.shape[1] :].swapaxes(1, 2)
