"""Other orders of the same sums: as right as eager PyTorch, and rounded otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ingot.plugins.moe_dispatch import moe_dispatch
from ingot.plugins.moe_linear import moe_linear
from ingot.validate.truth.orders import SHARES, Split


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@torch.inference_mode()
def test_every_order_of_a_layer_is_as_right_and_another() -> None:
    layer = nn.Linear(96, 40)
    x = drawn(2, 5, 96)
    truth = x.double() @ layer.weight.double().T + layer.bias.double()
    plain = layer(x)
    found = [plain]
    for share in SHARES:
        with Split(share):
            found.append(layer(x))
    assert len({each.numpy().tobytes() for each in found}) == 1 + len(SHARES)
    for each in found:
        assert 2.0**-27 < error(each, truth) < 2.0**-21
    assert torch.equal(layer(x), plain)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cuts_the_products_inside_of_the_experts(dtype: torch.dtype) -> None:
    logits = drawn(30, 4)
    x, up, down = (drawn(*shape) / 8 for shape in ((30, 64), (4, 48, 64), (4, 64, 24)))
    ids = logits.topk(2).indices

    def both(dtype: torch.dtype) -> list[torch.Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        inputs = x.to(dtype), logits.to(wide), up.to(dtype), down.to(dtype)
        return [moe_dispatch(*inputs, 2, True, "silu"), moe_linear(inputs[0], ids, inputs[2])]

    plain, truth = both(dtype), both(torch.float64)
    with Split(1 / 3):
        found = both(dtype)
    for one, other, exact in zip(plain, found, truth, strict=True):
        assert not torch.equal(one, other) or dtype != torch.float32
        assert error(other, exact) < 3 * error(one, exact)


@torch.inference_mode()
def test_leaves_alone_what_cannot_be_cut() -> None:
    layer = nn.Linear(1, 3)
    x = drawn(4, 1)
    plain = layer(x)
    with Split(1 / 2):
        assert torch.equal(layer(x), plain)
