"""Adapters that PEFT makes, and what PEFT makes of them: the oracle of merged weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
IDS = torch.tensor([[11, 205, 7, 300, 42, 8, 99, 501, 3, 17, 3]])


def base_model(folder: Path, *, untied: bool = False, rows: int | None = None) -> Any:
    """transformers' model of a checkpoint, float32.

    Args:
        folder: the checkpoint.
        untied: the head is a copy of the embedding, no longer the same tensor.
        rows: resize the vocabulary.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows)
    if untied:
        weight = model.get_input_embeddings().weight.detach().clone()
        model.get_output_embeddings().weight = torch.nn.Parameter(weight)
        model.config.tie_word_embeddings = False
    return model


def make_adapter(
    base: Path, out: Path, *, rows: int | None = None, task_type: str = "CAUSAL_LM", **config: Any
) -> Path:
    """An adapter whose tensors are all random, saved by PEFT; ``config`` is a ``LoraConfig``."""
    model = base_model(base, rows=rows)
    generator = torch.Generator().manual_seed(11)
    with warnings.catch_warnings():
        # PEFT warns of what is tied, and of what it saves beside the adapter.
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(task_type=task_type, **{"r": 4, **config}))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.3 * parameter.std(correction=0).clamp(min=0.1) * noise
        adapted.save_pretrained(str(out))
    return out


def adapted_model(base: Path, adapter: Path, **loaded: Any) -> Any:
    """PEFT's model of an adapter over a checkpoint, not merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base_model(base, **loaded), adapter).eval()


def merged_model(base: Path, adapter: Path, **loaded: Any) -> Any:
    """transformers' model after PEFT's own merge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adapted_model(base, adapter, **loaded).merge_and_unload()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of ``IDS``."""
    result: torch.Tensor = model(IDS).logits
    return result


def change_config(adapter: Path, **fields: Any) -> Path:
    """Change fields of an ``adapter_config.json`` in place."""
    raw = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**raw, **fields}))
    return adapter


def change_tensors(
    adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    """Replace the tensors of an adapter in place."""
    tensors = change(load_file(adapter / WEIGHTS))
    # Safetensors takes no tensors that share memory.
    own = {name: each.contiguous().clone() for name, each in tensors.items()}
    save_file(own, adapter / WEIGHTS)
    return adapter
