"""A checkpoint with an adapter merged into its weights, each as it is read.

The formulas are those of peft 0.21's ``merge_and_unload``: ``W + scaling * B @ A``
(``peft/tuners/lora/layer.py``), with DoRA that times ``m`` over its norm along each row
(``peft/tuners/lora/variants.py``), and of token rows the rows themselves. All of it is float32,
whatever the checkpoint's and the adapter's dtype; the export rounds the result once, to its own
precision.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ingot.graphs.adapter import ADAPTER_WEIGHTS, AdapterConfig, AdapterError, read_adapter
from ingot.graphs.checkpoint import DTYPES, Checkpoint, read_header
from ingot.graphs.coded import Coded, Form
from ingot.plugins.errors import named

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, opened and read.

    Attributes:
        path: the folder.
        config: ``adapter_config.json``.
        tensors: ``adapter_model.safetensors``.
        sha256: of the config and of every tensor.
    """

    path: Path
    config: AdapterConfig
    tensors: Checkpoint
    sha256: str

    @classmethod
    def open(cls, path: Path) -> Adapter:
        """Read an adapter; its tensors are few and small, so all are hashed here.

        Raises:
            IngotError: no adapter in the folder, one that cannot be merged or read, or one that
                holds a NaN.
        """
        config = read_adapter(path)
        entries = read_header(path / ADAPTER_WEIGHTS)
        if not entries:
            raise AdapterError(f"{path / ADAPTER_WEIGHTS} holds no tensors; there is no adapter.")
        tensors = Checkpoint(path, config.raw, entries)
        for name, entry in entries.items():
            if entry.dtype not in DTYPES:
                raise AdapterError(
                    f"{path / ADAPTER_WEIGHTS}: {named(name)} is {entry.dtype}; supported: "
                    f"{', '.join(DTYPES)}."
                )
            tensors.read(name)
        return cls(path, config, tensors, tensors.digest())


@dataclass(frozen=True)
class LowRank:
    """``scaling * B @ A``, added to a matrix or to each of a stack of them.

    Attributes:
        tensors: of the adapter.
        down: name of A: ``[r, I]``, or ``[E*r, I]`` of a stack, expert by expert.
        up: name of B: ``[O, r]``, or ``[O, r*E]`` of a stack, whose experts are innermost.
        scaling: alpha over r, or over its root.
        experts: E; 0 where there is no stack.
        embedding: A is ``[r, O]`` and B ``[I, r]``, as of an ``nn.Embedding``.
        magnitude: name of DoRA's magnitudes, ``[O]``, or ``[I]`` of an embedding; None without.
    """

    tensors: Checkpoint
    down: str
    up: str
    scaling: float
    experts: int = 0
    embedding: bool = False
    magnitude: str | None = None

    def apply(self, matrix: torch.Tensor, block: int, rows: slice) -> torch.Tensor:
        """Rows of one matrix of the stack, float32 ``[rows, I]``, with the adapter in them."""
        merged = matrix + self._delta(block, rows)
        if self.magnitude is None:
            return merged
        magnitude = self.tensors.read(self.magnitude).float()
        norm: torch.Tensor = torch.linalg.norm(merged, dim=0 if self.embedding else 1)
        if self.embedding:
            return magnitude / norm * merged
        return (magnitude[rows] / norm)[:, None] * merged

    def _delta(self, block: int, rows: slice) -> torch.Tensor:
        down, up = self.tensors.read(self.down), self.tensors.read(self.up)
        if self.embedding:
            return (up.float() @ down[:, rows].float()).T * self.scaling
        if self.experts:
            down = down.view(self.experts, -1, down.shape[1])[block]
            up = up.view(len(up), -1, self.experts)[:, :, block]
        return (up[rows].float() @ down.float()) * self.scaling


@dataclass(frozen=True)
class Shift:
    """``scaling`` times the bias of B, added to a bias ``[O]``."""

    tensors: Checkpoint
    bias: str
    scaling: float

    def apply(self, matrix: torch.Tensor, _block: int, rows: slice) -> torch.Tensor:
        """Rows of the bias, float32 ``[rows, 1]``, with the shift in them."""
        return matrix + self.tensors.read(self.bias).float()[rows, None] * self.scaling


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that are stored whole.

    Attributes:
        tensors: of the adapter.
        values: name of the rows, ``[n, I]``.
        tokens: which rows they are.
    """

    tensors: Checkpoint
    values: str
    tokens: tuple[int, ...]

    def apply(self, matrix: torch.Tensor, _block: int, _rows: slice) -> torch.Tensor:
        """A whole embedding, float32 ``[O, I]``, with the rows in it."""
        values = self.tensors.read(self.values).float()
        return matrix.index_copy(0, torch.tensor(self.tokens), values)


Change = LowRank | Shift | TokenRows


@dataclass(frozen=True)
class Piece:
    """What one change makes of some rows of a stored tensor: of matrix ``block`` its ``rows``,
    which are the rows ``of_rows`` of matrix ``of_block`` of what is changed."""

    change: Change
    block: int
    rows: slice
    of_block: int
    of_rows: slice


@dataclass
class MergedCheckpoint(Checkpoint):
    """A checkpoint whose weights are read with an adapter in them.

    Attributes:
        adapter: what is merged.
        base: the checkpoint without it.
        sources: tensors that are not the base's of the same name -> where they are and their name
            there.
        pieces: tensor name -> what changes it.
    """

    adapter: Adapter = field(kw_only=True)
    base: Checkpoint = field(kw_only=True)
    sources: dict[str, tuple[Checkpoint, str]] = field(kw_only=True)
    pieces: dict[str, list[Piece]] = field(kw_only=True)

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that are read."""
        return (*self.base.folders, self.adapter.path)

    def side_folder(self, name: str) -> Path:
        """The adapter's where it has such a file: what it was trained with.

        With a vocabulary come all files of its tokenizer: a template of the base's beside it would
        win over one in the adapter's ``tokenizer_config.json``.
        """
        folder = self.adapter.path
        # Of the model, and read from its folder.
        if name == "generation_config.json":
            return self.base.side_folder(name)
        whole = any((folder / each).is_file() for each in VOCABULARIES)
        there = (folder / name).is_file() or any((folder / name).glob("*.jinja"))
        return folder if whole or there else self.base.side_folder(name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor; float32 where the adapter changes it, and else in its file's dtype.

        Raises:
            IngotError: a NaN or an infinity, in a file or after the merge.
        """
        return self._read(name, None)

    def dtype(self, name: str) -> torch.dtype:
        """See ``Checkpoint.dtype``."""
        source, stored = self.sources.get(name, (self.base, name))
        return torch.float32 if name in self.pieces else source.dtype(stored)

    def form(self, name: str) -> Form | None:
        """See ``Checkpoint.form``; None of what the adapter changes."""
        source, stored = self.sources.get(name, (self.base, name))
        return None if name in self.pieces else source.form(stored)

    def coded(self, name: str) -> Coded | None:
        """See ``Checkpoint.coded``; None of what the adapter changes."""
        source, stored = self.sources.get(name, (self.base, name))
        return None if name in self.pieces else source.coded(stored)

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """One matrix of a stack of them, as ``read`` has it."""
        return self._read(name, row)

    def digest(self) -> str:
        """SHA-256 over the checkpoint's digest and the adapter's."""
        return hashlib.sha256(f"{super().digest()}:{self.adapter.sha256}".encode()).hexdigest()

    def _read(self, name: str, row: int | None) -> torch.Tensor:
        source, stored = self.sources.get(name, (self.base, name))
        tensor = source.read(stored)
        self.digests[name] = source.digests[stored]
        if row is not None:
            tensor = tensor[row]
        if name not in self.pieces:
            return tensor
        # A copy: the tensor may be a map of the file.
        merged = tensor.to(torch.float32, copy=True)
        if merged.dim() == 3:
            blocks = merged
        else:
            blocks = (merged if merged.dim() == 2 else merged[:, None])[None]
        for piece in self.pieces[name]:
            if row is not None and piece.block != row:
                continue
            matrix = blocks[piece.block if row is None else 0]
            matrix[piece.rows] = piece.change.apply(
                matrix[piece.rows], piece.of_block, piece.of_rows
            )
        if merged.numel() and not torch.isfinite(torch.stack(torch.aminmax(merged))).all():
            raise AdapterError(
                f"{self.adapter.path}: merged into {name}, the adapter makes a NaN or an infinity "
                "of it; it belongs to another model, or its training diverged."
            )
        return merged
