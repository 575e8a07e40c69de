"""Which layer is computed wrongly, where the graph and its session are right.

A faulty kernel gives the same numbers on both sides of a comparison of graphs, so it is found in
none. What tells the place is the run that failed, once more, with the values between the layers as
outputs and the truth's experts, held against eager PyTorch: the first of them beyond its limit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from ingot.validate.result import KERNELS, Location, Routing, TensorResult
from ingot.validate.truth.recording import HIDDEN_STATES, ROUTER_LOGITS

# Of a layer's values its states come first, then what its routers see, and what leaves it last.
_STATE, _ROUTER, _LEAVES, _BEHIND = range(4)


def first_computed_wrong(
    results: Iterable[TensorResult],
    routing: Iterable[Routing],
    layers: Mapping[str, int],
    count: int,
) -> Location | None:
    """The first value of the first layer that fails, by layer and then by call.

    Args:
        results: of values between the layers, of states and of the main output.
        routing: a choice that fails is its layer's, where no value fails before.
        layers: see ``validate.truth.reference.Reference.layers``.
        count: how many layers there are.
    """
    results = list(results)
    order = _Order({result.name for result in results}, layers, count)
    found = [order.of_value(result) for result in results if result.problem]
    for each in routing:
        wrong = [(flip.router, flip.token, flip.row) for flip in each.flips if flip.fails]
        wrong += [(one.router, one.token, one.row) for one in each.ignored]
        for router, token, row in wrong:
            layer, value = layers[f"{ROUTER_LOGITS}{router}"], f"token {token} of row {row}"
            place = Location(layer, KERNELS, f"the experts of {value}", math.inf)
            found.append(_Placed((layer, _ROUTER), place))
    # The first call of those that are equal in both, since the order is stable.
    return min(found, key=lambda each: each.order).location if found else None


class _Placed(NamedTuple):
    """A place, and the layer and the order in it, by which places are compared."""

    order: tuple[float, int]
    location: Location


class _Order:
    """The order of a model's values.

    What leaves the last layer has no name in some models, where the hidden state that follows has
    been through the final norm; and where a graph does not name that one either, only the main
    output tells of all that is there.

    Args:
        names: of the values that were looked at.
        layers: as above.
        count: as above.
    """

    def __init__(self, names: Collection[str], layers: Mapping[str, int], count: int) -> None:
        self._layers = layers
        self._last = count - 1
        hidden = [name for name in names if name.startswith(HIDDEN_STATES)]
        self._left = any(layers.get(name) == self._last for name in hidden)
        self._normed = any(name not in layers for name in hidden)

    def of_value(self, result: TensorResult) -> _Placed:
        """Where a value that fails is."""
        layer, order = self._place(result)
        ratio = math.inf if result.score is None else result.score
        detail = [result.problem] * math.isinf(ratio) + ["there or behind it"] * (order == _BEHIND)
        shown = None if layer in (-1, math.inf) else int(layer)
        value = f"{result.name} at {result.stage}"
        place = Location(shown, KERNELS, value, ratio, detail="; ".join(detail))
        return _Placed((layer, order), place)

    def _place(self, result: TensorResult) -> tuple[float, int]:
        if result.layer is not None:
            return result.layer, _STATE
        if result.name in self._layers:
            order = _LEAVES if result.name.startswith(HIDDEN_STATES) else _ROUTER
            return self._layers[result.name], order
        known = self._left or (self._normed and not result.name.startswith(HIDDEN_STATES))
        return (math.inf, _LEAVES) if known else (self._last, _BEHIND)
