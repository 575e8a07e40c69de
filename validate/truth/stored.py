"""The weights that an ingot has: its checkpoint's, each rounded to what the ingot stores it in.

What a kernel makes of a weight and what storing the weight costs are two errors. The truth of a
validation is of the stored weights, so that its noise floor holds however narrow they are; where
nothing is lost they are the checkpoint's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import onnx
import torch
from onnx import helper

from ingot.export.ingot import GRAPH, Manifest
from ingot.graphs.checkpoint import Checkpoint, parts_of
from ingot.graphs.family import family_of
from ingot.graphs.layers import Model


@dataclass
class StoredCheckpoint(Checkpoint):
    """A checkpoint whose tensors are read as an ingot stores them.

    Attributes:
        base: the checkpoint as it is.
        stored: the dtype of each tensor that loses by it.
    """

    base: Checkpoint = field(kw_only=True)
    stored: dict[str, torch.dtype] = field(kw_only=True)

    @property
    def folders(self) -> tuple[Path, ...]:
        """See ``Checkpoint.folders``."""
        return self.base.folders

    def side_folder(self, name: str) -> Path:
        """See ``Checkpoint.side_folder``."""
        return self.base.side_folder(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the ingot's, where it has another."""
        return self.stored.get(name) or self.base.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, rounded as PyTorch rounds it to float32 and then to what it is stored in."""
        return self._rounded(name, self.base.read(name))

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """One matrix of a stack of them."""
        return self._rounded(name, self.base.read_row(name, row))

    def digest(self) -> str:
        """The checkpoint's own."""
        return self.base.digest()

    def _rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        dtype = self.stored.get(name)
        return tensor if dtype is None else tensor.float().to(dtype)


def as_stored(folder: Path, manifest: Manifest, checkpoint: Checkpoint, model: Model) -> Checkpoint:
    """The checkpoint as an ingot stores it; itself, where nothing is lost.

    Args:
        folder: the ingot; of its graph the dtypes of the weights are read, and no weight.
        manifest: of it.
        checkpoint: what it was made from.
        model: of its task, on the meta device.
    """
    if not manifest.weights:
        return checkpoint
    weight_map = family_of(checkpoint).weight_map(model, checkpoint, manifest.task)
    stored: dict[str, torch.dtype] = {}
    graph = onnx.load(str(folder / GRAPH), load_external_data=False).graph
    for tensor in graph.initializer:
        dtype = getattr(torch, helper.tensor_dtype_to_np_dtype(tensor.data_type).name)
        for part in parts_of(weight_map, tensor.name):
            if torch.promote_types(checkpoint.dtype(part.name), dtype) != dtype:
                stored[part.name] = dtype
    if not stored:
        return checkpoint
    return StoredCheckpoint(
        checkpoint.path,
        checkpoint.config,
        checkpoint.entries,
        checkpoint.digests,
        checkpoint.sizes,
        base=checkpoint,
        stored=stored,
    )
