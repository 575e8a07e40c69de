"""A Mamba2 scan that PyTorch can differentiate: the operator's own reference writes in place.

The chunked form (Dao and Gu 2024, arXiv:2405.21060, section 6): inside a chunk each token reads all
before it by matrix products, and the state goes from chunk to chunk. So what a gradient needs to be
kept is a state a chunk, and not one a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Tokens of a chunk.
CHUNK = 32


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    mask: torch.Tensor,
    _chunk_size: int,
    dt_min: float,
    dt_max: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``plugins.mamba2_scan.eager``, whose arguments these are, in float32."""
    heads = x.shape[2]
    group = torch.arange(heads) // (heads // b.shape[2])
    step = F.softplus(dt + dt_bias).clamp(dt_min, dt_max) * mask[..., None]
    # [B, Hm, T, ...], so that products are over the last two axes.
    given = (step[..., None] * x).transpose(1, 2)
    keys, queries = (each[:, :, group].transpose(1, 2) for each in (b, c))
    decay = (step * a).transpose(1, 2)
    results = []
    for first in range(0, x.shape[1], CHUNK):
        here = slice(first, first + CHUNK)
        total = decay[:, :, here].cumsum(-1)
        between = total[..., :, None] - total[..., None, :]
        later = torch.ones(between.shape[-2:], dtype=torch.bool).triu(1)
        reach = between.masked_fill(later, -torch.inf).exp()
        scores = queries[:, :, here] @ keys[:, :, here].transpose(-1, -2) * reach
        read = queries[:, :, here] @ state.transpose(-1, -2) * total[..., None].exp()
        results.append(scores @ given[:, :, here] + read)
        left = (total[..., -1:] - total).exp()[..., None] * given[:, :, here]
        state = state * total[..., -1, None, None].exp()
        state = state + left.transpose(-1, -2) @ keys[:, :, here]
    y = torch.cat(results, dim=2).transpose(1, 2)
    return y + d[:, None] * x, state
