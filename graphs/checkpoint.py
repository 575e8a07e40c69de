"""Reading a Hugging Face checkpoint folder: ``config.json`` and safetensors, one tensor at a time.

The safetensors format is an 8-byte little-endian header length, a JSON header and the tensors'
bytes (https://github.com/huggingface/safetensors#format). The library checks the header; tensors
are read through a memory map of their own bytes alone, so that no page of a tensor stays
resident after its use and memory is bounded by one tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ingot.graphs.folder import CONFIG as CONFIG
from ingot.graphs.folder import INDEX as INDEX
from ingot.graphs.folder import SINGLE as SINGLE
from ingot.graphs.folder import CheckpointError as CheckpointError
from ingot.graphs.folder import Folder

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Part:
    """One tensor of the checkpoint: its name and the shape it must have."""

    name: str
    shape: tuple[int, ...]


# Parameter name -> the tensors whose row-major elements, one after the other, are the parameter.
WeightMap = Mapping[str, tuple[Part, ...]]


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its file, safetensors dtype, shape and byte range in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass
class Checkpoint:
    """A checkpoint folder, opened: its config and an index of every tensor, no weight read yet.

    Attributes:
        path: the folder.
        config: ``config.json``, parsed, as transformers writes it.
        entries: tensor name of transformers -> where it lies.
        digests: SHA-256 of every tensor read so far, by name.
        sizes: what messages call the place that says how large each tensor is.
    """

    path: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    digests: dict[str, str] = field(default_factory=dict)
    sizes: str = CONFIG

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the config and the safetensors headers.

        Raises:
            CheckpointError: the folder, its config or a header is missing or malformed.
        """
        folder = Folder.read(path)
        stored = _read_index(folder)
        entries = {folder.tensor_name(name): entry for name, entry in stored.items()}
        if len(entries) < len(stored):
            raise CheckpointError(f"{path} holds its embedding twice, in two spellings; keep one.")
        return cls(path, folder.config, entries, sizes=folder.sizes)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the file's dtype, backed by a private memory map of its bytes.

        Raises:
            CheckpointError: a NaN or infinite weight.
        """
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        page = entry.begin - entry.begin % mmap.ALLOCATIONGRANULARITY
        with entry.file.open("rb") as file:
            # Copy-on-write, because torch wants a writable buffer; nothing writes to it.
            window = mmap.mmap(
                file.fileno(), entry.end - page, access=mmap.ACCESS_COPY, offset=page
            )
        tensor = torch.frombuffer(
            window, dtype=dtype, offset=entry.begin - page, count=math.prod(entry.shape)
        ).reshape(entry.shape)
        if name not in self.digests:
            self._check_finite(name, tensor)
            view = memoryview(window)[entry.begin - page :]
            self.digests[name] = hashlib.sha256(view).hexdigest()
        return tensor

    def _check_finite(self, name: str, tensor: torch.Tensor) -> None:
        # One pass without a copy: NaN and infinity both reach the extremes.
        if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            index = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            raise CheckpointError(
                f"{self.entries[name].file.name}: {name} holds a {tensor[tuple(index)].item()} at "
                f"index {index}; every weight must be finite. The file is damaged, or the training "
                "run diverged."
            )

    def digest(self) -> str:
        """SHA-256 over the config and every tensor read, whatever the order and the sharding."""
        total = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.digests):
            total.update(f"{name}:{self.digests[name]}".encode())
        return total.hexdigest()


def _read_index(folder: Folder) -> dict[str, Entry]:
    path, weight_map = folder.path, folder.weight_map()
    if weight_map is None:
        return _read_header(path / SINGLE)
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).is_file():
            raise CheckpointError(f"{INDEX} names {shard}, which is not in {path}.")
        for name, entry in _read_header(path / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{shard} holds {name}, which {INDEX} places in {weight_map.get(name)}."
                )
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries:
            raise CheckpointError(f"{INDEX} places {name} in {shard}, which does not hold it.")
    return entries


def _read_header(file: Path) -> dict[str, Entry]:
    try:
        # The library proves that the header covers the file exactly, without holes or overlaps.
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file.name} is not a whole safetensors file ({error}); it may be truncated. "
            "Download or copy it again."
        ) from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if info["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{file.name}: {name} is {info['dtype']}; supported: {', '.join(DTYPES)}. "
                "Quantised checkpoints are not supported; export the original."
            )
        begin, end = (8 + length + offset for offset in info["data_offsets"])
        entries[name] = Entry(file, info["dtype"], tuple(info["shape"]), begin, end)
    return entries


def check_weights(
    checkpoint: Checkpoint,
    weight_map: WeightMap,
    *,
    tied: Mapping[str, str] | None = None,
    unused: Iterable[str] = (),
) -> None:
    """Every tensor the graph needs is there with its shape; every tensor there is used once.

    Args:
        checkpoint: the opened folder.
        weight_map: what the graph needs.
        tied: checkpoint tensors that may repeat another one, name -> the one repeated.
        unused: tensors that the task leaves aside, such as the language-model head.

    Raises:
        CheckpointError: naming the first tensor that is missing, extra or of another shape.
    """
    needed: dict[str, Part] = {}
    for parameter, parts in weight_map.items():
        for part in parts:
            if part.name in needed:
                raise AssertionError(f"{part.name} is mapped twice, the second time by {parameter}")
            needed[part.name] = part
    for part in needed.values():
        entry = checkpoint.entries.get(part.name)
        if entry is None:
            raise CheckpointError(
                f"{checkpoint.path.name}: tensor {part.name} {list(part.shape)} is missing; "
                f"{checkpoint.sizes} asks for it. Check that every shard is there and the config "
                "belongs to these weights."
            )
        if entry.shape != part.shape:
            raise CheckpointError(
                f"{checkpoint.path.name}: tensor {part.name} has shape {list(entry.shape)}; "
                f"{checkpoint.sizes} makes it {list(part.shape)}."
            )
    tied = tied or {}
    for name in checkpoint.entries:
        if name in needed or name in unused:
            continue
        if name in tied:
            if not torch.equal(checkpoint.read(name), checkpoint.read(tied[name])):
                raise CheckpointError(
                    f"{checkpoint.path.name}: tie_word_embeddings is true, yet {name} differs from "
                    f"{tied[name]}. Set tie_word_embeddings to false, or remove {name}."
                )
            continue
        raise CheckpointError(
            f"{checkpoint.path.name}: tensor {name} {list(checkpoint.entries[name].shape)} is in "
            "the file but nothing in the graph uses it, so the export would silently drop it."
        )


def assemble(
    checkpoint: Checkpoint, parts: tuple[Part, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """One parameter from its parts, of ``shape`` and ``dtype``; reads one part at a time."""
    if len(parts) == 1:
        # An unconverted tensor stays a view of its memory map: no copy is made.
        return checkpoint.read(parts[0].name).to(dtype).reshape(shape)
    out = torch.empty(math.prod(shape), dtype=dtype)
    at = 0
    for part in parts:
        size = math.prod(part.shape)
        out[at : at + size] = checkpoint.read(part.name).reshape(-1)
        at += size
    return out.reshape(shape)


def stack_height(shape: tuple[int, ...]) -> int:
    """E of a stack of matrices ``[E, ...]``, one an expert; 1 of any other parameter.

    A depthwise convolution ``[C, 1, W]`` has three axes too, and is no stack.
    """
    return shape[0] if len(shape) == 3 and shape[1] > 1 else 1


def assemble_row(
    checkpoint: Checkpoint,
    parts: tuple[Part, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    row: int,
) -> torch.Tensor:
    """``assemble(...)[row]``, reading no more than that row needs: one expert of many."""
    if len(parts) == 1:
        return checkpoint.read(parts[0].name).reshape(shape)[row].to(dtype)
    each = len(parts) // shape[0]
    return assemble(checkpoint, parts[row * each : (row + 1) * each], shape[1:], dtype)


def load_parameters(
    module: torch.nn.Module,
    checkpoint: Checkpoint,
    weight_map: WeightMap,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] = lambda _bytes: None,
) -> None:
    """Give a module built on the meta device its weights, in place.

    Args:
        module: the module; every parameter of it is replaced.
        checkpoint: where the weights lie.
        weight_map: parameter name -> parts.
        dtype: of every parameter; by default each keeps its own.
        advance: told the bytes of each parameter as it is loaded.
    """
    for name, parameter in list(module.named_parameters()):
        shape = tuple(parameter.shape)
        value = assemble(checkpoint, weight_map[name], shape, dtype or parameter.dtype)
        set_parameter(module, name, value)
        advance(value.nbytes)


def set_parameter(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a weight in a parameter's place, such as that of a module on the meta device."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))


def block_reader(
    checkpoint: Checkpoint, weight_map: WeightMap, module: torch.nn.Module
) -> Callable[[str, int], torch.Tensor]:
    """Reads a module's weights by name and block, each in its parameter's dtype.

    A block is one expert of a stack ``[E, ...]``, or with number 0 the whole of another parameter.
    """
    parameters = dict(module.named_parameters())

    def read(name: str, block: int) -> torch.Tensor:
        parts, parameter = weight_map[name], parameters[name]
        shape = tuple(parameter.shape)
        if stack_height(shape) > 1:
            return assemble_row(checkpoint, parts, shape, parameter.dtype, block)
        return assemble(checkpoint, parts, shape, parameter.dtype)

    return read
