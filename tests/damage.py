"""Copies of an ingot with one thing changed, as its manifest then says or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.export.engine import custom_nodes, profiles, trtexec_options
from ingot.export.ingot import (
    ENGINE,
    GRAPH,
    MANIFEST,
    TRTEXEC,
    WEIGHTS,
    EngineInfo,
    Manifest,
    file_infos,
)
from ingot.export.request import Limits
from ingot.graphs.state import KEPT, LOGITS_TO_KEEP, SEQUENCE
from ingot.plugins.whole import sha256


def copied(ingot: Path, out: Path, **fields: Any) -> Path:
    """A copy whose ``ingot.json`` has other values in some fields."""
    shutil.copytree(ingot, out)
    raw = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**raw, **fields}))
    return out


def with_engine(ingot: Path, out: Path) -> Path:
    """A copy that says it holds an engine of its graph; the engine itself is a stand-in."""
    as_lowered(copied(ingot, out))
    (out / ENGINE).write_bytes(b"engine")
    manifest = Manifest.read(out)
    made = profiles(manifest.inputs, manifest.states, Limits())
    sha256 = manifest.files[GRAPH].sha256
    plugins = custom_nodes(out / GRAPH)
    engine = EngineInfo("tensorrt-rtx", "1.7", (80,), sha256, plugins, (), False, made)
    (out / TRTEXEC).write_text(trtexec_options(made))
    replace(manifest, engine=engine, files=file_infos(out, {})).write(out)
    return out


def as_lowered(ingot: Path) -> Path:
    """Let ``ingot.json`` say that the graph is one for TensorRT.

    The states of such a one share no buffer, and it has the logits of all tokens.
    """
    manifest = with_all_logits(Manifest.read(ingot))
    states = tuple(replace(state, shared=False) for state in manifest.states)
    replace(manifest, target="trt", states=states).write(ingot)
    return ingot


def with_all_logits(manifest: Manifest) -> Manifest:
    """The manifest of a graph that cannot be asked for the last logits alone."""
    inputs = tuple(each for each in manifest.inputs if each.name != LOGITS_TO_KEEP)
    outputs = tuple(
        replace(each, shape=tuple(SEQUENCE if size == KEPT else size for size in each.shape))
        for each in manifest.outputs
    )
    return replace(manifest, inputs=inputs, outputs=outputs)


def with_weight(
    ingot: Path,
    out: Path,
    name: str,
    change: Callable[[npt.NDArray[np.float32]], object],
    *,
    known: bool = True,
) -> Path:
    """A copy with one weight changed in place.

    Args:
        ingot: a float32 one.
        out: the copy.
        name: how the name of the weight ends; one has such a name.
        change: the weight, which it may write to.
        known: whether the manifest has the new file's hash.
    """
    copied(ingot, out)
    file = out / WEIGHTS
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    (found,) = [entry for each, entry in header.items() if each.endswith(name)]
    # In the file's own bytes, because writing it anew would move the tensors.
    begin, end = (8 + length + offset for offset in found["data_offsets"])
    array = np.frombuffer(memoryview(data)[begin:end], dtype=np.float32).reshape(found["shape"])
    before = array.copy()
    change(array)
    assert (array != before).any()
    file.write_bytes(data)
    if known:
        raw = json.loads((out / MANIFEST).read_text())
        raw["files"][WEIGHTS]["sha256"] = sha256(file)
        (out / MANIFEST).write_text(json.dumps(raw))
    return out


def one_percent(weight: npt.NDArray[np.float32]) -> None:
    """Make a weight 1 % larger."""
    weight *= np.float32(1.01)
