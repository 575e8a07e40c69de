"""Where the checkpoint of an export comes from, and whether what is made of it has room."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import torch

from ingot.export.early import find_source
from ingot.export.graph import check_outputs
from ingot.export.progress import Stages
from ingot.export.request import ExportError, ExportRequest
from ingot.graphs import merge
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.family import find_family
from ingot.graphs.folder import Folder
from ingot.graphs.hub import Source, resolve_adapter
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.graphs.quantised import quantisation
from ingot.plugins.json_file import read_json
from ingot.plugins.whole import TakenError, staged


def open_checkpoint(
    request: ExportRequest, stages: Stages, source: Source | None = None
) -> Checkpoint:
    """The checkpoint to export: found, downloaded, or made from a preset beside the destination.

    Its weights are read with the request's adapter in them.

    Args:
        request: what to export.
        stages: shows the steps.
        source: by ``find_source``, where it has looked already.

    Raises:
        IngotError: none that the request fits, or no room to make one.
    """
    adapter = None if request.adapter is None else resolve_adapter(request.adapter)
    return merge.open_checkpoint(_folder(request, stages, source), adapter)


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


def _folder(request: ExportRequest, stages: Stages, source: Source | None) -> Path:
    source = source or find_source(request)
    if source is not None:
        return _fetched(source, request)
    family = find_family(request.model)
    assert request.preset is not None
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


def _fetched(source: Source, request: ExportRequest) -> Path:
    """The folder of a source; gigabytes are downloaded only where the config can be exported."""
    if source.hub_name is not None:
        folder = Folder.read(source.folder)
        family = find_family(folder.family)
        check_outputs(family, request.extra_outputs)
        family.config(folder.config, request.task)
        quantisation(folder.config)
    return source.fetch()
