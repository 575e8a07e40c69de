"""The four models that every program is given: seeded checkpoints of realistic shapes.

Widths of whole blocks of 256, which llama.cpp's K-quants take; numbers are written in bfloat16, so
what stores bfloat16 loses nothing of them.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingot.graphs.checkpoint import read_header
from ingot.plugins.whole import staged

ROOT = Path(__file__).resolve().parents[2]
# Ids are fed; some programs refuse a folder without a tokenizer all the same.
TOKENIZER = ROOT / "tests" / "data" / "trained" / "granite"
SEED = 0

CONFIGS: dict[str, dict[str, Any]] = {
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "vocab_size": 49152,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 21,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "logits_scaling": 8.0,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "vocab_size": 50304,
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    },
    "jetmoe": {
        "architectures": ["JetMoeForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 5,
        "num_key_value_heads": 8,
        "kv_channels": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "mamba2": {
        "architectures": ["Mamba2ForCausalLM"],
        "vocab_size": 50288,
        "hidden_size": 768,
        "num_hidden_layers": 24,
        "num_heads": 24,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "chunk_size": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
}
FAMILIES = tuple(CONFIGS)
# Released shapes, which are measured where they are asked for: 14 GB each, and transformers in
# float32, which all others are multiples of, would take 28 GB of memory.
RELEASED = {
    "olmoe-1b-7b": {
        **CONFIGS["olmoe"],
        "model_type": "olmoe",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 1024,
        "num_experts": 64,
        "eos_token_id": 50279,
    },
    "granite-4.0-h-tiny": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "vocab_size": 100352,
        "hidden_size": 1536,
        "intermediate_size": 512,
        "shared_intermediate_size": 1024,
        "num_hidden_layers": 40,
        "layer_types": [
            "attention" if index in (5, 15, 25, 35) else "mamba" for index in range(40)
        ],
        "position_embedding_type": "nope",
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "num_local_experts": 64,
        "num_experts_per_tok": 6,
        "mamba_n_heads": 48,
        "mamba_n_groups": 1,
        "mamba_d_state": 128,
        "mamba_d_head": 64,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": 131072,
        "rope_theta": 10000.0,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0078125,
        "logits_scaling": 6.0,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 100257,
        "eos_token_id": 100257,
        "pad_token_id": 100256,
    },
}
# How many experts a token takes, and of how many, by names in the families' configs.
_EXPERTS = ("num_experts", "num_local_experts")


@dataclass(frozen=True)
class Model:
    """One checkpoint.

    Attributes:
        family: its ``model_type``, or the name of a released shape.
        checkpoint: a Hugging Face folder.
        config: what is in its ``config.json``.
    """

    family: str
    checkpoint: Path
    config: dict[str, Any]

    @classmethod
    def prepare(cls, family: str, work: Path) -> Model:
        """Make the checkpoint where it is not there; a minute.

        Args:
            family: one of ``FAMILIES``, or of ``RELEASED``.
            work: where it is kept.
        """
        folder = work / "checkpoints" / family
        config = {"model_type": family, **(CONFIGS | RELEASED)[family]}
        if not folder.is_dir():
            import torch

            from ingot.graphs.family import find_family
            from ingot.graphs.preset import write_checkpoint

            with staged(folder, replace=False) as made:
                known = find_family(config["model_type"])
                write_checkpoint(made, known, config, dtype=torch.bfloat16, seed=SEED)
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copy(TOKENIZER / name, made / name)
        return cls(family, folder, json.loads((folder / "config.json").read_text()))

    @property
    def released(self) -> bool:
        """Whether it is too large for some of the programs."""
        return self.family in RELEASED

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def chosen(self) -> float:
        """Which share of its experts a token takes; 1 where it has none."""
        experts = next((self.config[name] for name in _EXPERTS if name in self.config), None)
        return 1.0 if experts is None else self.config["num_experts_per_tok"] / experts

    @property
    def tied(self) -> bool:
        return bool(self.config["tie_word_embeddings"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors in the checkpoint's files."""
        files = sorted(self.checkpoint.glob("*.safetensors"))
        return {name: entry.shape for file in files for name, entry in read_header(file).items()}

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())
