"""What kernels are timed beside computes the same: a wrong peer would be no comparison."""

from __future__ import annotations

import pytest
import torch

from benchmarks.on_gpu import peers
from ingot.plugins.check import Inputs
from ingot.plugins.moe_dispatch import moe_dispatch
from ingot.plugins.moe_linear import moe_linear

BF16 = torch.bfloat16
# Four experts, two of them chosen; sizes that grouped products take: multiples of 16 bytes.
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 4, 2, 32, 16


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("tokens", [1, 9])
def test_every_mixture_of_experts_is_the_same(tokens: int) -> None:
    make = Inputs("cpu", tokens)
    x = make.normal(tokens, HIDDEN, dtype=BF16)
    logits = make.router_logits(tokens, EXPERTS, TOP_K, skewed=False)
    gate_up = make.normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=BF16, gain=HIDDEN**-0.5)
    down = make.normal(EXPERTS, HIDDEN, INTERMEDIATE, dtype=BF16, gain=INTERMEDIATE**-0.5)
    weights = (gate_up, down)
    exact = [each.double() for each in (x, logits, *weights)]
    want = moe_dispatch(*exact, TOP_K, False, "silu")
    loop = peers.CublasLoop(logits, TOP_K)
    for got in (
        peers.eager_moe(x, logits, *weights, TOP_K),
        peers.grouped_mm(x, logits, *weights, TOP_K),
        loop(x, *weights),
    ):
        assert relative(got, want) < 2e-2


@pytest.mark.parametrize("per_choice", [False, True])
def test_a_grouped_linear_layer_is_the_operator(per_choice: bool) -> None:
    make = Inputs("cpu", 5)
    rows = (7, TOP_K) if per_choice else (7,)
    x = make.normal(*rows, HIDDEN, dtype=BF16)
    ids = make.router_logits(7, EXPERTS, TOP_K, skewed=False).topk(TOP_K).indices
    weight = make.normal(EXPERTS, 16, HIDDEN, dtype=BF16, gain=HIDDEN**-0.5)
    want = moe_linear(x.double(), ids, weight.double())
    assert relative(peers.grouped_linear(x, ids, weight), want) < 1e-2


def test_skewed_logits_send_every_token_to_the_same_experts() -> None:
    logits = Inputs("cpu", 3).router_logits(50, 8, 3, skewed=True)
    assert set(logits.topk(3).indices.flatten().tolist()) == {5, 6, 7}
