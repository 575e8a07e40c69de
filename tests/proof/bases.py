"""The right ingots in whose copies faults are planted: each is exported once, and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import toy_hybrid
from packed_cases import CASES
from safetensors.torch import load_file, save_file
from traces import Traces

from ingot.export.build import build
from ingot.export.graph import Capture
from ingot.export.ingot import Manifest
from ingot.export.progress import Stages
from ingot.export.quantization import BITS
from ingot.export.request import ExportRequest
from ingot.graphs.checkpoint import SINGLE
from ingot.graphs.family import find_family
from ingot.graphs.merge import open_checkpoint
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.validate.truth.cache import Cache
from ingot.validate.truth.reference import Reference

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Base:
    """What an ingot is made of.

    Attributes:
        name: what faults call it.
        family: whose tiny preset it is.
        target: of the export.
        precision: of the export.
        task: of the export.
        config: other fields than the preset's.
        stored: dtype of the checkpoint's tensors.
        seed: of the weights.
        change: the checkpoint's tensors, in place.
        adapter: writes a LoRA adapter for a checkpoint into a folder.
        packed: how the checkpoint is quantised, by its name in ``packed_cases.CASES``.
        weights: what matrices are stored in, where that is not the precision.
        more: other fields of the request.
        max_kl: what storing the weights may cost, where random weights make too much of it.
    """

    name: str
    family: str
    target: str
    precision: str = "fp32"
    task: str = "generate"
    config: Mapping[str, Any] = field(default_factory=dict)
    stored: torch.dtype = torch.float32
    seed: int = 7
    change: Callable[[Tensors], None] | None = None
    adapter: Callable[[Path, Path], None] | None = None
    packed: str | None = None
    weights: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    max_kl: float | None = None


class Kept:
    """One base in a folder: its checkpoint, its ingot and the eager graph that is the truth.

    Args:
        base: what it is.
        place: an empty folder for it.
        traces: the graphs that this process has traced; right ones only.
    """

    def __init__(self, base: Base, place: Path, traces: Traces) -> None:
        self.base = base
        self.traces = traces
        self._place = place

    @cached_property
    def source(self) -> Path:
        """The checkpoint's folder."""
        base, folder = self.base, self._place / "checkpoint"
        folder.mkdir(parents=True)
        family = find_family(base.family)
        config = {**preset_config(family, "tiny"), **base.config}
        task = "classify" if base.task == "classify" else "generate"
        write_checkpoint(folder, family, config, task=task, dtype=base.stored, seed=base.seed)
        if base.change is not None:
            tensors = load_file(folder / SINGLE)
            base.change(tensors)
            save_file(tensors, folder / SINGLE, {"format": "pt"})
        if base.packed is not None:
            return CASES[base.packed](folder, self._place / "packed").packed
        return folder

    @cached_property
    def adapter(self) -> Path | None:
        """The adapter's folder, if there is one."""
        if self.base.adapter is None:
            return None
        folder = self._place / "adapter"
        folder.mkdir()
        self.base.adapter(self.source, folder)
        return folder

    @cached_property
    def ingot(self) -> Path:
        """The right ingot; read only."""
        return self.exported(self._place / "ingot")

    @cached_property
    def reference(self) -> Reference:
        """Its truth, which keeps what it computed."""
        return self._of(self.ingot)

    def reference_of(self, ingot: Path) -> Reference:
        """The truth of an ingot that may be wrong.

        What is stored in whole numbers has a truth of its own, as in a validation. Any other is the
        right ingot's, of which all is computed already.
        """
        whole = self.base.weights in BITS or self.base.packed is not None
        return self._of(ingot) if whole else self.reference

    def _of(self, ingot: Path) -> Reference:
        checkpoint = open_checkpoint(self.source, self.adapter)
        cache = Cache(self._place / "cache")
        return Reference.of_ingot(ingot, Manifest.read(ingot), checkpoint, cache)

    def exported(self, out: Path, capture: Capture | None = None) -> Path:
        """A new ingot of the checkpoint, not validated.

        Args:
            out: its folder.
            capture: traces the eager graph; from ``traces`` by default.
        """
        base = self.base
        adapter = None if self.adapter is None else str(self.adapter)
        request = ExportRequest(
            str(self.source),
            base.target,
            out,
            precision=base.precision,
            task=base.task,
            builder="none",
            adapter=adapter,
            weights=base.weights,
            **base.more,
        )
        build(request, Stages(), None, capture=capture or self.traces)
        return out


def known(base: Base) -> AbstractContextManager[Any]:
    """Lets the product know the family of a base, as long as it is entered."""
    is_toy = base.family == toy_hybrid.FAMILY.model_type
    return toy_hybrid.registered() if is_toy else nullcontext()


NARROW = {"num_experts": 64, "num_experts_per_tok": 1, "hidden_size": 32, "intermediate_size": 16}
# More keys than a kernel takes at once.
LONGER = {"max_position_embeddings": 640}
DYNAMIC = {
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
}


def _of_family(family: str) -> list[Base]:
    return [
        Base(f"{family} onnx", family, "onnx"),
        Base(f"{family} ort", family, "ort"),
        Base(f"{family} fp16", family, "trt", "fp16"),
    ]


BF16 = torch.bfloat16
# No size is a multiple of a block.
UNEVEN = {"hidden_size": 72, "intermediate_size": 50, "vocab_size": 251}


def exact(block: int = 32, *, symmetric: bool = True) -> dict[str, Any]:
    """A request of whole numbers whose kernels compute in float32."""
    return {"block": block, "symmetric": symmetric, "accuracy": "exact"}


# Kernels of Ingot's own, which read panels.
OWN = {"kernels": "ingot"}
# Block and zero points are the checkpoint's.
GIVEN = {"accuracy": "exact"}

BASES = {
    base.name: base
    for base in (
        *_of_family("granite"),
        *_of_family("olmoe"),
        *_of_family("jetmoe"),
        *_of_family("mamba2"),
        *_of_family("granitemoehybrid"),
        Base("olmoe 64 experts onnx", "olmoe", "onnx", config=NARROW),
        Base("olmoe 64 experts ort", "olmoe", "ort", config=NARROW),
        Base("olmoe clipped onnx", "olmoe", "onnx", config={"clip_qkv": 8.0}),
        Base("granite dynamic onnx", "granite", "onnx", config=DYNAMIC),
        *(Base(f"{family} bf16", family, "trt", "bf16") for family in ("granite", "mamba2")),
        Base("granite features ort", "granite", "ort", task="features"),
        Base("mamba2 features onnx", "mamba2", "onnx", task="features"),
        Base("jetmoe classify onnx", "jetmoe", "onnx", task="classify"),
        Base("jetmoe classify ort", "jetmoe", "ort", task="classify"),
        Base("granite bf16 weights ort", "granite", "ort", stored=BF16, weights="checkpoint"),
        Base("olmoe bf16 weights ort", "olmoe", "ort", weights="bf16"),
        Base("jetmoe bf16 weights onnx", "jetmoe", "onnx", stored=BF16, weights="bf16"),
        Base("mamba2 fp16 weights ort", "mamba2", "ort", weights="fp16"),
        Base("olmoe int4 ort", "olmoe", "ort", weights="int4", more=exact()),
        Base(
            "olmoe int4 zeros ort",
            "olmoe",
            "ort",
            weights="int4",
            more=exact(symmetric=False),
        ),
        Base(
            "olmoe int4 uneven ort",
            "olmoe",
            "ort",
            weights="int4",
            config=UNEVEN,
            more=exact(128),
        ),
        Base(
            "granite int4 zeros ort",
            "granite",
            "ort",
            weights="int4",
            more=exact(symmetric=False),
        ),
        Base("jetmoe int8 ort", "jetmoe", "ort", weights="int8", more=exact()),
        Base("mamba2 int4 ort", "mamba2", "ort", weights="int4", more=exact(64)),
        Base("olmoe awq ort", "olmoe", "ort", packed="awq", weights="checkpoint", more=GIVEN),
        Base("granite gptq ort", "granite", "ort", packed="gptq", weights="checkpoint", more=GIVEN),
        Base("granite ingot", "granite", "ort", more=OWN),
        Base("granite 640 ingot", "granite", "ort", config=LONGER, more=OWN),
        Base("jetmoe bf16 ingot", "jetmoe", "ort", stored=BF16, weights="checkpoint", more=OWN),
        Base("mamba2 bf16 ingot", "mamba2", "ort", weights="bf16", more=OWN),
        Base("olmoe int4 ingot", "olmoe", "ort", weights="int4", more={**exact(), **OWN}),
        Base(
            "granite int4 zeros ingot",
            "granite",
            "ort",
            weights="int4",
            more={**exact(symmetric=False), **OWN},
        ),
        Base(
            "olmoe int8 uneven ingot",
            "olmoe",
            "ort",
            weights="int8",
            config=UNEVEN,
            more={**exact(64), **OWN},
        ),
        Base("granitemoehybrid ingot", "granitemoehybrid", "ort", more=OWN),
        Base("hybrid ort", "toy_hybrid", "ort"),
        Base("hybrid ingot", "toy_hybrid", "ort", more=OWN),
        Base("hybrid onnx", "toy_hybrid", "onnx"),
    )
}
