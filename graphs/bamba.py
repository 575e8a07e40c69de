"""Bamba: Mamba2 layers with attention in some, and a gated MLP behind each.

Source: IBM, Princeton, CMU and UIUC 2024, "Bamba: Inference-Efficient Hybrid Mamba2 Model"
(huggingface.co/blog/bamba); the mixer is Dao and Gu 2024, arXiv:2405.21060. Config and tensor names
are Hugging Face's. Of the heads of attention one half is rotated by the positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ingot.graphs.attention import Attention, read_heads
from ingot.graphs.config import (
    MOST_POSITIONS,
    ConfigError,
    ConfigReader,
    Facts,
    ModelConfig,
)
from ingot.graphs.family import Family
from ingot.graphs.hybrid import HybridLayer, hybrid_step
from ingot.graphs.layers import (
    HIDDEN_ACT,
    CausalLM,
    Decoder,
    GatedMLP,
    Mixed,
    RMSNorm,
    Step,
)
from ingot.graphs.mamba2_mixer import (
    MixerSizes,
    draw,
    read_attention_layers,
    read_mixer,
)
from ingot.graphs.rope import RopeParameters, RotaryEmbedding
from ingot.plugins.errors import shown

# transformers rotates so much of each head whatever the config says.
ROTATED = 0.5


@dataclass(frozen=True)
class BambaConfig(ModelConfig):
    """The fields of a Bamba ``config.json`` that shape the result, by their own names.

    Attributes:
        attention: of each layer, whether its mixer is attention.
    """

    attention: tuple[bool, ...]
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    mixer: MixerSizes
    rope: RopeParameters

    @classmethod
    def read(cls, raw: dict[str, Any]) -> BambaConfig:
        """From a parsed ``config.json``; absent fields take transformers' defaults.

        Raises:
            ConfigError: a field of another type, or one that the graph does not implement.
        """
        config = ConfigReader(raw, "bamba")
        hidden_size = config.size("hidden_size", 4096)
        heads, key_value_heads, head_dim = read_heads(config, hidden_size, 32, 8)
        layers = config.layers(default=32)
        attention = _attention_layers(config, layers)
        eps = config.epsilon("rms_norm_eps", 1e-5)
        mixer = read_mixer(config, hidden_size, eps)
        context = config.size("max_position_embeddings", 262144, MOST_POSITIONS)
        rope = RopeParameters.read(config, head_dim, context, share=ROTATED)
        # An older name of which half of a head is rotated.
        config.must_be("attn_rotary_emb", rope.dim, f"{ROTATED:g} of a head is rotated")
        result = cls(
            vocab_size=config.size("vocab_size", 128000),
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            attention=attention,
            intermediate_size=config.size("intermediate_size", 14336),
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            hidden_act=config.choice("hidden_act", HIDDEN_ACT, "silu"),
            rms_norm_eps=eps,
            attention_bias=config.take("attention_bias", bool, False),
            mlp_bias=config.take("mlp_bias", bool, False),
            mixer=mixer,
            rope=rope,
            tie_word_embeddings=config.take("tie_word_embeddings", bool, False),
            facts=Facts(
                routers=(0,) * layers,
                chunk_size=0 if all(attention) else mixer.chunk_size,
                # A recurrence has no positions, so nothing limits them.
                context_length=rope.context_length if any(attention) else None,
                switch_length=rope.switch_length if any(attention) else None,
                eos_token_ids=config.token_ids("eos_token_id"),
                pad_token_id=config.take("pad_token_id", int, 0),
            ),
        )
        config.finish()
        return result


def _attention_layers(config: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Those of ``attn_layer_indices``; lists of what each layer is must say the same."""
    indices = config.take("attn_layer_indices", list, [])
    known = range(layers)
    if any(type(index) is not int or index not in known for index in indices):
        raise ConfigError(
            f"config.json: attn_layer_indices is {shown(indices)}; it must be numbers of the "
            f"{layers} layers."
        )
    attention = tuple(index in indices for index in known)
    listed = read_attention_layers(config, layers)
    if (config.taken["layer_types"] or config.taken["layers_block_type"]) and listed != attention:
        raise ConfigError(
            "config.json: attn_layer_indices and layer_types differ in which layers are of "
            "attention."
        )
    return attention


class BambaDecoderLayer(HybridLayer):
    def __init__(self, config: BambaConfig, index: int) -> None:
        if config.attention[index]:
            super().__init__(Attention.of(config, bias=config.attention_bias))
        else:
            super().__init__(config.mixer)
        self.feed_forward = GatedMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, bias=config.mlp_bias
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        mixed, present, _ = self.mixer(self.input_layernorm(x), step, past)
        x = x + mixed
        return Mixed(x + self.feed_forward(self.pre_ff_layernorm(x)), present)


class BambaModel(Decoder):
    """The bare model: ``last_hidden_state [B, T, H]`` after the final norm."""

    config: BambaConfig

    def __init__(self, config: BambaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            BambaDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope)

    def begin(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, Step]:
        """See ``Decoder.begin``; a step holds what the layers of this model read."""
        x = self.embed_tokens(input_ids)
        kinds, rotary_emb = self.config.attention, self.rotary_emb
        return x, hybrid_step(kinds, x, attention_mask, position_ids, rotary_emb)

    def end(
        self, outputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """See ``Decoder.end``."""
        x = self.final_layernorm(outputs[-1])
        return x, (*outputs[:-1], x)


class BambaForCausalLM(CausalLM):
    """The bare model and a language-model head: ``logits [B, T, V]``."""

    bare = BambaModel


_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "attn_layer_indices": [2],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_chunk_size": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}

FAMILY = Family(
    model_type="bamba",
    read_config=BambaConfig.read,
    tasks={"generate": BambaForCausalLM, "features": BambaModel},
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    head_tensors=("lm_head.weight",),
    keep_in_fp32=("A_log", "D", "dt_bias"),
    draw=draw,
    presets={
        "tiny": _TINY,
        "small": {
            **_TINY,
            "vocab_size": 50304,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "attn_layer_indices": [3],
            "num_attention_heads": 8,
            "mamba_n_heads": 16,
            "mamba_d_state": 64,
            "mamba_d_head": 64,
            "mamba_chunk_size": 64,
            "max_position_embeddings": 4096,
        },
        # The released Bamba-9B.
        "full": {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "attn_layer_indices": [9, 18, 27],
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "mamba_n_heads": 128,
            "mamba_n_groups": 1,
            "mamba_d_state": 128,
            "mamba_d_head": 64,
            "mamba_chunk_size": 256,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 0,
        },
    },
)
