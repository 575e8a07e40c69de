"""Tensors of a checkpoint as an ingot has them in blocks of whole numbers.

Which rows of a stored weight are a tensor's follows from what reads the weight, as for the
comparison of weights; nothing here comes from what an export makes blocks with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ingot.graphs.checkpoint import Part, WeightMap, stack_height
from ingot.plugins.errors import IngotError, named
from ingot.validate.identity.weights_blocks import Rows, blocked, is_packed, stored_rows
from ingot.validate.identity.weights_files import Reader, Tensor
from ingot.validate.identity.weights_graph import Graph, LayoutError
from ingot.validate.identity.weights_names import OF_ONE_EXPERT
from ingot.validate.identity.weights_piece import Numbers

# Numbers that are decoded at a time: few enough for what comes on the way to stay in a cache.
AT_ONCE = 1 << 18
# Elements that are hashed at a time.
HASHED = 1 << 22


class DecodedError(IngotError):
    """An ingot whose weights in blocks are not what its graph says."""


@dataclass(frozen=True)
class Stored:
    """Where rows of a tensor of the checkpoint are.

    Attributes:
        weight: that they are stored in.
        rows: of it; ``begin`` counts from the first row of the tensor.
    """

    weight: Numbers
    rows: Rows


@dataclass
class Decoded:
    """Tensors that an ingot has in blocks, decoded as they are read.

    Attributes:
        shapes: of each tensor.
        stored: where its rows are; rows that are in no block are left to the checkpoint.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    stored: dict[str, list[Stored]] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, graph: Graph, weight_map: WeightMap, model: nn.Module) -> Decoded:
        """Where an ingot has which tensor; its weights are not read.

        Args:
            folder: the ingot.
            graph: of it.
            weight_map: what tensors the parameters are made of.
            model: on the meta device.

        Raises:
            DecodedError: weights in blocks that do not fit together.
        """
        shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
        decoded = cls()
        for name, weight in graph.weights.items():
            if weight.external is None or not is_packed(graph, name):
                continue
            try:
                decoded._take(graph, name, weight_map, shapes)
            except LayoutError as error:
                raise DecodedError(
                    f"{folder.name}: {named(name)} cannot be decoded: {error}; export it again."
                ) from error
        return decoded

    def _take(
        self,
        graph: Graph,
        name: str,
        weight_map: WeightMap,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Note the tensors that one weight in blocks has rows of."""
        one = None if name in weight_map else OF_ONE_EXPERT.fullmatch(name)
        parameter = name if one is None else one["stack"]
        weight = blocked(graph, name)
        if parameter not in weight_map or weight is None:
            # Of no parameter, which the comparison of weights says, or floats.
            return
        shape = shapes[parameter]
        count, height = stack_height(shape), shape[-2]
        expert = 0 if one is None else int(one["expert"])
        matrices = range(count) if one is None else range(expert, expert + 1)
        needed = (len(matrices), height, shape[-1])
        has = (weight.matrices, weight.rows, weight.columns)
        if len(shape) < 2 or has[0] != needed[0] or has[1] < needed[1] or has[2] < needed[2]:
            raise LayoutError(f"it has {list(has)} for {list(needed)}")
        layout, at = graph.layout(name), 0
        for part in weight_map[parameter]:
            self.shapes[part.name] = part.shape
            rows = _size(part) // shape[-1]
            for matrix, row, begin, some in _by_matrix(at, rows, height):
                if matrix not in matrices:
                    continue
                within = matrix - matrices.start
                for each in stored_rows(layout, weight.matrices, height, within, row, some):
                    moved = each._replace(begin=each.begin + begin)
                    self.stored.setdefault(part.name, []).append(Stored(weight, moved))
            at += rows

    @property
    def blocks(self) -> dict[str, int]:
        """Numbers of a block, of each tensor; of one that is stored in several the most."""
        return {name: max(each.weight.size for each in rows) for name, rows in self.stored.items()}

    def tensor(self, name: str, otherwise: torch.Tensor | None, row: int | None) -> torch.Tensor:
        """One tensor in float32.

        Args:
            name: of it.
            otherwise: what is taken of rows that are in no block, of the shape of the result; None
                where there are none.
            row: which matrix of a stack; None for the whole.
        """
        shape = self.shapes[name]
        height, columns = (shape[-2] if row is not None else _rows(shape)), shape[-1]
        first = 0 if row is None else row * height
        if otherwise is None:
            out = np.empty((height, columns), np.float32)
        else:
            out = otherwise.float().reshape(height, columns).numpy().copy()
        with Reader() as reader:
            for each in self.stored[name]:
                for rows in _within(each.rows, first, height, columns):
                    _decode(reader, each.weight, rows, out[rows.begin : rows.begin + rows.height])
        return torch.from_numpy(out).reshape(shape if row is None else shape[1:])

    def whole(self, name: str) -> bool:
        """Whether all rows of a tensor are in blocks."""
        return sum(each.rows.height for each in self.stored[name]) == _rows(self.shapes[name])

    def digest(self) -> str:
        """SHA-256 over how each tensor is stored and over the bytes that it is stored in."""
        total, seen = hashlib.sha256(), set[str]()
        with Reader() as reader:
            for name in sorted(self.stored):
                for each in self.stored[name]:
                    weight = each.weight
                    total.update(f"{name}:{weight.text}:{weight.codes.name}:{each.rows};".encode())
                    for tensor in weight.tensors:
                        if tensor.name not in seen:
                            seen.add(tensor.name)
                            total.update(f"{tensor.name}:{tensor.shape};".encode())
                            for piece in _pieces(reader, tensor):
                                total.update(piece)
        return total.hexdigest()


def _decode(reader: Reader, weight: Numbers, rows: Rows, out: np.ndarray) -> None:
    """Rows of one matrix into ``out [count, columns]``, some at a time."""
    height = max(1, AT_ONCE // (weight.blocks * weight.size))
    for begin in range(0, rows.height, height):
        count = min(height, rows.height - begin)
        first = rows.first + begin * rows.step
        piece = weight.piece(reader, rows.matrix, first, count, rows.step)
        out[begin : begin + count] = piece.decoded()[:, : out.shape[1]]


def _within(rows: Rows, first: int, height: int, columns: int) -> Iterator[Rows]:
    """Those of some rows that are among ``height`` rows from ``first``, counted from there."""
    begin, end = max(rows.begin, first), min(rows.begin + rows.height, first + height)
    if begin < end and columns:
        skipped = begin - rows.begin
        start = rows.first + skipped * rows.step
        yield Rows(begin - first, end - begin, rows.matrix, start, rows.step)


def _by_matrix(at: int, rows: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Rows of a parameter from ``at`` on: matrix, row of it, how many were before, and how many."""
    done = 0
    while done < rows:
        matrix, row = divmod(at + done, height)
        some = min(height - row, rows - done)
        yield matrix, row, done, some
        done += some


def _pieces(reader: Reader, tensor: Tensor) -> Iterator[bytes]:
    for first in range(0, tensor.size, HASHED):
        yield reader.elements(tensor, first, min(HASHED, tensor.size - first)).tobytes()


def _rows(shape: Sequence[int]) -> int:
    """Of all matrices together."""
    total = 1
    for size in shape[:-1]:
        total *= size
    return total


def _size(part: Part) -> int:
    return _rows(part.shape) * part.shape[-1]
