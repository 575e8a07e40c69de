"""Changes of an ingot's files, after which every hash fits again, as whoever writes one can do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from ingot.export.ingot import GRAPH, MANIFEST, WEIGHTS, file_infos
from proof.editing import Array, Edit, Editor
from proof.fault import Change

DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "U8": np.uint8,
}


def sealed(folder: Path) -> None:
    """Give every file the size and hash that it has now."""
    held = json.loads((folder / MANIFEST).read_text())
    held["files"] = {name: vars(info) for name, info in file_infos(folder, {}).items()}
    (folder / MANIFEST).write_text(json.dumps(held))


def graph(edit: Edit) -> Change:
    """The graph file is another one."""

    def apply(folder: Path) -> None:
        model = onnx.load(str(folder / GRAPH), load_external_data=False)
        before = model.SerializeToString(deterministic=True)
        edit(Editor(model))
        assert model.SerializeToString(deterministic=True) != before
        (folder / GRAPH).write_bytes(model.SerializeToString())
        sealed(folder)

    return apply


def weight(ending: str, change: Callable[[Array], Any]) -> Change:
    """Every weight whose name ends so is changed: in place, or to what ``change`` returns."""
    return weights((ending,), lambda array: _changed(array, change))


def _changed(array: Array, change: Callable[[Array], Any]) -> None:
    other = change(array)
    if other is not None:
        array[...] = other


def weights(endings: tuple[str, ...], change: Callable[..., object]) -> Change:
    """The weights whose names end so, each found once, are changed in place together."""

    def apply(folder: Path) -> None:
        path = folder / WEIGHTS
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        found = []
        for ending in endings:
            (name,) = (name for name in header if name.endswith(ending))
            entry = header[name]
            begin = 8 + size + entry["data_offsets"][0]
            shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
            found.append(np.memmap(path, dtype, "r+", begin, shape))
        before = [np.array(array) for array in found]
        change(*found)
        # By bytes, since NaN is like nothing.
        same = [a.tobytes() == b.tobytes() for a, b in zip(found, before, strict=True)]
        assert not all(same), endings
        for array in found:
            array.flush()
        sealed(folder)

    return apply


def every_weight(change: Callable[[Array], Array]) -> Change:
    """All of them are."""

    def apply(folder: Path) -> None:
        with (folder / WEIGHTS).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin = 8 + size + entry["data_offsets"][0]
            shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
            array = np.memmap(folder / WEIGHTS, dtype, "r+", begin, shape)
            array[...] = change(np.array(array))
            array.flush()
            del name
        sealed(folder)

    return apply


def manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    """``ingot.json`` says something else."""

    def apply(folder: Path) -> None:
        held = json.loads((folder / MANIFEST).read_text())
        before = json.dumps(held)
        change(held)
        assert json.dumps(held) != before
        (folder / MANIFEST).write_text(json.dumps(held))

    return apply


def field(*path: str | int, to: Any) -> Change:
    """One field of ``ingot.json`` has another value."""

    def change(held: dict[str, Any]) -> None:
        *above, last = path
        inner: Any = held
        for key in above:
            inner = inner[key]
        inner[last] = to(inner[last]) if callable(to) else to

    return manifest(change)
