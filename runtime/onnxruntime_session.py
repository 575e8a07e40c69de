"""ONNX Runtime's sessions: where every graph is opened, and the only import of the package.

A session's options, its provider and what ONNX Runtime leaves behind on a disk are decided here
once, for an ingot's session and for what is run beside it in a validation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.plugins.errors import IngotError
from ingot.runtime.session import SessionError

# ONNX Runtime's wheel (1.31) otherwise keeps a database of its use in the home folder to report it.
# It looks when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

CPU = "CPUExecutionProvider"
# Characters of a message of ONNX Runtime.
MOST_SAID = 500
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_SPINNING = "session.intra_op.allow_spinning"


def open_session(
    graph: Path | bytes,
    *,
    name: str = "",
    threads: int = 0,
    spinning: bool = True,
    provider: str = CPU,
    weights_folder: Path | None = None,
    weights: Mapping[str, onnxruntime.OrtValue] | None = None,
    libraries: Sequence[Path] = (),
    optimized: Path | None = None,
) -> onnxruntime.InferenceSession:
    """ONNX Runtime's session of one graph.

    Args:
        graph: an ONNX file, which finds its weights beside it, or the bytes of one.
        name: of the graph in a refusal; by default its path.
        threads: of one operator; 0 lets ONNX Runtime choose.
        spinning: whether threads wait for the next run busily. Where sessions take turns, they
            would take the processor from each other.
        provider: of the kernels.
        weights_folder: where the graph's external data lies; bytes have no place of their own.
        weights: initializers by name, in place of their external data. The session reads them where
            they are, so the caller keeps them for as long as it runs.
        libraries: shared libraries with custom operators of the graph.
        optimized: where the graph is written as ONNX Runtime runs it.

    Raises:
        SessionError: a provider that this ONNX Runtime does not have, or a graph it cannot load.
    """
    has = onnxruntime.get_available_providers()
    if provider not in has:
        # ONNX Runtime itself would warn, and run on another.
        raise SessionError(
            f"ONNX Runtime {onnxruntime.__version__} has no {provider} here, but {', '.join(has)}; "
            "install a build that has it."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its warnings about unused constants of the function bodies are of no use to a user, and its
    # errors are raised as well.
    options.log_severity_level = 4
    if not spinning:
        options.add_session_config_entry(_SPINNING, "0")
    if weights_folder is not None:
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights_folder))
    if weights is not None:
        options.add_external_initializers(list(weights), list(weights.values()))
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    source = graph if isinstance(graph, bytes) else str(graph)
    try:
        for library in libraries:
            options.register_custom_ops_library(str(library))
        return onnxruntime.InferenceSession(source, options, providers=[provider])
    # ONNX Runtime's exceptions share no public base class.
    except Exception as error:
        name = name or ("the graph" if isinstance(graph, bytes) else str(graph))
        raise SessionError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {name}: {said(error)}"
        ) from error


@contextmanager
def guarded() -> Iterator[None]:
    """Turns what ONNX Runtime and numpy raise over an ingot that is not whole into one of ours.

    Raises:
        SessionError: in place of any exception but Ingot's own.
    """
    try:
        yield
    except IngotError:
        raise
    # ONNX Runtime's exceptions share no public base class.
    except Exception as error:
        raise SessionError(
            f"ONNX Runtime {onnxruntime.__version__} could not run this ingot: {said(error)}; if "
            "its files are those of one export, report this."
        ) from error


def said(error: Exception) -> str:
    """An exception in one line; names in it come from the graph, which may be anybody's."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST_SAID else f"{text[:MOST_SAID]}..."


def ort_value(array: npt.NDArray[Any]) -> onnxruntime.OrtValue:
    """An array as a session binds it; a contiguous one is not copied and must outlive the value."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
