"""What can be refused of an export before PyTorch is imported, which takes seconds.

Nothing here needs it: what an export is asked for, where it is to lie, and where its checkpoint is.
"""

from __future__ import annotations

import re
from pathlib import Path

from ingot.export.ingot import check_destination
from ingot.export.request import PRESETS, ExportError, ExportRequest
from ingot.graphs.adapter import read_adapter, refuse_forgotten
from ingot.graphs.config import MOST_POSITIONS
from ingot.graphs.folder import Folder, is_folder
from ingot.graphs.hub import Source, find, resolve_adapter
from ingot.graphs.names import FAMILIES, RELEASED, nearest
from ingot.plugins.errors import shown


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
    context = request.context
    if context is not None and (type(context) is not int or not 1 <= context <= MOST_POSITIONS):
        raise ExportError(
            f"--context is {shown(context)}; it must be at least 1 and at most {MOST_POSITIONS}."
        )
    if request.for_tensorrt:
        # Here, for it imports onnx, which other targets need later.
        from ingot.export.engine import plan_engine

        plan_engine(request)


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
    if model in FAMILIES:
        if is_folder(model):
            raise ExportError(
                f"{model!r} is a family name and also a folder here; write ./{model} for the "
                "folder."
            )
        if request.preset is not None:
            return None
        model = RELEASED[model]
    elif not is_folder(model) and (meant := _preset_meant(model)):
        raise ExportError(f"there is no {shown(model)}; did you mean --model {meant}?")
    elif request.preset is not None:
        meant = nearest(model, FAMILIES)
        raise ExportError(
            f"--preset goes with a family name ({', '.join(FAMILIES)}), not {shown(model)}"
            f"{f'; did you mean {meant}?' if meant else '.'}"
        )
    source = find(model, request.revision)
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
    if family in FAMILIES and preset in PRESETS:
        return f"{family} --preset {preset}"
    return None
