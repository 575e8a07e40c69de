"""Shared by the tests of Triton repositories: stand-ins for an engine and a sequence batcher."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import as_lowered
from google.protobuf import text_format

from ingot.export.engine import profiles
from ingot.export.ingot import ENGINE, GRAPH, EngineInfo, Manifest, file_infos
from ingot.export.request import Limits
from ingot.runtime.onnxruntime_session import open_session
from ingot.runtime.triton_plan import PLUGINS

# On a machine that only runs the tests of GPUs it may be missing.
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")


def with_engine(source: Path, folder: Path, **changes: Any) -> Path:
    """An ingot that says it holds a TensorRT engine; the engine itself is a stand-in."""
    ingot = as_lowered(Path(shutil.copytree(source, folder)))
    manifest = Manifest.read(ingot)
    (ingot / ENGINE).write_bytes(b"engine")
    libraries = changes.setdefault("libraries", (PLUGINS,))
    for name in libraries:
        (ingot / name).write_bytes(b"plugins")
    engine = EngineInfo(
        builder="tensorrt",
        version="10.13.3",
        compute_capabilities=(90,),
        graph_sha256=manifest.files[GRAPH].sha256,
        plugins={"MoeDispatch": 2},
        libraries=libraries,
        embedded=False,
        profiles=profiles(manifest.inputs, manifest.states, Limits(4, 256, 64)),
    )
    changed = replace(manifest, engine=replace(engine, **changes), files=file_infos(ingot, {}))
    changed.write(ingot)
    return ingot


def parsed(path: Path) -> Any:
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


class Sequence:
    """What Triton's sequence batcher does with implicit state, over ONNX Runtime in this process.

    Everything is read off the config; the states' buffers are this class's.
    """

    def __init__(self, folder: Path) -> None:
        self.config = parsed(folder / "config.pbtxt")
        path = folder / "1" / self.config.default_model_filename
        self.session = open_session(path)
        self.states = list(self.config.sequence_batching.state)
        self.values = {}
        for state in self.states:
            (first,) = state.initial_state
            assert first.zero_data and first.data_type == state.data_type
            self.values[state.input_name] = np.zeros((1, *first.dims), dtype=np.float32)

    def __call__(self, **inputs: list[int]) -> Any:
        feeds = {name: np.array([value], dtype=np.int64) for name, value in inputs.items()}
        assert {item.name for item in self.config.input} == set(feeds)
        outputs = [self.config.output[0].name, *(state.output_name for state in self.states)]
        result, *after = self.session.run(outputs, {**feeds, **self.values})
        for state, value in zip(self.states, after, strict=True):
            assert value.ndim == len(state.dims) + 1
            for dim, size in zip(state.dims, value.shape[1:], strict=True):
                assert dim in (-1, size), "Triton would refuse or misread this state"
            self.values[state.input_name] = value
        return result
