"""A session that plays what a table says of each token, so that all it gives is known by hand.

A token id is ``100 * row + column`` of the inputs, wherever and in whatever call it is fed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.export.ingot import Manifest, TensorInfo
from ingot.graphs.state import State
from ingot.runtime.session import Floats, Ids
from ingot.validate.truth.inputs import Inputs
from ingot.validate.truth.recording import Layout
from ingot.validate.truth.replay import Chosen

Array = npt.NDArray[Any]
# By name, of each token id its numbers.
Table = dict[str, Array]

IDS = 200
KEY, SSM = "present.0.key", "present.0.ssm"
ROUTERS = ["router_logits.0", "router_logits.1"]
HIDDEN = "hidden_states.0"
# Of one token: a cache's [heads, size], a state's numbers, and so on.
SIZES: dict[str, tuple[int, ...]] = {
    "logits": (5,),
    KEY: (2, 3),
    SSM: (4,),
    **dict.fromkeys(ROUTERS, (4,)),
    HIDDEN: (3,),
}


def manifest(*, classifier: bool = False) -> Manifest:
    """Of a graph with a cache and a state of fixed size, or of one without state."""
    cache = ("batch", 2, "total_sequence", 3)
    states = (
        State("key", "past.0.key", KEY, "float32", cache, cache, 2, False),
        State("ssm", "past.0.ssm", SSM, "float32", ("batch", 4), ("batch", 4), None, False),
    )
    shape = ("batch", 5) if classifier else ("batch", "sequence", 5)
    return Manifest(
        model_type="played",
        task="classify" if classifier else "generate",
        target="onnx",
        precision="float32",
        main_output="logits",
        inputs=(),
        outputs=(TensorInfo("logits", "float32", shape),),
        states=() if classifier else states,
        vocab_size=IDS,
        source={},
        generation={},
        graph={},
        parameters=0,
        active_parameters=0,
        weight_bytes=0,
        tools={},
    )


def layout(*, classifier: bool = False) -> Layout:
    """Of the same graph."""
    return Layout(manifest(classifier=classifier), ())


def inputs(decode: int = 3, *, classifier: bool = False) -> Inputs:
    """A prefill of 19 tokens and single ones; the second row begins with 7 of padding."""
    ids = np.arange(2)[:, None] * 100 + np.arange(19 + decode)
    mask = np.ones_like(ids)
    mask[1, :7] = 0
    return Inputs(ids, mask, 19, stateful=not classifier)


def token(row: int, column: int) -> int:
    """The id of a token."""
    return 100 * row + column


class Played:
    """The session.

    Args:
        table: what it plays.
        forced: what it plays where the experts are given.
        runs: by number, tables of single runs from one reset to the next.
        classifier: whether it has one output a row, of its last token, and no state.

    Attributes:
        routers: as of ``validate.truth.taps.TappedSession``.
        chosen: all that was given to ``choose``.
    """

    def __init__(
        self,
        table: Table,
        forced: Table | None = None,
        runs: dict[int, Table] | None = None,
        *,
        classifier: bool = False,
    ) -> None:
        self.table, self.forced, self.runs = table, forced, runs or {}
        self.classifier = classifier
        self.routers = [name for name in ROUTERS if name in table]
        self.chosen: list[Sequence[Chosen] | None] = []
        self.tapped: dict[str, Array] = {}
        self._run = -1

    def choose(self, chosen: Sequence[Chosen] | None) -> None:
        self.chosen.append(chosen)

    def reset(self, batch: int, capacity: int) -> None:
        # A run with given experts is the same run again.
        self._run += not self._given
        self._seen: Ids = np.zeros((batch, 0), np.int64)

    @property
    def _given(self) -> bool:
        return bool(self.chosen) and self.chosen[-1] is not None

    def _playing(self) -> Table:
        if self._given:
            assert self.forced is not None
            return self.forced
        return self.runs.get(self._run, self.table)

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        self._seen = np.concatenate((self._seen, input_ids), axis=1)
        table = self._playing()
        self.tapped = {
            name: array[input_ids.reshape(-1) if name in ROUTERS else input_ids]
            for name, array in table.items()
            if name.startswith(("router_logits.", "hidden_states."))
        }
        main: Floats = table["logits"][input_ids]
        return main[:, -1] if self.classifier else main[:, -logits_to_keep:]

    def state(self) -> dict[str, Floats]:
        if self.classifier:
            return {}
        table, seen = self._playing(), self._seen
        caches = {n: np.moveaxis(a[seen], 1, 2) for n, a in table.items() if n.endswith(".key")}
        return {**caches, **{n: a[seen[:, -1]] for n, a in table.items() if n.endswith(".ssm")}}
