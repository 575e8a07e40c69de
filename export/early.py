"""What can be refused of an export before PyTorch is imported, which takes seconds.

Nothing here needs it: what an export is asked for, where it is to lie, and where its checkpoint is.
"""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path

from ingot.export.ingot import check_destination
from ingot.export.ingot_schema import INGOT, ORT, PORTABLE
from ingot.export.request import PRESETS, ExportError, ExportRequest, Limits
from ingot.graphs import names
from ingot.graphs.adapter import read_adapter, refuse_forgotten
from ingot.graphs.config import MOST_POSITIONS
from ingot.graphs.folder import Folder, is_folder
from ingot.graphs.hub import Source, find, resolve_adapter
from ingot.graphs.names import RELEASED, nearest
from ingot.plugins.cpu.operators import installed
from ingot.plugins.errors import IngotError, shown

# Of a preset's weights; a larger seed would give those of its remainder.
MOST_SEEDS = 1 << 32


def check_request(request: ExportRequest) -> None:
    """Refuse options that do not go together, and a destination that cannot be.

    Raises:
        IngotError: the first of them.
    """
    # A folder is known before anything is read; what a name stands for, once it is found.
    read = [Path(name) for name in (request.model, request.adapter) if name is not None]
    check_destination(request.out, request.overwrite, *read)
    if request.precision != "fp32" and not request.for_tensorrt:
        raise ExportError(
            f"--precision {request.precision} goes with a TensorRT target; {request.target} ingots "
            "are float32."
        )
    if request.for_tensorrt and request.weights is not None:
        raise ExportError(
            f"--weights {request.weights} goes with the targets onnx and ort; an engine stores its "
            "weights in its --precision."
        )
    if request.in_numbers and request.target != "ort":
        raise ExportError(
            f"--weights {request.weights} goes with the target ort, whose runtime has kernels for "
            f"it; {request.target} stores floats: give --weights checkpoint, bf16 or fp16."
        )
    _check_kernels(request)
    # The numbers of a quantised checkpoint come with a format of their own, and with no kernel.
    floats = ("checkpoint", "bf16") if request.kernels == INGOT else ("checkpoint",)
    own = ("accuracy",) if request.target == "ort" and request.weights in floats else ()
    for option in ("block", "symmetric", "accuracy", "calibration"):
        known = request.in_numbers or option in own
        if not known and getattr(request, option) is not None:
            also = ", and by --kernels ingot with bf16" * (option == "accuracy")
            raise ExportError(
                f"--{option} goes with --weights int8 or int4{also}; it says nothing of others."
            )
    _check_calibration(request)
    if not request.for_tensorrt:
        _refuse_engine_options(request)
    if type(request.seed) is not int or not 0 <= request.seed < MOST_SEEDS:
        raise ExportError(f"--seed is {shown(request.seed)}; it must be 0 to {MOST_SEEDS - 1}.")
    context = request.context
    if context is not None and (type(context) is not int or not 1 <= context <= MOST_POSITIONS):
        raise ExportError(
            f"--context is {shown(context)}; it must be at least 1 and at most {MOST_POSITIONS}."
        )
    if request.for_tensorrt:
        # Here, for it imports onnx, which other targets need later.
        from ingot.export.engine import plan_engine

        plan_engine(request)


def _check_kernels(request: ExportRequest) -> None:
    """Refuse kernels that the target does not have, or that do not read such weights."""
    kernels, weights = request.kernels, request.weights
    if kernels == ORT:
        return
    if request.target != "ort":
        raise ExportError(
            f"--kernels {kernels} goes with the target ort, and the target is {request.target}; "
            "leave it out."
        )
    if kernels == PORTABLE and request.in_numbers:
        raise ExportError(
            f"--kernels portable has standard operators alone, and none of them multiplies by "
            f"--weights {weights}; give --weights bf16 or fp16, or --kernels ort or ingot."
        )
    if kernels == INGOT:
        installed()
        if weights == "fp16":
            raise ExportError(
                "--kernels ingot has none for --weights fp16; give bf16, which takes as many "
                "bytes, or checkpoint, which stores float16 as float32, or --kernels ort."
            )


def check_max_kl(max_kl: float | None) -> None:
    """Refuse a limit that no divergence is held to.

    Raises:
        IngotError: it is negative, or no finite number.
    """
    if max_kl is None:
        return
    number = isinstance(max_kl, int | float) and not isinstance(max_kl, bool)
    if not number or not 0 <= max_kl < math.inf:
        raise IngotError(
            f"--max-kl is {shown(max_kl)}; it must be a number of nats of at least 0, such as 0.3."
        )


def _check_calibration(request: ExportRequest) -> None:
    """Refuse a way of choosing numbers that nothing is chosen by."""
    file, bits = request.calibration, request.bits
    for option, value in (("--bits", bits), ("--method", request.method)):
        if value is not None and file is None:
            raise ExportError(
                f"{option} chooses by what the model computes; give --calibration with a file of "
                "text or token ids."
            )
    if file is not None and not file.is_file():
        raise ExportError(f"--calibration {file} is no file; give one of text or token ids.")
    if bits is None:
        return
    if request.weights != "int4":
        raise ExportError(
            f"--bits raises some weights of int4 to int8, and --weights is {request.weights}; give "
            "--weights int4."
        )
    if request.task != "generate":
        raise ExportError(
            f"--bits measures the next token's distribution, and --task {request.task} has none; "
            "leave it out."
        )
    if not 0 < bits < math.inf:
        raise ExportError(f"--bits is {shown(bits)}; it must be a number, such as 4.8.")


def _refuse_engine_options(request: ExportRequest) -> None:
    """What is said of an engine where none is made would be dropped without a word."""
    given = {
        f"--builder {request.builder}": request.builder not in ("auto", "none"),
        "--embed-plugins": request.embed_plugins,
        **{
            f"--{field.name.replace('_', '-')}": getattr(request.limits, field.name)
            != field.default
            for field in fields(Limits)
        },
    }
    for option in (option for option, is_given in given.items() if is_given):
        raise ExportError(
            f"{option} is of a TensorRT engine, and a {request.target} ingot has none; give "
            "--target trt or trt-rtx, or leave it out."
        )


def find_source(request: ExportRequest) -> Source | None:
    """Where the checkpoint of an export is, its config read as far as its architecture.

    Returns:
        The source; None of a preset, which is made.

    Raises:
        IngotError: no such folder, family or hub name, or a checkpoint that nothing here exports.
    """
    adapter = None
    if request.adapter is not None:
        # Before the model, which may have to be downloaded.
        adapter = resolve_adapter(request.adapter)
        read_adapter(adapter)
    model = request.model
    if model in names.FAMILIES:
        if is_folder(model):
            raise ExportError(
                f"{model!r} is a family name and also a folder here; write ./{model} for the "
                "folder."
            )
        if request.preset is not None:
            if request.revision is not None:
                raise ExportError("--revision is of a name on the hub, and a preset is made here.")
            return None
        model = RELEASED[model]
    elif not is_folder(model) and (meant := _preset_meant(model)):
        raise ExportError(f"there is no {shown(model)}; did you mean --model {meant}?")
    elif request.preset is not None:
        meant = nearest(model, names.FAMILIES)
        raise ExportError(
            f"--preset goes with a family name ({', '.join(names.FAMILIES)}), not {shown(model)}"
            f"{f'; did you mean {meant}?' if meant else '.'}"
        )
    source = find(model, request.revision)
    if source.hub_name is None and request.revision is not None:
        raise ExportError(
            f"--revision is of a name on the hub, and {shown(model)} is a folder, which has the "
            "one revision that lies there; leave it out."
        )
    # Before its config, which a folder that is an adapter and nothing else does not have.
    refuse_forgotten(source.folder, adapter, source.hub_name)
    folder = Folder.read(source.folder)
    # Read for their refusals; on the hub the weights are looked for when they are fetched.
    _ = folder.family
    if source.hub_name is None:
        folder.weight_map()
    return source


def _preset_meant(model: str) -> str | None:
    """The options that somebody meant by ``olmoe-tiny`` and the like."""
    family, _, preset = re.sub(r"[_: ]", "-", model.lower()).partition("-")
    if family in names.FAMILIES and preset in PRESETS:
        return f"{family} --preset {preset}"
    return None
