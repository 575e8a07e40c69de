"""Which experts each token was given, by the target and by the truth.

Two modes. *Free*: each side chooses for itself; a rounding error may turn a near-tie, and every
number after differs, though nothing is wrong. *Replayed*: the truth's choices are forced on the
target and on the eager floor (``validate.truth.replay``), so that no luck is left and tight limits
hold for every number. What a target chose is read from its kernels (``validate.truth.probes``), and
so is whether it used what was forced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.validate.judge.limits import FLIP_LIMIT
from ingot.validate.judge.metrics import rms
from ingot.validate.result import Flip, Ignored, Routing
from ingot.validate.truth.replay import Chosen, choices

Array = npt.NDArray[Any]

# A share of a token's experts. Kernels that take their top k from a float32 softmax see no
# difference between such experts, and no number shows it.
NEGLIGIBLE = 1e-30


def margins(router_logits: Array, top_k: int) -> Array:
    """The K-th largest logit less the next, ``[..., E]`` -> ``[...]``; K is below E."""
    ordered = np.sort(router_logits, axis=-1)
    result: Array = ordered[..., -top_k] - ordered[..., -top_k - 1]
    return result


def counted(router_logits: Array) -> npt.NDArray[np.bool_]:
    """Which experts ``[n, E]`` have a weight that can be seen."""
    logits = router_logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    # One that is no number counts.
    result: npt.NDArray[np.bool_] = ~(shares < NEGLIGIBLE)
    return result


def _explained(truth: Array, eager: Array) -> float:
    """The largest margin that rounding explains, of one router's logits ``[n, E]``."""
    return FLIP_LIMIT * rms(eager.astype(np.float64) - truth)


def compare_choices(
    expected: Sequence[Array],
    truth: Sequence[Array],
    eager: Sequence[Array],
    target: Sequence[Chosen],
    places: npt.NDArray[np.int64],
    top_k: int,
    names: tuple[str, ...],
    *,
    forced: bool = False,
) -> Routing:
    """Hold the target's choices against the truth's.

    Args:
        expected: router logits ``[n, E]`` of each router, one row a real token: of the truth, or
            of what stands in its place.
        truth: of the truth.
        eager: of the eager graph in the target's precision.
        target: the experts ``[n, E]`` that the target chose.
        places: ``[n, 2]``, row of the batch and position of each token.
        top_k: K.
        names: of the routers.
        forced: whether the truth's experts were used, and ``target`` is only what the target's
            logits said.

    Returns:
        Every flip. One that follows from another, since it is at a later router of the same row
        and not before it, is marked as such: its margin says nothing. Where the experts are
        forced, none follows.
    """
    flips: list[Flip] = []
    agreement = []
    # By row, the first position that an earlier router's flip changed.
    changed: dict[int, int] = {}
    for router, (want, chosen) in enumerate(zip(expected, target, strict=True)):
        wanted = choices(want, top_k)
        differ = ((wanted != chosen) & counted(want)).any(axis=-1)
        agreement.append(float(1 - differ.mean()))
        explained = _explained(truth[router], eager[router])
        here = []
        for token in np.flatnonzero(differ):
            row, position = (int(place) for place in places[token])
            flip = Flip(
                router=router,
                row=row,
                token=position,
                expected=tuple(np.flatnonzero(wanted[token]).tolist()),
                chosen=tuple(np.flatnonzero(chosen[token]).tolist()),
                margin=float(margins(want[token], top_k)),
                explained=explained,
                follows=not forced and position >= changed.get(row, position + 1),
            )
            here.append(flip)
        for flip in here:
            changed[flip.row] = min(flip.token, changed.get(flip.row, flip.token))
        flips += here
    return Routing(tuple(agreement), tuple(flips), names)


def ignored_choices(
    forced: Sequence[Chosen],
    used: Mapping[int, Chosen],
    moved: Sequence[Array],
    places: npt.NDArray[np.int64],
) -> tuple[Ignored, ...]:
    """Where experts that were forced were not used: of each router the first token, if any.

    Args:
        forced: the experts ``[n, E]`` of each router, one row a real token.
        used: what its kernels took, by router; one that is not there was not read.
        moved: the logits ``[n, E]`` that forced them, of each router.
        places: ``[n, 2]``, row of the batch and position of each token.
    """
    result = []
    for router, found in sorted(used.items()):
        wanted = forced[router]
        differ = np.flatnonzero(((wanted != found) & counted(moved[router])).any(axis=-1))
        if len(differ):
            row, position = (int(place) for place in places[differ[0]])
            given, taken = (
                tuple(np.flatnonzero(side[differ[0]]).tolist()) for side in (wanted, found)
            )
            result.append(Ignored(router, row, position, given, taken, len(differ)))
    return tuple(result)


def first_flips(routing: Routing) -> dict[int, int]:
    """The first position of each row from which on other experts changed the numbers, by row.

    Empty where a flip fails: then nothing is left out of any comparison.
    """
    result: dict[int, int] = {}
    if any(flip.fails for flip in routing.flips):
        return result
    for flip in routing.flips:
        result[flip.row] = min(flip.token, result.get(flip.row, flip.token))
    return result


def doubtful(
    expected: Sequence[Array],
    truth: Sequence[Array],
    eager: Sequence[Array],
    places: npt.NDArray[np.int64],
    top_k: int,
) -> dict[int, int]:
    """The first position of each row where rounding explains another choice at some router, by row.

    Args:
        expected: router logits ``[n, E]`` of each router, of the truth or what stands in its place.
        truth: of the truth.
        eager: of the eager graph in the target's precision.
        places: ``[n, 2]``, row of the batch and position of each token.
        top_k: K.
    """
    result: dict[int, int] = {}
    for want, exact, own in zip(expected, truth, eager, strict=True):
        if want.shape[1] <= top_k:
            continue
        for row, position in places[margins(want, top_k) <= _explained(exact, own)]:
            result[int(row)] = min(int(position), result.get(int(row), int(position)))
    return result


def least_margin(router_logits: Sequence[Array], top_k: int) -> float | None:
    """The smallest difference between a token's K-th and next logit; None without a choice."""
    found = [
        float(margins(logits, top_k).min()) for logits in router_logits if logits.shape[-1] > top_k
    ]
    return min(found, default=None)
