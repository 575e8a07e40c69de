"""Mixtral: a pre-norm decoder whose MLP is a mixture of experts.

Source: Jiang et al. 2024, "Mixtral of Experts", arXiv:2401.04088, section 2. Config and tensor
names are those of transformers 5; the hub's checkpoints have older ones. The weights of the chosen
experts are the softmax of their logits alone. Attention may be over a sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ingot.graphs.attention import GroupedConfig, PreNormLayer, RotaryDecoder, rotary_facts
from ingot.graphs.checkpoint import Part
from ingot.graphs.config import MOST_POSITIONS, ConfigReader
from ingot.graphs.config_fields import ATTENTION, EXPERTS
from ingot.graphs.family import Family
from ingot.graphs.layers import (
    CausalLM,
    SequenceClassifier,
)
from ingot.graphs.moe import SparseMoeBlock, expert_parts, read_experts, router_gain


@dataclass(frozen=True)
class MixtralConfig(GroupedConfig):
    """The fields of a Mixtral ``config.json`` that shape the result, by their own names."""

    intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    sliding_window: int | None

    @classmethod
    def read(cls, raw: dict[str, Any]) -> MixtralConfig:
        """From a parsed ``config.json``; absent fields take transformers' defaults.

        Raises:
            ConfigError: a field of another type, or one that the graph does not implement.
        """
        config = ConfigReader(raw, "mixtral")
        common = cls.common(
            config,
            vocab_size=32000,
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_theta=1000000.0,
        )
        layers = common["num_hidden_layers"]
        config.all_layers(layers, layer_types=ATTENTION, mlp_layer_types=EXPERTS)
        experts, chosen = read_experts(config, "num_local_experts", "num_experts", 8, 2)
        window = config.size("sliding_window", MOST_POSITIONS, MOST_POSITIONS)
        result = cls(
            **common,
            intermediate_size=config.size("intermediate_size", 14336),
            num_local_experts=experts,
            num_experts_per_tok=chosen,
            sliding_window=None if raw.get("sliding_window") is None else window,
            facts=rotary_facts(
                config, common["rope"], (1,) * layers, chosen, num_labels=config.labels()
            ),
        )
        config.finish()
        return result


class MixtralDecoderLayer(PreNormLayer):
    def __init__(self, config: MixtralConfig, _index: int) -> None:
        mlp = SparseMoeBlock(
            config.hidden_size,
            config.intermediate_size,
            config.num_local_experts,
            config.num_experts_per_tok,
            normalise=True,
            activation=config.hidden_act,
        )
        super().__init__(config, mlp)


class MixtralModel(RotaryDecoder):
    """The bare model: ``last_hidden_state [B, T, H]`` after the final norm."""

    layer = MixtralDecoderLayer
    config: MixtralConfig

    @property
    def window(self) -> int | None:
        """See ``RotaryDecoder.window``."""
        return self.config.sliding_window


class MixtralForCausalLM(CausalLM):
    """The bare model and a language-model head: ``logits [B, T, V]``."""

    bare = MixtralModel


class MixtralForSequenceClassification(SequenceClassifier):
    """The bare model and a classifier of the last token: ``logits [B, num_labels]``."""

    bare = MixtralModel


def hub_parts(name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """What the hub's checkpoints call a parameter of the experts; empty for every other one."""
    on_hub = name.replace(".mlp.", ".block_sparse_moe.")
    if name.endswith(".mlp.gate.weight"):
        return (Part(on_hub, shape),)
    return expert_parts(on_hub, shape, gate_up=("w1", "w3"), down="w2")


FAMILY = Family(
    model_type="mixtral",
    read_config=MixtralConfig.read,
    tasks={
        "generate": MixtralForCausalLM,
        "features": MixtralModel,
        "classify": MixtralForSequenceClassification,
    },
    other_spelling=hub_parts,
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    head_tensors=("lm_head.weight", "score.weight"),
    extra_outputs=("router_logits", "hidden_states"),
    preset_gain=router_gain,
    presets={
        "tiny": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 512,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        "small": {
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 4096,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        # The released Mixtral-8x7B.
        "full": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    },
)
