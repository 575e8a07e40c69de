"""What is trained: one small model of each kind, by transformers' own classes.

Rows of OLMoE's, Granite's and Mamba2's matrices are 256 or 512 numbers long, the experts' too:
llama.cpp's K-quants take blocks of 256 and fall back to others where a row is no multiple.
JetMoE, which llama.cpp does not know, has rows of 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    GraniteConfig,
    GraniteMoeHybridConfig,
    JetMoeConfig,
    Mamba2Config,
    OlmoeConfig,
    PreTrainedConfig,
)

from benchmarks.training.tokenizer import END_ID, PADDING_ID, VOCABULARY

CONTEXT = 512


@dataclass(frozen=True)
class Recipe:
    """One family's model and how long it is trained.

    Attributes:
        config: the model's sizes.
        steps: updates of the weights.
        rate: the highest learning rate.
        rows, length: sequences a step, and tokens of each.
        warm_up: the first updates, over which the rate rises.
    """

    config: PreTrainedConfig
    steps: int
    rate: float
    rows: int = 4
    length: int = 128
    warm_up: int = 60


def _common() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 2,
        "bos_token_id": END_ID,
        "eos_token_id": END_ID,
        "pad_token_id": PADDING_ID,
    }


def recipes() -> dict[str, Recipe]:
    """Family -> its recipe."""
    attention = {"num_attention_heads": 4, "max_position_embeddings": CONTEXT}
    return {
        "olmoe": Recipe(
            OlmoeConfig(
                **_common(),
                **attention,
                hidden_size=256,
                intermediate_size=256,
                num_key_value_heads=1,
                num_experts=6,
                num_experts_per_tok=2,
                output_router_logits=False,
                router_aux_loss_coef=0.01,
            ),
            steps=400,
            rate=3e-3,
            rows=8,
            warm_up=100,
        ),
        "jetmoe": Recipe(
            JetMoeConfig(
                **_common(),
                hidden_size=128,
                intermediate_size=128,
                num_key_value_heads=4,
                kv_channels=32,
                num_local_experts=8,
                num_experts_per_tok=2,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=True,
                initializer_range=0.02,
            ),
            steps=800,
            rate=3e-3,
        ),
        "granite": Recipe(
            GraniteConfig(
                **_common(),
                **attention,
                hidden_size=256,
                intermediate_size=512,
                num_key_value_heads=1,
                tie_word_embeddings=True,
                # As in released Granites: none of them is 1.
                embedding_multiplier=6.0,
                attention_multiplier=0.015625,
                residual_multiplier=0.6,
                logits_scaling=2.0,
            ),
            steps=500,
            rate=3e-3,
        ),
        "mamba2": Recipe(
            Mamba2Config(
                **_common(),
                hidden_size=256,
                expand=2,
                num_heads=8,
                head_dim=64,
                state_size=64,
                n_groups=1,
                chunk_size=32,
                tie_word_embeddings=True,
                initializer_range=0.02,
            ),
            steps=700,
            rate=3e-3,
        ),
        # Layers of both kinds, each with experts beside a shared MLP, and two groups.
        "granitemoehybrid": Recipe(
            GraniteMoeHybridConfig(
                **_common() | {"num_hidden_layers": 3},
                **attention,
                layer_types=["mamba", "attention", "mamba"],
                hidden_size=256,
                intermediate_size=64,
                shared_intermediate_size=128,
                num_key_value_heads=1,
                num_local_experts=6,
                num_experts_per_tok=2,
                output_router_logits=False,
                router_aux_loss_coef=0.01,
                mamba_n_heads=8,
                mamba_n_groups=2,
                mamba_d_state=32,
                mamba_d_head=64,
                mamba_chunk_size=32,
                tie_word_embeddings=True,
                embedding_multiplier=6.0,
                attention_multiplier=0.015625,
                residual_multiplier=0.6,
                logits_scaling=2.0,
            ),
            steps=500,
            rate=3e-3,
        ),
    }
