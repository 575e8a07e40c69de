"""Qwen3 with experts: norms of every head's queries and keys, and dense layers where asked for.

Source: Qwen team 2025, "Qwen3 Technical Report", arXiv:2505.09388, section 2. Config and tensor
names are Hugging Face's. Attention may be over a sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ingot.graphs.attention import GroupedConfig, PreNormLayer, RotaryDecoder, rotary_facts
from ingot.graphs.config import (
    MOST_POSITIONS,
    ConfigError,
    ConfigReader,
)
from ingot.graphs.config_fields import ATTENTION
from ingot.graphs.family import Family
from ingot.graphs.layers import (
    CausalLM,
    GatedMLP,
    SequenceClassifier,
)
from ingot.graphs.moe import SparseMoeBlock, expert_parts, read_experts, router_gain
from ingot.plugins.errors import shown


@dataclass(frozen=True)
class Qwen3MoeConfig(GroupedConfig):
    """The fields of a Qwen3 MoE ``config.json`` that shape the result, by their own names.

    Attributes:
        sparse: of each layer, whether it has experts.
        intermediate_size: of the layers without; 0 where there is none.
        moe_intermediate_size: of one expert; 0 where there is none.
        sliding_window: how many tokens one sees, itself included; None for all.
    """

    sparse: tuple[bool, ...]
    intermediate_size: int
    moe_intermediate_size: int
    attention_bias: bool
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    sliding_window: int | None

    @classmethod
    def read(cls, raw: dict[str, Any]) -> Qwen3MoeConfig:
        """From a parsed ``config.json``; absent fields take transformers' defaults.

        Raises:
            ConfigError: a field of another type, or one that the graph does not implement.
        """
        config = ConfigReader(raw, "qwen3_moe")
        common = cls.common(
            config,
            vocab_size=151936,
            hidden_size=2048,
            num_hidden_layers=24,
            num_attention_heads=32,
            num_key_value_heads=4,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
        )
        layers = common["num_hidden_layers"]
        config.all_layers(layers, layer_types=ATTENTION)
        experts, chosen = read_experts(config, "num_experts", "num_local_experts", 128, 8, least=0)
        sparse = _sparse_layers(config, layers, experts)
        # Without a layer that has them the sizes of experts say nothing, and so for dense layers.
        dense_size = config.size("intermediate_size", 6144)
        expert_size = config.size("moe_intermediate_size", 768)
        experts, chosen = (experts, chosen) if any(sparse) else (0, 0)
        # The size of a window says nothing where it is not used.
        window = config.size("sliding_window", 4096, MOST_POSITIONS)
        used = config.take("use_sliding_window", bool, False)
        result = cls(
            **common,
            sparse=sparse,
            intermediate_size=0 if all(sparse) else dense_size,
            moe_intermediate_size=expert_size if experts else 0,
            attention_bias=config.take("attention_bias", bool, False),
            num_experts=experts,
            num_experts_per_tok=chosen,
            norm_topk_prob=config.take("norm_topk_prob", bool, False),
            sliding_window=window if used else None,
            facts=rotary_facts(
                config,
                common["rope"],
                tuple(int(each) for each in sparse),
                chosen,
                num_labels=config.labels(),
            ),
        )
        config.finish()
        return result


def _sparse_layers(config: ConfigReader, layers: int, experts: int) -> tuple[bool, ...]:
    """Every ``decoder_sparse_step``-th layer has experts, but for those of ``mlp_only_layers``."""
    step = config.size("decoder_sparse_step", 1)
    dense = config.take("mlp_only_layers", list, [])
    if any(type(index) is not int for index in dense):
        raise ConfigError(
            f"config.json: mlp_only_layers is {shown(dense)}; it must be numbers of layers."
        )
    return tuple(
        experts > 0 and (index + 1) % step == 0 and index not in dense for index in range(layers)
    )


class Qwen3MoeDecoderLayer(PreNormLayer):
    def __init__(self, config: Qwen3MoeConfig, index: int) -> None:
        mlp: nn.Module = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        if config.sparse[index]:
            mlp = SparseMoeBlock(
                config.hidden_size,
                config.moe_intermediate_size,
                config.num_experts,
                config.num_experts_per_tok,
                normalise=config.norm_topk_prob,
                activation=config.hidden_act,
            )
        super().__init__(
            config,
            mlp,
            bias=config.attention_bias,
            normed="head",
            norm_eps=config.rms_norm_eps,
        )


class Qwen3MoeModel(RotaryDecoder):
    """The bare model: ``last_hidden_state [B, T, H]`` after the final norm."""

    layer = Qwen3MoeDecoderLayer
    config: Qwen3MoeConfig

    @property
    def window(self) -> int | None:
        """See ``RotaryDecoder.window``."""
        return self.config.sliding_window


class Qwen3MoeForCausalLM(CausalLM):
    """The bare model and a language-model head: ``logits [B, T, V]``."""

    bare = Qwen3MoeModel


class Qwen3MoeForSequenceClassification(SequenceClassifier):
    """The bare model and a classifier of the last token: ``logits [B, num_labels]``."""

    bare = Qwen3MoeModel


FAMILY = Family(
    model_type="qwen3_moe",
    read_config=Qwen3MoeConfig.read,
    tasks={
        "generate": Qwen3MoeForCausalLM,
        "features": Qwen3MoeModel,
        "classify": Qwen3MoeForSequenceClassification,
    },
    other_spelling=expert_parts,
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    head_tensors=("lm_head.weight", "score.weight"),
    extra_outputs=("router_logits", "hidden_states"),
    preset_gain=router_gain,
    presets={
        "tiny": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "max_position_embeddings": 512,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        "small": {
            "vocab_size": 151936,
            "hidden_size": 512,
            "moe_intermediate_size": 192,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "max_position_embeddings": 4096,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        # The released Qwen3-30B-A3B.
        "full": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
    },
)
