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
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ingot.graphs.coded import Coded, Form
from ingot.graphs.config import ModelConfig, refuse_quantised
from ingot.graphs.folder import CONFIG as CONFIG
from ingot.graphs.folder import INDEX as INDEX
from ingot.graphs.folder import SINGLE as SINGLE
from ingot.graphs.folder import CheckpointError as CheckpointError
from ingot.graphs.folder import Folder
from ingot.plugins.errors import named, shown
from ingot.plugins.json_file import MOST_BYTES, JsonError, parse_json

# A weight in float64 is rounded to the nearest float32, as transformers rounds it where it loads in
# float32; where the graph runs in half precision, from there, as PyTorch does.
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
# What quantised checkpoints pack numbers in.
PACKED_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
# Tensors that earlier versions of transformers and other trainers stored beside the weights: how
# their names end, with how many axes, and why they may be left aside. transformers leaves them too.
BUFFERS: tuple[tuple[tuple[str, ...], int, str], ...] = (
    (
        ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq", "rotary_emb.long_inv_freq"),
        1,
        "the rotary frequencies follow from config.json",
    ),
    (("rope.freqs", "rotary_emb.freqs"), 1, "the rotary frequencies follow from config.json"),
    (
        ("rotary_emb.cos_cached", "rotary_emb.sin_cached"),
        4,
        "the rotary tables follow from config.json",
    ),
    (
        ("rotary_emb.cos_cached", "rotary_emb.sin_cached"),
        2,
        "the rotary tables follow from config.json",
    ),
    (
        ("attn.bias", "self_attn.bias", "attention.bias", "self_attention.bias", "causal_mask"),
        4,
        "the causal mask follows from the length of a call",
    ),
    (
        ("attn.masked_bias", "self_attn.masked_bias", "attention.masked_bias"),
        0,
        "it is what masked scores were set to",
    ),
    (("position_ids",), 2, "the positions of a call are counted from its mask"),
)
# What a clone has in the place of a large file until git-lfs has fetched it.
LFS_POINTER = b"version https://git-lfs"


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
        # Before the dtypes of its tensors, which would be named in its place.
        refuse_quantised(folder.config, readable=())
        return cls(path, folder.config, plain(read_entries(folder)), sizes=folder.sizes)

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that are read."""
        return (self.path,)

    def side_folder(self, _name: str) -> Path:
        """The folder that a file beside the weights, such as ``tokenizer.json``, is taken from."""
        return self.path

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the file's dtype, backed by a private memory map of its bytes.

        Raises:
            CheckpointError: a NaN or infinite weight.
        """
        tensor = read_tensor(self.entries[name])
        if tensor.numel() and name not in self.digests:
            self._check_finite(name, tensor)
            self.digests[name] = hash_tensor(tensor)
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """That of what ``read`` gives."""
        return DTYPES[self.entries[name].dtype]

    def form(self, _name: str) -> Form | None:
        """How a matrix is stored in a few bits; None of any other tensor."""
        return None

    def coded(self, _name: str) -> Coded | None:
        """The whole numbers of a matrix that is stored in a few bits; None of any other."""
        return None

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """One matrix of a stack ``[E, ...]``."""
        return self.read(name)[row]

    def _check_finite(self, name: str, tensor: torch.Tensor) -> None:
        # One pass without a copy: NaN and infinity both reach the extremes. What float64 alone
        # holds is infinite where the graph runs.
        wide = tensor.dtype == torch.float64
        extremes = torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor
        if not torch.isfinite(extremes.float() if wide else extremes).all():
            index = (~torch.isfinite(tensor.float() if wide else tensor)).nonzero()[0].tolist()
            found = tensor[tuple(index)].item()
            raise CheckpointError(
                f"{self.entries[name].file.name}: {named(name)} holds a {found} at index {index}; "
                f"every weight must be finite{' in float32' if wide else ''}. The file is damaged, "
                "or the training run diverged."
            )

    def digest(self) -> str:
        """SHA-256 over the config and every tensor read, whatever the order and the sharding."""
        total = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.digests):
            total.update(f"{name}:{self.digests[name]}".encode())
        return total.hexdigest()


def read_tensor(entry: Entry) -> torch.Tensor:
    """One tensor, backed by a private memory map of its bytes."""
    dtype = {**DTYPES, **PACKED_DTYPES}[entry.dtype]
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    page = entry.begin - entry.begin % mmap.ALLOCATIONGRANULARITY
    with entry.file.open("rb") as file:
        # Copy-on-write, because torch wants a writable buffer; nothing writes to it.
        window = mmap.mmap(file.fileno(), entry.end - page, access=mmap.ACCESS_COPY, offset=page)
    return torch.frombuffer(
        window, dtype=dtype, offset=entry.begin - page, count=math.prod(entry.shape)
    ).reshape(entry.shape)


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of the bytes of a contiguous tensor."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def read_entries(folder: Folder) -> dict[str, Entry]:
    """Where each tensor of a folder lies, by transformers' names.

    Raises:
        IngotError: files that are missing or damaged, or names that do not belong to the config.
    """
    stored = _read_index(folder)
    names = folder.tensor_names(stored)
    return {names[name]: entry for name, entry in stored.items()}


def plain(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The weights among some tensors.

    Raises:
        CheckpointError: one that is no plain numbers.
    """
    result = {}
    for name, entry in entries.items():
        if is_buffer(name, entry.shape):
            continue
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{entry.file.name}: {named(name)} is {entry.dtype}; supported: "
                f"{', '.join(DTYPES)}, and whole numbers where quantization_config in config.json "
                "says what they are; export the original."
            )
        result[name] = entry
    return result


def _read_index(folder: Folder) -> dict[str, Entry]:
    path, weight_map = folder.path, folder.weight_map()
    if weight_map is None:
        return read_header(path / SINGLE)
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).is_file():
            raise CheckpointError(f"{INDEX} names {named(shard)}, which is not in {path}.")
        for name, entry in read_header(path / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{named(shard)} holds {named(name)}, which {INDEX} places in "
                    f"{shown(weight_map.get(name))}."
                )
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries:
            raise CheckpointError(
                f"{INDEX} places {named(name)} in {named(shard)}, which does not hold it."
            )
    return entries


def read_header(file: Path) -> dict[str, Entry]:
    """Where each tensor of a safetensors file lies.

    Raises:
        CheckpointError: a damaged file, or a tensor of another dtype than ``DTYPES``.
    """
    try:
        with file.open("rb") as stream:
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if first == LFS_POINTER[:8] and stream.read(len(LFS_POINTER) - 8) == LFS_POINTER[8:]:
                raise CheckpointError(
                    f"{file.name} is git-lfs's pointer to the weights, as a clone without it has; "
                    "run git lfs pull in the folder."
                )
            if length > MOST_BYTES:
                # Of a damaged file mostly, whose first bytes are no length.
                raise CheckpointError(
                    f"{file.name} is not a whole safetensors file: its header would be {length:,} "
                    f"bytes, and the most that is read is {MOST_BYTES:,}. Download or copy it "
                    "again."
                )
            raw = stream.read(length)
        header = parse_json(raw, f"the header of {file.name}")
        # The library proves that the header covers the file exactly, without holes or overlaps.
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError, JsonError) as error:
        raise CheckpointError(
            f"{file.name} is not a whole safetensors file ({error}); it may be truncated. "
            "Download or copy it again."
        ) from error
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in info["data_offsets"])
        entries[name] = Entry(file, info["dtype"], tuple(info["shape"]), begin, end)
    return entries


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is no weight, and is left aside as transformers leaves it."""
    return any(
        len(shape) == axes and any(name == end or name.endswith("." + end) for end in ends)
        for ends, axes, _ in BUFFERS
    )


def check_sizes(config: ModelConfig, stored: Mapping[str, Entry]) -> None:
    """Each size of a config is one that the stored tensors can hold, by their headers alone.

    A layer has tensors of its own, and every other size is part of a dimension of some tensor. So
    damage and malice are refused before a module is made for each of a billion layers.

    Args:
        config: every integer of it a size, but for the lengths of a scan's chunks and of a window.
        stored: the tensors by name.

    Raises:
        CheckpointError: naming the first size that is too large.
    """
    widest = max((size for entry in stored.values() for size in entry.shape), default=0)
    for field_ in fields(config):
        value = getattr(config, field_.name)
        if type(value) is not int or field_.name in ("chunk_size", "sliding_window"):
            continue
        of_layers = field_.name == "num_hidden_layers"
        most = len(stored) if of_layers else widest
        if value > most:
            has = f"{most} tensors" if of_layers else f"no dimension above {most}"
            raise CheckpointError(
                f"config.json: {field_.name} is {value}, and the checkpoint has {has}; the config "
                "does not belong to these weights, or some of them are missing."
            )


def check_weights(
    checkpoint: Checkpoint,
    weight_map: WeightMap,
    *,
    tied: Mapping[str, str] | None = None,
    untied: Mapping[str, str] | None = None,
    unused: Iterable[str] = (),
) -> None:
    """Every tensor the graph needs is there with its shape; every tensor there is used once.

    Args:
        checkpoint: the opened folder.
        weight_map: what the graph needs.
        tied: checkpoint tensors that may repeat another one, name -> the one repeated.
        untied: tensors that another model would share, each with the one that it shares it with.
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
            twin = (untied or {}).get(part.name)
            hint = (
                f" Where the model shares it with {twin}, set tie_word_embeddings in config.json "
                "to true; it is false there, or absent and false by default."
                if twin in needed and twin in checkpoint.entries
                else ""
            )
            raise CheckpointError(
                f"{checkpoint.path.name}: tensor {part.name} {list(part.shape)} is missing; "
                f"{checkpoint.sizes} asks for it. Check that every shard is there and the config "
                f"belongs to these weights.{hint}"
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
            entry, repeated = checkpoint.entries[name], checkpoint.entries[tied[name]]
            if entry.shape != repeated.shape or not torch.equal(
                checkpoint.read(name), checkpoint.read(tied[name])
            ):
                raise CheckpointError(
                    f"{checkpoint.path.name}: tie_word_embeddings is true, yet {named(name)} "
                    f"differs from {tied[name]}. Set tie_word_embeddings to false, or remove "
                    f"{named(name)}."
                )
            continue
        raise CheckpointError(
            f"{checkpoint.path.name}: tensor {named(name)} "
            f"{list(checkpoint.entries[name].shape)} is in "
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
        return checkpoint.read_row(parts[0].name, row).reshape(shape[1:]).to(dtype)
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


def parts_of(weight_map: WeightMap, name: str) -> tuple[Part, ...]:
    """What a weight of a graph is made of; nothing where it is of no parameter.

    An expert of a stack may be a weight of its own, ``{parameter}.{expert}``.
    """
    return weight_map.get(name) or weight_map.get(name.rpartition(".")[0]) or ()


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
