"""Where the checkpoint of an export comes from, and whether what is made of it has room."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import torch

from ingot.export.progress import Stages
from ingot.export.request import ExportError, ExportRequest
from ingot.graphs import names
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.family import find_family
from ingot.graphs.hub import resolve
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.plugins.json_file import read_json
from ingot.plugins.whole import TakenError, staged


def open_checkpoint(request: ExportRequest, stages: Stages) -> Checkpoint:
    """The checkpoint to export: found, downloaded, or made from a preset beside the destination.

    Raises:
        IngotError: none that the request fits, or no room to make one.
    """
    return Checkpoint.open(_folder(request, stages))


def check_space(path: Path, needed: int) -> None:
    """Refuse what has no room, before any work is done.

    Args:
        path: what is to be made.
        needed: its bytes.

    Raises:
        ExportError: the disk has less.
    """
    existing = next(p for p in path.absolute().parents if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ExportError(
            f"{path} needs {needed / 1e9:.1f} GB and {existing} has {free / 1e9:.1f} GB free."
        )


def _folder(request: ExportRequest, stages: Stages) -> Path:
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
        written = read_json(folder / "config.json")
        if {**written, **config} == written:
            return folder
        raise ExportError(f"{folder} holds another config than preset {request.preset}; remove it.")
    model = family.build(config, task)
    size = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    check_space(folder, size)
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
