"""Granite: a dense pre-norm decoder with four multipliers on its signal path.

Source: Granite team 2024, "Granite 3.0 Language Models", section 3; the multipliers are those of
maximal update parametrisation (Yang et al. 2022, arXiv:2203.03466, table 8). Config and tensor
names are Hugging Face's. The multipliers stand here where the paper has them; the export folds
them into weights and attention scales, so they cost nothing at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ingot.graphs.config import ConfigError, ConfigReader
from ingot.graphs.family import Family
from ingot.graphs.layers import HIDDEN_ACT, CausalLM, ModelOutput, RMSNorm, attention, causal_mask
from ingot.graphs.rope import RopeParameters, RotaryEmbedding, rotate
from ingot.graphs.state import State, key_value_states
from ingot.plugins.activations import activate


@dataclass(frozen=True)
class GraniteConfig:
    """The fields of a Granite ``config.json`` that shape the result, by their own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    embedding_multiplier: float
    logits_scaling: float
    residual_multiplier: float
    attention_multiplier: float
    tie_word_embeddings: bool
    rope: RopeParameters

    @classmethod
    def read(cls, raw: dict[str, Any]) -> GraniteConfig:
        """From a parsed ``config.json``; absent fields take transformers' defaults.

        Raises:
            ConfigError: a field of another type, or one that the graph does not implement.
        """
        config = ConfigReader(raw, "granite")
        hidden_size = config.size("hidden_size", 4096)
        heads = config.size("num_attention_heads", 32)
        key_value_heads = config.size("num_key_value_heads", heads)
        if hidden_size % heads and raw.get("head_dim") is None:
            raise ConfigError(
                f"config.json: hidden_size {hidden_size} is not a multiple of "
                f"num_attention_heads {heads}."
            )
        if heads % key_value_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {key_value_heads}."
            )
        head_dim = config.size("head_dim", hidden_size // heads)
        rope = RopeParameters.read(config, head_dim, config.size("max_position_embeddings", 2048))
        result = cls(
            vocab_size=config.size("vocab_size", 32000),
            hidden_size=hidden_size,
            intermediate_size=config.size("intermediate_size", 11008),
            num_hidden_layers=config.size("num_hidden_layers", 32),
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            hidden_act=config.choice("hidden_act", HIDDEN_ACT, "silu"),
            rms_norm_eps=config.take("rms_norm_eps", float, 1e-6),
            attention_bias=config.take("attention_bias", bool, False),
            mlp_bias=config.take("mlp_bias", bool, False),
            embedding_multiplier=config.take("embedding_multiplier", float, 1.0),
            logits_scaling=config.take("logits_scaling", float, 1.0),
            residual_multiplier=config.take("residual_multiplier", float, 1.0),
            attention_multiplier=config.take("attention_multiplier", float, 1.0),
            tie_word_embeddings=config.take("tie_word_embeddings", bool, False),
            rope=rope,
        )
        config.finish()
        return result


class GraniteAttention(nn.Module):
    def __init__(self, config: GraniteConfig) -> None:
        super().__init__()
        self.config = config
        hidden, bias = config.hidden_size, config.attention_bias
        width = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, width, bias=bias)
        self.k_proj = nn.Linear(hidden, shared, bias=bias)
        self.v_proj = nn.Linear(hidden, shared, bias=bias)
        self.o_proj = nn.Linear(width, hidden, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = (-1, self.config.head_dim)
        out, present_key, present_value = attention(
            rotate(self.q_proj(x).unflatten(-1, heads), cos, sin),
            rotate(self.k_proj(x).unflatten(-1, heads), cos, sin),
            self.v_proj(x).unflatten(-1, heads),
            past_key,
            past_value,
            mask,
            self.config.attention_multiplier,
        )
        return self.o_proj(out), present_key, present_value


class GraniteMLP(nn.Module):
    def __init__(self, config: GraniteConfig) -> None:
        super().__init__()
        self.act = partial(activate, config.hidden_act)
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return y


class GraniteDecoderLayer(nn.Module):
    def __init__(self, config: GraniteConfig) -> None:
        super().__init__()
        self.self_attn = GraniteAttention(config)
        self.mlp = GraniteMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.residual_multiplier = config.residual_multiplier

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mixed, present_key, present_value = self.self_attn(
            self.input_layernorm(x), cos, sin, mask, past_key, past_value
        )
        x = x + mixed * self.residual_multiplier
        x = x + self.mlp(self.post_attention_layernorm(x)) * self.residual_multiplier
        return x, present_key, present_value


class GraniteModel(nn.Module):
    """The bare model: ``last_hidden_state [B, T, H]`` after the final norm."""

    main_output = "last_hidden_state"

    def __init__(self, config: GraniteConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            GraniteDecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope)

    @property
    def states(self) -> tuple[State, ...]:
        c = self.config
        return tuple(
            state
            for layer in range(c.num_hidden_layers)
            for state in key_value_states(layer, c.num_key_value_heads, c.head_dim)
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: tuple[torch.Tensor, ...],
    ) -> ModelOutput:
        """One prefill or decode call; arguments as in ``graphs.olmoe.OlmoeModel.forward``."""
        x = self.embed_tokens(input_ids) * self.config.embedding_multiplier
        cos, sin = (table.to(x.dtype) for table in self.rotary_emb(position_ids))
        mask = causal_mask(attention_mask, input_ids.shape[1])
        present: list[torch.Tensor] = []
        hidden_states = [x]
        for index, layer in enumerate(self.layers):
            x, key, value = layer(x, cos, sin, mask, past[2 * index], past[2 * index + 1])
            present += [key, value]
            hidden_states.append(x)
        hidden_states[-1] = x = self.norm(x)
        return ModelOutput(x, tuple(present), hidden_states=tuple(hidden_states))


class GraniteForCausalLM(CausalLM):
    """The bare model and a language-model head: ``logits [B, T, V]``."""

    bare = GraniteModel

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: tuple[torch.Tensor, ...],
    ) -> ModelOutput:
        """As ``GraniteModel.forward``, with logits for every new token."""
        out = super().forward(input_ids, attention_mask, position_ids, past)
        return out._replace(main=out.main / self.config.logits_scaling)


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
    hub_name="ibm-granite/granite-3.3-2b-instruct",
    read_config=GraniteConfig.read,
    tasks={"generate": GraniteForCausalLM, "features": GraniteModel},
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    head_tensors=("lm_head.weight",),
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
