"""A checkpoint with its weights rounded as a half-precision graph holds them.

What such a graph is, apart from how it rounds, shows in float32 over its own weights: a constant
that is 0.1 % wrong is lost in the noise of half precision, and at hundreds of floors there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.family import family_of
from ingot.validate.identity.weights_factors import factors
from ingot.validate.identity.weights_graph import Graph


@dataclass
class RoundedCheckpoint(Checkpoint):
    """A checkpoint whose weights are read as if they had been rounded to half precision.

    A factor that the graph has in a weight was there before it was rounded, and is taken out again.

    Attributes:
        base: the checkpoint.
        precision: ``float16`` or ``bfloat16``.
        exact: tensors that a graph of this precision has in float32.
        folded: factors by tensor.
    """

    base: Checkpoint = field(kw_only=True)
    precision: torch.dtype = field(kw_only=True)
    exact: frozenset[str] = field(kw_only=True)
    folded: Mapping[str, tuple[np.float32, ...]] = field(kw_only=True)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in half precision where no factor was taken out, and else in float32."""
        tensor = self.base.read(name)
        self.digests[name] = self.base.digests[name]
        if name in self.exact:
            return tensor
        held = tensor.to(torch.float32).to(self.precision)
        given = self.folded.get(name, ())
        for factor in given:
            # As an export multiplies: in float32, and rounded to the precision of the graph.
            held = (held.to(torch.float32) * float(factor)).to(self.precision)
        if not given:
            return held
        wide = held.to(torch.float32)
        for factor in given:
            wide /= float(factor)
        return wide

    def dtype(self, name: str) -> torch.dtype:
        """See ``Checkpoint.dtype``."""
        if name in self.exact:
            return self.base.dtype(name)
        return torch.float32 if self.folded.get(name) else self.precision

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """One matrix of a stack."""
        return self.read(name)[row]

    def digest(self) -> str:
        """SHA-256 over the checkpoint's and how it is rounded."""
        how = {name: [float(factor) for factor in each] for name, each in self.folded.items()}
        text = f"{self.base.digest()}:{self.precision}:{sorted(self.exact)}:{sorted(how.items())}"
        return hashlib.sha256(text.encode()).hexdigest()


def rounded(base: Checkpoint, task: str, precision: torch.dtype, graph: Path) -> RoundedCheckpoint:
    """A checkpoint as an ingot of half precision holds it.

    Args:
        base: that it was made from.
        task: of the ingot.
        precision: of the ingot.
        graph: the ingot's graph, which says where factors are; its numbers are not read.
    """
    family = family_of(base)
    model = family.build(base.config, task, precision, base.entries)
    parts = family.weight_map(model, base, task)
    folded = factors(Graph.read(graph.parent, graph.name), base.config)
    return RoundedCheckpoint(
        base.path,
        base.config,
        base.entries,
        sizes=base.sizes,
        base=base,
        precision=precision,
        exact=frozenset(
            part.name
            for name in parts
            if name.endswith(family.keep_in_fp32)
            for part in parts[name]
        ),
        folded={part.name: each for name, each in folded.items() for part in parts.get(name, ())},
    )
