"""The exact twin of a graph: the same with products that leave their activations as they are.

At accuracy level 4 ONNX Runtime's kernels for weights in blocks round the activations to int8, a
block at a time; at level 0 they do not. The level is an attribute and nothing else, so what the
twin computes says of the graph all but that rounding, in the noise floor of float32.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from ingot.export.ingot import GRAPH, Manifest
from ingot.plugins.cpu.operators import DOMAIN
from ingot.runtime.ort import OrtSession

MICROSOFT = "com.microsoft"
LEVEL, EXACT = "accuracy_level", 0
# The same of Ingot's own kernels, yes or no.
ROUNDS = "round_activations"
# Operators that round activations to int8 where their level asks for it.
ROUNDING = ("MatMulNBits", "QMoE")
BITS = ("expert_weight_bits", "fc1_expert_weight_bits", "fc2_expert_weight_bits")
# Of experts in so many bits QMoE rounds at every level (1.31.1).
ALWAYS_ROUNDED = 8


def no_twin(folder: Path) -> str | None:
    """Why a graph has no exact twin, in one sentence without a full stop; None where it has one.

    Args:
        folder: the ingot.
    """
    model = onnx.load(str(folder / GRAPH), load_external_data=False)
    for node in model.graph.node:
        bits = [each.i for each in node.attribute if each.name in BITS]
        if node.op_type == "QMoE" and node.domain == MICROSOFT and ALWAYS_ROUNDED in bits:
            return (
                "ONNX Runtime's QMoE rounds the activations of experts in 8 bits at every accuracy "
                "level"
            )
    return None


def make_exact(model: onnx.ModelProto) -> None:
    """Let every product of a graph leave its activations as they are."""
    for node in model.graph.node:
        rounding = node.domain == MICROSOFT and node.op_type in ROUNDING
        for attribute in node.attribute if rounding or node.domain == DOMAIN else ():
            if attribute.name in (LEVEL, ROUNDS):
                attribute.i = EXACT


class ExactSession(OrtSession):
    """Runs the exact twin of an ingot as a session runs the ingot.

    Args:
        folder: the ingot.
        manifest: the ingot's.
        threads: see ``runtime.loading.load``.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int = 0) -> None:
        model = onnx.load(str(folder / GRAPH), load_external_data=False)
        make_exact(model)
        super().__init__(folder, manifest, threads=threads, graph=model.SerializeToString())
