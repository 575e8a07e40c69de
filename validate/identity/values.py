"""Constants, attributes and types in words."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ingot.plugins.errors import named, shown
from ingot.validate.identity.bodies import is_weight

# Elements of a constant that are said one by one.
MOST_ELEMENTS = 6


def tensor_text(tensor: onnx.TensorProto) -> str:
    """A weight by its name, dtype and shape, a small constant by its numbers."""
    kind = f"{_dtype(tensor.data_type)} {list(tensor.dims)}"
    if is_weight(tensor):
        return f"the weight {named(tensor.name)}, {kind}"
    try:
        array = numpy_helper.to_array(tensor)
    except (TypeError, ValueError, KeyError):
        return f"a damaged constant, {kind}"
    if array.size > MOST_ELEMENTS or tensor.data_type == onnx.TensorProto.STRING:
        return f"a constant {kind}{_sum(array)}"
    numbers = [_number(each) for each in array.reshape(-1)]
    said = numbers[0] if array.ndim == 0 else f"[{', '.join(numbers)}]"
    return f"{said} ({_dtype(tensor.data_type)})"


def attribute_text(attribute: onnx.AttributeProto) -> str:
    """The value of an attribute."""
    if attribute.ref_attr_name:
        return f"the function's {attribute.ref_attr_name}"
    if attribute.type == onnx.AttributeProto.TENSOR:
        return tensor_text(attribute.t)
    try:
        value = helper.get_attribute_value(attribute)
    except ValueError:
        return "of an unknown type"
    if isinstance(value, bytes):
        return shown(value.decode(errors="replace"))
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, list) and all(isinstance(each, int | float) for each in value):
        return shown([float(_number(e)) if isinstance(e, float) else e for e in value])
    return f"a value of type {attribute.type}"


def type_text(proto: onnx.TypeProto | None) -> str:
    """Dtype and shape."""
    if proto is None or not proto.HasField("tensor_type"):
        return "of unknown type"
    tensor = proto.tensor_type
    dtype = _dtype(tensor.elem_type)
    if not tensor.HasField("shape"):
        return f"{dtype} of unknown shape"
    sizes = [
        str(d.dim_value) if d.HasField("dim_value") else named(d.dim_param or "?")
        for d in tensor.shape.dim
    ]
    return f"{dtype} [{', '.join(sizes)}]"


def _dtype(number: int) -> str:
    try:
        return helper.tensor_dtype_to_np_dtype(number).name
    except (KeyError, ValueError):
        return f"dtype {number}"


def _number(value: object) -> str:
    """A number with the digits that its dtype has; an attribute is of float32."""
    return str(np.float32(value) if type(value) is float else value)


def _sum(array: np.ndarray) -> str:
    if array.dtype.kind not in "fiub":
        return ""
    with np.errstate(all="ignore"):
        return f" of sum {float(np.sum(array, dtype=np.float64)):.9g}"
