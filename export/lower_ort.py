"""Canonical ONNX -> a graph for ONNX Runtime's CPU provider, one small pass per difference.

There are three, by whose kernels run it; what matrices are stored in comes behind all of them.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from ingot.export.passes.attention import AttentionToGroupQueryAttention
from ingot.export.passes.causal_conv import CausalConvToOperator
from ingot.export.passes.convolution import CausalConvToBlocked
from ingot.export.passes.functions import AttachFunctionBodies
from ingot.export.passes.graph_pass import Applied, run
from ingot.export.passes.moe import MoeDispatchToMoE
from ingot.export.passes.moe_linear import MoeLinearToMatMuls
from ingot.export.passes.rotary import RotationToOperator
from ingot.export.passes.scan import Mamba2ScanToLinearAttention
from ingot.export.passes.tied import TiedHeadToFusedMatMul


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
        AttentionToGroupQueryAttention(),
        RotationToOperator(),
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


def shares_buffers(model: ir.Model) -> bool:
    """Whether each cache may be one buffer for past and present."""
    return any(node.op_type == "GroupQueryAttention" for node in model.graph)
