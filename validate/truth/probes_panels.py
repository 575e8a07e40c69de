"""Synthetic experts in panels: probes of ``ingot.cpu::MoeDispatch``.

The kernel that chooses is asked itself, by a node with the attributes of the one that is probed but
for what its experts are: how weights are stored is no part of the choice, so they are float32.
Written apart from what an export makes panels with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from ingot.plugins.cpu.operators import DOMAIN as PANELS
from ingot.validate.truth.probes_quantised import GATE, PREFIX, UP

Floats = npt.NDArray[np.float32]

# Rows of a panel, which lie side by side.
ROWS = 16
# How a stack of plain float32 is described.
PLAIN: dict[str, str | int] = {"numbers": "float32", "block": 0, "zero_points": 0}


class PanelExperts:
    """The experts of probes, shared by all that have as many.

    Args:
        model: to which they are added.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._initializers = model.graph.initializer
        self._names: dict[int, tuple[str, str, str]] = {}

    def probe(
        self, node: onnx.NodeProto, logits: str, experts: int, output: str, kept: list[str]
    ) -> list[onnx.NodeProto]:
        """The nodes of a probe, to be put behind the node that chooses.

        Args:
            node: the one that chooses.
            logits: that it is given.
            experts: E.
            output: the name of what the probe gives, ``[N, E]`` float32.
            kept: takes values that have to be outputs of the graph.
        """
        nodes = []
        if experts not in self._names:
            prefix = f"{PREFIX}.panels.{experts}"
            x, *stacks = (f"{prefix}.{part}" for part in ("x", "gate_up", "down"))
            for name, array in zip(stacks, synthetic_experts(experts), strict=True):
                self._initializers.append(numpy_helper.from_array(_in_panels(array), name))
            self._names[experts] = (x, stacks[0], stacks[1])
            kept.append(x)
            nodes = ones(logits, prefix, x)
        x, gate_up, down = self._names[experts]
        stored: dict[str, Any] = {
            f"{of}_{key}": said for of in ("gate_up", "down") for key, said in PLAIN.items()
        }
        sizes: dict[str, Any] = {"hidden": experts, "intermediate": 1, "experts": experts}
        made = helper.make_node(
            node.op_type, [x, logits, gate_up, down], [output], domain=PANELS, **stored, **sizes
        )
        own = {*stored, *sizes}
        made.attribute.extend(each for each in node.attribute if each.name not in own)
        return [*nodes, made]


def synthetic_experts(experts: int) -> tuple[Floats, Floats]:
    """Experts of inner size 1 of which each answers a one at its own place.

    Returns:
        Gate and up ``[E, 2, E]`` and down ``[E, E, 1]``, for an input of ones.
    """
    gate_up = np.zeros((experts, 2, experts), np.float32)
    gate_up[:, 0, 0], gate_up[:, 1, 0] = GATE, UP
    return gate_up, np.eye(experts, dtype=np.float32)[..., None]


def ones(logits: str, prefix: str, name: str) -> list[onnx.NodeProto]:
    """What makes a one for each token and expert."""
    one = numpy_helper.from_array(np.ones(1, np.float32))
    return [
        helper.make_node("Shape", [logits], [f"{prefix}.shape"]),
        helper.make_node("ConstantOfShape", [f"{prefix}.shape"], [name], value=one),
    ]


def _in_panels(stack: Floats) -> npt.NDArray[np.uint8]:
    """``[E, rows, columns]`` as bytes ``[E, panels, columns * 16 * 4]``, missing rows of zeros."""
    experts, rows, columns = stack.shape
    count = -(-rows // ROWS)
    filled = np.zeros((experts, count * ROWS, columns), np.float32)
    filled[:, :rows] = stack
    panels = filled.reshape(experts, count, ROWS, columns).swapaxes(2, 3)
    return np.ascontiguousarray(panels).reshape(experts, count, -1).view(np.uint8)
