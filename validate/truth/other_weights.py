"""The checkpoint of a model whose weights are read otherwise, and which is that checkpoint else."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from ingot.graphs.checkpoint import Checkpoint


@dataclass
class OtherWeights(Checkpoint):
    """A checkpoint over another one.

    Attributes:
        base: the checkpoint as it is.
    """

    base: Checkpoint = field(kw_only=True)

    @classmethod
    def over(cls, base: Checkpoint, **held: Any) -> Self:
        """One over a checkpoint, with the fields of the class besides."""
        return cls(
            base.path, base.config, base.entries, base.digests, base.sizes, base=base, **held
        )

    @property
    @abstractmethod
    def key(self) -> str:
        """What tells these weights from others of the checkpoint, for what is kept of them."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """See ``Checkpoint.folders``."""
        return self.base.folders

    def side_folder(self, name: str) -> Path:
        """See ``Checkpoint.side_folder``."""
        return self.base.side_folder(name)

    def digest(self) -> str:
        """The checkpoint's own."""
        return self.base.digest()

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as these weights have it."""
        return self._read(name, None)

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """One matrix of a stack of them."""
        return self._read(name, row)

    @abstractmethod
    def _read(self, name: str, row: int | None) -> torch.Tensor:
        """One tensor, or one matrix of a stack where ``row`` says which."""

    def _of_base(self, name: str, row: int | None) -> torch.Tensor:
        """The same of the checkpoint as it is."""
        return self.base.read(name) if row is None else self.base.read_row(name, row)
