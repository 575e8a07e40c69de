"""Attention with its cache, and the decoder whose every layer has it.

Shape letters as in ``docs/design.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ingot.graphs.config import ModelConfig
from ingot.graphs.layers import Decoder, Layer, Mixed, RMSNorm, Step
from ingot.graphs.rope import RopeParameters, RotaryEmbedding, rotate
from ingot.graphs.state import State, key_value_states


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(ModelConfig):
    """What the config of a ``RotaryDecoder`` has beside every model's.

    Attributes:
        sliding_window: how many tokens one sees, itself included; None for all.
    """

    rms_norm_eps: float
    rope: RopeParameters
    sliding_window: int | None = None


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

    def begin(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, Step]:
        """See ``Decoder.begin``."""
        x = self.embed_tokens(input_ids)
        cos, sin = (table.to(x.dtype) for table in self.rotary_emb(position_ids))
        visible = causal_mask(attention_mask, input_ids.shape[1], self.config.sliding_window)
        return x, Step(visible, cos=cos, sin=sin)
