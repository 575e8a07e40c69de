"""Short ways to write a fault: an edit of the graph, planted in its file or in what runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from ingot.runtime import onnxruntime_session
from proof import stored
from proof.editing import Edit, Editor
from proof.fault import By, Change, Fault, InFolder, InProcess, Patch, Where


def in_graph(
    name: str,
    base: str,
    kind: str,
    edit: Edit,
    where: Where | None = None,
    by: tuple[By, ...] = ("graph",),
    **more: Any,
) -> Fault:
    """The graph file is wrong."""
    return Fault(name, base, kind, "graph", InFolder(stored.graph(edit)), by, where, **more)


def in_kernel(
    name: str,
    base: str,
    kind: str,
    edit: Edit,
    where: Where | None = None,
    by: tuple[By, ...] = ("numbers",),
    **more: Any,
) -> Fault:
    """The graph file is right, and ONNX Runtime computes as if it were edited so."""
    return Fault(name, base, kind, "kernel", InProcess(kernel(edit)), by, where, **more)


def in_weights(
    name: str,
    base: str,
    change: Change,
    where: Where | None = None,
    kind: str = "weights",
    by: tuple[By, ...] = ("weights",),
    **more: Any,
) -> Fault:
    """The weights file is wrong."""
    return Fault(name, base, kind, "weights", InFolder(change), by, where, **more)


def in_session(
    name: str,
    base: str,
    patch: Patch,
    where: Where | None = None,
    kind: str = "session",
    **more: Any,
) -> Fault:
    """What feeds the graph and keeps its states is wrong."""
    return Fault(name, base, kind, "session", InProcess(patch), ("numbers",), where, **more)


def manifest(name: str, base: str, change: Change, words: str, kind: str = "contract") -> Fault:
    """``ingot.json`` is wrong: the contract's check says so, or nothing runs."""
    plant, by = InFolder(change), ("contract", "refused")
    return Fault(name, base, kind, "manifest", plant, by, Where(words=words))  # type: ignore[arg-type]


def kernel(edit: Edit) -> Patch:
    """Every session over a whole graph opens another one.

    What looks for a place lowers and cuts graphs by itself and runs both on the same kernels, so
    that a wrong one differs in none; it is left alone.
    """
    right = onnxruntime_session.open_session

    def opened(graph: Path | bytes, **options: Any) -> Any:
        data = graph if isinstance(graph, bytes) else graph.read_bytes()
        model = onnx.load_model_from_string(data)
        if not isinstance(graph, bytes):
            options.setdefault("weights_folder", graph.parent)
        edit(Editor(model))
        return right(model.SerializeToString(), **options)

    def apply(patch: pytest.MonkeyPatch) -> None:
        for module in ("ingot.runtime.ort", "ingot.validate.locate.session"):
            patch.setattr(f"{module}.open_session", opened)

    return apply
