"""What a quantised checkpoint's ``config.json`` says of it: one class a method, and no tensor.

``quantization_config`` is written by the program that quantised, and each has its own fields. Those
that say how tensors are packed are read, those that say how the numbers were found change nothing,
and every other is refused, as in the rest of ``config.json``.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ingot.graphs.checkpoint import CheckpointError, Entry, hash_tensor, read_tensor
from ingot.graphs.coded import Coded
from ingot.plugins.errors import named, shown

BITS = (4, 8)
# The whole row.
ALL_COLUMNS = -1


@dataclass(frozen=True)
class Settings:
    """How the numbers of one matrix were made.

    Attributes:
        bits: of a number.
        group: columns of a group; ``ALL_COLUMNS`` where a row is one.
        symmetric: whether zero points are the middle.
    """

    bits: int
    group: int
    symmetric: bool

    def columns(self, of: int) -> int:
        """Columns of a group in a matrix with so many."""
        return of if self.group == ALL_COLUMNS else self.group


@dataclass(frozen=True)
class Packed:
    """Where a quantised matrix lies.

    Attributes:
        module: the layer that it is the weight of.
        settings: by the config.
        tensors: what the format calls each tensor of it -> where that lies.
    """

    module: str
    settings: Settings
    tensors: Mapping[str, Entry]

    def read(self, role: str) -> torch.Tensor:
        """One of its tensors, which has to be there."""
        return read_tensor(self.tensors[role])

    def digest(self) -> str:
        """SHA-256 of all its tensors, by their roles."""
        total = hashlib.sha256()
        for role in sorted(self.tensors):
            total.update(f"{role}:{hash_tensor(self.read(role))}".encode())
        return total.hexdigest()

    def error(self, role: str, says: str) -> CheckpointError:
        """What is wrong with one of its tensors."""
        entry = self.tensors.get(role) or next(iter(self.tensors.values()))
        return CheckpointError(f"{entry.file.name}: {named(f'{self.module}.{role}')} {says}")

    def entry(self, role: str, axes: int | None, *dtypes: str) -> Entry:
        """Where a tensor lies that has to be there.

        Args:
            role: of the tensor.
            axes: how many it has; None for any.
            dtypes: it may have.

        Raises:
            CheckpointError: it is missing, or of another dtype or number of axes.
        """
        entry = self.tensors.get(role)
        if entry is None:
            raise self.error(
                role,
                "is missing, without which the weight of its layer is not known; check that every "
                "shard is there, and download or copy them again.",
            )
        if entry.dtype not in dtypes or axes not in (None, len(entry.shape)):
            with_axes = "" if axes is None else f" with {axes} {'axes' if axes > 1 else 'axis'}"
            raise self.error(
                role,
                f"is {entry.dtype} {list(entry.shape)}; it must be {' or '.join(dtypes)}"
                f"{with_axes}.",
            )
        return entry

    def shaped(self, role: str, shape: tuple[int, ...], *dtypes: str) -> torch.Tensor:
        """A tensor that has to be there, and of one shape.

        Raises:
            CheckpointError: it is not.
        """
        entry = self.entry(role, len(shape), *dtypes)
        if entry.shape != shape:
            raise self.error(
                role,
                f"has shape {list(entry.shape)}; with {self.settings.bits} bits and groups of "
                f"{self._groups} it is {list(shape)}. The config does not belong to these "
                "weights, or the file is damaged.",
            )
        return self.read(role)

    def zero_points(self, role: str, zeros: torch.Tensor, says: str) -> torch.Tensor | None:
        """Zero points ``[N, groups]`` as the settings have them; None where all are the middle.

        Args:
            role: of their tensor.
            zeros: that it holds, ``[N, groups]``.
            says: what is wrong where the settings are symmetric, and one is not the middle.

        Raises:
            CheckpointError: it is so.
        """
        if not self.settings.symmetric:
            return zeros.contiguous()
        if (zeros != 1 << (self.settings.bits - 1)).any():
            raise self.error(role, says)
        return None

    @property
    def _groups(self) -> str:
        group = self.settings.group
        return "a whole row" if group == ALL_COLUMNS else f"{group} columns"


class Format(ABC):
    """How one method packs matrices.

    Attributes:
        method: its name in ``quant_method``.
        marks: roles of tensors, without one of which there is no packed matrix.
    """

    method: str
    marks: tuple[str, ...]

    @abstractmethod
    def role(self, leaf: str, entry: Entry) -> str | None:
        """The role of a tensor of a packed matrix; None of any other.

        Args:
            leaf: the end of its name, behind the layer's.
            entry: where it lies.
        """

    @abstractmethod
    def settings(self, modules: Sequence[str]) -> Mapping[str, Settings | None]:
        """How each layer is quantised; None where the config says that it is not.

        Args:
            modules: names of the packed layers.

        Raises:
            IngotError: patterns that cannot be matched.
        """

    @abstractmethod
    def shape(self, packed: Packed) -> tuple[int, int]:
        """N and K of a matrix.

        Raises:
            CheckpointError: tensors that are missing, or do not belong together.
        """

    def order(self, packed: Packed) -> torch.Tensor | None:
        """The group of each column, ``[K]`` int64; None where they follow each other in groups.

        Raises:
            CheckpointError: groups that are not there.
        """
        return None

    @abstractmethod
    def decode(self, packed: Packed) -> Coded:
        """A matrix, unpacked.

        Raises:
            CheckpointError: tensors that do not belong together, or hold what none can.
        """


def bits_of(given: Any, where: str) -> int:
    """Bits of a number, which are few.

    Raises:
        CheckpointError: another number of them.
    """
    if given not in BITS or isinstance(given, bool):
        raise CheckpointError(
            f"config.json: {where} is {shown(given)}; numbers of 4 and of 8 bits are read. Export "
            "the float32, float16 or bfloat16 original."
        )
    return int(given)


def group_of(given: Any, where: str) -> int:
    """Columns of a group.

    Raises:
        CheckpointError: no such number.
    """
    if type(given) is not int or (given != ALL_COLUMNS and given < 1):
        raise CheckpointError(
            f"config.json: {where} is {shown(given)}; it must be at least 1, or -1 for a whole row."
        )
    return given
