"""The same OLMoE with as many heads of keys as of queries: all that llama.cpp's graph takes.

It norms all keys of a token together, over a vector that it wants as long as the hidden one. Where
each head of keys and values is repeated for every head of queries that reads it, the mean square of
the keys is what it was, and so is every result. Released OLMoEs have as many of both already.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ingot.plugins.whole import staged

REPEATED = re.compile(r"\.self_attn\.(k_proj|v_proj|k_norm)\.weight$")


def needs_repeated_heads(checkpoint: Path) -> bool:
    """Whether llama.cpp takes it only with its heads repeated."""
    config = json.loads((checkpoint / "config.json").read_text())
    heads = config.get("num_attention_heads")
    return config["model_type"] == "olmoe" and config.get("num_key_value_heads", heads) != heads


def repeat_heads(checkpoint: Path, out: Path) -> None:
    """Write the folder ``out``.

    Args:
        checkpoint: an OLMoE in one file of safetensors.
        out: must not be there.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    weights = load_file(checkpoint / "model.safetensors")
    for name, weight in weights.items():
        if REPEATED.search(name):
            weights[name] = repeated(weight, groups, heads // groups)
    with staged(out, replace=False) as folder:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        config["num_key_value_heads"] = heads
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())


def repeated(weight: torch.Tensor, groups: int, times: int) -> torch.Tensor:
    """Each of ``groups`` blocks of rows, ``times`` behind each other."""
    blocks = weight.reshape(groups, -1, *weight.shape[1:])
    return blocks.repeat_interleave(times, dim=0).flatten(0, 1)
