"""What ``ingot.json`` says of an export."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ingot.export.capture import OPSET, Captured
from ingot.export.graph import Opened, Recipe, operators
from ingot.export.ingot import Manifest, TensorInfo
from ingot.export.ingot_schema import ORT
from ingot.export.lower_ort import in_place
from ingot.export.passes.weights import Weight
from ingot.export.request import ExportError
from ingot.graphs.adapter_weights import MergedCheckpoint
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.config import ModelConfig
from ingot.graphs.family import active_parameters
from ingot.graphs.hub import describe
from ingot.plugins.errors import shown
from ingot.plugins.json_fields import safe
from ingot.version import __version__

# Names of the packages that a runtime may be installed by.
ONNX_RUNTIME = ("onnxruntime", "onnxruntime-gpu")
TENSORRT = ("tensorrt", "tensorrt-rtx-cu13")
TOOLS = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    *ONNX_RUNTIME,
    "safetensors",
    "tokenizers",
    *TENSORRT,
    "polygraphy",
)


def make_manifest(
    recipe: Recipe,
    opened: Opened,
    checkpoint: Checkpoint,
    captured: Captured,
    generation: dict[str, Any],
) -> Manifest:
    """The manifest of a graph; nothing in it is of the files yet, nor of an engine or a verdict.

    Args:
        recipe: of the graph.
        opened: what was captured.
        checkpoint: whose weights have all been read, for its hash.
        captured: the graph, lowered.
        generation: of ``export.generation.read_generation``.
    """
    config = opened.model.config
    total, active = active_parameters(opened.model)
    shared = in_place(captured.model)
    graph = captured.model.graph
    counts = operators(captured.model)
    return Manifest(
        model_type=opened.family.model_type,
        task=recipe.task,
        target=recipe.target,
        precision=recipe.precision,
        main_output=captured.main_output,
        inputs=tuple(_tensor_info(value) for value in graph.inputs),
        outputs=tuple(_tensor_info(value) for value in graph.outputs),
        states=tuple(replace(state, shared=state.input in shared) for state in captured.states),
        vocab_size=config.vocab_size,
        source=_source(checkpoint),
        generation=generation,
        graph={
            "opset": OPSET,
            "nodes": sum(counts.values()),
            "operators": counts,
            "unread_bytes": _unread_bytes(graph),
            **passes(captured),
        },
        parameters=total,
        active_parameters=active,
        weight_bytes=_weight_bytes(graph),
        tools={"ingot": __version__, **versions(TOOLS)},
        labels=_labels(checkpoint, recipe.task, config),
        weights=recipe.weights,
        quantization=recipe.quantization,
        kernels="" if recipe.kernels == ORT else recipe.kernels,
        activations=recipe.activations,
    )


def passes(captured: Captured) -> dict[str, Any]:
    """What made the graph, for ``graph`` of ``ingot.json``.

    ``passes`` has what each pass of the capture did, ``canonical`` the operators of the canonical
    graph where it was lowered, and ``lowering`` how each pass of that led from there to the graph.
    """
    found: dict[str, Any] = {"passes": [each.summary() for each in captured.passes]}
    if captured.canonical:
        found["canonical"] = captured.canonical
        found["lowering"] = [each.summary() for each in captured.lowering]
    return found


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    """Name, revision and hash of a checkpoint, and of the adapter that is merged into it."""
    source: dict[str, Any] = {**_described(checkpoint.path), "sha256": checkpoint.digest()}
    if isinstance(checkpoint, MergedCheckpoint):
        adapter = checkpoint.adapter
        said = _described(adapter.path)
        source["adapter"] = {
            "name": said["checkpoint"],
            "revision": said["revision"],
            "sha256": adapter.sha256,
        }
    return source


def _described(folder: Path) -> dict[str, str | None]:
    return {name: said and safe(said) for name, said in describe(folder).items()}


def _weight_bytes(graph: ir.Graph) -> int:
    """Bytes of the weights as they are stored, written already or not."""
    tensors = (value.const_value for value in graph.initializers.values())
    return sum(each.nbytes for each in tensors if isinstance(each, (Weight, ir.ExternalTensor)))


def _unread_bytes(graph: ir.Graph) -> int:
    """Bytes of the tables that are only looked up in, less the one row that a token reads."""
    result = 0
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, (Weight, ir.ExternalTensor)) and _looked_up(value):
            rows = tensor.shape.numpy()[0]
            result += tensor.nbytes // rows * (rows - 1)
    return result


def _looked_up(value: ir.Value) -> bool:
    """Whether a weight is a table, or of one, of which rows are read and nothing else."""
    uses = list(value.uses())
    return bool(uses) and all(
        (node.op_type == "Gather" and index == 0)
        or (node.op_type == "GatherBlockQuantized" and index != 1)
        or (node.op_type == "Embedding" and index == 1)
        or (node.op_type == "Reshape" and _looked_up(node.outputs[0]))
        for node, index in uses
    )


def _tensor_info(value: ir.Value) -> TensorInfo:
    assert value.name is not None and value.dtype is not None and value.shape is not None
    dimensions = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
    return TensorInfo(value.name, value.dtype.numpy().name, dimensions)


def _labels(checkpoint: Checkpoint, task: str, config: ModelConfig) -> tuple[str, ...]:
    """Names of the classes, by their number."""
    if task != "classify":
        return ()
    named = checkpoint.config.get("id2label") or {}
    if not isinstance(named, dict):
        raise ExportError(
            f"config.json: id2label is {shown(named)}; it must be an object of names by number."
        )
    return tuple(safe(str(named.get(str(n), f"LABEL_{n}"))) for n in range(config.facts.num_labels))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed, by name."""
    found = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
