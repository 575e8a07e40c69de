"""Which experts each token was given, by the target and by the truth.

Two modes. *Free*: each side chooses for itself; a rounding error may turn a near-tie, and every
number after differs, though nothing is wrong. *Replayed*: the truth's choices are forced on the
target and on the eager floor, so that no luck is left and tight limits hold for every number.

To force a choice, router logits are moved as little as will do (``replayed``): where a token's own
choice is the wanted one they stay as they are, to the bit; where it is not, the chosen and the
others are moved to either side of their midpoint. A flip that rounding explains moves a logit by
less than its rounding error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ingot.plugins.moe_dispatch
import ingot.plugins.moe_linear  # noqa: F401  (both register their operators)
from ingot.validate.judge.limits import FLIP_LIMIT
from ingot.validate.judge.metrics import rms
from ingot.validate.result import Flip, Routing

Array = npt.NDArray[Any]
Chosen = npt.NDArray[np.bool_]

DOMAIN = "ingot.validate"
OPERATOR = "Replay"
# How far apart two logits are put, relative to the largest of the token (and at least that):
# enough for any float32 top-k to tell them apart, and for one of the softmax, as in ONNX Runtime's
# MoE, where a small difference of small logits would round away.
NUDGE = 2.0**-20

# The operators that choose, and the place of the router's logits among their arguments.
_ROUTED: dict[Any, int] = {
    torch.ops.ingot.moe_dispatch.default: 1,
    torch.ops.ingot.choose_experts.default: 0,
}


def choices(router_logits: Array, top_k: int) -> Chosen:
    """The experts that logits ``[N, E]`` choose, as a mask; among equals the lower id is chosen."""
    order = np.argsort(-router_logits, axis=-1, kind="stable")[:, :top_k]
    result = np.zeros(router_logits.shape, dtype=np.bool_)
    np.put_along_axis(result, order, True, axis=-1)
    return result


def replayed(router_logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Router logits ``[N, E]``, moved as little as makes ``chosen [N, E]`` the top k."""
    infinity = torch.full_like(router_logits, torch.inf)
    least = torch.where(chosen, router_logits, infinity).amin(-1, keepdim=True)
    most = torch.where(chosen, -infinity, router_logits).amax(-1, keepdim=True)
    middle = (least + most) / 2
    below = middle - (router_logits.abs().amax(-1, keepdim=True) + 1) * NUDGE
    moved = torch.where(chosen, router_logits.clamp(min=middle), router_logits.clamp(max=below))
    # Among equals the lower id is chosen, so a tie may be right as it is.
    ids, count = torch.arange(router_logits.shape[-1]), router_logits.shape[-1]
    last = torch.where(chosen & (router_logits == least), ids, -1).amax(-1, keepdim=True)
    first = torch.where(~chosen & (router_logits == most), ids, count).amin(-1, keepdim=True)
    right = (least > most) | ((least == most) & (last < first))
    return torch.where(right, router_logits, moved)


class Replay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it the eager graphs use the experts that were given to ``choose``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._chosen: Iterator[Chosen] | None = None

    def choose(self, chosen: Sequence[Chosen] | None) -> None:
        """Set the next call's experts: a mask ``[N, E]`` for each router in the order they run.

        None leaves the choice to the graph.
        """
        self._chosen = None if chosen is None else iter(chosen)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _ROUTED and self._chosen is not None:
            place = _ROUTED[function]
            mask = torch.from_numpy(next(self._chosen))
            args = (*args[:place], replayed(args[place], mask), *args[place + 1 :])
        return function(*args, **(kwargs or {}))


def replay_function() -> onnx.FunctionProto:
    """``replayed`` in standard ONNX operators, as a function of a model."""
    return onnx.parser.parse_function(
        f"""
        <opset_import: ["" : 23], domain: "{DOMAIN}">
        {OPERATOR} (router_logits, chosen) => (moved_logits)
        {{
            infinity = Constant <value_float: float = inf> ()
            minus_infinity = Neg (infinity)
            last = Constant <value_ints: ints = [-1]> ()
            half = Constant <value_float: float = 0.5> ()
            nudge = Constant <value_float: float = {NUDGE!r}> ()
            of_chosen = Where (chosen, router_logits, infinity)
            of_others = Where (chosen, minus_infinity, router_logits)
            least = ReduceMin (of_chosen, last)
            most = ReduceMax (of_others, last)
            both = Add (least, most)
            middle = Mul (both, half)
            sizes = Abs (router_logits)
            size = ReduceMax (sizes, last)
            unit = Constant <value_float: float = 1.0> ()
            size_up = Add (size, unit)
            step = Mul (size_up, nudge)
            below = Sub (middle, step)
            raised = Max (router_logits, middle)
            lowered = Min (router_logits, below)
            moved = Where (chosen, raised, lowered)
            zero = Constant <value_int: int = 0> ()
            one = Constant <value_int: int = 1> ()
            minus_one = Neg (one)
            experts = Shape <start: int = 1> (router_logits)
            count = Squeeze (experts)
            ids = Range (zero, count, one)
            others = Not (chosen)
            is_least = Equal (router_logits, least)
            is_most = Equal (router_logits, most)
            chosen_least = And (chosen, is_least)
            other_most = And (others, is_most)
            ids_least = Where (chosen_least, ids, minus_one)
            ids_most = Where (other_most, ids, count)
            last_least = ReduceMax (ids_least, last)
            first_most = ReduceMin (ids_most, last)
            apart = Greater (least, most)
            equal = Equal (least, most)
            in_order = Less (last_least, first_most)
            right_tie = And (equal, in_order)
            right = Or (apart, right_tie)
            moved_logits = Where (right, router_logits, moved)
        }}
        """
    )


def margins(router_logits: Array, top_k: int) -> Array:
    """The K-th largest logit less the next, ``[..., E]`` -> ``[...]``; K is below E."""
    ordered = np.sort(router_logits, axis=-1)
    result: Array = ordered[..., -top_k] - ordered[..., -top_k - 1]
    return result


def _explained(truth: Array, eager: Array) -> float:
    """The largest margin that rounding explains."""
    return FLIP_LIMIT * rms(eager.astype(np.float64) - truth)


def compare_choices(
    expected: Sequence[Array],
    truth: Sequence[Array],
    eager: Sequence[Array],
    target: Sequence[Array],
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
        target: of the target.
        places: ``[n, 2]``, row of the batch and position of each token.
        top_k: K.
        names: of the routers.
        forced: whether the truth's experts were used whatever the target's logits said.

    Returns:
        Every flip. One that follows from another, since it is at a later router of the same row
        and not before it, is marked as such: its margin says nothing. Where the experts are
        forced, none follows.
    """
    flips: list[Flip] = []
    agreement = []
    # By row, the first position that an earlier router's flip changed.
    changed: dict[int, int] = {}
    for router, (want, found) in enumerate(zip(expected, target, strict=True)):
        wanted, chosen = choices(want, top_k), choices(found, top_k)
        differ = (wanted != chosen).any(axis=-1)
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


def first_flips(routing: Routing) -> dict[int, int]:
    """By row, the position from which on other experts changed the numbers.

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
    """By row, the first position where rounding explains another choice at some router.

    Args are those of ``compare_choices``.
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
