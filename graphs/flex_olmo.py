"""FlexOlmo: experts trained apart, in a decoder whose norms are behind attention and experts.

Source: Shi et al. 2025, "FlexOlmo: Open Language Models for Flexible Data Use", arXiv:2507.07024,
section 3; config and tensor names are Hugging Face's. Queries and keys are normed over all heads of
a token together, and the weights of the chosen experts are renormalised only if the config says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ingot.graphs.attention import GroupedConfig, PostNormLayer, RotaryDecoder, rotary_facts
from ingot.graphs.config import ConfigReader
from ingot.graphs.config_fields import ATTENTION, EXPERTS
from ingot.graphs.family import Family
from ingot.graphs.layers import CausalLM
from ingot.graphs.moe import SparseMoeBlock, expert_parts, read_experts, router_gain


@dataclass(frozen=True)
class FlexOlmoConfig(GroupedConfig):
    """The fields of such a ``config.json`` that shape the result, by their own names."""

    intermediate_size: int
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
        common = cls.common(
            config,
            vocab_size=100352,
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
            rope_theta=500000.0,
        )
        layers = common["num_hidden_layers"]
        config.all_layers(layers, layer_types=ATTENTION, mlp_layer_types=EXPERTS)
        experts, chosen = read_experts(config, "num_experts", "num_local_experts", 7, 5)
        result = cls(
            **common,
            intermediate_size=config.size("intermediate_size", 11008),
            attention_bias=config.take("attention_bias", bool, False),
            num_experts=experts,
            num_experts_per_tok=chosen,
            norm_topk_prob=config.take("norm_topk_prob", bool, False),
            facts=rotary_facts(config, common["rope"], (1,) * layers, chosen),
        )
        config.finish()
        return result


class FlexOlmoDecoderLayer(PostNormLayer):
    def __init__(self, config: FlexOlmoConfig, _index: int) -> None:
        mlp = SparseMoeBlock(
            config.hidden_size,
            config.intermediate_size,
            config.num_experts,
            config.num_experts_per_tok,
            normalise=config.norm_topk_prob,
            activation=config.hidden_act,
        )
        eps = config.rms_norm_eps
        super().__init__(config, mlp, bias=config.attention_bias, normed="all", norm_eps=eps)


class FlexOlmoModel(RotaryDecoder):
    """The bare model: ``last_hidden_state [B, T, H]`` after the final norm."""

    layer = FlexOlmoDecoderLayer


class FlexOlmoForCausalLM(CausalLM):
    """The bare model and a language-model head: ``logits [B, T, V]``."""

    bare = FlexOlmoModel


FAMILY = Family(
    model_type="flex_olmo",
    read_config=FlexOlmoConfig.read,
    tasks={"generate": FlexOlmoForCausalLM, "features": FlexOlmoModel},
    other_spelling=expert_parts,
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    head_tensors=("lm_head.weight",),
    extra_outputs=("router_logits", "hidden_states"),
    preset_gain=router_gain,
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
