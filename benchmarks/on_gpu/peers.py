"""What the kernels are timed beside: the same mathematics by PyTorch, as well as it can be had.

None of these is used by anything that is exported. Letters are those of docs/design.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.on_gpu.runner import Refused


def eager_moe(
    x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int
) -> torch.Tensor:
    """The usual loop over the experts that were chosen; it waits for their ids on the host."""
    weights, ids = logits.softmax(-1).topk(top_k)
    y = torch.zeros_like(x)
    for expert in torch.unique(ids).tolist():
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down[expert])
        y.index_add_(0, token, (weights[token, slot, None] * out).to(y.dtype))
    return y


class SortedChoices:
    """Choices ``ids [N, K]`` by expert: where each stands, and where each expert's end.

    Attributes:
        rows: ``[N*K]``, the token of every choice in that order.
        order: ``[N*K]``, the number ``n * K + k`` of every choice in that order.
        ends: ``[E]`` int32, the end of every expert's choices.
    """

    def __init__(self, ids: torch.Tensor, experts: int) -> None:
        self.order = ids.flatten().argsort(stable=True)
        self.rows = self.order // ids.shape[1]
        self.back = self.order.argsort()
        places = torch.arange(experts, device=ids.device)
        self.ends = torch.searchsorted(ids.flatten()[self.order], places, right=True).int()

    def combine(self, out: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Results ``[N*K, H]`` in this order, weights ``[N, K]`` -> their sums ``[N, H]``."""
        of_tokens = out[self.back].view(*weights.shape, -1)
        return torch.bmm(weights[:, None].to(out.dtype), of_tokens)[:, 0]


def grouped_product(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """PyTorch's grouped product: rows ``[N*K, Kin]`` by expert, weight ``[E, O, Kin]``.

    Raises:
        Refused: this PyTorch has none for the device.
    """
    product = getattr(torch, "_grouped_mm", None)
    if product is None:
        raise Refused("this PyTorch has no torch._grouped_mm")
    try:
        result: torch.Tensor = product(rows, weight.transpose(1, 2), offs=ends)
    except (RuntimeError, NotImplementedError) as error:
        raise Refused(f"torch._grouped_mm: {str(error).splitlines()[0]}") from error
    return result


def grouped_mm(
    x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int
) -> torch.Tensor:
    """Sort, two of PyTorch's grouped products, and add up; no wait for the host."""
    weights, ids = logits.softmax(-1).topk(top_k)
    choices = SortedChoices(ids, logits.shape[1])
    gate, up = grouped_product(x[choices.rows], gate_up, choices.ends).chunk(2, dim=-1)
    out = grouped_product(F.silu(gate) * up, down, choices.ends)
    return choices.combine(out, weights)


def grouped_linear(x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``ingot::MoeLinear`` by one of PyTorch's grouped products."""
    choices = SortedChoices(ids, weight.shape[0])
    rows = x[choices.rows] if x.ndim == 2 else x.flatten(0, 1)[choices.order]
    out = grouped_product(rows, weight, choices.ends)
    return out[choices.back].view(*ids.shape, -1)


class CublasLoop:
    """One cuBLAS product per expert and matrix, with the experts' shares known on the host.

    The sorting is not timed: it is a bound on what a loop of library calls can reach.
    """

    def __init__(self, logits: torch.Tensor, top_k: int) -> None:
        self.weights, ids = logits.softmax(-1).topk(top_k)
        self.choices = SortedChoices(ids, logits.shape[1])
        ends = self.choices.ends.tolist()
        begins = [0, *ends[:-1]]
        self.shares = [(e, b, end) for e, (b, end) in enumerate(zip(begins, ends, strict=True))]

    def __call__(self, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        rows = x[self.choices.rows]
        out = torch.empty_like(rows)
        for expert, begin, end in self.shares:
            if begin == end:
                continue
            gate, up = F.linear(rows[begin:end], gate_up[expert]).chunk(2, dim=-1)
            torch.mm(F.silu(gate) * up, down[expert].T, out=out[begin:end])
        return self.choices.combine(out, self.weights)


def conv1d(
    x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """``ingot::CausalConv`` with SiLU by PyTorch's convolution, but for the new state."""
    window = torch.cat((state, x.transpose(1, 2)), dim=2)
    return F.silu(F.conv1d(window, weight, bias, groups=weight.shape[0])).transpose(1, 2)


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention over ``[B, heads, tokens, size]``; causal where all tokens are new."""
    causal = query.shape[2] == key.shape[2]
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
