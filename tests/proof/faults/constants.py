"""Attributes and constants of the graph that are not the config's, also where they never bind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import numpy_helper

from proof.editing import Array, Edit, Editor, attribute, value_of
from proof.fault import Fault, Where
from proof.planting import in_graph

KIND = "constant"


def set_of(operator: str, number: int, name: str, value: Any) -> Edit:
    """An attribute of the n-th node of an operator, branches included."""

    def apply(edit: Editor) -> None:
        for node in edit.alike(edit.anywhere(operator)[number]):
            attribute(node, name, value)

    return apply


def flipped(operator: str, number: int, name: str) -> Edit:
    """A flag of it."""

    def apply(edit: Editor) -> None:
        node = edit.anywhere(operator)[number]
        attribute(node, name, 1 - value_of(node, name))

    return apply


def frequencies(change: Callable[[Array], Any]) -> Edit:
    """The only float constant that is a vector of the main graph."""

    def apply(edit: Editor) -> None:
        (tensor,) = (
            each
            for each in edit.graph.initializer
            if each.name.startswith("lifted_tensor") and len(each.dims) == 1
        )
        other = np.asarray(change(numpy_helper.to_array(tensor).copy()), np.float32)
        tensor.CopyFrom(numpy_helper.from_array(other, tensor.name))

    return apply


def scalar(value: float, to: float) -> Edit:
    """A scalar constant, found by what it is."""

    def apply(edit: Editor) -> None:
        hits = [
            each
            for each in edit.graph.initializer
            if not each.external_data
            and not each.dims
            and np.isclose(float(numpy_helper.to_array(each)), value)
        ]
        assert hits
        for each in hits:
            array = numpy_helper.to_array(each)
            each.CopyFrom(numpy_helper.from_array(np.asarray(to, array.dtype), each.name))

    return apply


def integers(before: list[int], after: list[int]) -> Edit:
    """A vector of whole numbers, found by what it is."""

    def apply(edit: Editor) -> None:
        hits = [
            each
            for each in edit.graph.initializer
            if not each.external_data
            and len(each.dims) == 1
            and numpy_helper.to_array(each).tolist() == before
        ]
        assert hits
        for each in hits:
            other = np.asarray(after, np.int64)
            each.CopyFrom(numpy_helper.from_array(other, each.name))

    return apply


def one_frequency(array: Array) -> Array:
    array[-1] *= 1.001
    return array


LAYER, OUTSIDE = Where(1), Where(None)
NORM = Where(1, ("RMSNormalization",))
LAST = np.iinfo(np.int64).max

FAULTS: list[Fault] = [
    # Every norm of layer 1; a layer has two, and of OLMoE four.
    in_graph(
        "eps 1e-3", "granite onnx", KIND, set_of("RMSNormalization", 2, "epsilon", 1e-3), NORM
    ),
    in_graph("eps 2e-5", "granite ort", KIND, set_of("RMSNormalization", 3, "epsilon", 2e-5), NORM),
    in_graph("eps 1e-6", "olmoe ort", KIND, set_of("RMSNormalization", 5, "epsilon", 1e-6), NORM),
    in_graph(
        "eps 1.1e-5", "olmoe fp16", KIND, set_of("RMSNormalization", 4, "epsilon", 1.1e-5), NORM
    ),
    in_graph("eps 0", "mamba2 ort", KIND, set_of("RMSNormalization", 3, "epsilon", 0.0), NORM),
    in_graph(
        "eps 1e-3, bfloat16",
        "granite bf16",
        KIND,
        set_of("RMSNormalization", 2, "epsilon", 1e-3),
        NORM,
        ("numbers",),
    ),
    in_graph("eps 1e-3", "mamba2 fp16", KIND, set_of("RMSNormalization", 2, "epsilon", 1e-3), NORM),
    in_graph(
        "final norm eps 1e-4",
        "jetmoe onnx",
        KIND,
        set_of("RMSNormalization", 4, "epsilon", 1e-4),
        OUTSIDE,
    ),
    in_graph("scale 1/4", "granite onnx", KIND, set_of("Attention", 1, "scale", 0.25), LAYER),
    in_graph("softcap 50", "granite onnx", KIND, set_of("Attention", 1, "softcap", 50.0), LAYER),
    in_graph("softcap 1e6", "olmoe onnx", KIND, set_of("Attention", 1, "softcap", 1e6), LAYER),
    in_graph(
        "scale 0.1 % off", "granite ort", KIND, set_of("GroupQueryAttention", 1, "scale", 0.0625625)
    ),
    in_graph("scale 1/8", "granite fp16", KIND, set_of("Attention", 0, "scale", 0.125), Where(0)),
    in_graph(
        "a window of 256",
        "olmoe ort",
        KIND,
        set_of("GroupQueryAttention", 1, "local_window_size", 256),
        LAYER,
    ),
    in_graph(
        "a window of 8",
        "granite ort",
        KIND,
        set_of("GroupQueryAttention", 0, "local_window_size", 8),
    ),
    in_graph("softcap 30", "jetmoe ort", KIND, set_of("GroupQueryAttention", 1, "softcap", 30.0)),
    in_graph("top 1", "olmoe onnx", KIND, set_of("MoeDispatch", 1, "top_k", 1), LAYER),
    in_graph("top 3", "olmoe ort", KIND, set_of("MoE", 1, "k", 3), LAYER),
    in_graph("weights sum to 1", "olmoe ort", KIND, flipped("MoE", 1, "normalize_routing_weights")),
    in_graph("weights sum to 1", "olmoe fp16", KIND, flipped("MoeDispatch", 1, "normalize"), LAYER),
    in_graph(
        "weights do not sum to 1",
        "jetmoe ort",
        KIND,
        flipped("MoE", 1, "normalize_routing_weights"),
    ),
    in_graph(
        "weights do not sum to 1", "jetmoe onnx", KIND, flipped("MoeDispatch", 1, "normalize")
    ),
    in_graph(
        "activation GELU",
        "olmoe onnx",
        KIND,
        set_of("MoeDispatch", 0, "activation", "gelu"),
        Where(0),
    ),
    in_graph(
        "swiglu alpha 1.702",
        "olmoe ort",
        KIND,
        set_of("MoE", 0, "activation_alpha", 1.702),
        Where(0),
    ),
    in_graph("swiglu beta 1", "olmoe ort", KIND, set_of("MoE", 1, "activation_beta", 1.0), LAYER),
    in_graph("swiglu limit 1e4", "olmoe ort", KIND, set_of("MoE", 1, "swiglu_limit", 1e4), LAYER),
    in_graph("rope base 1 % off", "granite onnx", KIND, frequencies(lambda a: a * 1.01), OUTSIDE),
    in_graph("last frequency 0.1 % off", "olmoe ort", KIND, frequencies(one_frequency), OUTSIDE),
    in_graph(
        "frequencies in float16", "jetmoe ort", KIND, frequencies(lambda a: a.astype(np.float16))
    ),
    in_graph(
        "no frequency below 0.01", "granite ort", KIND, frequencies(lambda a: np.maximum(a, 0.01))
    ),
    in_graph("clipped at 7.9", "olmoe clipped onnx", KIND, scalar(8, 7.9), Where(0)),
    in_graph("clipped at 1e9", "olmoe clipped onnx", KIND, scalar(8, 1e9), Where(0)),
    in_graph("chunks of 16", "mamba2 onnx", KIND, set_of("Mamba2Scan", 1, "chunk_size", 16), LAYER),
    in_graph(
        "time step at most 100",
        "mamba2 onnx",
        KIND,
        set_of("Mamba2Scan", 1, "dt_max", 100.0),
        LAYER,
    ),
    in_graph(
        "time step at least 0.001",
        "mamba2 fp16",
        KIND,
        set_of("Mamba2Scan", 0, "dt_min", 1e-3),
        Where(0),
    ),
    in_graph(
        "time step at most 0.1", "mamba2 onnx", KIND, set_of("Mamba2Scan", 1, "dt_max", 0.1), LAYER
    ),
    in_graph("scale 2", "mamba2 ort", KIND, set_of("LinearAttention", 3, "scale", 2.0), LAYER),
    in_graph(
        "scale 2 for one token",
        "mamba2 ort",
        KIND,
        set_of("LinearAttention", 2, "scale", 2.0),
        LAYER,
    ),
    in_graph("head's width", "granite onnx", KIND, integers([0, 0, 4, 16], [0, 0, 4, -1])),
    in_graph("end of a slice", "granite onnx", KIND, integers([LAST], [LAST // 2])),
    in_graph(
        "conv of other groups", "mamba2 fp16", KIND, set_of("CausalConv", 1, "activation", "none")
    ),
    in_graph("bias on what is hidden", "granite ort", KIND, scalar(-3.4028235e38, -1e4), OUTSIDE),
]
