"""A graph in half precision with float32 in its place, for ONNX Runtime's CPU provider.

That provider has no bfloat16 kernels, and float16 ones for some operators only, so that it rounds
where it changes from one to the other; and numpy has no dtype for what it hands out in bfloat16 or
in eight bits. In float32 both sides of a comparison run by one rule, and what is wrong is not
hidden by what half precision costs. What is not seen is whether a value was rounded, or overflowed,
as its graph says; casts that should not be there are other nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from ingot.validate.locate.graph import branches

Array = npt.NDArray[Any]

FLOAT = onnx.TensorProto.FLOAT
HALVES = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
# What is computed in another type: the floats that are narrower than float32, and the integers
# that numpy has none for.
_FLOATS = ("FLOAT16", "BFLOAT16", "FLOAT8E", "FLOAT4E", "FLOAT6E")
_INTEGERS = {"INT4": "INT8", "INT2": "INT8", "UINT4": "UINT8", "UINT2": "UINT8"}
WIDE: dict[int, int] = {
    number: FLOAT if name.startswith(_FLOATS) else onnx.TensorProto.DataType.Value(_INTEGERS[name])
    for name, number in onnx.TensorProto.DataType.items()
    if name.startswith(_FLOATS) or name in _INTEGERS
}
# Attributes whose number is a type: of Cast, of what makes tensors, of QuantizeLinear.
_TYPES = ("to", "dtype", "output_dtype")


def widen(model: onnx.ModelProto, precision: str) -> None:
    """Compute a graph in float32, in place; its inputs and weights have to be given so.

    A cast to the graph's own precision is one to float32. One to another narrow type is not part of
    any right graph, so what it rounds stays rounded.

    Args:
        model: the graph, whose functions are of any precision.
        precision: its own, by PyTorch's name.
    """
    own = HALVES.get(precision)
    types: dict[str, int] = {}
    _widen_tensors(model.graph.initializer, types)
    _widen_nodes(model.graph.node, own, types)
    for function in model.functions:
        del function.value_info[:]
        _widen_nodes(function.node, own, {})


def widened(array: Array) -> Array:
    """An array as ``widen`` wants it: float32 where it is in half precision or narrower."""
    # numpy's own dtypes are 1; those of other packages, such as bfloat16, are 2.
    if array.dtype.isbuiltin == 1 and array.dtype != np.float16:
        return array
    integer = array.dtype.name.removeprefix("u").startswith("int")
    unsigned = array.dtype.name.startswith("u")
    return array.astype(np.uint8 if unsigned else np.int8 if integer else np.float32)


def _widen_nodes(nodes: Any, own: int | None, types: dict[str, int]) -> None:
    """Compute the nodes of a graph or function, and of its branches, in float32, in place.

    Args:
        nodes: protobuf's list of nodes, in the order of computation.
        own: the precision of the graph, if that is half.
        types: of values before, as far as they are known; those of the nodes are added.
    """
    result = []
    for node in nodes:
        result.append(node)
        if node.op_type == "CastLike" and node.input[1] in types:
            _cast_to(node, types[node.input[1]])
        for attribute in node.attribute:
            _widen_tensor(attribute.t)
            for tensor in attribute.tensors:
                _widen_tensor(tensor)
            for graph in branches(attribute):
                _widen_branch(graph, own, types)
            if attribute.name not in _TYPES or not attribute.i:
                continue
            types[node.output[0]] = attribute.i
            if attribute.i == own:
                attribute.i = FLOAT
            elif attribute.i in WIDE:
                name, node.output[0] = node.output[0], f"{node.output[0]}.rounded"
                wide = WIDE[attribute.i]
                result.append(helper.make_node("Cast", [node.output[0]], [name], to=wide))
    if len(result) > len(nodes):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in result]
        del nodes[:]
        nodes.extend(copies)


def _cast_to(node: onnx.NodeProto, to: int) -> None:
    """Make a Cast of a node that casts to the type of another value."""
    del node.input[1:]
    node.op_type = "Cast"
    node.attribute.append(helper.make_attribute("to", to))


def _widen_branch(graph: onnx.GraphProto, own: int | None, types: dict[str, int]) -> None:
    """``_widen_nodes`` for a branch, or the body of a loop, which says what it takes and gives."""
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        of_tensor = value.type.tensor_type
        if of_tensor.elem_type in WIDE:
            of_tensor.elem_type = WIDE[of_tensor.elem_type]
    inner = dict(types)
    _widen_tensors(graph.initializer, inner)
    _widen_nodes(graph.node, own, inner)


def _widen_tensors(tensors: Iterable[onnx.TensorProto], types: dict[str, int]) -> None:
    for tensor in tensors:
        types[tensor.name] = tensor.data_type
        _widen_tensor(tensor)


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type not in WIDE:
        return
    wide = WIDE[tensor.data_type]
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        tensor.data_type = wide
    else:
        dtype = helper.tensor_dtype_to_np_dtype(wide)
        array = numpy_helper.to_array(tensor).astype(dtype)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
