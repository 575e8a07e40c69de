"""OLMoE: a pre-norm decoder whose MLP is a mixture of experts.

Source: Muennighoff et al. 2024, "OLMoE: Open Mixture-of-Experts Language Models",
arXiv:2409.02060, section 2 and appendix B; config and tensor names are Hugging Face's. What sets
it apart from Llama: RMS norms over the whole query and key projections, an optional clip of
queries, keys and values, and top-k weights that are not renormalised unless the config says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ingot.graphs.attention import GroupedConfig, PreNormLayer, RotaryDecoder, rotary_facts
from ingot.graphs.config import ConfigReader
from ingot.graphs.config_fields import ATTENTION, EXPERTS
from ingot.graphs.family import Family
from ingot.graphs.layers import CausalLM
from ingot.graphs.moe import SparseMoeBlock, expert_parts, read_experts, router_gain


@dataclass(frozen=True)
class OlmoeConfig(GroupedConfig):
    """The fields of an OLMoE ``config.json`` that shape the result, by their own names."""

    intermediate_size: int
    attention_bias: bool
    clip_qkv: float | None
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool

    @classmethod
    def read(cls, raw: dict[str, Any]) -> OlmoeConfig:
        """From a parsed ``config.json``; absent fields take transformers' defaults.

        Raises:
            ConfigError: a field of another type, or one that the graph does not implement.
        """
        config = ConfigReader(raw, "olmoe")
        common = cls.common(
            config,
            vocab_size=50304,
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=16,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        )
        size = common["hidden_size"] // common["num_attention_heads"]
        config.must_be("head_dim", size, "q_norm spans hidden_size")
        layers = common["num_hidden_layers"]
        config.all_layers(layers, layer_types=ATTENTION, mlp_layer_types=EXPERTS)
        experts, chosen = read_experts(config, "num_experts", "num_local_experts", 64, 8)
        result = cls(
            **common,
            intermediate_size=config.size("intermediate_size", 2048),
            attention_bias=config.take("attention_bias", bool, False),
            clip_qkv=config.optional_float("clip_qkv"),
            num_experts=experts,
            num_experts_per_tok=chosen,
            norm_topk_prob=config.take("norm_topk_prob", bool, False),
            facts=rotary_facts(config, common["rope"], (1,) * layers, chosen),
        )
        config.finish()
        return result


class OlmoeDecoderLayer(PreNormLayer):
    def __init__(self, config: OlmoeConfig, _index: int) -> None:
        mlp = SparseMoeBlock(
            config.hidden_size,
            config.intermediate_size,
            config.num_experts,
            config.num_experts_per_tok,
            normalise=config.norm_topk_prob,
            activation=config.hidden_act,
        )
        super().__init__(
            config,
            mlp,
            bias=config.attention_bias,
            normed="all",
            norm_eps=config.rms_norm_eps,
            clip=config.clip_qkv,
        )


class OlmoeModel(RotaryDecoder):
    """The bare model: ``last_hidden_state [B, T, H]`` after the final norm."""

    layer = OlmoeDecoderLayer


class OlmoeForCausalLM(CausalLM):
    """The bare model and a language-model head: ``logits [B, T, V]``."""

    bare = OlmoeModel


FAMILY = Family(
    model_type="olmoe",
    read_config=OlmoeConfig.read,
    tasks={"generate": OlmoeForCausalLM, "features": OlmoeModel},
    other_spelling=expert_parts,
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    head_tensors=("lm_head.weight",),
    tokenizer_class="GPTNeoXTokenizer",
    extra_outputs=("router_logits", "hidden_states"),
    preset_gain=router_gain,
    presets={
        "tiny": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 512,
            "eos_token_id": None,
            "pad_token_id": 1,
        },
        "small": {
            "vocab_size": 50304,
            "hidden_size": 512,
            "intermediate_size": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "eos_token_id": None,
            "pad_token_id": 1,
        },
        # The released OLMoE-1B-7B.
        "full": {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "eos_token_id": 50279,
            "pad_token_id": 1,
        },
    },
)
