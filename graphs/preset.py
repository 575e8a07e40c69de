"""Seeded random checkpoints in the shape of a family: real Hugging Face folders, made offline.

Weights are scaled so that activations stay near 1 through every layer and the router's choices
have real margins; a checkpoint of zeros or of tiny weights would hide every mistake.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ingot.graphs.checkpoint import CONFIG, INDEX, SINGLE
from ingot.graphs.family import Family
from ingot.plugins.errors import IngotError

# Small, because one shard at a time is held in memory.
SHARD_BYTES = 512 << 20


def preset_config(family: Family, preset: str) -> dict[str, Any]:
    """The ``config.json`` of a preset.

    Raises:
        IngotError: a preset the family lacks.
    """
    if preset not in family.presets:
        raise IngotError(
            f"{family.model_type} has no preset {preset!r}; it has: {', '.join(family.presets)}."
        )
    return {"model_type": family.model_type, **family.presets[preset]}


def random_weight(
    family: Family, name: str, shape: tuple[int, ...], seed: int, device: str = "cpu"
) -> torch.Tensor:
    """One float32 weight, the same for the same name, shape, seed and kind of device.

    The family's gain is not in it.
    """
    # torch keeps the low 32 bits of a seed alone; a CRC that starts from ours fits in them.
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode(), seed))
    normal = torch.randn(shape, generator=generator, device=device)
    drawn = family.draw(name, normal, generator)
    if drawn is not None:
        return drawn
    if "norm" in name:
        return 1.0 + 0.1 * normal
    if name.endswith("bias"):
        return 0.1 * normal
    # Times and not over: so do the weights of earlier versions round, and a seed keeps its numbers.
    return normal if "embed" in name else normal * (1 / math.sqrt(shape[-1]))


def tensors(
    family: Family, config: dict[str, Any], task: str = "generate"
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint, experts in their per-expert spelling."""
    for name, parameter in family.build(config, task).named_parameters():
        shape = tuple(parameter.shape)
        for part in family.other_spelling(name, shape):
            yield part.name, part.shape
        if not family.other_spelling(name, shape):
            yield name, shape


def write_checkpoint(
    folder: Path,
    family: Family,
    config: dict[str, Any],
    *,
    task: str = "generate",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _bytes: None,
) -> None:
    """Write a seeded checkpoint folder, holding one shard in memory at a time.

    Args:
        folder: an existing, empty folder.
        family: the architecture.
        config: its ``config.json``.
        task: whose model is written; ``generate`` serves ``features`` too.
        dtype: dtype of every tensor.
        seed: of the weights.
        advance: told the bytes of each tensor made.
    """
    size = dtype.itemsize
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, shape in tensors(family, config, task):
        if used and used + math.prod(shape) * size > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append((name, shape))
        used += math.prod(shape) * size
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        made = {}
        for name, shape in shard:
            gain = family.preset_gain(name, config)
            made[name] = (gain * random_weight(family, name, shape, seed)).to(dtype)
            weight_map[name] = file
            total += made[name].nbytes
            advance(made[name].nbytes)
        save_file(made, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        # transformers does not open an index without metadata.
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    text = {**config, "dtype": str(dtype).removeprefix("torch.")}
    (folder / CONFIG).write_text(json.dumps(text, indent=2) + "\n")
