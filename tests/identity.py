"""Ingots of every kind beside a fresh capture, for the checks that run nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from conftest import MakeCheckpoint, MakeIngot
from traces import Traces

from ingot.export.capture import Captured
from ingot.export.graph import Opened, Recipe
from ingot.export.ingot import GRAPH, MANIFEST, Manifest, file_infos
from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.plugins.errors import IngotError
from ingot.validate.identity.subject import Subject

FAMILIES = ("granite", "jetmoe", "mamba2", "olmoe")


class Kept:
    """By family and target: an ingot, made when first asked for, and its checkpoint.

    Every subject of one recipe shares one fresh capture.

    Args:
        make_checkpoint: the fixture.
        make_ingot: the fixture.
        traces: the fixture.
        tiny: the checkpoint of OLMoE.
        ingots: those that are there of it, by target.
    """

    def __init__(
        self,
        make_checkpoint: MakeCheckpoint,
        make_ingot: MakeIngot,
        traces: Traces,
        tiny: Path,
        ingots: dict[str, Path],
    ) -> None:
        self._make_checkpoint, self._make_ingot, self._traces = make_checkpoint, make_ingot, traces
        self._checkpoints = {"olmoe": tiny}
        self._ingots = {("olmoe", target, "fp32"): ingot for target, ingot in ingots.items()}
        self._fresh: dict[tuple[str, Recipe], tuple[Opened, Captured]] = {}

    def checkpoint(self, family: str) -> Path:
        """Of a family; ``clipped`` is OLMoE with a ``clip_qkv`` that no value reaches."""
        if family not in self._checkpoints:
            config = {"clip_qkv": 1e6} if family == "clipped" else {}
            name = "olmoe" if family == "clipped" else family
            self._checkpoints[family] = self._make_checkpoint(name, **config)
        return self._checkpoints[family]

    def ingot(self, family: str, target: str, precision: str = "fp32") -> Path:
        key = family, target, precision
        if key not in self._ingots:
            options = {"builder": "none"} if target.startswith("trt") else {}
            checkpoint = self.checkpoint(family)
            made = self._make_ingot(checkpoint, target, precision=precision, **options)
            self._ingots[key] = made
        return self._ingots[key]

    def subject(self, folder: Path, family: str) -> Subject:
        """What the checks of a folder are given; its files are not proven to be whole."""
        checkpoint = Checkpoint.open(self.checkpoint(family))
        subject = Subject(folder, Manifest.read(folder), checkpoint, Stages(), self._traces)
        key = family, subject.recipe
        if key not in self._fresh:
            try:
                self._fresh[key] = subject.opened, subject.captured
            # For a check to find out.
            except IngotError:
                return subject
        # As if they were cached there.
        subject.__dict__.update(zip(("opened", "captured"), self._fresh[key], strict=True))
        return subject


def changed(
    ingot: Path,
    out: Path,
    change: Callable[[onnx.ModelProto], object] | None = None,
    said: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """A copy with another graph or another ``ingot.json``, whose hashes are right.

    Args:
        ingot: read only.
        out: the copy.
        change: is given the graph's file.
        said: is given the manifest, parsed.
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ingot, out)
    if change is not None:
        model = onnx.load(str(out / GRAPH), load_external_data=False)
        change(model)
        (out / GRAPH).write_bytes(model.SerializeToString())
    if said is not None:
        raw = json.loads((out / MANIFEST).read_text())
        said(raw)
        (out / MANIFEST).write_text(json.dumps(raw))
    manifest = Manifest.read(out)
    replace(manifest, files=file_infos(out, {})).write(out)
    return out
