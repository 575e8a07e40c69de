"""OLMo 2: a dense decoder whose norms are behind attention and MLP, not before them.

Source: OLMo team 2024, "2 OLMo 2 Furious", arXiv:2501.00656, section 2; config and tensor names are
Hugging Face's. Queries and keys are normed over all heads of a token together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ingot.graphs.attention import GroupedConfig, PostNormLayer, RotaryDecoder, rotary_facts
from ingot.graphs.config import ConfigReader
from ingot.graphs.config_fields import ATTENTION, DENSE
from ingot.graphs.family import Family
from ingot.graphs.layers import (
    CausalLM,
    GatedMLP,
    SequenceClassifier,
)


@dataclass(frozen=True)
class Olmo2Config(GroupedConfig):
    """The fields of such a ``config.json`` that shape the result, by their own names."""

    intermediate_size: int
    attention_bias: bool

    @classmethod
    def read(cls, raw: dict[str, Any]) -> Olmo2Config:
        """From a parsed ``config.json``; absent fields take transformers' defaults.

        Raises:
            ConfigError: a field of another type, or one that the graph does not implement.
        """
        config = ConfigReader(raw, "olmo2")
        common = cls.common(
            config,
            vocab_size=50304,
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
        )
        layers = common["num_hidden_layers"]
        config.all_layers(layers, layer_types=ATTENTION, mlp_layer_types=DENSE)
        result = cls(
            **common,
            intermediate_size=config.size("intermediate_size", 11008),
            attention_bias=config.take("attention_bias", bool, False),
            facts=rotary_facts(config, common["rope"], (0,) * layers, num_labels=config.labels()),
        )
        config.finish()
        return result


class Olmo2DecoderLayer(PostNormLayer):
    def __init__(self, config: Olmo2Config, _index: int) -> None:
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        eps = config.rms_norm_eps
        super().__init__(config, mlp, bias=config.attention_bias, normed="all", norm_eps=eps)


class Olmo2Model(RotaryDecoder):
    """The bare model: ``last_hidden_state [B, T, H]`` after the final norm."""

    layer = Olmo2DecoderLayer


class Olmo2ForCausalLM(CausalLM):
    """The bare model and a language-model head: ``logits [B, T, V]``."""

    bare = Olmo2Model


class Olmo2ForSequenceClassification(SequenceClassifier):
    """The bare model and a classifier of the last token: ``logits [B, num_labels]``."""

    bare = Olmo2Model


FAMILY = Family(
    model_type="olmo2",
    read_config=Olmo2Config.read,
    tasks={
        "generate": Olmo2ForCausalLM,
        "features": Olmo2Model,
        "classify": Olmo2ForSequenceClassification,
    },
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    head_tensors=("lm_head.weight", "score.weight"),
    presets={
        "tiny": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
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
            "max_position_embeddings": 4096,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        # The released OLMo-2-1124-7B.
        "full": {
            "vocab_size": 100352,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-6,
            "eos_token_id": 100257,
            "pad_token_id": 100277,
        },
    },
)
