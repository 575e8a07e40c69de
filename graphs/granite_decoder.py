"""The decoder of Granite's architectures with experts: a mixer and an MLP in each layer.

Source: Granite team 2024, "Granite 3.0 Language Models", section 3, and 2025, "Granite 4.0 Language
Models"; the experts are gated and of the top K as in Shen et al. 2024, arXiv:2408.13359, section 2.
Config and tensor names are Hugging Face's. A layer adds ``residual_multiplier`` times a mixer,
which is attention or Mamba2, and then as much of its experts and its shared MLP, which read the
same norm; each architecture says which of these it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ingot.graphs.attention import Attention, read_heads
from ingot.graphs.config import MOST_EXPERTS, MOST_POSITIONS, ConfigReader, Facts
from ingot.graphs.family import Family
from ingot.graphs.granite_multipliers import MultipliedConfig, ScaledLM, read_multipliers
from ingot.graphs.hybrid import HybridLayer, hybrid_step
from ingot.graphs.layers import HIDDEN_ACT, Decoder, Mixed, RMSNorm, SequenceClassifier, Step
from ingot.graphs.mamba2_mixer import MixerSizes
from ingot.graphs.moe import FusedMLP, SparseMoeBlock, granite_parts
from ingot.graphs.rope import RopeParameters, RotaryEmbedding

RMS_NORM_EPS = 1e-6


@dataclass(frozen=True)
class GraniteDecoderConfig(MultipliedConfig):
    """The fields of a ``config.json`` that shape the result, by their own names.

    Attributes:
        attention: of each layer, whether its mixer is attention.
        intermediate_size: of one expert; 0 without any.
        shared_intermediate_size: of the MLP that every token takes; 0 without one.
        num_local_experts: 0 without any.
        mixer: of the layers without attention; None where there is no such layer.
        rope: None where queries and keys are not rotated.
    """

    attention: tuple[bool, ...]
    intermediate_size: int
    shared_intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    attention_bias: bool
    num_local_experts: int
    num_experts_per_tok: int
    mixer: MixerSizes | None
    rope: RopeParameters | None

    @classmethod
    def read(
        cls,
        config: ConfigReader,
        attention: tuple[bool, ...],
        *,
        shared_intermediate_size: int,
        mixer: MixerSizes | None = None,
        rotated: bool = True,
        least_experts: int = 1,
    ) -> GraniteDecoderConfig:
        """The fields that all of them have; absent ones take transformers' defaults.

        Args:
            config: of which an architecture's own fields were taken before.
            attention: see the class, as for those below.
            shared_intermediate_size: 0 without.
            mixer: None without.
            rotated: whether queries and keys are rotated.
            least_experts: the fewest there may be.

        Raises:
            ConfigError: a field of another type, or one that the graph does not implement.
        """
        hidden_size = config.size("hidden_size", 4096)
        heads, key_value_heads, head_dim = read_heads(config, hidden_size, 32)
        context = config.size("max_position_embeddings", 2048, MOST_POSITIONS)
        # Read in any case: what it says must be known, also where nothing is rotated.
        rope = RopeParameters.read(config, head_dim, context)
        experts = config.size("num_local_experts", 8, MOST_EXPERTS, least=least_experts)
        chosen = config.size("num_experts_per_tok", 2, MOST_EXPERTS, least=min(experts, 1))
        if experts:
            config.at_most("num_experts_per_tok", "num_local_experts")
        else:
            config.ignore("intermediate_size")
        result = cls(
            vocab_size=config.size("vocab_size", 32000),
            hidden_size=hidden_size,
            num_hidden_layers=len(attention),
            attention=attention,
            # Without experts it says nothing.
            intermediate_size=config.size("intermediate_size", 11008) if experts else 0,
            shared_intermediate_size=shared_intermediate_size,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            hidden_act=config.choice("hidden_act", HIDDEN_ACT, "silu"),
            rms_norm_eps=config.epsilon("rms_norm_eps", RMS_NORM_EPS),
            attention_bias=config.take("attention_bias", bool, False),
            num_local_experts=experts,
            num_experts_per_tok=chosen if experts else 0,
            **read_multipliers(config),
            mixer=mixer,
            rope=rope if rotated else None,
            tie_word_embeddings=config.take("tie_word_embeddings", bool, False),
            facts=Facts(
                routers=(min(experts, 1),) * len(attention),
                experts_per_token=chosen if experts else 0,
                chunk_size=0 if mixer is None else mixer.chunk_size,
                # A recurrence has no positions, so nothing limits them.
                context_length=rope.context_length if any(attention) else None,
                switch_length=rope.switch_length if rotated else None,
                eos_token_ids=config.token_ids("eos_token_id"),
                pad_token_id=config.take("pad_token_id", int, 0),
                num_labels=config.labels(),
            ),
        )
        config.finish()
        return result


class GraniteDecoderLayer(HybridLayer):
    def __init__(self, config: GraniteDecoderConfig, index: int) -> None:
        if config.attention[index]:
            scale, turned = config.attention_multiplier, config.rope is not None
            bias = config.attention_bias
            super().__init__(Attention.of(config, scale=scale, bias=bias, turned=turned))
        else:
            assert config.mixer is not None
            super().__init__(config.mixer)
        self.has_experts = config.num_local_experts > 0
        if self.has_experts:
            self.block_sparse_moe = SparseMoeBlock(
                config.hidden_size,
                config.intermediate_size,
                config.num_local_experts,
                config.num_experts_per_tok,
                # The softmax over the chosen logits alone is the one over all, divided by its sum.
                normalise=True,
                activation=config.hidden_act,
                router="router",
            )
        self.has_shared = config.shared_intermediate_size > 0
        if self.has_shared:
            self.shared_mlp = FusedMLP(
                config.hidden_size, config.shared_intermediate_size, config.hidden_act
            )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.residual_multiplier = config.residual_multiplier

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        mixed, present, _ = self.mixer(self.input_layernorm(x), step, past)
        x = x + mixed * self.residual_multiplier
        normed = self.post_attention_layernorm(x)
        router_logits: tuple[torch.Tensor, ...] = ()
        if self.has_experts:
            y, logits = self.block_sparse_moe(normed)
            router_logits = (logits,)
            if self.has_shared:
                y = y + self.shared_mlp(normed)
        else:
            y = self.shared_mlp(normed)
        return Mixed(x + y * self.residual_multiplier, present, router_logits)


class GraniteDecoder(Decoder):
    """The bare model: ``last_hidden_state [B, T, H]`` after the final norm."""

    config: GraniteDecoderConfig

    def __init__(self, config: GraniteDecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            GraniteDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = None if config.rope is None else RotaryEmbedding(config.rope)

    def begin(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, Step]:
        """See ``Decoder.begin``; a step holds what the layers of this model read."""
        x = self.embed_tokens(input_ids) * self.config.embedding_multiplier
        kinds, rotary_emb = self.config.attention, self.rotary_emb
        return x, hybrid_step(kinds, x, attention_mask, position_ids, rotary_emb)


class GraniteDecoderForCausalLM(ScaledLM):
    """The bare model and a language-model head: ``logits [B, T, V]``."""

    bare = GraniteDecoder


class GraniteDecoderForSequenceClassification(SequenceClassifier):
    """The bare model and a classifier of the last token: ``logits [B, num_labels]``."""

    bare = GraniteDecoder


def preset_gain(name: str, config: dict[str, Any]) -> float:
    """Undo the multipliers, as training does, so that no part of the signal drowns another."""
    if "embed_tokens" in name:
        return 1 / float(config["embedding_multiplier"])
    if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj", "output_linear.weight")):
        return 1 / float(config["residual_multiplier"])
    if name.endswith("lm_head.weight"):
        return float(config["logits_scaling"])
    # A router's logits spread over several units, so that its top-k has margins; queries and keys
    # of this size make attention choose rather than average.
    return 2.0 if name.endswith(("router.weight", "q_proj.weight", "k_proj.weight")) else 1.0


def granite_family(
    model_type: str,
    read_config: Callable[[dict[str, Any]], GraniteDecoderConfig],
    presets: Mapping[str, dict[str, Any]],
    **more: Any,
) -> Family:
    """A ``Family`` of this decoder, and what else it has."""
    return Family(
        model_type=model_type,
        read_config=read_config,
        tasks={
            "generate": GraniteDecoderForCausalLM,
            "features": GraniteDecoder,
            "classify": GraniteDecoderForSequenceClassification,
        },
        other_spelling=granite_parts,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        head_tensors=("lm_head.weight", "score.weight"),
        extra_outputs=("router_logits", "hidden_states"),
        preset_gain=preset_gain,
        presets=presets,
        **more,
    )
