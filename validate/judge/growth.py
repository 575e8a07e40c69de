"""Whether a target's error grows over decode beyond what eager PyTorch's own does."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ingot.validate.judge.limits import SCORE_FLOOR
from ingot.validate.result import Growth, TensorResult

# Last score over first. A score is an error over eager's of the same step, so growth that the
# arithmetic itself has divides out, and another order of the same sums stays near 1. What remains
# are the scatter of single steps, which a mean over a quarter of them damps, and an error that
# always leans to one side: it adds up as n where independent ones add up as sqrt(n), so between the
# middles of the first and the last quarter (a factor 7 in n) its score rises 2.6-fold at most. A
# fault that feeds on itself rises by a factor a step.
GROWTH_LIMIT = 4.0

# Fewer steps make quarters of one step, which is scatter and no mean.
LEAST_STEPS = 8

_DECODE = re.compile(r"decode ([0-9]+)")
_ANY_DECODE = re.compile(r"(?:seed [0-9]+, )?(decode [0-9]+)(, replayed)?")


def growth(tensors: Sequence[TensorResult]) -> list[Growth]:
    """How the scores of each kind change over the stages named ``decode N``.

    Args:
        tensors: of a report, in any order; of stages with other names, and those without a score,
            nothing is taken.

    Returns:
        One entry a kind with at least ``LEAST_STEPS`` steps, in the order of their first tensors.
    """
    return [
        _growth(kind, list(steps.values()))
        for kind, steps in step_scores(tensors).items()
        if len(steps) >= LEAST_STEPS
    ]


def step_scores(tensors: Sequence[TensorResult]) -> dict[str, dict[int, float]]:
    """The RMS of the scores by kind and decode step, the steps in order; a NaN stays one."""
    kinds: dict[str, dict[int, list[float]]] = {}
    for tensor in tensors:
        stage = _DECODE.fullmatch(tensor.stage)
        score = tensor.score
        if stage is not None and score is not None:
            steps = kinds.setdefault(tensor.kind, defaultdict(list))
            steps[int(stage[1])].append(score)
    return {
        kind: {number: _rms(steps[number]) for number in sorted(steps)}
        for kind, steps in kinds.items()
    }


def over_decode(tensors: Sequence[TensorResult]) -> list[TensorResult]:
    """The results of the decode steps of all sets of token ids, with ``decode N`` as their stage.

    Those with the truth's experts where a target was run with them, since they miss no token.
    """
    found = [(stage, t) for t in tensors if (stage := _ANY_DECODE.fullmatch(t.stage))]
    replayed = [(stage, tensor) for stage, tensor in found if stage[2]]
    return [replace(tensor, stage=stage[1]) for stage, tensor in replayed or found]


def _growth(kind: str, scores: Sequence[float]) -> Growth:
    """The growth of one kind, from the scores of all steps in order."""
    quarter = len(scores) // 4
    first, last = _mean(scores[:quarter]), _mean(scores[-quarter:])
    wrong = [score for score in scores if not math.isfinite(score)]
    if wrong:
        # Also in the middle, where no quarter would see it.
        last = math.nan if any(math.isnan(score) for score in wrong) else math.inf
    return Growth(kind, first, last, GROWTH_LIMIT)


def _rms(scores: Sequence[float]) -> float:
    # hypot does not overflow where squares would; of an infinity and a NaN it makes an infinity.
    if any(math.isnan(score) for score in scores):
        return math.nan
    return math.hypot(*scores) / math.sqrt(len(scores))


def _mean(scores: Sequence[float]) -> float:
    """Geometric, none below ``SCORE_FLOOR``."""
    # In this order: a comparison with NaN is false, and max keeps its first argument then.
    return math.exp(math.fsum(math.log(max(score, SCORE_FLOOR)) for score in scores) / len(scores))
