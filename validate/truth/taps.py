"""An ingot's graph with its routers and hidden states as outputs, and its choices as inputs.

Every graph names these values (``export.capture``), so nothing has to be found by its shape. The
graph is changed in memory; the weights stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from ingot.export.ingot import GRAPH, Manifest
from ingot.runtime.ort import OrtSession
from ingot.runtime.session import Floats, Ids
from ingot.validate.truth.recording import HIDDEN_STATES, ROUTER_LOGITS, Array, numbered
from ingot.validate.truth.replay import Chosen, chosen_input, insert_replays


class TappedSession(OrtSession):
    """Runs an ingot's graph on ONNX Runtime and keeps what is inside.

    Args:
        folder: the ingot.
        manifest: the ingot's.

    Attributes:
        tapped: of the last call, ``router_logits.{i} [B*T, E]`` as the router made them and
            ``hidden_states.{i} [B, T, H]``.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        model = onnx.load(str(folder / GRAPH), load_external_data=False)
        named = {name for node in model.graph.node for name in node.output}
        self.routers = numbered(named, ROUTER_LOGITS)
        taps = [*self.routers, *numbered(named, HIDDEN_STATES)]
        outputs = {value.name for value in model.graph.output}
        model.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in taps if name not in outputs
        )
        insert_replays(model, self.routers)
        super().__init__(folder, manifest, graph=model.SerializeToString(), taps=taps)
        self.choose(None)

    def choose(self, chosen: Sequence[Chosen] | None) -> None:
        """Force these experts on each router, ``[B*T, E]``; None leaves the choice to the graph."""
        # With all of them chosen no other could stand above, and no logit is moved.
        masks = [np.ones((1, 1), dtype=np.bool_)] * len(self.routers) if chosen is None else chosen
        self.given = {
            chosen_input(name): mask for name, mask in zip(self.routers, masks, strict=True)
        }

    def step(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        """See ``runtime.session.Session.step``."""
        self._pieces: list[dict[str, Array]] = []
        main = super().step(input_ids, attention_mask)
        batch = len(input_ids)
        self.tapped = {
            name: np.concatenate([_by_row(p[name], batch) for p in self._pieces], axis=1)
            for name in self.tapped
        }
        for name in self.routers:
            self.tapped[name] = self.tapped[name].reshape(-1, self.tapped[name].shape[-1])
        return main

    def _run(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        # A step may take several, a token each.
        main = super()._run(input_ids, attention_mask)
        self._pieces.append(self.tapped)
        return main


def _by_row(tap: Array, batch: int) -> Array:
    """``[B*T, E]`` or ``[B, T, H]`` -> ``[B, T, ...]`` in float32."""
    return tap.reshape(batch, -1, tap.shape[-1]).astype(np.float32)
