"""Attention with its cache, and the decoder whose every layer has it.

Shape letters as in ``docs/design.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ingot.graphs.config import MOST_FACTOR, MOST_POSITIONS, ConfigReader, Facts, ModelConfig
from ingot.graphs.layers import HIDDEN_ACT, Decoder, Layer, Mixed, RMSNorm, Step
from ingot.graphs.rope import RopeParameters, RotaryEmbedding, rotate
from ingot.graphs.state import State, key_value_states


@dataclass(frozen=True)
class RotaryConfig(ModelConfig):
    """What the config of a ``RotaryDecoder`` has beside every model's."""

    rms_norm_eps: float
    rope: RopeParameters


@dataclass(frozen=True)
class GroupedConfig(RotaryConfig):
    """The fields that every config with ``Attention`` in all layers has, by their own names."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str

    @staticmethod
    def common(
        config: ConfigReader,
        *,
        vocab_size: int,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int,
        rms_norm_eps: float,
        rope_theta: float = 10000.0,
    ) -> dict[str, Any]:
        """Those fields by name, but for ``facts``.

        Args:
            config: of the model.
            vocab_size: transformers' default, as are those below.
            hidden_size: see ``vocab_size``.
            num_hidden_layers: see ``vocab_size``.
            num_attention_heads: see ``vocab_size``.
            num_key_value_heads: see ``vocab_size``; None for as many as heads.
            max_position_embeddings: see ``vocab_size``.
            rms_norm_eps: see ``vocab_size``.
            rope_theta: see ``vocab_size``.

        Raises:
            ConfigError: a field of another type, or one that the graph does not implement.
        """
        hidden = config.size("hidden_size", hidden_size)
        heads, shared, size = read_heads(config, hidden, num_attention_heads, num_key_value_heads)
        context = config.size("max_position_embeddings", max_position_embeddings, MOST_POSITIONS)
        return {
            "vocab_size": config.size("vocab_size", vocab_size),
            "hidden_size": hidden,
            "num_hidden_layers": config.layers(default=num_hidden_layers),
            "num_attention_heads": heads,
            "num_key_value_heads": shared,
            "head_dim": size,
            "hidden_act": config.choice("hidden_act", HIDDEN_ACT, "silu"),
            "rms_norm_eps": config.epsilon("rms_norm_eps", rms_norm_eps),
            "rope": RopeParameters.read(config, size, context, rope_theta=rope_theta),
            "tie_word_embeddings": config.take("tie_word_embeddings", bool, False),
        }


def read_heads(
    config: ConfigReader, hidden_size: int, heads: int, key_value_heads: int | None = None
) -> tuple[int, int, int]:
    """``num_attention_heads``, ``num_key_value_heads`` and ``head_dim``.

    Args:
        config: of the model.
        hidden_size: H, which heads share where the config does not say their size.
        heads: transformers' default.
        key_value_heads: transformers' default of a config that does not have the field; with null
            in it, or None here, there are as many as heads.

    Raises:
        ConfigError: numbers that do not go together.
    """
    heads = config.size("num_attention_heads", heads, MOST_FACTOR)
    if key_value_heads is None or "num_key_value_heads" in config.raw:
        key_value_heads = heads
    key_value_heads = config.size("num_key_value_heads", key_value_heads, MOST_FACTOR)
    if config.raw.get("head_dim") is None:
        config.multiple("hidden_size", of="num_attention_heads")
    config.multiple("num_attention_heads", of="num_key_value_heads")
    return heads, key_value_heads, config.size("head_dim", hidden_size // heads, MOST_FACTOR)


def rotary_facts(
    config: ConfigReader,
    rope: RopeParameters,
    routers: tuple[int, ...],
    experts_per_token: int = 0,
    num_labels: int = 0,
) -> Facts:
    """What is known of a model whose every layer attends to rotated queries and keys.

    Args:
        config: of the model.
        rope: how they are rotated.
        routers: see ``Facts``, as for those below.
        experts_per_token: 0 without experts.
        num_labels: of a classifier, where the family has one.
    """
    return Facts(
        routers=routers,
        experts_per_token=experts_per_token,
        context_length=rope.context_length,
        switch_length=rope.switch_length,
        num_labels=num_labels,
        eos_token_ids=config.token_ids("eos_token_id"),
        pad_token_id=config.take("pad_token_id", int, 0),
    )


def causal_mask(
    attention_mask: torch.Tensor, tokens: int, window: int | None = None
) -> torch.Tensor:
    """Which keys each new token may see.

    A token sees the unmasked keys up to itself, or the last of them that a window holds. It always
    sees itself, also where it is padding: a row without any key would be NaN, and poison later
    layers through the cache.

    Args:
        attention_mask: ``[B, S]`` int64, 1 for real tokens, 0 for padding, past included.
        tokens: T, how many of the S are new.
        window: how many it sees at most, itself included; padding is none of them.

    Returns:
        ``[B, 1, T, S]`` bool.
    """
    total = attention_mask.shape[1]
    # Counted from the end, so that the graph needs S and T only and never the size of a cache
    # input, which may have spare room where past and present share one buffer.
    key_from_end = torch.arange(total, device=attention_mask.device).flip(0)
    query_from_end = torch.arange(tokens, device=attention_mask.device).flip(0)
    visible = key_from_end[None, :] >= query_from_end[:, None]
    itself = key_from_end[None, :] == query_from_end[:, None]
    visible = visible & (attention_mask[:, None, None, :] != 0)
    if window is not None:
        place = attention_mask.cumsum(-1)
        behind = place[:, -tokens:, None] - place[:, None, :]
        visible = visible & (behind < window)[:, None]
    return visible | itself


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past: tuple[torch.Tensor, ...],
    mask: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Grouped-query attention over the cache and the new tokens.

    Args:
        query: ``[B, T, Hq, D]``.
        key: ``[B, T, Hkv, D]``, as is ``value``.
        past: the caches of key and value, ``[B, Hkv, P, D]`` each; none for a call that stands
            alone.
        mask: ``[B, 1, T, S]`` bool.
        scale: factor on the scores.

    Returns:
        ``[B, T, Hq*D]`` and the new caches ``[B, Hkv, S, D]``.
    """
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    if past:
        past_key, past_value = past
        key = torch.cat((past_key, key), dim=2)
        value = torch.cat((past_value, value), dim=2)
    # The torch exporter refuses grouped queries where the head counts are equal.
    grouped = query.shape[2] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key, value, attn_mask=mask, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(2), (key, value)


class HasHeads(Protocol):
    """A config with the sizes of attention."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class Attention(nn.Module):
    """Grouped-query attention between linear projections.

    Source: Ainslie et al. 2023, arXiv:2305.13245; norms of queries and keys are Henry et al. 2020,
    arXiv:2010.04245, with learned factors.

    Args:
        hidden_size: H.
        heads: Hq.
        key_value_heads: Hkv.
        head_size: D.
        scale: factor on the scores; by default D to the power of -1/2.
        bias: whether the projections have one.
        turned: whether queries and keys are rotated by their positions.
        normed: whether queries and keys are normed before, ``"head"`` each head by itself and
            ``"all"`` all heads of a token together; None for neither.
        norm_eps: of those norms.
        clip: largest magnitude of queries, keys and values; None without one.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        key_value_heads: int,
        head_size: int,
        *,
        scale: float | None = None,
        bias: bool = False,
        turned: bool = True,
        normed: Literal["head", "all"] | None = None,
        norm_eps: float = 0.0,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        self.key_value_heads, self.head_size = key_value_heads, head_size
        self.scale = head_size**-0.5 if scale is None else scale
        self.turned, self.normed, self.clip = turned, normed, clip
        width, key_width = heads * head_size, key_value_heads * head_size
        self.q_proj = nn.Linear(hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(hidden_size, key_width, bias=bias)
        self.v_proj = nn.Linear(hidden_size, key_width, bias=bias)
        self.o_proj = nn.Linear(width, hidden_size, bias=bias)
        if normed is not None:
            by_head = normed == "head"
            self.q_norm = RMSNorm(head_size if by_head else width, norm_eps)
            self.k_norm = RMSNorm(head_size if by_head else key_width, norm_eps)

    @classmethod
    def of(cls, config: HasHeads, **more: Any) -> Attention:
        """Of a config's sizes, and what else ``Attention`` is told."""
        return cls(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            **more,
        )

    def states(self, index: int) -> tuple[State, ...]:
        """The caches of the layer of that number."""
        return key_value_states(index, self.key_value_heads, self.head_size)

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        """``[B, T, H]`` and the caches -> the same, without a residual."""
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.normed == "all":
            query, key = self.q_norm(query), self.k_norm(key)
        clip = self.clip
        if clip is not None:
            query, key, value = (part.clamp(-clip, clip) for part in (query, key, value))
        heads = (-1, self.head_size)
        query, key, value = (part.unflatten(-1, heads) for part in (query, key, value))
        if self.normed == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        if self.turned:
            query, key = (rotate(part, step.cos, step.sin) for part in (query, key))
        out, present = attention(query, key, value, past, step.visible, self.scale)
        return Mixed(self.o_proj(out), present)


def read_by(mlp: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """What an MLP makes of ``x [B, T, H]``, and the logits of its router, if it has one."""
    made = mlp(x)
    return (made[0], made[1:]) if isinstance(made, tuple) else (made, ())


class PreNormLayer(Layer):
    """Attention and then an MLP or experts, each behind a norm and beside a residual.

    Args:
        config: of the model.
        mlp: gives ``[B, T, H]``, or that and its router's logits.
        attention: what ``Attention`` is told beside sizes.
    """

    def __init__(self, config: GroupedConfig, mlp: nn.Module, **attention: Any) -> None:
        super().__init__()
        self.self_attn = Attention.of(config, **attention)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def states(self, index: int) -> tuple[State, ...]:
        """See ``Layer.states``."""
        return self.self_attn.states(index)

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        """See ``Layer.forward``."""
        mixed, present, _ = self.self_attn(self.input_layernorm(x), step, past)
        x = x + mixed
        y, router_logits = read_by(self.mlp, self.post_attention_layernorm(x))
        return Mixed(x + y, present, router_logits)


class PostNormLayer(Layer):
    """The same with a norm behind attention and MLP rather than before."""

    def __init__(self, config: GroupedConfig, mlp: nn.Module, **attention: Any) -> None:
        super().__init__()
        self.self_attn = Attention.of(config, **attention)
        self.mlp = mlp
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def states(self, index: int) -> tuple[State, ...]:
        """See ``Layer.states``."""
        return self.self_attn.states(index)

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        """See ``Layer.forward``."""
        mixed, present, _ = self.self_attn(x, step, past)
        x = x + self.post_attention_layernorm(mixed)
        y, router_logits = read_by(self.mlp, x)
        return Mixed(x + self.post_feedforward_layernorm(y), present, router_logits)


class RotaryDecoder(Decoder):
    """A bare model whose every layer attends to rotated queries and keys.

    A subclass names the class of its layers, which is given the config and the layer's number.
    """

    layer: Callable[[Any, int], Layer]
    config: RotaryConfig

    def __init__(self, config: RotaryConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            type(self).layer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope)

    @property
    def window(self) -> int | None:
        """How many tokens one sees at most, itself included; None for all."""
        return None

    def begin(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, Step]:
        """See ``Decoder.begin``."""
        x = self.embed_tokens(input_ids)
        cos, sin = (table.to(x.dtype) for table in self.rotary_emb(position_ids))
        visible = causal_mask(attention_mask, input_ids.shape[1], self.window)
        return x, Step(visible, cos=cos, sin=sin)
