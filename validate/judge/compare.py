"""The one comparator: named tensors of a target, against the truth and in floors."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from ingot.validate.judge.limits import HALF_NORM_LIMIT, LIMITS, NORM_LIMIT, ROUNDOFF, TIE_LIMIT
from ingot.validate.judge.metrics import Array, Errors, errors, rms, top1_disagreements
from ingot.validate.result import TensorResult
from ingot.validate.truth.noise import relative_errors


def compare(
    stage: str,
    truth: Mapping[str, Array],
    eager: Mapping[str, Array],
    target: Mapping[str, Array],
    kinds: Mapping[str, str],
    precision: str = "float32",
    floors: Mapping[str, float] | None = None,
    expected: Mapping[str, Array] | None = None,
    noise: Mapping[str, Array] | None = None,
) -> list[TensorResult]:
    """Compare every tensor after one call.

    Args:
        stage: named in the results.
        truth: references by name, one precision higher.
        eager: the same of eager PyTorch in the target's precision.
        target: the tensors that are judged.
        kinds: name -> ``logits``, ``hidden``, or the kind of a state.
        precision: of the target.
        floors: by name, eager PyTorch's usual error over many calls. In one call it may be less by
            chance, where a tensor has few elements, and is then taken to be that.
        expected: what the target is compared with, by default the truth.
        noise: by name the squared errors ``[n, runs]`` of eager PyTorch and of the same with its
            sums in other orders. The largest error of a run is the floor: where a call amplifies
            rounding, one run may have been lucky.

    Returns:
        One result a name of either side, and one more where nothing could be compared. A missing
        or extra tensor, another shape, a NaN or infinity and an empty tensor are all failures: none
        of them can prove anything. A constant tensor is compared as any other: a projection of
        zeros, a token whose embedding is zero and a router that has learned nothing make some.
    """
    results = []
    expected = truth if expected is None else expected
    for name in [*truth, *(name for name in target if name not in truth)]:
        kind = kinds.get(name, "hidden")
        found: Errors | None = None
        floor: float | None = None
        top1: float | None = None
        not_finite: tuple[str, ...] = ()
        if name not in target:
            problem = "the target has no such output"
        elif name not in expected:
            problem = "the reference has no such output"
        else:
            sides = (expected[name], eager[name], target[name])
            not_finite = _not_finite(*sides)
            problem = _cannot_compare(*sides, not_finite, precision)
        if not problem:
            found = errors(expected[name], target[name])
            of_eager = errors(truth[name], eager[name])
            usual = 0.0 if floors is None else floors.get(name, 0.0)
            # Of a call in which eager PyTorch overflows there is no error.
            usual = usual if np.isfinite(usual) else 0.0
            samples = () if noise is None else relative_errors(noise[name], truth[name])
            samples = tuple(sample for sample in samples if np.isfinite(sample))
            floor = float(max(of_eager.relative_rms, *samples, usual, ROUNDOFF[precision]))
            problem = _judge(found, of_eager, floor, kind, precision)
            if kind == "logits":
                top1, differ = _judge_top1(expected[name], target[name], floor)
                problem = problem or differ
        results.append(
            TensorResult(
                stage,
                name,
                kind,
                layer_of(name),
                None if found is None else found.relative_rms,
                floor,
                None if found is None else found.norm_ratio,
                LIMITS[kind].of(precision),
                problem,
                top1,
                not_finite,
            )
        )
    if not any(result.error is not None for result in results):
        nothing = "nothing was compared"
        results.append(
            TensorResult(stage, "all outputs", "hidden", None, None, None, None, 0, nothing)
        )
    return results


def layer_of(name: str) -> int | None:
    """The layer of a state, by its name; None for another output."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def _cannot_compare(
    truth: Array, eager: Array, target: Array, not_finite: tuple[str, ...], precision: str
) -> str:
    """Why two tensors say nothing about each other."""
    if truth.shape != target.shape:
        return f"shape {list(target.shape)}, expected {list(truth.shape)}"
    if eager.dtype != target.dtype:
        return f"dtype {target.dtype}, expected {eager.dtype}"
    if truth.size == 0:
        return "the tensor is empty"
    if not_finite:
        return _what_is_not_finite(target, not_finite, precision)
    return ""


def _not_finite(truth: Array, eager: Array, target: Array) -> tuple[str, ...]:
    """The sides that hold NaN or infinity."""
    sides = {"reference": truth, "eager": eager, "target": target}
    return tuple(name for name, array in sides.items() if not np.isfinite(array).all())


def _what_is_not_finite(target: Array, sides: tuple[str, ...], precision: str) -> str:
    """Who holds NaN or infinity, and whether float16 is too narrow for the model."""
    if "reference" in sides:
        return "the reference holds NaN or infinity"
    if "eager" in sides:
        as_well = ", and so does the target" if "target" in sides else ""
        found = f"eager PyTorch in {precision} holds NaN or infinity{as_well}"
        if precision == "float16":
            return f"{found}: this model does not fit float16; use --precision bf16"
        return f"{found}, so there is nothing to compare with"
    overflow = precision == "float16" and np.isinf(target).any()
    found = "the target overflows float16" if overflow else "the target holds NaN or infinity"
    return f"{found}, and eager PyTorch does not"


def _judge(found: Errors, eager: Errors, floor: float, kind: str, precision: str) -> str:
    limit = LIMITS[kind].of(precision)
    score = found.relative_rms / floor
    if score > limit:
        return (
            f"the error {found.relative_rms:.1e} is {score:.3g} times what eager PyTorch makes in "
            f"{precision}; up to {limit:g} times are accepted"
        )
    # A kernel whose errors lean to one side may change the norm by all of its error.
    noise = abs(eager.norm_ratio - 1) + floor / 2
    off = abs(found.norm_ratio - 1)
    most = NORM_LIMIT if precision == "float32" else HALF_NORM_LIMIT
    if off > most * noise:
        return (
            f"the norm is {found.norm_ratio:.6f} times the reference's, {off / noise:.3g} times "
            f"what rounding explains; up to {most:g} times are accepted"
        )
    return ""


def _judge_top1(truth: Array, target: Array, floor: float) -> tuple[float, str]:
    """Share of agreeing likeliest tokens, and the problem if they differ by more than a tie.

    The RMS over a vocabulary does not see one wrong logit; the likeliest token may.
    """
    rows = truth.reshape(-1, truth.shape[-1])
    tie = TIE_LIMIT * floor * rms(truth)
    share, wrong = top1_disagreements(rows, target.reshape(rows.shape), tie)
    return share, f"{wrong} of {len(rows)} likeliest tokens differ, and not by a tie" * bool(wrong)
