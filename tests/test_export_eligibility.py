"""The limits that an export refuses by are those that the kernels refuse by."""

from __future__ import annotations

from ctypes import Structure
from typing import TYPE_CHECKING

import pytest

from ingot.plugins.causal_conv import MOST_WIDTH, causal_conv
from ingot.plugins.library import LibraryError
from ingot.plugins.mamba2_scan import MOST_STATES, mamba2_scan
from ingot.plugins.moe_dispatch import MOST_CHOSEN, MOST_EXPERTS, moe_dispatch
from ingot.plugins.moe_linear import moe_linear

if TYPE_CHECKING:
    from ingot.plugins.kernels.interpret import InterpretedLibrary

BF16, FP32 = 2, 0


def accepts(device: InterpretedLibrary, parameters: Structure) -> bool:
    """Whether the host layer takes these sizes; a call without tokens launches nothing."""
    try:
        device.run(parameters, None, 0, None)
    except LibraryError:
        return False
    return True


def dispatch(experts: int = 8, top_k: int = 2, width: int = 16, dtype: int = BF16) -> Structure:
    return moe_dispatch.structure(
        dtype=dtype, top_k=top_k, experts=experts, tokens=0, hidden=16, intermediate=width
    )


def linear(width: int = 16, dtype: int = BF16) -> Structure:
    return moe_linear.structure(
        dtype=dtype, top_k=2, experts=8, tokens=0, in_features=16, out_features=width
    )


def scan(head_size: int = 16, states: int = 16) -> Structure:
    return mamba2_scan.structure(
        dtype=BF16, batch=0, tokens=1, heads=4, head_size=head_size, groups=2, states=states
    )


def conv(width: int) -> Structure:
    return causal_conv.structure(dtype=BF16, batch=0, tokens=1, channels=24, width=width)


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        (dispatch(MOST_EXPERTS), dispatch(MOST_EXPERTS + 1)),
        (dispatch(100, MOST_CHOSEN), dispatch(100, MOST_CHOSEN + 1)),
        (dispatch(width=24), dispatch(width=20)),
        (dispatch(width=20, dtype=FP32), dispatch(width=0, dtype=FP32)),
        (linear(width=24), linear(width=20)),
        (linear(width=21, dtype=FP32), linear(width=0, dtype=FP32)),
        (scan(head_size=MOST_STATES), scan(head_size=MOST_STATES + 1)),
        (scan(states=MOST_STATES), scan(states=MOST_STATES + 1)),
        (conv(MOST_WIDTH), conv(MOST_WIDTH + 1)),
    ],
)
def test_both_sides_refuse_the_same(
    device: InterpretedLibrary, inside: Structure, outside: Structure
) -> None:
    assert accepts(device, inside)
    assert not accepts(device, outside)
