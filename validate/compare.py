"""The one comparator: named tensors of a target against their references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from validate.metrics import Array, Errors, errors, rms, top1_disagreements
from validate.tolerances import TOLERANCES, Tolerance


@dataclass(frozen=True)
class Comparison:
    """One tensor at one step.

    Attributes:
        step: ``prefill`` or ``decode 3``.
        name: of the tensor.
        problem: what is wrong in one sentence; empty where it passed.
        errors: the figures, where the tensors could be compared at all.
        top1: share of agreeing likeliest tokens, for logits.
    """

    step: str
    name: str
    problem: str
    errors: Errors | None = None
    top1: float | None = None


def compare(
    step: str,
    expected: Mapping[str, Array],
    actual: Mapping[str, Array],
    kinds: Mapping[str, str],
    precision: str = "float32",
) -> list[Comparison]:
    """Compare every tensor of one step.

    Args:
        step: named in the results.
        expected: references by name.
        actual: the target's tensors by name.
        kinds: name -> ``logits``, ``hidden``, or the kind of a state.
        precision: of the target.

    Returns:
        One comparison a name of either side, and one more where nothing could be compared. A
        missing or extra tensor, another shape or dtype, a NaN or infinity, an empty tensor and a
        constant one are all failures: none of them can prove anything.
    """
    results = []
    for name in [*expected, *(name for name in actual if name not in expected)]:
        if name not in actual:
            results.append(Comparison(step, name, "the target has no such output"))
        elif name not in expected:
            results.append(Comparison(step, name, "the reference has no such output"))
        else:
            tolerance = TOLERANCES[precision, kinds[name]]
            is_logits = kinds[name] == "logits"
            results.append(
                _compare_one(step, name, expected[name], actual[name], tolerance, is_logits)
            )
    if not any(result.errors for result in results):
        results.append(Comparison(step, "all outputs", "nothing was compared"))
    return results


def _compare_one(
    step: str, name: str, expected: Array, actual: Array, limit: Tolerance, is_logits: bool
) -> Comparison:
    def fails(problem: str) -> Comparison:
        return Comparison(step, name, problem)

    if expected.shape != actual.shape:
        return fails(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    if expected.dtype != actual.dtype:
        return fails(f"dtype {actual.dtype}, expected {expected.dtype}")
    if expected.size == 0:
        return fails("the tensor is empty")
    for side, array in (("the reference", expected), ("the target", actual)):
        if not np.isfinite(array).all():
            return fails(f"{side} holds NaN or infinity")
        if array.min() == array.max():
            return fails(f"every element of {side} is {array.flat[0]}")
    found = errors(expected, actual)
    top1: float | None = None
    problem = ""
    if found.relative_rms > limit.relative_rms:
        problem = f"relative RMS error {found.relative_rms:.2e} above {limit.relative_rms:.0e}"
    elif abs(found.norm_ratio - 1) > limit.norm_ratio:
        problem = f"norm ratio {found.norm_ratio:.6f} differs from 1 by over {limit.norm_ratio:.0e}"
    if is_logits:
        rows = expected.reshape(-1, expected.shape[-1])
        top1, wrong = top1_disagreements(
            rows, actual.reshape(rows.shape), limit.tie * rms(expected)
        )
        if wrong and not problem:
            problem = f"{wrong} of {len(rows)} likeliest tokens differ, and not by a tie"
    return Comparison(step, name, problem, found, top1)
