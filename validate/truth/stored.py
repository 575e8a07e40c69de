"""The weights that an ingot has: its checkpoint's, each as the ingot stores it.

What a kernel makes of a weight and what storing the weight costs are two errors. The truth of a
validation is of the stored weights, so that its noise floor holds however narrow they are; where
nothing is lost they are the checkpoint's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import onnx
import torch
from onnx import helper

from ingot.export.ingot import GRAPH, Manifest
from ingot.graphs.checkpoint import Checkpoint, parts_of
from ingot.graphs.family import family_of
from ingot.graphs.layers import Model
from ingot.validate.truth.decoded import Decoded


@dataclass
class StoredCheckpoint(Checkpoint):
    """A checkpoint whose tensors are read as an ingot stores them.

    Attributes:
        base: the checkpoint as it is.
        stored: the dtype of each tensor that loses by it.
        decoded: tensors that are in blocks of whole numbers.
    """

    base: Checkpoint = field(kw_only=True)
    stored: dict[str, torch.dtype] = field(kw_only=True)
    decoded: Decoded = field(kw_only=True, default_factory=Decoded)

    @property
    def folders(self) -> tuple[Path, ...]:
        """See ``Checkpoint.folders``."""
        return self.base.folders

    def side_folder(self, name: str) -> Path:
        """See ``Checkpoint.side_folder``."""
        return self.base.side_folder(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the ingot's, where it has another; what is in blocks is read in float32."""
        if name in self.decoded.stored:
            return torch.float32
        return self.stored.get(name) or self.base.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor: decoded, or rounded as PyTorch rounds it to float32 and then to its dtype."""
        return self._read(name, None)

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """One matrix of a stack of them."""
        return self._read(name, row)

    @cached_property
    def key(self) -> str:
        """What tells these weights from others of the checkpoint, for what is kept of them."""
        held: dict[str, object] = {name: str(dtype) for name, dtype in self.stored.items()}
        if self.decoded.stored:
            held |= {"": self.decoded.digest()}
        return json.dumps(held)

    def digest(self) -> str:
        """The checkpoint's own."""
        return self.base.digest()

    def _read(self, name: str, row: int | None) -> torch.Tensor:
        if name not in self.decoded.stored:
            tensor = self.base.read(name) if row is None else self.base.read_row(name, row)
            return self._rounded(name, tensor)
        rest = None
        if not self.decoded.whole(name):
            rest = self.base.read(name) if row is None else self.base.read_row(name, row)
        return self.decoded.tensor(name, rest, row)

    def _rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        dtype = self.stored.get(name)
        return tensor if dtype is None else tensor.float().to(dtype)


def as_stored(folder: Path, manifest: Manifest, checkpoint: Checkpoint, model: Model) -> Checkpoint:
    """The checkpoint as an ingot stores it; itself, where nothing is lost.

    Args:
        folder: the ingot; its graph is read, and no weight until it is asked for.
        manifest: of it.
        checkpoint: what it was made from.
        model: of its task, on the meta device.

    Raises:
        IngotError: weights in blocks of whole numbers that do not fit together.
    """
    if not manifest.weights:
        return checkpoint
    weight_map = family_of(checkpoint).weight_map(model, checkpoint, manifest.task)
    stored: dict[str, torch.dtype] = {}
    decoded = Decoded.read(folder, weight_map, model)
    graph = onnx.load(str(folder / GRAPH), load_external_data=False).graph
    for tensor in graph.initializer:
        dtype = getattr(torch, helper.tensor_dtype_to_np_dtype(tensor.data_type).name)
        if not dtype.is_floating_point:
            continue
        for part in parts_of(weight_map, tensor.name):
            if torch.promote_types(checkpoint.dtype(part.name), dtype) != dtype:
                stored[part.name] = dtype
    if not stored and not decoded.stored:
        return checkpoint
    return StoredCheckpoint(
        checkpoint.path,
        checkpoint.config,
        checkpoint.entries,
        checkpoint.digests,
        checkpoint.sizes,
        base=checkpoint,
        stored=stored,
        decoded=decoded,
    )
