"""A checkpoint whose matrices are packed, read as one of plain weights.

Whoever reads a weight of it, the export, the truth of a validation or the search for a fault, reads
float32 numbers under transformers' names, as if they had been stored so; every target and every way
to store weights therefore takes such a checkpoint as any other. What wants the whole numbers asks
for them (``Checkpoint.coded``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ingot.graphs.awq import Awq
from ingot.graphs.checkpoint import (
    Checkpoint,
    CheckpointError,
    Entry,
    WeightMap,
    plain,
    read_entries,
    stack_height,
)
from ingot.graphs.coded import Coded, Form
from ingot.graphs.compressed_tensors import CompressedTensors
from ingot.graphs.config import QUANTISATION, method_of, refuse_quantised
from ingot.graphs.folder import Folder
from ingot.graphs.gptq import Gptq
from ingot.graphs.quantisation import Format, Packed
from ingot.plugins.errors import named

FORMATS = {each.method: each for each in (Gptq, Awq, CompressedTensors)}


def quantisation(config: dict[str, Any]) -> Format | None:
    """How a ``config.json`` says that weights are packed; None where they are not.

    Raises:
        IngotError: a method, or a way of it, that is not read.
    """
    refuse_quantised(config)
    section = config.get(QUANTISATION)
    if not section:
        return None
    method = method_of(section)
    assert method is not None
    return FORMATS[method].read(section)


def open_folder(path: Path) -> Checkpoint:
    """A checkpoint folder, opened, whether its weights are packed or plain.

    Raises:
        IngotError: a folder that cannot be read, or does not hold what its config promises.
    """
    folder = Folder.read(path)
    packing = quantisation(folder.config)
    if packing is None:
        return Checkpoint.open(path)
    return QuantisedCheckpoint.of(folder, packing)


@dataclass
class QuantisedCheckpoint(Checkpoint):
    """A checkpoint with packed matrices.

    Attributes:
        packing: how they are packed.
        packed: by the name that transformers has for the plain weight.
    """

    packing: Format = field(kw_only=True)
    packed: Mapping[str, Packed] = field(kw_only=True)

    @classmethod
    def of(cls, folder: Folder, packing: Format) -> QuantisedCheckpoint:
        """Find the packed matrices among the tensors of a folder.

        Raises:
            IngotError: tensors that are missing, do not belong together, or are packed where the
                config says that they are not.
        """
        stored = read_entries(folder)
        layers: dict[str, dict[str, str]] = {}
        for name, entry in stored.items():
            module, _, leaf = name.rpartition(".")
            role = packing.role(leaf, entry)
            if role is not None:
                layers.setdefault(module, {})[role] = name
        _check_layers(stored, layers, packing)
        settings = packing.settings(tuple(layers))
        taken = {name for roles in layers.values() for name in roles.values()}
        entries = plain({name: each for name, each in stored.items() if name not in taken})
        packed: dict[str, Packed] = {}
        for module, roles in layers.items():
            weight = f"{module}.weight"
            first = stored[next(iter(roles.values()))]
            how = settings[module]
            if how is None:
                raise CheckpointError(
                    f"{first.file.name}: {named(module)} is packed, and {QUANTISATION} in "
                    "config.json says that it is not quantised; the config does not belong to "
                    "these weights."
                )
            if weight in entries:
                raise CheckpointError(
                    f"{first.file.name}: {named(module)} is packed, and there is a plain "
                    f"{named(weight)} as well; remove the one that is not the model's."
                )
            tensors = {role: stored[name] for role, name in roles.items()}
            packed[weight] = Packed(module, how, tensors)
            shape = packing.shape(packed[weight])
            marked = next(tensors[mark] for mark in packing.marks if mark in tensors)
            entries[weight] = Entry(marked.file, "F32", shape, marked.begin, marked.end)
        return cls(
            folder.path,
            folder.config,
            entries,
            sizes=folder.sizes,
            packing=packing,
            packed=packed,
        )

    def read(self, name: str) -> torch.Tensor:
        """One tensor; float32 where it is packed, and else in the file's dtype.

        Raises:
            CheckpointError: a NaN or infinite weight, or tensors that do not belong together.
        """
        coded = self.coded(name)
        return super().read(name) if coded is None else coded.weights()

    def form(self, name: str) -> Form | None:
        """See ``Checkpoint.form``.

        Raises:
            CheckpointError: see ``read``.
        """
        packed = self.packed.get(name)
        if packed is None:
            return None
        _, columns = self.entries[name].shape
        bits, group = packed.settings.bits, packed.settings.columns(columns)
        in_order = self.packing.order(packed) is None
        return Form(bits, group, columns, packed.settings.symmetric, in_order)

    def coded(self, name: str) -> Coded | None:
        """The whole numbers of a packed matrix.

        Raises:
            CheckpointError: see ``read``.
        """
        packed = self.packed.get(name)
        if packed is None:
            return None
        coded = self.packing.decode(packed)
        if name not in self.digests:
            if not torch.isfinite(coded.scales * ((1 << coded.bits) - 1)).all():
                raise CheckpointError(
                    f"{self.entries[name].file.name}: {named(packed.module)} has a scale that is "
                    "no number, or makes weights beyond float32; the file is damaged, or the "
                    "quantisation diverged."
                )
            self.digests[name] = packed.digest()
        return coded


def forms(
    checkpoint: Checkpoint, weight_map: WeightMap, module: torch.nn.Module
) -> dict[str, tuple[Form, ...]]:
    """How the parameters of a model are stored that are in whole numbers, all parts of each."""
    result = {}
    for name, _ in module.named_parameters():
        found = [checkpoint.form(part.name) for part in weight_map[name]]
        known = tuple(form for form in found if form is not None)
        if len(known) == len(found):
            result[name] = known
    return result


def coded_reader(
    checkpoint: Checkpoint, weight_map: WeightMap, module: torch.nn.Module
) -> Callable[[str, int], list[Coded]]:
    """Reads the parts of a parameter of ``forms`` by its name and block, rows after rows."""
    heights = {name: stack_height(tuple(each.shape)) for name, each in module.named_parameters()}

    def read(name: str, block: int) -> list[Coded]:
        parts = weight_map[name]
        each = len(parts) // heights[name]
        found = [checkpoint.coded(part.name) for part in parts[block * each : (block + 1) * each]]
        return [coded for coded in found if coded is not None]

    return read


def _check_layers(
    stored: Mapping[str, Entry], layers: Mapping[str, Mapping[str, str]], packing: Format
) -> None:
    """Refuse tensors of a packed matrix without the matrix, and a folder without any."""
    if not layers:
        raise CheckpointError(
            f"config.json: {QUANTISATION} (quant_method {packing.method}), and no weight is "
            "packed; the config is that of another checkpoint. If the tensors here are the "
            f"original, remove {QUANTISATION} from config.json."
        )
    for module, roles in layers.items():
        if not any(mark in roles for mark in packing.marks):
            name = next(iter(roles.values()))
            raise CheckpointError(
                f"{stored[name].file.name}: {named(name)} is there without "
                f"{named(f'{module}.{packing.marks[0]}')}, so {named(module)} is not packed as "
                f"{packing.method} packs; save the checkpoint again, or export the original."
            )
