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

import torch

from ingot.export.ingot import GRAPH, Manifest
from ingot.graphs.checkpoint import DTYPES, Checkpoint, parts_of
from ingot.graphs.family import family_of
from ingot.graphs.layers import Model
from ingot.validate.identity.weights_graph import Graph
from ingot.validate.identity.weights_panels import panels
from ingot.validate.truth.activations import TO_BFLOAT16
from ingot.validate.truth.decoded import Decoded
from ingot.validate.truth.other_weights import OtherWeights


@dataclass
class StoredCheckpoint(OtherWeights):
    """A checkpoint whose tensors are read as an ingot stores them: decoded, or rounded.

    What is rounded is so as PyTorch rounds it: to float32, and then to its dtype.

    Attributes:
        stored: the dtype of each tensor that loses by it.
        decoded: tensors that are in blocks of whole numbers.
    """

    stored: dict[str, torch.dtype] = field(kw_only=True)
    decoded: Decoded = field(kw_only=True, default_factory=Decoded)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the ingot's, where it has another; what is in blocks is read in float32."""
        if name in self.decoded.stored:
            return torch.float32
        return self.stored.get(name) or self.base.dtype(name)

    @cached_property
    def key(self) -> str:
        """See ``OtherWeights.key``."""
        held: dict[str, object] = {name: str(dtype) for name, dtype in self.stored.items()}
        if self.decoded.stored:
            held |= {"": self.decoded.digest()}
        return json.dumps(held)

    def _read(self, name: str, row: int | None) -> torch.Tensor:
        if name in self.decoded.stored:
            rest = None if self.decoded.whole(name) else self._of_base(name, row)
            return self.decoded.tensor(name, rest, row)
        tensor, dtype = self._of_base(name, row), self.stored.get(name)
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
    graph = Graph.read(folder, GRAPH)
    decoded = Decoded.of(folder, graph, weight_map, model)
    for name, weight in graph.weights.items():
        own = panels(graph, name)
        floats = None if own is None or own.whole else own.floats()
        dtype = DTYPES.get((floats or weight.tensor).dtype)
        if dtype is None:
            # Bytes of what is in blocks.
            continue
        for part in parts_of(weight_map, name):
            if torch.promote_types(checkpoint.dtype(part.name), dtype) != dtype:
                stored[part.name] = dtype
    if not stored and not decoded.stored:
        return checkpoint
    return StoredCheckpoint.over(checkpoint, stored=stored, decoded=decoded)


def narrowing(
    folder: Path, manifest: Manifest, checkpoint: Checkpoint, model: Model
) -> dict[str, int]:
    """The tensors whose products round activations to bfloat16; see ``RoundedActivations``.

    Args:
        folder: the ingot; its graph is read.
        manifest: of it.
        checkpoint: what it was made from.
        model: of its task, on the meta device.
    """
    weight_map = family_of(checkpoint).weight_map(model, checkpoint, manifest.task)
    graph = Graph.read(folder, GRAPH)
    return {
        part.name: TO_BFLOAT16
        for name in graph.weights
        if (own := panels(graph, name)) is not None and own.numbers == "bfloat16"
        for part in parts_of(weight_map, name)
    }
