"""Values of a graph that float16 cannot hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx

from ingot.validate.judge.metrics import UNSETTLED, rms
from ingot.validate.locate.graph import Array, Graph, uses

FLOAT16 = onnx.TensorProto.FLOAT16
# The largest finite one is 65504; from here on a number is rounded to infinity.
ROUNDS_UP = 65520.0


def halves(graph: Graph) -> set[str]:
    """The values of a graph that are float16, as far as its operators tell."""
    found = {value.name for value in _typed(graph.model.graph)}
    # What a damaged graph says of itself is no reason to stop.
    with contextlib.suppress(Exception):
        inferred = onnx.shape_inference.infer_shapes(graph.model)
        found |= {value.name for value in _typed(inferred.graph)}
    return found


def _typed(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    for value in (*graph.value_info, *graph.output):
        if value.type.tensor_type.elem_type == FLOAT16:
            yield value


def beyond(expected: Array, found: Array, other: Array, *, half: bool) -> float | None:
    """The largest number of a tensor where that is beyond float16, and float16 has to hold it.

    Padding may hold anything.

    Args:
        expected: as it should be, in float32.
        found: the ingot's; in float32, but what a cast to float16 made infinite.
        other: as it should be with other tokens in the padding.
        half: whether the ingot's is float16.
    """
    if expected.dtype != np.float32 or not expected.shape == found.shape == other.shape:
        return None
    finite = np.isfinite(expected)
    if not finite.any():
        return None
    counted = finite
    if other is not expected:
        with np.errstate(invalid="ignore", over="ignore"):
            moved = np.abs(expected - other) <= UNSETTLED * rms(expected[finite])
        counted = finite & moved
    held = np.abs(found[counted]) if half else np.abs(expected[counted & ~np.isfinite(found)])
    held = held[np.isfinite(held)]
    largest = float(held.max(initial=0.0))
    return largest if largest >= ROUNDS_UP else None


def reader_of_infinite(graph: Graph) -> tuple[str, str] | None:
    """The first value that is made from a weight with infinite numbers, and that weight.

    Rounding to float16 makes a number beyond it infinite. Every weight is read.
    """
    for node in graph.model.graph.node:
        for name in uses(node):
            outputs = [value for value in node.output if value in graph.positions]
            if outputs and graph.is_weight(name) and np.isinf(graph.read(name)).any():
                return outputs[0], name
    return None
