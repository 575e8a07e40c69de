"""Ways to quantise a checkpoint, each a format with its settings and what packs so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from packers import (
    Numbers,
    Quantised,
    Tensors,
    awq,
    gptq,
    int_quantized,
    is_linear,
    numbers,
    pack_quantized,
    quantise,
)


class Case(NamedTuple):
    """One way.

    Attributes:
        section: ``quantization_config``.
        pack: name and numbers -> tensors.
        settings: of ``packers.numbers``.
        chosen: which layers, by name.
    """

    section: Mapping[str, Any]
    pack: Callable[[str, Numbers], Tensors]
    settings: Mapping[str, Any]
    chosen: Callable[[str], bool] = is_linear

    def __call__(self, source: Path, folder: Path, **settings: Any) -> Quantised:
        made = {**self.settings, **settings}

        def make(_module: str, weight: np.ndarray, seed: int) -> Numbers:
            return numbers(weight, seed, **made)

        return quantise(source, folder, self.section, self.pack, self.chosen, make)


def with_head(module: str) -> bool:
    """The head as well."""
    return is_linear(module) or module == "lm_head"


def group(
    bits: int = 4, size: int | None = 32, *, symmetric: bool = True, **more: Any
) -> dict[str, Any]:
    """One of ``config_groups``."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "targets": ["Linear"],
        "weights": {**weights, **more},
        "input_activations": None,
        "output_activations": None,
    }


def compressed(written: str, *groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A ``quantization_config`` of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": written,
        "quantization_status": "compressed",
        "config_groups": {f"group_{at}": each for at, each in enumerate(groups)},
        "ignore": ["lm_head", r"re:.*mlp\.gate$"],
        "kv_cache_scheme": None,
        "global_compression_ratio": 1.5,
        "version": "0.12.2",
        "sparsity_config": {},
        "transform_config": {},
        **more,
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["gate"],
}
bf16 = {"dtype": torch.bfloat16}

CASES = {
    "gptq": Case(GPTQ, gptq, {}),
    "gptq symmetric": Case(
        {**GPTQ, "sym": True, "group_size": 64}, gptq, {"symmetric": True, "group": 64}
    ),
    "gptq_v2 of 8 bits": Case(
        {**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}, partial(gptq, version=2), {"bits": 8}
    ),
    "gptq of rows": Case({**GPTQ, "group_size": -1}, gptq, {"group": -1}),
    "gptq of wide groups": Case({**GPTQ, "group_size": 16}, gptq, {"group": 16}),
    "gptq in the order of activations": Case({**GPTQ, "desc_act": True}, gptq, {"shuffled": True}),
    "gptq with its head": Case({**GPTQ, "lm_head": True}, gptq, {}, with_head),
    "awq": Case(AWQ, awq, {}),
    "awq of rows": Case({**AWQ, "group_size": -1}, awq, {"group": -1}),
    "pack-quantized": Case(
        compressed("pack-quantized", group()),
        partial(pack_quantized, symmetric=True),
        {"symmetric": True, **bf16},
    ),
    "pack-quantized with zero points": Case(
        compressed("pack-quantized", group(symmetric=False)),
        partial(pack_quantized, symmetric=False),
        bf16,
    ),
    "pack-quantized with zero points in bytes": Case(
        compressed("pack-quantized", group(symmetric=False)),
        partial(pack_quantized, symmetric=False, in_bytes=True),
        bf16,
    ),
    "pack-quantized of 8 bits a row": Case(
        compressed("pack-quantized", group(8, None, symmetric=False)),
        partial(pack_quantized, symmetric=False),
        {"bits": 8, "group": -1, **bf16},
    ),
    "pack-quantized in the order of activations": Case(
        compressed("pack-quantized", group(actorder="group")),
        partial(pack_quantized, symmetric=True),
        {"symmetric": True, "shuffled": True, **bf16},
    ),
    "int-quantized": Case(
        compressed("int-quantized", group(8, None)),
        partial(int_quantized, symmetric=True),
        {"bits": 8, "group": -1, "symmetric": True, **bf16},
    ),
    "naive-quantized with zero points": Case(
        compressed("naive-quantized", group(8, 32, symmetric=False)),
        partial(int_quantized, symmetric=False),
        {"bits": 8, **bf16},
    ),
}
