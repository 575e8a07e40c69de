"""Canonical ONNX -> a graph for ONNX Runtime's CPU provider, one small pass per difference."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from ingot.export.passes.attention import AttentionToGroupQueryAttention
from ingot.export.passes.convolution import CausalConvToBlocked
from ingot.export.passes.graph_pass import Applied, run
from ingot.export.passes.moe import MoeDispatchToMoE
from ingot.export.passes.moe_linear import MoeLinearToMatMuls
from ingot.export.passes.scan import Mamba2ScanToLinearAttention
from ingot.export.passes.tied import TiedHeadToFusedMatMul


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
        TiedHeadToFusedMatMul(),
        RemoveUnusedNodesPass(),
        NameFixPass(),
    ]
    return run(model, passes)


def shares_buffers(model: ir.Model) -> bool:
    """Whether each cache may be one buffer for past and present."""
    return any(node.op_type == "GroupQueryAttention" for node in model.graph)
