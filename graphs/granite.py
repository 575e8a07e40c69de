"""Granite: a dense pre-norm decoder with four multipliers on its signal path.

Source: Granite team 2024, "Granite 3.0 Language Models", section 3; the multipliers are those of
maximal update parametrisation (Yang et al. 2022, arXiv:2203.03466, table 8). Config and tensor
names are Hugging Face's. The multipliers stand here where the paper has them; the export folds
them into weights and attention scales, so they cost nothing at run time.

Llama (Touvron et al. 2023, arXiv:2302.13971, section 2.2) is the same decoder without them, under
the same tensor names; so are the Granite code models, whose ``model_type`` is ``llama``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ingot.graphs.attention import Attention, GroupedConfig, RotaryDecoder, rotary_facts
from ingot.graphs.config import ConfigReader
from ingot.graphs.config_fields import ATTENTION, DENSE
from ingot.graphs.family import Family
from ingot.graphs.granite_multipliers import (
    NOT_MULTIPLIED,
    MultipliedConfig,
    ScaledLM,
    read_multipliers,
)
from ingot.graphs.layers import (
    GatedMLP,
    Layer,
    Mixed,
    RMSNorm,
    SequenceClassifier,
    Step,
)
from ingot.graphs.state import State


@dataclass(frozen=True)
class GraniteConfig(GroupedConfig, MultipliedConfig):
    """The fields of a Granite ``config.json`` that shape the result, by their own names."""

    intermediate_size: int
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def read(cls, raw: dict[str, Any]) -> GraniteConfig:
        """From a parsed ``config.json``; absent fields take transformers' defaults.

        Raises:
            ConfigError: a field of another type, or one that the graph does not implement.
        """
        llama = raw.get("model_type") == "llama"
        config = ConfigReader(raw, "llama" if llama else "granite")
        common = cls.common(
            config,
            vocab_size=32000,
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
        )
        layers = common["num_hidden_layers"]
        config.all_layers(layers, layer_types=ATTENTION, mlp_layer_types=DENSE)
        if llama:
            config.must_be("pretraining_tp", 1, "it computes every product in one piece")
            multipliers = {**NOT_MULTIPLIED, "attention_multiplier": common["head_dim"] ** -0.5}
        else:
            multipliers = read_multipliers(config)
        result = cls(
            **common,
            **multipliers,
            intermediate_size=config.size("intermediate_size", 11008),
            attention_bias=config.take("attention_bias", bool, False),
            mlp_bias=config.take("mlp_bias", bool, False),
            facts=rotary_facts(config, common["rope"], (0,) * layers, num_labels=config.labels()),
        )
        config.finish()
        return result


class GraniteDecoderLayer(Layer):
    def __init__(self, config: GraniteConfig, _index: int) -> None:
        super().__init__()
        self.self_attn = Attention.of(
            config, scale=config.attention_multiplier, bias=config.attention_bias
        )
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, bias=config.mlp_bias
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.residual_multiplier = config.residual_multiplier

    def states(self, index: int) -> tuple[State, ...]:
        return self.self_attn.states(index)

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        mixed, present, _ = self.self_attn(self.input_layernorm(x), step, past)
        x = x + mixed * self.residual_multiplier
        x = x + self.mlp(self.post_attention_layernorm(x)) * self.residual_multiplier
        return Mixed(x, present)


class GraniteModel(RotaryDecoder):
    """The bare model: ``last_hidden_state [B, T, H]`` after the final norm."""

    layer = GraniteDecoderLayer
    config: GraniteConfig

    def begin(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, Step]:
        """See ``Decoder.begin``; the embedding is multiplied by ``embedding_multiplier``."""
        x, step = super().begin(input_ids, attention_mask, position_ids)
        return x * self.config.embedding_multiplier, step


class GraniteForCausalLM(ScaledLM):
    """The bare model and a language-model head: ``logits [B, T, V]``."""

    bare = GraniteModel


class GraniteForSequenceClassification(SequenceClassifier):
    """The bare model and a classifier of the last token: ``logits [B, num_labels]``."""

    bare = GraniteModel


def preset_gain(name: str, config: dict[str, Any]) -> float:
    """Undo the multipliers, as training does, so that no part of the signal drowns another."""
    if "embed_tokens" in name:
        return 1 / float(config["embedding_multiplier"])
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return 2 / float(config["residual_multiplier"])
    if name.endswith("lm_head.weight"):
        return float(config["logits_scaling"])
    # Queries and keys of this size make attention choose rather than average.
    return 2.0 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0


FAMILY = Family(
    model_type="granite",
    read_config=GraniteConfig.read,
    tasks={
        "generate": GraniteForCausalLM,
        "features": GraniteModel,
        "classify": GraniteForSequenceClassification,
    },
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    head_tensors=("lm_head.weight", "score.weight"),
    preset_gain=preset_gain,
    presets={
        "tiny": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
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
        },
        "small": {
            "vocab_size": 49159,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        # The released Granite-3.3-2B.
        "full": {
            "vocab_size": 49159,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 10000000.0,
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
