"""An ingot's graph with its routers and hidden states as outputs, and its choices as inputs.

Every graph names these values (``export.capture``), so nothing has to be found by its shape. The
graph is changed in memory; the weights stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ingot.export.ingot import GRAPH, Manifest
from ingot.runtime.ort import OrtSession
from ingot.runtime.session import Floats, Ids
from ingot.validate.truth.probes import insert_probes
from ingot.validate.truth.recording import (
    CHOSEN_EXPERTS,
    HIDDEN_STATES,
    ROUTER_LOGITS,
    Array,
    numbered,
)
from ingot.validate.truth.replay import Chosen, forced_input, insert_replays
from ingot.validate.truth.twin import make_exact


class TappedSession(OrtSession):
    """Runs an ingot's graph on ONNX Runtime and keeps what is inside.

    Args:
        folder: the ingot.
        manifest: the ingot's.
        threads: see ``runtime.loading.load``.
        exact: whether it is the graph's exact twin (``validate.truth.twin``).

    Attributes:
        routers: the names of its router logits, in the order they run.
        unread: by such a name, why the choice that follows from them cannot be read.
        tapped: of the last call, ``router_logits.{i} [B*T, E]`` as the router made them,
            ``hidden_states.{i} [B, T, H]``, and ``chosen_experts.{i} [B*T, E]`` bool, the experts
            that were used, where that can be read.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, threads: int = 0, exact: bool = False
    ) -> None:
        model = onnx.load(str(folder / GRAPH), load_external_data=False)
        if exact:
            make_exact(model)
        named = {name for node in model.graph.node for name in node.output}
        self.routers = numbered(named, ROUTER_LOGITS)
        self._named = [*self.routers, *numbered(named, HIDDEN_STATES)]
        outputs = {value.name for value in model.graph.output}
        model.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in self._named if name not in outputs
        )
        insert_replays(model, self.routers)
        self._probes = insert_probes(model, self.routers)
        self.unread = self._probes.unread
        taps = list(dict.fromkeys([*self._named, *self._probes.outputs]))
        weights = self._change(model, folder)
        graph = model.SerializeToString()
        super().__init__(folder, manifest, threads=threads, graph=graph, taps=taps, weights=weights)
        self.choose(None)

    def _change(self, model: onnx.ModelProto, folder: Path) -> Mapping[str, Any] | None:
        """What else is changed in the graph, and the weights in place of the folder's, if any."""
        return None

    def choose(self, chosen: Sequence[Chosen] | None) -> None:
        """Force these experts on each router, ``[B*T, E]``; None leaves the choice to the graph."""
        if chosen is not None and len(chosen) != len(self.routers):
            raise ValueError(f"{len(chosen)} choices for {len(self.routers)} routers")
        self._forced = chosen

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        """See ``runtime.session.Session.step``."""
        self._pieces: list[dict[str, Array]] = []
        self._begin, self._batch = 0, len(input_ids)
        main = super().step(input_ids, attention_mask, logits_to_keep)
        by_token = (ROUTER_LOGITS, CHOSEN_EXPERTS)
        self.tapped = {}
        for name in self._pieces[0]:
            array = np.concatenate([piece[name] for piece in self._pieces], axis=1)
            flat = name.startswith(by_token)
            self.tapped[name] = array.reshape(-1, array.shape[-1]) if flat else array
        return main

    def _run(self, input_ids: Ids, attention_mask: Ids, kept: int) -> Floats:
        # A step may take several, a token each.
        tokens = input_ids.shape[1]
        self.given = self._given(slice(self._begin, self._begin + tokens))
        main = super()._run(input_ids, attention_mask, kept)
        self._begin += tokens
        taps: dict[str, Array] = {n: self.tapped[n].astype(np.float32) for n in self._named}
        for name in self.routers:
            chosen = self._probes.chosen(name, self.tapped)
            if chosen is not None:
                taps[name.replace(ROUTER_LOGITS, CHOSEN_EXPERTS)] = chosen
        self._pieces.append({name: _by_row(tap, self._batch) for name, tap in taps.items()})
        return main

    def _given(self, columns: slice) -> dict[str, Array]:
        """What forces the experts of some of the step's tokens."""
        if self._forced is None:
            # With all of them chosen no other could stand above, and no logit is moved.
            return {forced_input(name): np.ones((1, 1), np.bool_) for name in self.routers}
        return {
            forced_input(name): _by_row(mask, self._batch)[:, columns].reshape(-1, mask.shape[1])
            for name, mask in zip(self.routers, self._forced, strict=True)
        }


def _by_row(tap: Array, batch: int) -> Array:
    """``[B*T, ...]`` or ``[B, T, H]`` -> ``[B, T, ...]``."""
    return tap.reshape(batch, -1, tap.shape[-1])
