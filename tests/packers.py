"""Quantised checkpoints, packed by the definitions of their formats, a number at a time.

What is read of them is held against the numbers that were packed. No code is shared with what
reads: words are put together here by shifts of Python's integers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


@dataclass
class Numbers:
    """One quantised matrix.

    Attributes:
        codes: ``[N, K]``, at least 0.
        scales: ``[N, groups]``, float32 of what the file holds.
        zeros: ``[N, groups]``, at least 0.
        order: the group of each column, ``[K]``.
        bits: of a number.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    order: np.ndarray
    bits: int

    def weights(self) -> np.ndarray:
        """The matrix in float64, by the definition."""
        zeros, scales = (each[:, self.order] for each in (self.zeros, self.scales))
        return np.asarray((self.codes.astype(np.float64) - zeros) * scales.astype(np.float64))


def numbers(
    weight: np.ndarray,
    seed: int,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    shuffled: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Numbers:
    """A matrix rounded to whole numbers; zero points and the order of columns are drawn.

    Args:
        weight: ``[N, K]``.
        seed: of what is drawn.
        bits: of a number.
        group: columns of a group; -1 for all.
        symmetric: zero points are the middle.
        shuffled: the columns of a group lie anywhere.
        dtype: of the scales.
    """
    random = np.random.default_rng(seed)
    rows, columns = weight.shape
    group = columns if group == -1 else group
    groups = -(-columns // group)
    order = np.arange(columns) // group
    if shuffled:
        order = random.permutation(order)
    most, middle = 2**bits - 1, 2 ** (bits - 1)
    zeros = random.integers(1, most, (rows, groups))
    if symmetric:
        zeros[:] = middle
    largest = np.stack(
        [np.abs(weight[:, order == each]).max(axis=1) for each in range(groups)], axis=1
    )
    # Zero is where it is, and so the larger side decides.
    wide = largest / np.minimum(zeros, most - zeros).clip(1)
    scales = torch.from_numpy(wide).to(dtype).float().numpy()
    steps = np.rint(weight / scales[:, order]) + zeros[:, order]
    return Numbers(steps.clip(0, most).astype(np.int64), scales, zeros, order, bits)


def words(values: np.ndarray, bits: int) -> torch.Tensor:
    """Numbers along the last axis, in int32 words, the first in the lowest bits."""
    each = 32 // bits
    missing = -values.shape[-1] % each
    filled = np.concatenate(
        [values, np.zeros((*values.shape[:-1], missing), values.dtype)], axis=-1
    )
    result = np.zeros((*filled.shape[:-1], filled.shape[-1] // each), np.uint32)
    for place in np.ndindex(result.shape):
        word = 0
        for at in range(each):
            number = int(filled[(*place[:-1], place[-1] * each + at)])
            assert 0 <= number < 2**bits
            word |= number << (bits * at)
        result[place] = word
    return torch.from_numpy(result.view(np.int32))


def gptq(
    name: str, of: Numbers, *, version: int = 1, dtype: torch.dtype = torch.float16
) -> Tensors:
    """A layer as GPTQ packs it: numbers along K, zero points along N, one too small at first."""
    zeros = of.zeros - 1 if version == 1 else of.zeros
    return {
        f"{name}.qweight": words(of.codes, of.bits).T.contiguous(),
        f"{name}.qzeros": words(zeros.T, of.bits),
        f"{name}.scales": torch.from_numpy(of.scales.T.copy()).to(dtype),
        f"{name}.g_idx": torch.from_numpy(of.order.astype(np.int32)),
    }


def awq(name: str, of: Numbers) -> Tensors:
    """A layer as AutoAWQ packs it for its GEMM kernel: eight rows in a word, in its order."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def mixed(values: np.ndarray) -> torch.Tensor:
        turned = values.T.reshape(values.shape[1], -1, 8)
        return words(turned[:, :, order].reshape(values.shape[1], -1), 4)

    return {
        f"{name}.qweight": mixed(of.codes),
        f"{name}.qzeros": mixed(of.zeros),
        f"{name}.scales": torch.from_numpy(of.scales.T.copy()).half(),
    }


def pack_quantized(
    name: str,
    of: Numbers,
    *,
    symmetric: bool,
    in_bytes: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensors:
    """A layer as compressed-tensors packs it: numbers along K, zero points along N.

    To both the middle is added. Earlier versions had zero points in bytes, as signed numbers.
    """
    result = {
        f"{name}.weight_packed": words(of.codes, of.bits),
        f"{name}.weight_scale": torch.from_numpy(of.scales).to(dtype),
        f"{name}.weight_shape": torch.tensor(of.codes.shape),
    }
    if not symmetric:
        zeros = words(of.zeros.T, of.bits).T.contiguous()
        if in_bytes:
            signed = of.zeros - 2 ** (of.bits - 1)
            zeros = torch.from_numpy(signed.astype(np.int8))
        result[f"{name}.weight_zero_point"] = zeros
    if (np.diff(of.order) < 0).any():
        result[f"{name}.weight_g_idx"] = torch.from_numpy(of.order.astype(np.int32))
    return result


def int_quantized(
    name: str, of: Numbers, *, symmetric: bool, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    """A layer as compressed-tensors has it in bytes: signed numbers."""
    middle = 2 ** (of.bits - 1)
    result = {
        f"{name}.weight": torch.from_numpy((of.codes - middle).astype(np.int8)),
        f"{name}.weight_scale": torch.from_numpy(of.scales).to(dtype),
    }
    if not symmetric:
        result[f"{name}.weight_zero_point"] = torch.from_numpy((of.zeros - middle).astype(np.int8))
    return result


@dataclass
class Quantised:
    """A quantised folder beside one of the same numbers, plain.

    Attributes:
        packed: the folder.
        plain: the other, in float32.
        layers: what was packed, by module.
    """

    packed: Path
    plain: Path
    layers: dict[str, Numbers] = field(default_factory=dict)


def one_by_one(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Experts a layer each, as transformers 4 has them, of tensors that have them in one."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if tensor.dim() != 3 or leaf not in ("gate_up_proj", "down_proj"):
            result[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = {"down_proj": matrix}
            if leaf == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            for part, rows in parts.items():
                result[f"{owner}.{expert}.{part}.weight"] = rows.contiguous()
    return result


def quantise(
    source: Path,
    folder: Path,
    section: Mapping[str, Any],
    pack: Callable[[str, Numbers], Tensors],
    chosen: Callable[[str], bool],
    make: Callable[[str, np.ndarray, int], Numbers],
) -> Quantised:
    """Quantise a checkpoint folder.

    Args:
        source: the checkpoint, in one file.
        folder: gets ``packed`` and ``plain``.
        section: ``quantization_config``.
        pack: a layer's name and numbers -> its tensors.
        chosen: which layers are packed, by name.
        make: name, weight ``[N, K]`` and seed -> numbers.
    """
    result = Quantised(folder / "packed", folder / "plain")
    for each in (result.packed, result.plain):
        shutil.copytree(source, each)
        for file in each.glob("*.safetensors*"):
            file.unlink()
    config = json.loads((source / "config.json").read_text())
    written = {**config, "quantization_config": section}
    (result.packed / "config.json").write_text(json.dumps(written))
    packed: Tensors = {}
    plain: Tensors = {}
    stored = one_by_one(load_file(source / "model.safetensors"))
    for seed, (name, tensor) in enumerate(sorted(stored.items())):
        module = name.removesuffix(".weight")
        if tensor.dim() != 2 or not chosen(module):
            packed[name] = plain[name] = tensor
            continue
        of = make(module, tensor.float().numpy(), seed)
        result.layers[module] = of
        packed.update(pack(module, of))
        plain[name] = torch.from_numpy(of.weights().astype(np.float32))
    save_file(packed, result.packed / "model.safetensors", {"format": "pt"})
    save_file(plain, result.plain / "model.safetensors", {"format": "pt"})
    return result


def is_linear(module: str) -> bool:
    """A linear layer of the four families, routers and heads aside."""
    leaf = module.rpartition(".")[2]
    return leaf.endswith("_proj") or leaf in ("input_linear", "output_linear")
