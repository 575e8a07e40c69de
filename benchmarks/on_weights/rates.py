"""Tokens a second, measured alike for every program."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Tokens a second.

    Attributes:
        prefill: of a prompt in one call.
        decode: of the tokens behind it, one call each.
    """

    prefill: float
    decode: float


def measure(reset: Callable[[], None], step: Callable[[int], None], prompt: int, new: int) -> Rates:
    """Time one prompt and the tokens behind it, after a prompt that warms up.

    Args:
        reset: forgets the state.
        step: takes so many tokens in one call and computes logits of the last.
        prompt: tokens of the prompt.
        new: tokens behind it.
    """
    reset()
    step(prompt)
    step(1)
    reset()
    start = time.perf_counter()
    step(prompt)
    begun = time.perf_counter()
    for _ in range(new):
        step(1)
    return Rates(prompt / (begun - start), new / (time.perf_counter() - begun))
