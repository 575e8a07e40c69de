"""One export from request to ingot folder."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from ingot.export.capture import OPSET, Captured
from ingot.export.eligibility import eligibility, require
from ingot.export.engine import make_engine, plan_engine, profiles, trtexec_options
from ingot.export.graph import Capture, Recipe
from ingot.export.ingot import (
    GRAPH,
    TRTEXEC,
    WEIGHTS,
    Manifest,
    TensorInfo,
    check_destination,
    file_infos,
)
from ingot.export.lower_ort import shares_buffers
from ingot.export.progress import Stages
from ingot.export.request import PRECISIONS, ExportError, ExportRequest
from ingot.export.write_weights import weight_bytes, write_weights
from ingot.graphs import names
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.config import ModelConfig
from ingot.graphs.family import (
    Family,
    active_parameters,
    find_family,
    parameter_bytes,
)
from ingot.graphs.hub import describe, resolve
from ingot.graphs.layers import Model
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.plugins.whole import TakenError, staged
from ingot.version import __version__

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
TOOLS = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "safetensors",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "polygraphy",
)


# Given the staged folder, the opened checkpoint and the progress; returns ingot.json's summary.
Validate = Callable[[Path, Checkpoint, Stages], dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """A finished export: its manifest and the checkpoint folder it came from."""

    manifest: Manifest
    checkpoint: Path


def build(
    request: ExportRequest,
    stages: Stages,
    validate: Validate | None,
    *,
    capture: Capture | None = None,
) -> Result:
    """Export, validate and put the ingot in place.

    Args:
        request: what to export.
        stages: shows and measures the steps.
        validate: runs before the folder appears; None skips it and says so in ``ingot.json``.
        capture: traces the eager graph, ``export.capture.capture`` by default.

    Raises:
        IngotError: anything wrong with the request, the checkpoint or the destination; nothing is
            left at ``request.out`` that was not there before.
    """
    check_destination(request.out, request.overwrite)
    if request.precision != "fp32" and not request.for_tensorrt:
        raise ExportError(
            f"--precision {request.precision} goes with a TensorRT target; {request.target} ingots "
            "are float32."
        )
    builder = plan_engine(request) if request.for_tensorrt else None
    checkpoint = Checkpoint.open(_checkpoint_folder(request, stages))
    precision = PRECISIONS[request.precision]
    recipe = Recipe(request.target, request.task, precision, request.extra_outputs)
    eager = recipe.eager(checkpoint)
    weight_size = parameter_bytes(eager.model)
    # An engine holds its weights once more.
    _check_space(request.out, weight_size * (2 if builder else 1))
    with staged(request.out, replace=request.overwrite) as folder:
        captured = recipe.graph(eager, stages, capture)
        if request.for_tensorrt:
            rows = eligibility(captured.model, precision)
            stages.table(f"{eager.family.model_type} on TensorRT", rows)
            require(rows)
        size = weight_bytes(captured.model)
        with stages.stage("write weights", size) as advance:
            weights_hash = write_weights(captured.model, folder, WEIGHTS, advance)
            ir.save(captured.model, folder / GRAPH)
        for name in TOKENIZER_FILES:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, folder / name)
        manifest = _manifest(request, eager.family, checkpoint, eager.model, captured)
        if request.for_tensorrt:
            made = profiles(manifest.inputs, manifest.states, request.limits)
            (folder / TRTEXEC).write_text(trtexec_options(made), encoding="utf-8")
            if builder is not None:
                with stages.stage(f"build engine with {builder}"):
                    engine = make_engine(
                        folder, builder, manifest.precision, made, embed=request.embed_plugins
                    )
                manifest = replace(manifest, engine=engine)
        known = {WEIGHTS: weights_hash}
        manifest = replace(manifest, files=file_infos(folder, known))
        manifest.write(folder)
        summary: dict[str, Any] = {"verdict": "skipped", "reason": "--no-validate was given"}
        if validate is not None:
            summary = validate(folder, checkpoint, stages)
        manifest = replace(manifest, files=file_infos(folder, known), validation=summary)
        manifest.write(folder)
    return Result(manifest, checkpoint.path)


def _checkpoint_folder(request: ExportRequest, stages: Stages) -> Path:
    """The folder to export: found, downloaded, or made from a preset beside the destination."""
    if request.model not in names.FAMILIES:
        if request.preset is not None:
            raise ExportError(
                f"--preset goes with a family name ({', '.join(names.FAMILIES)}), not "
                f"{request.model!r}."
            )
        return resolve(request.model, request.revision)
    family = find_family(request.model)
    if Path(request.model).is_dir():
        raise ExportError(
            f"{request.model!r} is a family name and also a folder here; write ./{request.model} "
            "for the folder."
        )
    if request.preset is None:
        return resolve(family.hub_name, request.revision)
    config = preset_config(family, request.preset)
    dtype = torch.bfloat16 if request.preset == "full" else torch.float32
    # One model of the preset serves both tasks without a head of their own.
    task = "generate" if request.task == "features" else request.task
    name = f"{request.model}-{request.preset}-seed{request.seed}"
    name += "" if task == "generate" else f"-{task}"
    folder = request.out.absolute().parent / "checkpoints" / name
    if (folder / "config.json").is_file():
        written = json.loads((folder / "config.json").read_text())
        if {**written, **config} == written:
            return folder
        raise ExportError(f"{folder} holds another config than preset {request.preset}; remove it.")
    model = family.build(config, task)
    size = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    _check_space(folder, size)
    # Another export may have made it meanwhile, with the same bytes, and be reading it.
    with (
        suppress(TakenError),
        stages.stage(f"make {request.preset} checkpoint", size) as advance,
        staged(folder, replace=False) as made,
    ):
        write_checkpoint(
            made, family, config, task=task, dtype=dtype, seed=request.seed, advance=advance
        )
    return folder


def _check_space(path: Path, needed: int) -> None:
    existing = next(p for p in path.absolute().parents if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ExportError(
            f"{path} needs {needed / 1e9:.1f} GB and {existing} has {free / 1e9:.1f} GB free."
        )


def _manifest(
    request: ExportRequest,
    family: Family,
    checkpoint: Checkpoint,
    model: Model,
    captured: Captured,
) -> Manifest:
    config = model.config
    total, active = active_parameters(model)
    shared = shares_buffers(captured.model)
    graph = captured.model.graph
    operators = Counter(node.op_type for node in graph)
    return Manifest(
        model_type=family.model_type,
        task=request.task,
        target=request.target,
        precision=PRECISIONS[request.precision],
        main_output=captured.main_output,
        inputs=tuple(_tensor_info(value) for value in graph.inputs),
        outputs=tuple(_tensor_info(value) for value in graph.outputs),
        states=tuple(
            replace(state, shared=shared and state.axis is not None) for state in captured.states
        ),
        vocab_size=config.vocab_size,
        source={
            **describe(checkpoint.path),
            "sha256": checkpoint.digest(),
        },
        generation=_generation(checkpoint, config),
        graph={
            "opset": OPSET,
            "nodes": sum(operators.values()),
            "operators": dict(operators),
            "unread_bytes": _unread_bytes(graph),
        },
        parameters=total,
        active_parameters=active,
        weight_bytes=parameter_bytes(model),
        tools=_tool_versions(),
        labels=_labels(checkpoint, request.task, config),
    )


def _unread_bytes(graph: ir.Graph) -> int:
    """Bytes of the tables that are only looked up in, less the one row that a token reads."""
    result = 0
    for value in graph.initializers.values():
        tensor = value.const_value
        uses = value.uses()
        looked_up = all(node.op_type == "Gather" and index == 0 for node, index in uses)
        if tensor is not None and uses and looked_up and len(tensor.shape) == 2:
            rows = tensor.shape.numpy()[0]
            result += tensor.nbytes // rows * (rows - 1)
    return result


def _tensor_info(value: ir.Value) -> TensorInfo:
    assert value.name is not None and value.dtype is not None and value.shape is not None
    dimensions = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
    return TensorInfo(value.name, value.dtype.numpy().name, dimensions)


def _generation(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Any]:
    """What ends, begins and pads a sequence; ``generation_config.json`` wins where it is there."""
    facts = config.facts
    raw: dict[str, Any] = {
        "eos_token_id": list(facts.eos_token_ids),
        "pad_token_id": facts.pad_token_id,
    }
    file = checkpoint.path / "generation_config.json"
    if file.is_file():
        given = json.loads(file.read_text(encoding="utf-8"))
        raw.update({name: value for name, value in given.items() if value is not None})
    eos = raw.get("eos_token_id")
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = raw.get("pad_token_id")
    return {
        "eos_token_ids": ends,
        # Padding is masked, so any id of the vocabulary serves.
        "pad_token_id": pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else 0,
        "context_length": facts.context_length,
    }


def _labels(checkpoint: Checkpoint, task: str, config: ModelConfig) -> tuple[str, ...]:
    """Names of the classes, by their number."""
    if task != "classify":
        return ()
    named = checkpoint.config.get("id2label") or {}
    return tuple(str(named.get(str(n), f"LABEL_{n}")) for n in range(config.facts.num_labels))


def _tool_versions() -> dict[str, str]:
    versions = {"ingot": __version__}
    for name in TOOLS:
        found = _version(name)
        if found is not None:
            versions[name] = found
    return versions


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
