"""Canonical ONNX -> a graph for ONNX Runtime's CPU provider, one small pass per difference.

There are three, by whose kernels run it; what matrices are stored in comes behind all of them.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from ingot.export.passes.attention import AttentionToGroupQueryAttention
from ingot.export.passes.attention_operator import (
    AttentionToOperator,
    RotateInAttention,
)
from ingot.export.passes.causal_conv import CausalConvToOperator
from ingot.export.passes.convolution import CausalConvToBlocked
from ingot.export.passes.functions import AttachFunctionBodies
from ingot.export.passes.graph_pass import Applied, run
from ingot.export.passes.mixer import MixersToOperator
from ingot.export.passes.moe import MoeDispatchToMoE
from ingot.export.passes.moe_linear import MoeLinearToMatMuls
from ingot.export.passes.rotary import RotationToOperator
from ingot.export.passes.scan import Mamba2ScanToLinearAttention
from ingot.export.passes.tied import TiedHeadToFusedMatMul
from ingot.plugins.cpu.operators import ATTENTION, MIXER
from ingot.plugins.cpu.operators import DOMAIN as PANELS


def lower_portable(model: ir.Model) -> tuple[Applied, ...]:
    """Take apart, in place, what standard operators have a fast form for; any runtime runs it.

    Returns:
        What each pass did.
    """
    return run(model, [MoeLinearToMatMuls(), RemoveUnusedNodesPass(), NameFixPass()])


def lower_ingot(model: ir.Model) -> tuple[Applied, ...]:
    """Swap in, in place, what Ingot's own kernels leave to ONNX Runtime's, and gather what is ours.

    Returns:
        What each pass did.
    """
    passes = [
        CausalConvToOperator(),
        MixersToOperator(),
        AttentionToOperator(),
        RotationToOperator(),
        RotateInAttention(),
        TiedHeadToFusedMatMul(),
        RemoveUnusedNodesPass(),
        AttachFunctionBodies(),
        NameFixPass(),
    ]
    return run(model, passes)


def lower_ort(model: ir.Model) -> tuple[Applied, ...]:
    """Swap in ONNX Runtime's own kernels, in place, wherever their numbers are right.

    Returns:
        What each pass did.
    """
    passes = [
        MoeDispatchToMoE(),
        MoeLinearToMatMuls(),
        Mamba2ScanToLinearAttention(),
        CausalConvToBlocked(),
        AttentionToGroupQueryAttention(),
        RotationToOperator(),
        TiedHeadToFusedMatMul(),
        RemoveUnusedNodesPass(),
        NameFixPass(),
    ]
    return run(model, passes)


# Operators that write new states where the old ones are, if they are given one buffer for both, and
# which of their inputs these are.
IN_PLACE = {
    ("com.microsoft", "GroupQueryAttention"): (3, 4),
    (PANELS, ATTENTION): (3, 4),
    (PANELS, MIXER): (2, 3),
}


def in_place(model: ir.Model) -> set[str]:
    """Inputs of states that may be one buffer with what replaces them: nothing else reads them."""
    return {
        value.name or ""
        for node in model.graph
        for place in IN_PLACE.get((node.domain, node.op_type), ())
        if (value := node.inputs[place]) is not None and len(value.uses()) == 1
    }
