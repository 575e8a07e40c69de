"""The weights that a quantised checkpoint's packed tensors stand for, in numpy alone.

Written apart from what an export reads them with. How many bits numbers have and how they are
grouped follows from the shapes of the tensors that lie side by side; ``config.json`` says only what
these cannot. All formats mean ``(number - zero point) * scale``, here in float32, where it is exact
for scales of half precision.

Sources: the functions that unpack in the programs that pack, ``dequantize_weight`` of GPTQModel,
``dequantize_gemm`` of AutoAWQ and ``dequantize`` of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ingot.validate.identity.weights_files import (
    FileFormatError,
    Floats,
    Reader,
    Tensor,
    widen,
)

# The order of eight rows in a word of AWQ's.
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
ROLES = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
)
SIGNED = {"I8": np.int8, "I32": np.int32, "I64": np.int64}


@dataclass(frozen=True)
class Packed(Tensor):
    """A weight that is worked out of several tensors when it is read.

    Attributes:
        parts: the tensors, by role.
        method: ``quant_method``.
        version: of GPTQ's format, 1 or 2.
        words: whether GPTQ's zero points were made smaller in whole words.
        group: columns of a group, by the config; 0 where it says nothing.
    """

    parts: tuple[tuple[str, Tensor], ...] = ()
    method: str = ""
    version: int = 1
    words: bool = False
    group: int = 0

    def held(self) -> bytes:
        """The weight ``[N, K]``, float32."""
        return _decoded(self)


def unpacked(stored: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with a plain one for each packed weight.

    Args:
        stored: as they are in its files, by name.
        config: its ``config.json``.

    Raises:
        FileFormatError: tensors that do not belong together.
    """
    section = config.get("quantization_config")
    if not isinstance(section, dict) or not section:
        return dict(stored)
    result: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ROLES or (leaf == "weight" and tensor.dtype == "I8"):
            layers.setdefault(module, {})[leaf] = tensor
        else:
            result[name] = tensor
    for module, parts in layers.items():
        made = _packed(f"{module}.weight", parts, section)
        result[made.name] = made
    return result


def _packed(name: str, parts: Mapping[str, Tensor], section: Mapping[str, Any]) -> Packed:
    """What one weight is made of, and its shape."""
    meta, group = section.get("meta"), section.get("group_size")
    tools = meta.get("quantizer") if isinstance(meta, dict) else None
    version = section.get("checkpoint_format") or section.get("format")
    made = Packed(
        name,
        "F32",
        (),
        None,
        parts=tuple(sorted(parts.items())),
        method=str(section.get("quant_method")),
        version=2 if version == "gptq_v2" else 1,
        words="gptqmodel" in str(tools),
        group=group if isinstance(group, int) and group > 0 else 0,
    )
    try:
        shape = _shape(made, parts)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise FileFormatError(
            f"{name} of the checkpoint is packed in tensors that do not fit together ({error}); "
            "download it again."
        ) from error
    return replace(made, shape=shape)


def _shape(made: Packed, parts: Mapping[str, Tensor]) -> tuple[int, int]:
    if made.method == "awq":
        columns, words = parts["qweight"].shape
        return words * 8, columns
    if "qweight" in parts:
        words, rows = parts["qweight"].shape
        columns = parts["g_idx"].shape[0] if "g_idx" in parts else words * 32 // _bits(made, rows)
        return rows, columns
    if "weight_packed" in parts:
        rows, columns = (int(size) for size in _whole(parts["weight_shape"]))
        return rows, columns
    rows, columns = parts["weight"].shape
    return rows, columns


def _bits(made: Packed, rows: int) -> int:
    """Of GPTQ's numbers, by how its zero points are packed."""
    return dict(made.parts)["qzeros"].shape[1] * 32 // rows


@lru_cache(maxsize=2)
def _decoded(made: Packed) -> bytes:
    parts = dict(made.parts)
    if "qweight" not in parts:
        weight = _compressed(made, parts)
    elif made.method == "awq":
        weight = _awq(parts)
    else:
        weight = _gptq(made, parts)
    if weight.shape != made.shape:
        raise FileFormatError(
            f"{made.name} of the checkpoint is {list(weight.shape)} and should be "
            f"{list(made.shape)}; download it again."
        )
    return np.ascontiguousarray(weight, np.float32).tobytes()


def _gptq(made: Packed, parts: Mapping[str, Tensor]) -> Floats:
    rows, columns = made.shape
    words = _whole(parts["qweight"])
    bits = 32 * words.shape[0] // columns
    numbers = _fields(words.T, bits)[:, :columns]
    scales, packed = _floats(parts["scales"]), _whole(parts["qzeros"]).astype(np.uint32)
    if made.version == 1 and made.words:
        packed = packed + np.uint32(sum(1 << at for at in range(0, 32, bits)))
    zeros = _fields(packed, bits)[:, :rows]
    zeros = zeros + (made.version == 1 and not made.words)
    groups = len(scales)
    even = columns // groups if columns % groups == 0 else made.group
    order = np.arange(columns) // max(even, 1)
    if "g_idx" in parts:
        given = _whole(parts["g_idx"]).astype(np.int64)
        order = given % groups if given.any() else order
    return _weight(numbers, zeros.T, scales.T, order)


def _awq(parts: Mapping[str, Tensor]) -> Floats:
    words = _whole(parts["qweight"])
    scales = _floats(parts["scales"])
    order = np.arange(len(words)) // (len(words) // len(scales))
    zeros = _of_awq(_whole(parts["qzeros"])) if "qzeros" in parts else np.full(scales.T.shape, 8)
    return _weight(_of_awq(words), zeros, scales.T, order)


def _of_awq(words: np.ndarray) -> np.ndarray:
    """Words ``[n, N / 8]`` -> numbers ``[N, n]``."""
    fields = _fields(words, 4).reshape(len(words), -1, 8)
    numbers = np.empty_like(fields)
    numbers[:, :, AWQ] = fields
    return numbers.reshape(len(words), -1).T


def _compressed(made: Packed, parts: Mapping[str, Tensor]) -> Floats:
    rows, columns = made.shape
    scales = _floats(parts["weight_scale"])
    scales = np.broadcast_to(scales.reshape(-1, scales.shape[-1]), (rows, scales.shape[-1]))
    groups = scales.shape[1]
    order = np.arange(columns) // (columns // groups)
    if "weight_g_idx" in parts:
        given = _whole(parts["weight_g_idx"]).astype(np.int64)
        order = order if (given == -1).all() else given
    point, bits = parts.get("weight_zero_point"), 8
    if "weight" in parts:
        numbers, zeros = _whole(parts["weight"]).astype(np.int64), np.zeros((1, 1), np.int64)
    else:
        words = _whole(parts["weight_packed"])
        bits = 4 if -(-columns * 4 // 32) == words.shape[1] else 8
        numbers = _fields(words, bits)[:, :columns] - (1 << (bits - 1))
        zeros = np.zeros((1, 1), np.int64)
    if point is not None and point.dtype == "I8":
        zeros = _whole(point).astype(np.int64)
    elif point is not None:
        zeros = _fields(_whole(point).T, bits).T[:rows] - (1 << (bits - 1))
    zeros = np.broadcast_to(zeros.reshape(-1, zeros.shape[-1]), (rows, groups))
    return _weight(numbers, zeros, scales, order)


def _weight(numbers: np.ndarray, zeros: np.ndarray, scales: Floats, order: np.ndarray) -> Floats:
    """``[N, K]`` of numbers ``[N, K]``, and zero points and scales ``[N, groups]``."""
    moved = (numbers - zeros[:, order]).astype(np.float32)
    return np.asarray(moved * scales[:, order], np.float32)


def _fields(words: np.ndarray, bits: int) -> np.ndarray:
    """Words ``[n, m]`` -> the numbers in each, the lowest bits first, ``[n, m * 32 / bits]``."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    fields = (words.astype(np.uint32)[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    return fields.reshape(len(words), -1).astype(np.int64)


def _whole(tensor: Tensor) -> np.ndarray:
    with Reader() as reader:
        bits = reader.elements(tensor, 0, tensor.size)
    return bits.view(SIGNED[tensor.dtype]).reshape(tensor.shape)


def _floats(tensor: Tensor) -> Floats:
    with Reader() as reader:
        bits = reader.elements(tensor, 0, tensor.size)
    return widen(bits, tensor.dtype).reshape(tensor.shape)
