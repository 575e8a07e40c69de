"""Granite 4: Mamba2 and attention layers in turn, with experts and an MLP for all tokens in each.

Source: Granite team 2025, "Granite 4.0 Language Models"; ``granite_decoder.py`` has the layers.
There may be no experts, and attention has no rotation unless the config asks for one.
"""

from __future__ import annotations

from typing import Any

from ingot.graphs.config import ConfigReader
from ingot.graphs.granite_decoder import RMS_NORM_EPS, GraniteDecoderConfig, granite_family
from ingot.graphs.mamba2_mixer import draw, read_attention_layers, read_mixer


def read_config(raw: dict[str, Any]) -> GraniteDecoderConfig:
    """From a parsed ``config.json``; absent fields take transformers' defaults.

    Raises:
        ConfigError: a field of another type, or one that the graph does not implement.
    """
    config = ConfigReader(raw, "granitemoehybrid")
    attention = read_attention_layers(config, config.layers(default=32))
    hidden_size = config.size("hidden_size", 4096)
    # Read in any case: what it says must be known, also where no layer is one.
    mixer = read_mixer(config, hidden_size, config.epsilon("rms_norm_eps", RMS_NORM_EPS))
    return GraniteDecoderConfig.read(
        config,
        attention,
        shared_intermediate_size=config.size("shared_intermediate_size", 1024),
        mixer=None if all(attention) else mixer,
        rotated=config.choice("position_embedding_type", {"rope": True, "nope": False}, "nope"),
        least_experts=0,
    )


_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 32,
    "shared_intermediate_size": 48,
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "mamba", "attention", "mamba"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_chunk_size": 8,
    "max_position_embeddings": 512,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
    "logits_scaling": 8.0,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}

FAMILY = granite_family(
    model_type="granitemoehybrid",
    read_config=read_config,
    keep_in_fp32=("A_log", "D", "dt_bias"),
    draw=draw,
    presets={
        "tiny": _TINY,
        "small": {
            **_TINY,
            "vocab_size": 49160,
            "hidden_size": 512,
            "intermediate_size": 256,
            "shared_intermediate_size": 512,
            "num_hidden_layers": 10,
            "layer_types": ["mamba"] * 5 + ["attention"] + ["mamba"] * 4,
            "num_attention_heads": 8,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "mamba_n_heads": 16,
            "mamba_d_state": 64,
            "mamba_d_head": 64,
            "mamba_chunk_size": 64,
            "max_position_embeddings": 4096,
            "attention_multiplier": 0.015625,
        },
        # The released Granite-4.0-H-Tiny.
        "full": {
            "vocab_size": 100352,
            "hidden_size": 1536,
            "intermediate_size": 512,
            "shared_intermediate_size": 1024,
            "num_hidden_layers": 40,
            "layer_types": [
                "attention" if index in (5, 15, 25, 35) else "mamba" for index in range(40)
            ],
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "num_local_experts": 64,
            "num_experts_per_tok": 6,
            "mamba_n_heads": 48,
            "mamba_n_groups": 1,
            "mamba_d_state": 128,
            "mamba_d_head": 64,
            "mamba_chunk_size": 256,
            "max_position_embeddings": 131072,
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
    },
)
