"""FlexOlmo: experts trained apart, in a decoder whose norms are behind attention and experts.

Source: Shi et al. 2025, "FlexOlmo: Open Language Models for Flexible Data Use", arXiv:2507.07024,
section 3; config and tensor names are Hugging Face's. Queries and keys are normed over all heads of
a token together, and the weights of the chosen experts are renormalised only if the config says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ingot.graphs.attention import Attention, RotaryConfig, RotaryDecoder
from ingot.graphs.config import MOST_EXPERTS, MOST_FACTOR, MOST_POSITIONS, ConfigReader, Facts
from ingot.graphs.config_fields import ATTENTION, EXPERTS
from ingot.graphs.family import Family
from ingot.graphs.layers import HIDDEN_ACT, CausalLM, Layer, Mixed, RMSNorm, Step
from ingot.graphs.moe import SparseMoeBlock, expert_parts
from ingot.graphs.rope import RopeParameters
from ingot.graphs.state import State


@dataclass(frozen=True)
class FlexOlmoConfig(RotaryConfig):
    """The fields of such a ``config.json`` that shape the result, by their own names."""

    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    attention_bias: bool
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool

    @classmethod
    def read(cls, raw: dict[str, Any]) -> FlexOlmoConfig:
        """From a parsed ``config.json``; absent fields take transformers' defaults.

        Raises:
            ConfigError: a field of another type, or one that the graph does not implement.
        """
        config = ConfigReader(raw, "flex_olmo")
        hidden_size = config.size("hidden_size", 4096)
        heads = config.size("num_attention_heads", 32, MOST_FACTOR)
        key_value_heads = config.size("num_key_value_heads", heads, MOST_FACTOR)
        if raw.get("head_dim") is None:
            config.multiple("hidden_size", of="num_attention_heads")
        config.multiple("num_attention_heads", of="num_key_value_heads")
        head_dim = config.size("head_dim", hidden_size // heads, MOST_FACTOR)
        experts = config.size("num_local_experts", 7, MOST_EXPERTS)
        experts = config.size("num_experts", experts, MOST_EXPERTS)
        config.must_be("num_local_experts", experts, "it is another name of num_experts")
        chosen = config.size("num_experts_per_tok", 5, MOST_EXPERTS)
        config.at_most("num_experts_per_tok", "num_experts")
        context = config.size("max_position_embeddings", 4096, MOST_POSITIONS)
        rope = RopeParameters.read(config, head_dim, context, rope_theta=500000.0)
        layers = config.layers(default=32)
        config.all_layers(layers, layer_types=ATTENTION, mlp_layer_types=EXPERTS)
        result = cls(
            vocab_size=config.size("vocab_size", 100352),
            hidden_size=hidden_size,
            intermediate_size=config.size("intermediate_size", 11008),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            hidden_act=config.choice("hidden_act", HIDDEN_ACT, "silu"),
            rms_norm_eps=config.epsilon("rms_norm_eps", 1e-06),
            attention_bias=config.take("attention_bias", bool, False),
            num_experts=experts,
            num_experts_per_tok=chosen,
            norm_topk_prob=config.take("norm_topk_prob", bool, False),
            tie_word_embeddings=config.take("tie_word_embeddings", bool, False),
            rope=rope,
            facts=Facts(
                routers=(1,) * layers,
                experts_per_token=chosen,
                context_length=rope.context_length,
                switch_length=rope.switch_length,
                eos_token_ids=config.token_ids("eos_token_id"),
                pad_token_id=config.take("pad_token_id", int, 0),
            ),
        )
        config.finish()
        return result


class FlexOlmoDecoderLayer(Layer):
    def __init__(self, config: FlexOlmoConfig, _index: int) -> None:
        super().__init__()
        self.self_attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            bias=config.attention_bias,
            normed="all",
            norm_eps=config.rms_norm_eps,
        )
        self.mlp = SparseMoeBlock(
            config.hidden_size,
            config.intermediate_size,
            config.num_experts,
            config.num_experts_per_tok,
            normalise=config.norm_topk_prob,
            activation=config.hidden_act,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def states(self, index: int) -> tuple[State, ...]:
        return self.self_attn.states(index)

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        mixed, present, _ = self.self_attn(x, step, past)
        x = x + self.post_attention_layernorm(mixed)
        mixed, router_logits = self.mlp(x)
        return Mixed(x + self.post_feedforward_layernorm(mixed), present, (router_logits,))


class FlexOlmoModel(RotaryDecoder):
    """The bare model: ``last_hidden_state [B, T, H]`` after the final norm."""

    layer = FlexOlmoDecoderLayer


class FlexOlmoForCausalLM(CausalLM):
    """The bare model and a language-model head: ``logits [B, T, V]``."""

    bare = FlexOlmoModel


def preset_gain(name: str, _config: dict[str, Any]) -> float:
    """A router's logits spread over several units, so that its top-k has margins."""
    return 2.0 if name.endswith("gate.weight") else 1.0


FAMILY = Family(
    model_type="flex_olmo",
    read_config=FlexOlmoConfig.read,
    tasks={"generate": FlexOlmoForCausalLM, "features": FlexOlmoModel},
    other_spelling=expert_parts,
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    head_tensors=("lm_head.weight",),
    extra_outputs=("router_logits", "hidden_states"),
    preset_gain=preset_gain,
    presets={
        "tiny": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 512,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        "small": {
            "vocab_size": 50304,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "num_experts": 7,
            "num_experts_per_tok": 5,
            "max_position_embeddings": 4096,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        # The released FlexOlmo-7x7B.
        "full": {
            "vocab_size": 100352,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "num_experts": 7,
            "num_experts_per_tok": 5,
            "max_position_embeddings": 4096,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-6,
            "eos_token_id": 100257,
            "pad_token_id": 100277,
        },
    },
)
