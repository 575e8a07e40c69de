"""Writing a graph's weights into one safetensors file, streamed: one tensor in memory at a time.

The file is both a safetensors file and the graph's ONNX external data: an external tensor is a
file, an offset and a length, and safetensors stores plain row-major bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ingot.export.passes.weights import Weight
from ingot.export.progress import Advance

DTYPES = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT64: "I64",
    ir.DataType.UINT8: "U8",
}
# The data starts at a multiple of this, so that maps and vector loads are aligned.
ALIGNMENT = 4096


def weights_of(model: ir.Model) -> list[ir.Value]:
    """The initializers that are weights; small constants stay inside the graph file."""
    values = model.graph.initializers.values()
    return [value for value in values if isinstance(value.const_value, Weight)]


def weight_bytes(model: ir.Model) -> int:
    """Bytes that ``write_weights`` will write, without its header."""
    return sum(value.const_value.nbytes for value in weights_of(model) if value.const_value)


def write_weights(
    model: ir.Model, folder: Path, name: str, advance: Advance, stored: str = ""
) -> str:
    """Write every weight to ``folder/name`` and make the graph refer to it.

    Args:
        model: the graph.
        folder: of the file.
        name: of the file.
        advance: told the bytes that are written.
        stored: what matrices are stored in, for the file's metadata; empty where that is the
            precision.

    Returns:
        SHA-256 of the file.
    """
    values = weights_of(model)
    said = {"format": "pt"} | ({"weights": stored} if stored else {})
    header: dict[str, object] = {"__metadata__": said}
    offsets = []
    end = 0
    for value in values:
        tensor = value.const_value
        assert tensor is not None and value.name is not None
        offsets.append(end)
        end += tensor.nbytes
        header[value.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape.numpy()),
            "data_offsets": [offsets[-1], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    total = hashlib.sha256()
    with (folder / name).open("wb") as file:
        for head in (len(text).to_bytes(8, "little"), text):
            file.write(head)
            total.update(head)
        for value in values:
            tensor = value.const_value
            assert isinstance(tensor, Weight)
            begin = file.tell()
            for block in range(tensor.blocks):
                array = tensor.read_block(block)
                assert array.flags.c_contiguous, value.name
                data = array.reshape(-1).view(np.uint8).data
                file.write(data)
                total.update(data)
                advance(len(data))
            assert file.tell() - begin == tensor.nbytes, value.name
    for value, offset in zip(values, offsets, strict=True):
        tensor = value.const_value
        assert tensor is not None and value.name is not None
        value.const_value = ir.ExternalTensor(
            name,
            offset + 8 + len(text),
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name,
            base_dir=folder,
        )
    return total.hexdigest()
