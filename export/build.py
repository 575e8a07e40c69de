"""One export from request to ingot folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import onnx_ir as ir

from ingot.export.calibration.run import calibrate
from ingot.export.calibration.tokens import Calibration, read_calibration
from ingot.export.early import check_request
from ingot.export.eligibility import eligibility, require
from ingot.export.engine import make_engine, plan_engine, profiles, trtexec_options
from ingot.export.generation import read_generation
from ingot.export.graph import Capture, Opened, Recipe
from ingot.export.ingot import (
    GRAPH,
    SIDE_FILES,
    TRTEXEC,
    WEIGHTS,
    Manifest,
    file_infos,
)
from ingot.export.ingot_schema import CHECKPOINT, INGOT, LIBRARY
from ingot.export.manifest import make_manifest
from ingot.export.progress import Stages
from ingot.export.request import CALIBRATED, PRECISIONS, ExportError, ExportRequest
from ingot.export.request import WEIGHTS as WEIGHT_FORMATS
from ingot.export.source import check_space, open_checkpoint
from ingot.export.tokenizer import Find, copy_tokenizer, find_beside, make_tokenizer
from ingot.export.write_weights import weight_bytes, write_weights
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.hub import Source
from ingot.plugins.cpu.operators import installed
from ingot.plugins.json_fields import Field, FieldError
from ingot.plugins.links import require_inside
from ingot.plugins.whole import keep_apart, staged

# Given the staged folder, the opened checkpoint and the progress; returns ingot.json's summary.
Validate = Callable[[Path, Checkpoint, Stages], dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """A finished export: its manifest and the checkpoint folder it came from."""

    manifest: Manifest
    checkpoint: Path


def _of_floats(recipe: Recipe, opened: Opened, accuracy: str) -> Recipe:
    """A recipe for weights in floats with a choice of accuracy.

    Raises:
        ExportError: no weight is stored in bfloat16, or the kernels round nothing.
    """
    matrices = [name for name, each in opened.model.named_parameters() if each.dim() > 1]
    stored = {opened.stored(name) for name in matrices}
    if recipe.weights != CHECKPOINT:
        stored = {recipe.weights or recipe.precision}
    if recipe.kernels != INGOT or "bfloat16" not in stored:
        raise ExportError(
            f"--accuracy {accuracy} goes with weights in whole numbers, and by --kernels ingot "
            "with those in bfloat16; this export has neither, so leave it out, or give --weights "
            "int8 or int4, or bf16."
        )
    return replace(recipe, activations="bfloat16" if accuracy == "fast" else "")


def build(
    request: ExportRequest,
    stages: Stages,
    validate: Validate | None,
    *,
    capture: Capture | None = None,
    source: Source | None = None,
) -> Result:
    """Export, validate and put the ingot in place.

    Args:
        request: what to export.
        stages: shows and measures the steps.
        validate: runs before the folder appears; None skips it and says so in ``ingot.json``.
        capture: traces the eager graph, ``export.capture.capture`` by default.
        source: where the checkpoint is, by ``find_source``, where it has looked already.

    Raises:
        IngotError: anything wrong with the request, the checkpoint or the destination; nothing is
            left at ``request.out`` that was not there before.
    """
    check_request(request)
    builder = plan_engine(request) if request.for_tensorrt else None
    checkpoint = open_checkpoint(request, stages, source)
    for read in checkpoint.folders:
        keep_apart(request.out, read)
        _check_links(read)
    precision = PRECISIONS[request.precision]
    weights = WEIGHT_FORMATS[request.weights] if request.weights else ""
    recipe = Recipe(
        request.target,
        request.task,
        precision,
        request.extra_outputs,
        weights,
        request.quantization,
        request.kernels,
    )
    opened = recipe.open(checkpoint)
    if request.target == "ort" and request.weights == CHECKPOINT:
        recipe = recipe.as_given(opened, request.accuracy)
    if request.accuracy is not None and recipe.quantization is None:
        recipe = _of_floats(recipe, opened, request.accuracy)
    # Before any weight is read: what is wrong in a file of some lines is said at once.
    generation = read_generation(checkpoint, opened.model.config)
    if request.context is not None:
        # A validation recomputes what the config says; this is what somebody said.
        generation.update(context_length=request.context, context_given=True)
    beside = find_beside(checkpoint)
    tokenizer = make_tokenizer(beside, opened.family.tokenizer_class)
    # An engine holds its weights once more.
    check_space(request.out, recipe.stored_bytes(opened) * (2 if builder else 1))
    calibration = _calibration(request, opened, beside, tokenizer)
    with staged(request.out, replace=request.overwrite) as folder:
        coder = None
        if calibration is not None:
            method = request.method or CALIBRATED[0]
            recipe, coder = calibrate(
                recipe,
                opened,
                calibration,
                method,
                request.bits,
                stages,
                any_block=request.block is None,
            )
        captured = recipe.graph(opened, stages, capture, coder=coder)
        if request.for_tensorrt:
            rows = eligibility(captured.model, precision)
            stages.table(f"{opened.family.model_type} on TensorRT", rows)
            require(rows)
        known = {WEIGHTS: _write_graph(captured.model, folder, stages, recipe.weights)}
        if request.kernels == INGOT:
            copyfile(installed(), folder / LIBRARY)
        copy_tokenizer(beside, tokenizer, folder)
        manifest = make_manifest(recipe, opened, checkpoint, captured, generation)
        if request.for_tensorrt:
            manifest = _build_engine(request, builder, manifest, folder, stages)
        manifest = replace(manifest, files=file_infos(folder, known))
        manifest.write(folder)
        summary: dict[str, Any] = {"verdict": "skipped", "reason": "--no-validate was given"}
        if validate is not None:
            summary = validate(folder, checkpoint, stages)
        manifest = replace(manifest, files=file_infos(folder, known), validation=summary)
        manifest.write(folder)
    return Result(manifest, checkpoint.path)


def _calibration(
    request: ExportRequest, opened: Opened, beside: Find, tokenizer: str | None
) -> Calibration | None:
    """The tokens to choose numbers on, where some are given."""
    if request.calibration is None:
        return None
    config = opened.model.config
    length = config.facts.context_length or None
    return read_calibration(request.calibration, config.vocab_size, length, beside, tokenizer)


def _write_graph(model: ir.Model, folder: Path, stages: Stages, stored: str) -> str:
    """Write the graph and its weights; the SHA-256 of the weights, worked out on the way."""
    with stages.stage("write weights", weight_bytes(model)) as advance:
        digest = write_weights(model, folder, WEIGHTS, advance, stored)
        ir.save(model, folder / GRAPH)
    return digest


def _check_links(checkpoint: Path) -> None:
    """Refuse links out of a checkpoint for all that is read there and ends in the ingot.

    Raises:
        IngotError: naming the file, also where a manifest could not.
    """
    for pattern in (*SIDE_FILES, "*.json", "*.safetensors"):
        for path in checkpoint.glob(pattern):
            name = path.relative_to(checkpoint).as_posix()
            require_inside(checkpoint, name, hub=True)
            # Of the others the names are known.
            if path.parent != checkpoint:
                _check_name(checkpoint, name)


def _check_name(checkpoint: Path, name: str) -> None:
    """Refuse a file whose name no manifest may have.

    Raises:
        ExportError: naming the file.
    """
    try:
        Field(name, f"a file of {checkpoint}").file_name()
    except FieldError as error:
        raise ExportError(f"{error}; rename the file, or leave it out.") from error


def _build_engine(
    request: ExportRequest, builder: str | None, manifest: Manifest, folder: Path, stages: Stages
) -> Manifest:
    """Write trtexec's options and, with a builder, the engine; the manifest that says so."""
    made = profiles(manifest.inputs, manifest.states, request.limits)
    (folder / TRTEXEC).write_text(trtexec_options(made), encoding="utf-8")
    if builder is None:
        return manifest
    with stages.stage(f"build engine with {builder}"):
        engine = make_engine(folder, builder, manifest.precision, made, embed=request.embed_plugins)
    return replace(manifest, engine=engine)
