"""What an export refuses is what the kernels refuse, from one size to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ingot.plugins.causal_conv import MOST_WIDTH, causal_conv
from ingot.plugins.library import LibraryError
from ingot.plugins.mamba2_scan import MOST_STATES, mamba2_scan
from ingot.plugins.moe_dispatch import MOST_CHOSEN, MOST_EXPERTS, moe_dispatch
from ingot.plugins.moe_linear import moe_linear
from ingot.plugins.operator import Operator

if TYPE_CHECKING:
    from ingot.plugins.kernels.interpret import InterpretedLibrary

BF16, FP32 = "bfloat16", "float32"
# Calls that are taken, without tokens or rows, so that nothing is launched.
SIZES: dict[Operator, dict[str, int]] = {
    moe_dispatch: {"N": 0, "H": 16, "E": 100, "I": 16, "top_k": 2},
    moe_linear: {"N": 0, "K": 2, "Kin": 16, "E": 8, "O": 16},
    mamba2_scan: {"B": 0, "T": 1, "Hm": 4, "Pm": 16, "G": 2, "Ns": 16},
    causal_conv: {"B": 0, "T": 1, "C": 24, "W": 4},
}
ATTRIBUTES = {"normalize": 0, "activation": "silu", "dt_min": 0.0, "dt_max": 1.0}


def accepts(
    device: InterpretedLibrary, operator: Operator, sizes: dict[str, int], dtype: str
) -> bool:
    """Whether the host layer takes these sizes."""
    attributes: dict[str, Any] = {**ATTRIBUTES, **sizes}
    parameters = operator.parameters(dtype, sizes, operator.inputs[0].ranks[0], attributes)
    try:
        device.run(parameters, None, 0, None)
    except LibraryError:
        return False
    return True


@pytest.mark.parametrize(
    ("operator", "dtype", "letter", "most", "beyond"),
    [
        (moe_dispatch, BF16, "E", MOST_EXPERTS, MOST_EXPERTS + 1),
        (moe_dispatch, BF16, "top_k", MOST_CHOSEN, MOST_CHOSEN + 1),
        (moe_dispatch, BF16, "H", 24, 20),
        (moe_dispatch, BF16, "I", 24, 20),
        (moe_dispatch, FP32, "I", 20, None),
        (moe_linear, BF16, "Kin", 24, 20),
        (moe_linear, BF16, "O", 24, 20),
        (moe_linear, FP32, "O", 21, None),
        (mamba2_scan, BF16, "Pm", MOST_STATES, MOST_STATES + 1),
        (mamba2_scan, BF16, "Ns", MOST_STATES, MOST_STATES + 1),
        (causal_conv, BF16, "W", MOST_WIDTH, MOST_WIDTH + 1),
    ],
    ids=lambda each: each.name if isinstance(each, Operator) else None,
)
def test_both_sides_refuse_the_same(
    device: InterpretedLibrary,
    operator: Operator,
    dtype: str,
    letter: str,
    most: int,
    beyond: int | None,
) -> None:
    taken = {**SIZES[operator], letter: most}
    assert operator.refusal(taken, dtype) == ""
    assert accepts(device, operator, taken, dtype)
    if beyond is not None:
        refused = {**taken, letter: beyond}
        assert str(beyond) in operator.refusal(refused, dtype)
        assert not accepts(device, operator, refused, dtype)


@pytest.mark.parametrize(("operator", "letter"), [(moe_dispatch, "I"), (moe_linear, "O")])
def test_the_kernels_refuse_a_side_of_nothing(
    device: InterpretedLibrary, operator: Operator, letter: str
) -> None:
    assert not accepts(device, operator, {**SIZES[operator], letter: 0}, FP32)
