"""Which experts a token is given, and with what weights: the choice of every mixture of experts."""

from __future__ import annotations

from typing import Any

import torch


def route(
    router_logits: torch.Tensor, top_k: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts and their weights.

    Args:
        router_logits: ``[N, E]``, float32 or float64.
        top_k: K, experts per token.
        normalize: divide the K weights by their sum.

    Returns:
        Expert ids ``[N, K]`` int64 in descending order of logit, and weights ``[N, K]`` of the
        logits' dtype.
    """
    # torch.topk leaves the order of ties open; a stable sort puts the lower expert id first.
    ids = torch.sort(router_logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = torch.softmax(router_logits, dim=-1).gather(-1, ids)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights


@torch.library.custom_op("ingot::choose_experts", mutates_args=())
def choose_experts(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The ids of the K largest logits of each token; among equal logits the lower id comes first.

    ``torch.topk`` leaves ties open, and the exporter cannot translate a stable ``torch.sort``.
    ONNX's ``TopK`` has the order wanted here, so this operator becomes that node.

    Args:
        router_logits: ``[N, E]``, float32 or float64.
        top_k: K, between 1 and E.

    Returns:
        Ids ``[N, K]`` int64, in descending order of logit.
    """
    ids, _ = route(router_logits, top_k, normalize=False)
    return ids.contiguous()


@choose_experts.register_fake
def _(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    return router_logits.new_empty(router_logits.shape[0], top_k, dtype=torch.int64)


def translate_choose_experts(router_logits: Any, top_k: int) -> Any:
    """Entry of the translation table: ``choose_experts`` becomes a standard ``TopK``."""
    from onnxscript import opset23

    k: Any = opset23.Constant(value_ints=[top_k])
    _, ids = opset23.TopK(router_logits, k, axis=-1, largest=1, sorted=1)
    return ids
