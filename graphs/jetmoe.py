"""JetMoE: a decoder whose attention heads and MLPs are both mixtures of experts.

Source: Shen et al. 2024, "JetMoE: Reaching Llama2 Performance with 0.1M Dollars",
arXiv:2404.07413, section 2; the mixture of attention heads is Zhang et al. 2022,
arXiv:2210.05144. Config and tensor names are Hugging Face's. In attention the query and output
projections belong to experts and are chosen by token, while keys and values are shared: every
chosen expert brings Hkv query heads, one for each key-value head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ingot.graphs.attention import RotaryConfig, RotaryDecoder, attention
from ingot.graphs.config import MOST_EXPERTS, MOST_FACTOR, MOST_POSITIONS, ConfigReader, Facts
from ingot.graphs.config_fields import ATTENTION, EXPERTS
from ingot.graphs.family import Family
from ingot.graphs.layers import (
    HIDDEN_ACT,
    CausalLM,
    Layer,
    Mixed,
    ModelOutput,
    RMSNorm,
    SequenceClassifier,
    Step,
    load_balancing_loss,
)
from ingot.graphs.moe import wide_logits
from ingot.graphs.rope import RopeParameters, rotate
from ingot.graphs.state import State, key_value_states
from ingot.plugins.experts import choose_experts
from ingot.plugins.moe_dispatch import moe_dispatch
from ingot.plugins.moe_linear import moe_linear

# The released layers take this whatever `rms_norm_eps` says; the field is the final norm's alone.
LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class JetMoeConfig(RotaryConfig):
    """The fields of a JetMoE ``config.json`` that shape the result, by their own names."""

    intermediate_size: int
    num_key_value_heads: int
    kv_channels: int
    activation_function: str
    num_local_experts: int
    num_experts_per_tok: int

    @classmethod
    def read(cls, raw: dict[str, Any]) -> JetMoeConfig:
        """From a parsed ``config.json``; absent fields take transformers' defaults.

        Raises:
            ConfigError: a field of another type, or one that the graph does not implement.
        """
        config = ConfigReader(raw, "jetmoe")
        key_value_heads = config.size("num_key_value_heads", 16, MOST_FACTOR)
        kv_channels = config.size("kv_channels", 128, MOST_FACTOR)
        experts = config.size("num_local_experts", 8, MOST_EXPERTS)
        chosen = config.size("num_experts_per_tok", 2, MOST_EXPERTS)
        config.at_most("num_experts_per_tok", "num_local_experts")
        config.must_be(
            "num_attention_heads",
            key_value_heads * chosen,
            "each chosen expert has one query head for each of num_key_value_heads",
        )
        config.must_be("head_dim", kv_channels, "it is another name of kv_channels")
        # Names of the released checkpoint, whose own code had them; its other old names are in
        # `config_fields.SYNONYMS`. transformers has the biases and the gated MLP always.
        config.must_be("glu", True, "each expert is a gated MLP")
        config.must_be("bias", True, "the experts of attention and MLP have a bias each")
        # The final norm's is rms_norm_eps, and that of the layers is fixed.
        config.ignore("layer_norm_epsilon")
        context = config.size("max_position_embeddings", 4096, MOST_POSITIONS)
        rope = RopeParameters.read(config, kv_channels, context)
        layers = config.layers(default=12)
        config.all_layers(layers, layer_types=ATTENTION, mlp_layer_types=EXPERTS)
        result = cls(
            vocab_size=config.size("vocab_size", 32000),
            hidden_size=config.size("hidden_size", 2048),
            intermediate_size=config.size("intermediate_size", 5632),
            num_hidden_layers=layers,
            num_key_value_heads=key_value_heads,
            kv_channels=kv_channels,
            activation_function=config.choice("activation_function", HIDDEN_ACT, "silu"),
            rms_norm_eps=config.epsilon("rms_norm_eps", 1e-6),
            num_local_experts=experts,
            num_experts_per_tok=chosen,
            tie_word_embeddings=config.take("tie_word_embeddings", bool, True),
            rope=rope,
            facts=Facts(
                # Of the attention, and then of the MLP.
                routers=(2,) * layers,
                experts_per_token=chosen,
                context_length=rope.context_length,
                switch_length=rope.switch_length,
                num_labels=config.labels(),
                eos_token_ids=config.token_ids("eos_token_id"),
                pad_token_id=config.take("pad_token_id", int, 0),
            ),
        )
        config.finish()
        return result


class JetMoeRouter(nn.Module):
    def __init__(self, hidden_size: int, experts: int) -> None:
        super().__init__()
        self.layer = nn.Linear(hidden_size, experts, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[N, H]`` -> router logits ``[N, E]`` float32."""
        logits: torch.Tensor = self.layer(tokens)
        return wide_logits(logits)


class JetMoeParallelExperts(nn.Module):
    """One linear layer an expert, ``weight [E, O, Kin]``."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))


class JetMoeMoA(nn.Module):
    """The experts of attention: a query and an output projection each.

    Args:
        hidden_size: H.
        width: of one expert's heads together, Hkv*D.
        experts: E.
    """

    def __init__(self, hidden_size: int, width: int, experts: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.input_linear = JetMoeParallelExperts(experts, hidden_size, width)
        self.output_linear = JetMoeParallelExperts(experts, width, hidden_size)
        self.router = JetMoeRouter(hidden_size, experts)


class JetMoeAttention(nn.Module):
    """Attention whose query and output projections are experts, over shared keys and values.

    Args:
        hidden_size: H.
        key_value_heads: Hkv, as many query heads as each chosen expert brings.
        head_size: D.
        experts: E.
        experts_per_token: K.
    """

    def __init__(
        self,
        hidden_size: int,
        key_value_heads: int,
        head_size: int,
        *,
        experts: int,
        experts_per_token: int,
    ) -> None:
        super().__init__()
        self.key_value_heads, self.head_size = key_value_heads, head_size
        self.experts_per_token = experts_per_token
        width = key_value_heads * head_size
        self.experts = JetMoeMoA(hidden_size, width, experts)
        self.kv_proj = nn.Linear(hidden_size, 2 * width, bias=False)

    def states(self, index: int) -> tuple[State, ...]:
        """The caches of the layer of that number."""
        return key_value_states(index, self.key_value_heads, self.head_size)

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        """``[B, T, H]`` and the caches -> the same, without a residual."""
        experts, size = self.experts, self.head_size
        chosen, shared = self.experts_per_token, self.key_value_heads
        batch, length, _ = x.shape
        tokens = x.flatten(0, 1)
        router_logits = experts.router(tokens)
        ids = choose_experts(router_logits, chosen)
        gates = router_logits.gather(-1, ids).softmax(-1).to(x.dtype)

        query = moe_linear(tokens, ids, experts.input_linear.weight)
        query = rotate(query.view(batch, length, -1, size), step.cos, step.sin)
        # The experts' heads come one expert after another; the K heads that share a key-value
        # head must be neighbours for grouped-query attention.
        query = query.view(batch, length, chosen, shared, size).transpose(2, 3)
        key, value = self.kv_proj(x).unflatten(-1, (-1, size)).chunk(2, dim=2)
        out, present = attention(
            query.flatten(2, 3),
            rotate(key, step.cos, step.sin),
            value,
            past,
            step.visible,
            size**-0.5,
        )
        out = out.view(batch * length, shared, chosen, size).transpose(1, 2).flatten(2)
        y = moe_linear(out, ids, experts.output_linear.weight)
        y = (gates[..., None] * y).sum(1).view_as(x) + experts.bias
        return Mixed(y, present, (router_logits,))


class JetMoeMoE(nn.Module):
    """The MLP: a mixture of gated MLPs with one bias."""

    def __init__(self, config: JetMoeConfig) -> None:
        super().__init__()
        self.config = config
        hidden, inner = config.hidden_size, config.intermediate_size
        experts = config.num_local_experts
        self.bias = nn.Parameter(torch.empty(hidden))
        self.input_linear = JetMoeParallelExperts(experts, hidden, 2 * inner)
        self.output_linear = JetMoeParallelExperts(experts, inner, hidden)
        self.router = JetMoeRouter(hidden, experts)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, T, H]`` -> ``[B, T, H]`` and router logits ``[B*T, E]`` float32."""
        tokens = x.flatten(0, 1)
        router_logits = self.router(tokens)
        y = moe_dispatch(
            tokens,
            router_logits,
            self.input_linear.weight,
            self.output_linear.weight,
            self.config.num_experts_per_tok,
            # The softmax over the chosen logits alone is the one over all, divided by its sum.
            True,
            self.config.activation_function,
        )
        return y.view_as(x) + self.bias, router_logits


class JetMoeDecoderLayer(Layer):
    def __init__(self, config: JetMoeConfig, _index: int) -> None:
        super().__init__()
        self.self_attention = JetMoeAttention(
            config.hidden_size,
            config.num_key_value_heads,
            config.kv_channels,
            experts=config.num_local_experts,
            experts_per_token=config.num_experts_per_tok,
        )
        self.mlp = JetMoeMoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, LAYER_NORM_EPS)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, LAYER_NORM_EPS)

    def states(self, index: int) -> tuple[State, ...]:
        return self.self_attention.states(index)

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        mixed, present, attention_logits = self.self_attention(self.input_layernorm(x), step, past)
        x = x + mixed
        mixed, mlp_logits = self.mlp(self.post_attention_layernorm(x))
        return Mixed(x + mixed, present, (*attention_logits, mlp_logits))


class JetMoeModel(RotaryDecoder):
    """The bare model: ``last_hidden_state [B, T, H]`` after the final norm."""

    layer = JetMoeDecoderLayer


class JetMoeForCausalLM(CausalLM):
    """The bare model and a language-model head: ``logits [B, T, V]``."""

    bare = JetMoeModel

    def aux_loss(self, out: ModelOutput, attention_mask: torch.Tensor) -> torch.Tensor:
        """The load-balancing loss of a call without a past, over both kinds of router."""
        return load_balancing_loss(
            out.router_logits, self.config.facts.experts_per_token, attention_mask
        )


class JetMoeForSequenceClassification(SequenceClassifier):
    """The bare model and a classifier of the last token: ``logits [B, num_labels]``."""

    bare = JetMoeModel


def preset_gain(name: str, config: dict[str, Any]) -> float:
    """Weights with which attention chooses, and a tied head does not repeat the last token.

    Larger gains would let every rounding error grow from layer to layer.
    """
    if "embed_tokens" in name and config.get("tie_word_embeddings", True):
        return 0.25
    # A router's logits spread over several units, so that its top-k has margins.
    if name.endswith("router.layer.weight"):
        return 2.0
    return 1.4 if name.endswith(("experts.input_linear.weight", "kv_proj.weight")) else 1.0


FAMILY = Family(
    model_type="jetmoe",
    read_config=JetMoeConfig.read,
    tasks={
        "generate": JetMoeForCausalLM,
        "features": JetMoeModel,
        "classify": JetMoeForSequenceClassification,
    },
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    head_tensors=("lm_head.weight", "score.weight"),
    extra_outputs=("router_logits", "hidden_states"),
    preset_gain=preset_gain,
    presets={
        "tiny": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 16,
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
            "num_key_value_heads": 4,
            "kv_channels": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        # The released JetMoE-8B.
        "full": {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "kv_channels": 128,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    },
)
