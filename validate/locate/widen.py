"""A graph in half precision with float32 in its place, for ONNX Runtime's CPU provider.

That provider has no bfloat16 kernels, and float16 ones for some operators only, so that it rounds
where it changes from one to the other. In float32 both sides of a comparison run by one rule, and
what is wrong is not hidden by what half precision costs. What is not seen is whether a value was
rounded, or overflowed, as its graph says; casts that should not be there are other nodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]

FLOAT = onnx.TensorProto.FLOAT
HALVES = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}


def widen(model: onnx.ModelProto, precision: str) -> None:
    """Compute a graph in float32, in place; its inputs and weights have to be given so.

    A cast to the graph's own precision is one to float32. One to another half precision is not
    part of any right graph, so what it rounds stays rounded.

    Args:
        model: the graph, whose functions are of any precision.
        precision: its own, by PyTorch's name.
    """
    own = HALVES.get(precision)
    for tensor in model.graph.initializer:
        _widen_tensor(tensor)
    _widen_nodes(model.graph.node, own)
    for function in model.functions:
        _widen_nodes(function.node, own)


def widened(array: Array) -> Array:
    """An array as ``widen`` wants it: float32 where it is in half precision."""
    return array.astype(np.float32) if array.dtype.name in HALVES else array


def _widen_nodes(nodes: Any, own: int | None) -> None:
    """Compute the nodes of a graph or function, and of its branches, in float32, in place.

    Args:
        nodes: protobuf's list of nodes, in the order of computation.
        own: the precision of the graph, if that is half.
    """
    result = []
    for node in nodes:
        result.append(node)
        for attribute in node.attribute:
            _widen_tensor(attribute.t)
            _widen_nodes(attribute.g.node, own)
            if attribute.name != "to" or attribute.i not in HALVES.values():
                continue
            if attribute.i == own:
                attribute.i = FLOAT
            else:
                name, node.output[0] = node.output[0], f"{node.output[0]}.rounded"
                result.append(helper.make_node("Cast", [node.output[0]], [name], to=FLOAT))
    if len(result) > len(nodes):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in result]
        del nodes[:]
        nodes.extend(copies)


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type not in HALVES.values():
        return
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        tensor.data_type = FLOAT
    else:
        array = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
