"""A test-only architecture that mixes kinds of layers: scans and attention, with experts.

It is what a hybrid asks of the product, at the smallest: layers of two kinds in turn, whose states
grow or do not, and each with another number of routers. A layer is a token mixer and any number of
mixtures of experts, each with a residual. The graph is put together from what real architectures
are made of; tests register it for themselves, and the product has no branch for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from ingot.graphs import names
from ingot.graphs.attention import Attention, causal_mask
from ingot.graphs.config import ConfigReader, Facts, ModelConfig
from ingot.graphs.family import Family
from ingot.graphs.layers import CausalLM, Decoder, Layer, Mixed, RMSNorm, Step
from ingot.graphs.mamba2_mixer import Mamba2Mixer, MixerSizes, draw
from ingot.graphs.rope import RopeParameters, RotaryEmbedding
from ingot.graphs.state import State
from ingot.plugins.moe_dispatch import moe_dispatch

EPS = 1e-5


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    mixer: MixerSizes
    rope: RopeParameters

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def read(cls, raw: dict[str, Any]) -> ToyConfig:
        config = ConfigReader(raw, "toy_hybrid")
        layer_types = config.take("layer_types", list, [])
        routers = config.take("routers", list, [])
        hidden_size = config.size("hidden_size", 32)
        heads = config.size("num_attention_heads", 4)
        config.size("num_experts", 4)
        config.size("num_experts_per_tok", 2)
        config.multiple("hidden_size", of="num_attention_heads")
        config.at_most("num_experts_per_tok", "num_experts")
        rope = RopeParameters.read(
            config, hidden_size // heads, config.size("max_position_embeddings", 512)
        )
        mixer = MixerSizes(
            hidden_size=hidden_size,
            heads=config.size("mamba_heads", 4),
            head_size=config.size("mamba_head_dim", 16),
            groups=config.size("mamba_groups", 2),
            state_size=config.size("mamba_state_size", 8),
            conv_width=config.size("mamba_conv", 4),
            chunk_size=config.size("mamba_chunk_size", 8),
            activation="silu",
            bias=False,
            conv_bias=True,
            time_step_limit=(0.0, float("inf")),
            norm_eps=EPS,
        )
        result = cls(
            vocab_size=config.size("vocab_size", 512),
            hidden_size=hidden_size,
            num_hidden_layers=len(layer_types),
            tie_word_embeddings=config.take("tie_word_embeddings", bool, False),
            layer_types=tuple(layer_types),
            num_attention_heads=heads,
            num_key_value_heads=config.size("num_key_value_heads", 2),
            intermediate_size=config.size("intermediate_size", 16),
            num_experts=config.taken["num_experts"],
            num_experts_per_tok=config.taken["num_experts_per_tok"],
            mixer=mixer,
            rope=rope,
            facts=Facts(
                routers=tuple(routers),
                experts_per_token=config.taken["num_experts_per_tok"],
                chunk_size=mixer.chunk_size,
                context_length=rope.context_length,
                eos_token_ids=config.token_ids("eos_token_id"),
                pad_token_id=config.take("pad_token_id", int, 0),
            ),
        )
        config.finish()
        return result


class ToyExperts(nn.Module):
    """A pre-norm mixture of gated MLPs."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        e, h, i = config.num_experts, config.hidden_size, config.intermediate_size
        self.top_k = config.num_experts_per_tok
        self.norm = RMSNorm(h, EPS)
        self.router = nn.Linear(h, e, bias=False)
        self.gate_up = nn.Parameter(torch.empty(e, 2 * i, h))
        self.down = nn.Parameter(torch.empty(e, h, i))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.norm(x).flatten(0, 1)
        logits = self.router(tokens)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        y = moe_dispatch(tokens, logits, self.gate_up, self.down, self.top_k, True, "silu")
        return y.view_as(x), logits


class ToyLayer(Layer):
    def __init__(self, config: ToyConfig, index: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, EPS)
        self.mixer: Mamba2Mixer | Attention
        if config.layer_types[index] == "scan":
            self.mixer = Mamba2Mixer(config.mixer)
        else:
            self.mixer = Attention(
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
            )
        count = config.facts.routers[index]
        self.experts = nn.ModuleList(ToyExperts(config) for _ in range(count))

    def states(self, index: int) -> tuple[State, ...]:
        return self.mixer.states(index)

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        mixed, present, _ = self.mixer(self.norm(x), step, past)
        x = x + mixed
        router_logits: tuple[torch.Tensor, ...] = ()
        for experts in self.experts:
            mixed, logits = experts(x)
            x = x + mixed
            router_logits += (logits,)
        return Mixed(x, present, router_logits)


class ToyModel(Decoder):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ToyLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, EPS)
        self.rotary_emb = RotaryEmbedding(config.rope)

    def begin(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, Step]:
        x = self.embed_tokens(input_ids)
        cos, sin = (table.to(x.dtype) for table in self.rotary_emb(position_ids))
        tokens = input_ids.shape[1]
        # The caches need the past's mask, the scans that of the new tokens.
        real = attention_mask[:, -tokens:].to(x.dtype)
        return x, Step(causal_mask(attention_mask, tokens), real, cos, sin)


class ToyForCausalLM(CausalLM):
    bare = ToyModel


def preset_gain(name: str, _config: dict[str, Any]) -> float:
    return 2.0 if name.endswith("router.weight") else 1.0


FAMILY = Family(
    model_type="toy_hybrid",
    read_config=ToyConfig.read,
    tasks={"generate": ToyForCausalLM, "features": ToyModel},
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    head_tensors=("lm_head.weight",),
    extra_outputs=("router_logits", "hidden_states"),
    keep_in_fp32=("A_log", "D", "dt_bias"),
    draw=draw,
    preset_gain=preset_gain,
    presets={
        "tiny": {
            "layer_types": ["scan", "attention", "scan", "attention"],
            "routers": [1, 2, 0, 1],
            "eos_token_id": None,
            "pad_token_id": 0,
        }
    },
)


@contextmanager
def registered() -> Iterator[Family]:
    """The toy among the architectures that the product knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ingot.graphs.toy_hybrid", sys.modules[__name__])
        patch.setattr(names, "FAMILIES", (*names.FAMILIES, FAMILY.model_type))
        yield FAMILY
