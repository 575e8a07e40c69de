"""Granite 3 with experts, beside which stands an MLP that every token takes.

Source: Granite team 2024, "Granite 3.0 Language Models", section 3, for all but the MLP, which
transformers' ``granitemoeshared`` defines; ``granite_decoder.py`` has the layers.
"""

from __future__ import annotations

from typing import Any

from ingot.graphs.config import ConfigReader
from ingot.graphs.config_fields import ATTENTION, EXPERTS
from ingot.graphs.granite_decoder import GraniteDecoderConfig, granite_family


def read_config(raw: dict[str, Any]) -> GraniteDecoderConfig:
    """From a parsed ``config.json``; absent fields take transformers' defaults.

    Raises:
        ConfigError: a field of another type, or one that the graph does not implement.
    """
    config = ConfigReader(raw, "granitemoeshared")
    layers = config.layers(default=32)
    config.all_layers(layers, layer_types=ATTENTION, mlp_layer_types=EXPERTS)
    return GraniteDecoderConfig.read(
        config,
        (True,) * layers,
        shared_intermediate_size=config.size("shared_intermediate_size", 0, least=0),
    )


_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 32,
    "shared_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
    "logits_scaling": 6.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}

FAMILY = granite_family(
    model_type="granitemoeshared",
    read_config=read_config,
    presets={
        "tiny": _TINY,
        "small": {
            **_TINY,
            "vocab_size": 49155,
            "hidden_size": 512,
            "intermediate_size": 256,
            "shared_intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_local_experts": 32,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 4096,
            "attention_multiplier": 0.015625,
        },
        # The released preview with 7B parameters, of which a token uses 1B.
        "full": {
            "vocab_size": 49152,
            "hidden_size": 2048,
            "intermediate_size": 512,
            "shared_intermediate_size": 1024,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 62,
            "num_experts_per_tok": 6,
            "max_position_embeddings": 4096,
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
    },
)
