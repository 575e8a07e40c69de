"""Exports from Python: the one function that does what ``ingot export`` does.

Beside the command line, only this file joins the folders together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingot.export.early import check_max_kl, check_request, find_source
from ingot.export.ingot import TARGETS, Target
from ingot.export.ingot_schema import CHECKPOINT, INGOT
from ingot.export.kernels import chosen
from ingot.export.progress import Stages
from ingot.export.quantization import ACCURACIES, BLOCKS
from ingot.export.request import (
    BUILDERS,
    CALIBRATED,
    EXTRA_OUTPUTS,
    KERNELS,
    PRECISIONS,
    PRESETS,
    TASKS,
    WEIGHTS,
    Accuracy,
    Block,
    Builder,
    ExportError,
    ExportRequest,
    ExtraOutput,
    Kernels,
    Limits,
    Method,
    Precision,
    Preset,
    Task,
    Weights,
)
from ingot.graphs.names import nearest
from ingot.plugins.errors import shown

if TYPE_CHECKING:
    from ingot.export.build import Result
    from ingot.graphs.checkpoint import Checkpoint


def export(
    model: str | Path,
    out: str | Path,
    *,
    target: Target = "ort",
    task: Task = "generate",
    precision: Precision | None = None,
    weights: Weights | None = None,
    kernels: Kernels | None = None,
    block: Block | None = None,
    symmetric: bool | None = None,
    accuracy: Accuracy | None = None,
    calibration: str | Path | None = None,
    method: Method | None = None,
    bits: float | None = None,
    preset: Preset | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    seed: int = 0,
    extra_outputs: Sequence[ExtraOutput] = (),
    builder: Builder = "auto",
    max_batch: int = Limits.max_batch,
    max_seq: int = Limits.max_seq,
    opt_seq: int = Limits.opt_seq,
    embed_plugins: bool = False,
    context: int | None = None,
    validate: bool = True,
    max_kl: float | None = None,
    overwrite: bool = False,
    stages: Stages | None = None,
) -> Result:
    """An ingot of a Hugging Face checkpoint, as ``ingot export`` makes it.

    Args:
        model: a checkpoint folder, a family name such as ``olmoe``, or ``org/name`` on the hub.
        out: the folder to make.
        target: ``onnx``, ``ort``, ``trt`` or ``trt-rtx``.
        task: ``generate``, ``features`` or ``classify``.
        precision: of the weights and activations of a TensorRT target, ``bf16``, ``fp16`` or
            ``fp32``; where absent ``bf16`` there, and ``fp32`` for the other targets.
        weights: what matrices are stored in by the targets ``onnx`` and ``ort``, whose arithmetic
            is float32: ``fp32``, ``bf16``, ``fp16``, or ``checkpoint``, each as the checkpoint has
            it, which loses nothing, by ``ort`` also where those are whole numbers; where absent
            ``fp32``, or with the kernels ``ingot`` ``checkpoint``. By ``ort`` also ``int8`` and
            ``int4``, whole numbers with a scale a block.
        kernels: of the target ``ort``, whose run the graph: ``ort`` ONNX Runtime's own,
            ``ingot`` those of Ingot's, whose library goes into the ingot, ``portable`` what
            standard operators have, or ``auto``, the fastest of those that are installed; where
            absent ``ort``, which ONNX Runtime opens without more.
        block: of those, how many weights of a row share a scale: 32, 64 or 128; where absent 32,
            and with ``bits`` what pays most for each weight.
        symmetric: of those, whether there are no zero points; where absent True.
        accuracy: of those, and of a checkpoint's own, ``exact``, or ``fast``: products may round
            activations to int8, block by block; where absent ``fast``. By the kernels ``ingot`` of
            bfloat16 as well, to bfloat16, and there ``exact`` where absent.
        calibration: of those, a file that the numbers are chosen on: a text, or token ids of the
            model in ``.json``, ``.npy`` or ``.safetensors``.
        method: with a calibration, ``gptq``, where numbers make up for each other's errors, or
            ``importance``, where large inputs count more; where absent ``gptq``.
        bits: with a calibration and ``int4``, how many a weight may take on the mean, scales
            included: weights whose rounding costs most at the output get 8, or smaller blocks.
        preset: with a family name, first make a seeded random checkpoint of this shape: ``tiny``,
            ``small`` or ``full``.
        revision: branch, tag or commit on the hub.
        adapter: a PEFT LoRA adapter to merge into the weights, its folder or ``org/name`` on the
            hub.
        seed: of a preset's weights.
        extra_outputs: of ``router_logits`` and ``hidden_states``, each layer's tensor as a further
            output.
        builder: of a TensorRT engine, ``auto``, ``tensorrt`` or ``tensorrt-rtx``; ``none`` makes
            the graph alone.
        max_batch: most sequences of an engine's call.
        max_seq: most tokens of an engine's sequence, past and new.
        opt_seq: the length that an engine is tuned for.
        embed_plugins: put the plugin library into the engine file.
        context: longest sequence that the ingot takes, in place of what the config says, for a
            model that is known to go further; what it computes is the same.
        validate: compare the ingot with eager PyTorch before it appears.
        max_kl: the largest mean KL divergence that storing the weights in fewer bits may cost, in
            nats, in place of the limits of the format.
        overwrite: replace an ingot that is at ``out``.
        stages: shows the steps; where absent, nothing is shown.

    Returns:
        The manifest and the checkpoint's folder. ``manifest.verdict`` is ``passed``; ``passed, in
        part``, with what was not covered in ``manifest.validation["short"]``; ``skipped`` (what is
        delivered cannot run here, or nothing was asked); or ``failed``: such an ingot is there and
        does not load.

    Raises:
        IngotError: anything wrong with the arguments, the checkpoint or the destination; nothing is
            left at ``out`` that was not there before.
    """
    for name, value, known in (
        ("target", target, TARGETS),
        ("task", task, TASKS),
        ("precision", precision, (None, *PRECISIONS)),
        ("format of weights", weights, (None, *WEIGHTS)),
        ("kernels", kernels, (None, *KERNELS)),
        ("method", method, (None, *CALIBRATED)),
        ("size of a block", block, (None, *BLOCKS)),
        ("accuracy", accuracy, (None, *ACCURACIES)),
        ("preset", preset, (None, *PRESETS)),
        ("builder", builder, BUILDERS),
        *(("extra output", output, EXTRA_OUTPUTS) for output in extra_outputs),
    ):
        if value not in known:
            names = tuple(str(each) for each in known if each is not None)
            meant = nearest(str(value), names)
            raise ExportError(
                f"{shown(value)} is no {name}; give one of: {', '.join(names)}."
                f"{f' Did you mean {meant}?' if meant else ''}"
            )
    whose = chosen(kernels, target, weights)
    own = whose == INGOT and target == "ort"
    request = ExportRequest(
        model=str(model),
        target=target,
        out=Path(out),
        task=task,
        preset=preset,
        revision=revision,
        adapter=None if adapter is None else str(adapter),
        seed=seed,
        extra_outputs=tuple(dict.fromkeys(extra_outputs)),
        overwrite=overwrite,
        precision=precision or ("bf16" if target.startswith("trt") else "fp32"),
        weights=weights or (CHECKPOINT if own else None),
        kernels=whose,
        block=block,
        symmetric=symmetric,
        accuracy=accuracy,
        calibration=None if calibration is None else Path(calibration),
        method=method,
        bits=bits,
        builder=builder,
        limits=Limits(max_batch, max_seq, opt_seq),
        embed_plugins=embed_plugins,
        context=context,
    )
    stages = stages or Stages()
    check_request(request)
    check_max_kl(max_kl)
    source = find_source(request)
    with stages.stage("load PyTorch and the exporter"):
        # Here: what is refused above needs none of it, and answers at once.
        from ingot.export.build import build
    compare = partial(_compare, max_kl=max_kl) if validate else None
    return build(request, stages, compare, source=source)


def _compare(
    folder: Path, checkpoint: Checkpoint, stages: Stages, *, max_kl: float | None
) -> dict[str, Any]:
    """What ``ingot.json`` says of the comparison of a staged ingot with eager PyTorch."""
    # Here: an export that compares nothing needs no ONNX Runtime.
    from ingot.export.ingot import REPORT, Manifest
    from ingot.validate.early import cannot_compare
    from ingot.validate.report.files import write_json
    from ingot.validate.run import examine, examine_unrun
    from ingot.validate.truth.cache import default_cache
    from ingot.validate.truth.reference import Reference

    manifest = Manifest.read(folder)
    reference = Reference.of_ingot(folder, manifest, checkpoint, default_cache())
    # The folder still has a temporary name, and two exports are to be equal byte by byte.
    name = f"{manifest.model_type}-{manifest.target}"
    reason = cannot_compare(manifest)
    if reason is None:
        report = examine(folder, reference, stages, verify=False, name=name, max_kl=max_kl)
    else:
        report = examine_unrun(folder, reference, stages, reason, verify=False, name=name)
    # The manifest has the versions; nothing in an ingot depends on the machine or the day.
    write_json(replace(report, environment={}, seconds=0.0), folder / REPORT)
    return report.summary()
