"""OLMoE: a pre-norm decoder whose MLP is a mixture of experts.

Source: Muennighoff et al. 2024, "OLMoE: Open Mixture-of-Experts Language Models",
arXiv:2409.02060, section 2 and appendix B; config and tensor names are Hugging Face's. What sets
it apart from Llama: RMS norms over the whole query and key projections, an optional clip of
queries, keys and values, and top-k weights that are not renormalised unless the config says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ingot.graphs.checkpoint import Part
from ingot.graphs.config import (
    MOST_EXPERTS,
    MOST_FACTOR,
    MOST_POSITIONS,
    ConfigReader,
    Facts,
    ModelConfig,
)
from ingot.graphs.config_fields import ATTENTION, EXPERTS
from ingot.graphs.family import Family
from ingot.graphs.layers import (
    HIDDEN_ACT,
    CausalLM,
    Decoder,
    Layer,
    Mixed,
    RMSNorm,
    Step,
    attention,
    causal_mask,
)
from ingot.graphs.rope import RopeParameters, RotaryEmbedding, rotate
from ingot.graphs.state import State, key_value_states
from ingot.plugins.moe_dispatch import moe_dispatch


@dataclass(frozen=True)
class OlmoeConfig(ModelConfig):
    """The fields of an OLMoE ``config.json`` that shape the result, by their own names."""

    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    hidden_act: str
    rms_norm_eps: float
    attention_bias: bool
    clip_qkv: float | None
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    rope: RopeParameters

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def read(cls, raw: dict[str, Any]) -> OlmoeConfig:
        """From a parsed ``config.json``; absent fields take transformers' defaults.

        Raises:
            ConfigError: a field of another type, or one that the graph does not implement.
        """
        config = ConfigReader(raw, "olmoe")
        hidden_size = config.size("hidden_size", 2048)
        heads = config.size("num_attention_heads", 16, MOST_FACTOR)
        key_value_heads = config.size("num_key_value_heads", heads, MOST_FACTOR)
        experts = config.size("num_local_experts", 64, MOST_EXPERTS)
        experts = config.size("num_experts", experts, MOST_EXPERTS)
        config.must_be("num_local_experts", experts, "it is another name of num_experts")
        chosen = config.size("num_experts_per_tok", 8, MOST_EXPERTS)
        config.multiple("hidden_size", of="num_attention_heads")
        config.multiple("num_attention_heads", of="num_key_value_heads")
        config.at_most("num_experts_per_tok", "num_experts")
        config.must_be("head_dim", hidden_size // heads, "q_norm spans hidden_size")
        context = config.size("max_position_embeddings", 4096, MOST_POSITIONS)
        rope = RopeParameters.read(config, hidden_size // heads, context)
        layers = config.layers(default=16)
        config.all_layers(layers, layer_types=ATTENTION, mlp_layer_types=EXPERTS)
        result = cls(
            vocab_size=config.size("vocab_size", 50304),
            hidden_size=hidden_size,
            intermediate_size=config.size("intermediate_size", 2048),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            hidden_act=config.choice("hidden_act", HIDDEN_ACT, "silu"),
            rms_norm_eps=config.epsilon("rms_norm_eps", 1e-5),
            attention_bias=config.take("attention_bias", bool, False),
            clip_qkv=config.optional_float("clip_qkv"),
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


class OlmoeAttention(nn.Module):
    """Grouped-query attention with norms over all heads of the queries and of the keys.

    Args:
        hidden_size: H.
        heads: Hq.
        key_value_heads: Hkv.
        head_size: D.
        norm_eps: of the norms.
        bias: whether the projections have one.
        clip: largest magnitude of queries, keys and values; None without one.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        key_value_heads: int,
        head_size: int,
        *,
        norm_eps: float,
        bias: bool = False,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        self.key_value_heads, self.head_size, self.clip = key_value_heads, head_size, clip
        width, key_width = heads * head_size, key_value_heads * head_size
        self.q_proj = nn.Linear(hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(hidden_size, key_width, bias=bias)
        self.v_proj = nn.Linear(hidden_size, key_width, bias=bias)
        self.o_proj = nn.Linear(width, hidden_size, bias=bias)
        self.q_norm = RMSNorm(width, norm_eps)
        self.k_norm = RMSNorm(key_width, norm_eps)

    def states(self, index: int) -> tuple[State, ...]:
        """The caches of the layer of that number."""
        return key_value_states(index, self.key_value_heads, self.head_size)

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        """``[B, T, H]`` and the caches -> the same, without a residual."""
        query = self.q_norm(self.q_proj(x))
        key = self.k_norm(self.k_proj(x))
        value = self.v_proj(x)
        clip = self.clip
        if clip is not None:
            query, key, value = (part.clamp(-clip, clip) for part in (query, key, value))
        heads = (-1, self.head_size)
        out, present = attention(
            rotate(query.unflatten(-1, heads), step.cos, step.sin),
            rotate(key.unflatten(-1, heads), step.cos, step.sin),
            value.unflatten(-1, heads),
            past,
            step.visible,
            self.head_size**-0.5,
        )
        return Mixed(self.o_proj(out), present)


class OlmoeExperts(nn.Module):
    """The experts' weights, fused: rows of gate, then of up."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        e, h, i = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, h))
        self.down_proj = nn.Parameter(torch.empty(e, h, i))


class OlmoeSparseMoeBlock(nn.Module):
    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = OlmoeExperts(config)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, T, H]`` -> ``[B, T, H]`` and router logits ``[B*T, E]`` float32."""
        tokens = x.flatten(0, 1)
        logits = self.gate(tokens)
        router_logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        y = moe_dispatch(
            tokens,
            router_logits,
            self.experts.gate_up_proj,
            self.experts.down_proj,
            self.config.num_experts_per_tok,
            self.config.norm_topk_prob,
            self.config.hidden_act,
        )
        return y.view_as(x), router_logits


class OlmoeDecoderLayer(Layer):
    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.self_attn = OlmoeAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            norm_eps=config.rms_norm_eps,
            bias=config.attention_bias,
            clip=config.clip_qkv,
        )
        self.mlp = OlmoeSparseMoeBlock(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def states(self, index: int) -> tuple[State, ...]:
        return self.self_attn.states(index)

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        mixed, present, _ = self.self_attn(self.input_layernorm(x), step, past)
        x = x + mixed
        mixed, router_logits = self.mlp(self.post_attention_layernorm(x))
        return Mixed(x + mixed, present, (router_logits,))


class OlmoeModel(Decoder):
    """The bare model: ``last_hidden_state [B, T, H]`` after the final norm."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            OlmoeDecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope)

    def begin(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, Step]:
        x = self.embed_tokens(input_ids)
        cos, sin = (table.to(x.dtype) for table in self.rotary_emb(position_ids))
        return x, Step(causal_mask(attention_mask, input_ids.shape[1]), cos=cos, sin=sin)


class OlmoeForCausalLM(CausalLM):
    """The bare model and a language-model head: ``logits [B, T, V]``."""

    bare = OlmoeModel


def expert_parts(name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """The per-expert spelling of a fused expert parameter; empty for every other parameter.

    Both spellings are on the hub: ``mlp.experts.{e}.gate_proj.weight`` and so on from
    transformers 4, and the fused ``mlp.experts.gate_up_proj`` that transformers 5 can write.
    """
    owner, _, leaf = name.rpartition(".")
    if leaf == "gate_up_proj":
        half = (shape[1] // 2, shape[2])
        return tuple(
            Part(f"{owner}.{expert}.{which}.weight", half)
            for expert in range(shape[0])
            for which in ("gate_proj", "up_proj")
        )
    if leaf == "down_proj" and owner.endswith("experts"):
        return tuple(Part(f"{owner}.{e}.down_proj.weight", shape[1:]) for e in range(shape[0]))
    return ()


def preset_gain(name: str, _config: dict[str, Any]) -> float:
    """A router's logits spread over several units, so that its top-k has margins."""
    return 2.0 if name.endswith("gate.weight") else 1.0


FAMILY = Family(
    model_type="olmoe",
    read_config=OlmoeConfig.read,
    tasks={"generate": OlmoeForCausalLM, "features": OlmoeModel},
    other_spelling=expert_parts,
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    head_tensors=("lm_head.weight",),
    tokenizer_class="GPTNeoXTokenizer",
    extra_outputs=("router_logits", "hidden_states"),
    preset_gain=preset_gain,
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
