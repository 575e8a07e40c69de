"""A half-precision graph on ONNX Runtime in float32: what it is, apart from how it rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from ingot.export.ingot import Manifest
from ingot.runtime.onnxruntime_session import guarded, ort_value
from ingot.validate.locate.widen import HALVES, widen, widened
from ingot.validate.truth.taps import TappedSession


class WidenedSession(TappedSession):
    """The graph of a half-precision ingot with taps, computed in float32 over its own weights.

    Args:
        folder: the ingot.
        manifest: the ingot's.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._precision = manifest.precision
        states = tuple(state.cast("float32") for state in manifest.states)
        super().__init__(folder, replace(manifest, states=states))

    def _change(self, model: onnx.ModelProto, folder: Path) -> Mapping[str, Any]:
        # They must outlive the session.
        with guarded():
            self._weights = {
                tensor.name: ort_value(widened(numpy_helper.to_array(tensor, str(folder))))
                for tensor in model.graph.initializer
                if tensor.data_location == onnx.TensorProto.EXTERNAL
            }
        widen(model, self._precision)
        del model.graph.value_info[:]
        for value in (*model.graph.input, *model.graph.output):
            if value.type.tensor_type.elem_type in HALVES.values():
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        return self._weights
