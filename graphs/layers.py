"""Pieces that several architectures share. Shape letters as in ``docs/design.md``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ingot.graphs.state import State
from ingot.plugins.experts import route

# Hugging Face's `hidden_act` names -> the names the custom operators use.
HIDDEN_ACT = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class ModelOutput(NamedTuple):
    """What every graph returns.

    Attributes:
        main: ``logits [B, T, V]``, ``last_hidden_state [B, T, H]`` of a bare model, or
            ``logits [B, num_labels]`` of a classifier.
        present: the new states, in the order of the model's ``states``.
        router_logits: per router ``[B*T, E]`` float32.
        hidden_states: each ``[B, T, H]``, as transformers orders them: the embedding, every layer's
            output but the last, and the final norm's output.
    """

    main: torch.Tensor
    present: tuple[torch.Tensor, ...]
    router_logits: tuple[torch.Tensor, ...] = ()
    hidden_states: tuple[torch.Tensor, ...] = ()


class CausalLM(nn.Module):
    """A bare model with a language-model head: ``logits [B, T, V]``.

    A subclass names the class of the bare model, and where checkpoints keep it and its embedding.
    """

    main_output = "logits"
    bare: type[nn.Module]
    base_model_prefix = "model"
    embeddings = "embed_tokens"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        setattr(self, self.base_model_prefix, self.bare(config))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def states(self) -> tuple[State, ...]:
        """Those of the bare model."""
        result: tuple[State, ...] = getattr(self, self.base_model_prefix).states
        return result

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: tuple[torch.Tensor, ...],
    ) -> ModelOutput:
        """As the bare model's ``forward``, with logits for every new token."""
        model = getattr(self, self.base_model_prefix)
        out: ModelOutput = model(input_ids, attention_mask, position_ids, past)
        tied = self.config.tie_word_embeddings
        head = getattr(model, self.embeddings) if tied else self.lm_head
        return out._replace(main=F.linear(out.main, head.weight))


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467), statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` -> the same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def causal_mask(attention_mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Which keys each new token may see.

    A token sees the unmasked keys up to itself. It always sees itself, also where it is padding:
    a row without any key would be NaN, and poison later layers through the cache.

    Args:
        attention_mask: ``[B, S]`` int64, 1 for real tokens, 0 for padding, past included.
        tokens: T, how many of the S are new.

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
    return (visible & (attention_mask[:, None, None, :] != 0)) | itself


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
    mask: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Grouped-query attention over the cache and the new tokens.

    Args:
        query: ``[B, T, Hq, D]``.
        key: ``[B, T, Hkv, D]``, as is ``value``.
        past_key: ``[B, Hkv, P, D]``, as is ``past_value``; None where there is no cache.
        mask: ``[B, 1, T, S]`` bool.
        scale: factor on the scores.

    Returns:
        ``[B, T, Hq*D]`` and the new caches ``[B, Hkv, S, D]``.
    """
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    if past_key is not None and past_value is not None:
        key = torch.cat((past_key, key), dim=2)
        value = torch.cat((past_value, value), dim=2)
    # The torch exporter refuses grouped queries where the head counts are equal.
    grouped = query.shape[2] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key, value, attn_mask=mask, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(2), key, value


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...], top_k: int, attention_mask: torch.Tensor
) -> torch.Tensor:
    """How unevenly the routers load their experts; 1 times K where all are loaded alike.

    ``E * sum_e f_e * p_e``, with f_e the share of tokens that chose expert e and p_e its mean
    probability, over all routers together (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6).

    Args:
        router_logits: each ``[B*T, E]``.
        top_k: K, experts per token.
        attention_mask: ``[B, T]``; padding does not count.

    Returns:
        A scalar.
    """
    real = attention_mask.reshape(-1) != 0
    logits = torch.cat([router[real] for router in router_logits])
    experts = logits.shape[-1]
    ids, _ = route(logits, top_k, normalize=False)
    share = F.one_hot(ids, experts).sum(1).to(logits.dtype).mean(0)
    return experts * (share * logits.softmax(-1).mean(0)).sum()
