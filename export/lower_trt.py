"""Canonical ONNX -> a graph for TensorRT, one small pass per difference.

The canonical graph is nearly there: it was captured in the precision it is to run in, so it is
strongly typed, with float32 where the eager graph has float32; its ``Attention`` nodes have one
output and an explicit mask; and its own operators carry function bodies, which a parser inlines
where it finds no plugin.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from ingot.export.passes.all_logits import AllLogits
from ingot.export.passes.attention_matmuls import AttentionToMatMuls
from ingot.export.passes.causal_conv import CausalConvToOperator
from ingot.export.passes.functions import AttachFunctionBodies
from ingot.export.passes.graph_pass import Applied, run
from ingot.export.passes.plugin_nodes import NamePlugins


def lower_trt(model: ir.Model) -> tuple[Applied, ...]:
    """Prepare a graph for TensorRT's parser, in place; any ONNX runtime can still run it.

    Returns:
        What each pass did.
    """
    passes = [
        AllLogits(),
        CausalConvToOperator(),
        AttentionToMatMuls(),
        RemoveUnusedNodesPass(),
        AttachFunctionBodies(),
        NamePlugins(),
        NameFixPass(),
    ]
    return run(model, passes)
