"""Which files an ONNX graph has its weights in, by its own words.

A graph names them inside of its tensors, and ONNX Runtime opens what is named. The runtime has no
``onnx`` to read them with, so this reads the few messages of ``onnx.proto`` that lead to them, in
protobuf's wire format. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator

# Message -> number of a field -> the message that the field holds. All ways from a model to a
# tensor, by onnx.proto of IR version 13; what is not here is skipped.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 10: "Tensor", 6: "Graph", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
# Entry is a StringStringEntryProto: the key ``location`` has the file's name.
_KEY, _VALUE, _LOCATION = 1, 2, b"location"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Protobuf's parsers take no more either.
_MOST_DEPTH = 100


class GraphError(ValueError):
    """Bytes that are no ONNX file."""


def external_files(graph: bytes) -> set[str]:
    """The names of the files of an ONNX graph's external data, as the graph spells them.

    Args:
        graph: an ONNX file.

    Raises:
        GraphError: no protobuf, or messages nested deeper than parsers take.
    """
    found = set()
    waiting: list[tuple[str, memoryview, int]] = [("Model", memoryview(graph), 0)]
    while waiting:
        message, data, depth = waiting.pop()
        if depth > _MOST_DEPTH:
            raise GraphError(f"it is nested more than {_MOST_DEPTH} deep")
        if message == "Entry":
            pair = {number: bytes(value) for number, value in _fields(data)}
            if pair.get(_KEY) == _LOCATION:
                found.add(pair.get(_VALUE, b"").decode("utf-8", "backslashreplace"))
            continue
        inner = _FIELDS[message]
        waiting += [
            (inner[number], value, depth + 1) for number, value in _fields(data) if number in inner
        ]
    return found


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of every field that has a length."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        # Protobuf drops what is above 32 bits, so another number here would be a field there.
        number, kind = (tag & 0xFFFFFFFF) >> 3, tag & 7
        if number == 0:
            raise GraphError("it is no ONNX file")
        if kind == _BYTES:
            size, at = _varint(data, at)
            if size > end - at:
                raise GraphError("it is no ONNX file, or cut short")
            yield number, data[at : at + size]
            at += size
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise GraphError("it is no ONNX file")
    if at != end:
        raise GraphError("it is no ONNX file, or cut short")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number in base 128, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise GraphError("it is no ONNX file, or cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise GraphError("it is no ONNX file")
