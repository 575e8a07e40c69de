"""Which layer is computed wrongly, where the graph and its session are right.

A faulty kernel gives the same numbers on both sides of a comparison of graphs, so it is found in
none. What tells the place is the run that failed, once more, with the values between the layers as
outputs and the truth's experts, held against eager PyTorch: the first of them beyond its limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ingot.validate.result import KERNELS, Location, Routing, TensorResult
from ingot.validate.truth.recording import HIDDEN_STATES, ROUTER_LOGITS

# Of a layer's values its states come first, then what its routers see, and what leaves it last.
_STATE, _ROUTER, _LEAVES = range(3)


def first_computed_wrong(
    results: Iterable[TensorResult], routing: Iterable[Routing], by_layer: Sequence[int]
) -> Location | None:
    """The first value of the first layer that fails, by layer and then by call.

    Args:
        results: of values between the layers, of states and of the main output.
        routing: a choice that fails is its layer's, where no value fails before.
        by_layer: how many routers each layer has.
    """
    layers = [layer for layer, count in enumerate(by_layer) for _ in range(count)]
    found: list[tuple[float, int, Location]] = []
    for result in results:
        if result.problem:
            layer, order = _place(result, layers)
            ratio = math.inf if result.score is None else result.score
            detail = result.problem if not math.isfinite(ratio) else ""
            value = f"{result.name} at {result.stage}"
            shown = None if layer in (-1.0, math.inf) else int(layer)
            found.append((layer, order, Location(shown, KERNELS, value, ratio, detail=detail)))
    for each in routing:
        wrong = [(flip.router, flip.token, flip.row) for flip in each.flips if flip.fails]
        wrong += [(one.router, one.token, one.row) for one in each.ignored]
        for router, token, row in wrong:
            value = f"the experts of token {token} in row {row}"
            place = Location(layers[router], KERNELS, value, math.inf)
            found.append((layers[router], _ROUTER, place))
    # The first call of those that are equal in both, since the order is stable.
    return min(found, key=lambda each: each[:2])[2] if found else None


def _place(result: TensorResult, layers: Sequence[int]) -> tuple[float, int]:
    """The layer, -1 before the first and infinite after the last, and the order in it."""
    if result.name.startswith(HIDDEN_STATES):
        return int(result.name.removeprefix(HIDDEN_STATES)) - 1, _LEAVES
    if result.name.startswith(ROUTER_LOGITS):
        return layers[int(result.name.removeprefix(ROUTER_LOGITS))], _ROUTER
    return (math.inf if result.layer is None else result.layer), _STATE
