"""What a token costs at least, and so how near to the machine's ceilings a rate is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.on_peers.models import Model
from ingot.graphs.checkpoint import read_header

# Tensors of which a token takes some experts' part, as checkpoints and as ingots spell them.
EXPERT = re.compile(
    r"\.experts\.\d+\.|\.experts\.(gate_up|down)_proj|(?<!shared_mlp)\.(in|out)put_linear\."
)
# A table of which a token looks up one row; where it is the head as well, all of it is read.
TABLE = re.compile(r"\.(embed_tokens|embeddings)\.weight")
HEAD = re.compile(r"^lm_head\.weight$")
# Bytes of a number of a state.
FLOAT = 4


def part(name: str, model: Model) -> float:
    """Which share of a tensor one token reads."""
    if EXPERT.search(name):
        return model.chosen
    if TABLE.search(name) and not model.tied:
        return 1 / model.vocabulary
    return 1.0


def bytes_per_token(weights: Mapping[str, int], model: Model, past: int) -> float:
    """What decoding a token reads: weights, of the experts the chosen ones, and states.

    Args:
        weights: the bytes of each tensor by its name in an ingot.
        model: what they are of.
        past: tokens before it.
    """
    read = sum(size * part(name, model) for name, size in weights.items())
    return read + state_bytes(model.config, past)


def state_bytes(config: Mapping[str, Any], past: int) -> int:
    """What a token reads of the states, which are float32.

    Args:
        config: of one of ``models.CONFIGS``.
        past: tokens before it.
    """
    layers = config["num_hidden_layers"]
    if "state_size" in config:
        numbers = config["num_heads"] * config["head_dim"] * config["state_size"]
        return int(layers * numbers * FLOAT)
    kinds = config.get("layer_types") or ["attention"] * layers
    mixers = kinds.count("mamba")
    heads = config["num_key_value_heads"]
    size = config.get("kv_channels") or config["hidden_size"] // config["num_attention_heads"]
    numbers = (layers - mixers) * 2 * heads * size * past
    if mixers:
        of_one = config["mamba_n_heads"] * config["mamba_d_head"] * config["mamba_d_state"]
        numbers += mixers * of_one
    return int(numbers * FLOAT)


def products_per_token(
    shapes: Mapping[str, tuple[int, ...]], model: Model, head: float = 1.0
) -> float:
    """Multiply-adds of a token with the matrices; nothing else is counted.

    Args:
        shapes: of a checkpoint's tensors, by name.
        model: what they are of.
        head: for which share of the tokens the head is computed.
    """
    total = 0.0
    for name, shape in shapes.items():
        # A stack of experts has three axes, and so has a convolution, which is no such product.
        if len(shape) == 2 or (len(shape) == 3 and EXPERT.search(name)):
            table = bool(TABLE.search(name))
            if table and not model.tied:
                continue
            share = head if table or HEAD.search(name) else 1.0
            total += math.prod(shape) * part(name, model) * share
    return total


def share_of_reading(bytes_a_token: float, tokens_a_second: float, bandwidth: float) -> float:
    """Of the bytes that the machine can read a second."""
    return bytes_a_token * tokens_a_second / bandwidth


def share_of_peak(products_a_token: float, tokens_a_second: float, peak: float) -> float:
    """Of the operations that the machine can do a second; a multiply-add is two."""
    return 2 * products_a_token * tokens_a_second / peak


def tensor_bytes(weights: Path) -> dict[str, int]:
    """Of each tensor of a safetensors file."""
    return {name: entry.end - entry.begin for name, entry in read_header(weights).items()}
