"""What the tracer leaves behind, folded and taken out.

``onnxscript.optimizer.optimize`` does this with all rules that it has. One of them looks through
the whole graph at every node, so that the time of an export grew with the square of its layers: 10
of 25 s for 30 layers. Here are the others whose operators the graphs of ``graphs/`` have.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import PassManager, Sequential
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    NameFixPass,
    OutputFixPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common

# In the order in which they are tried at a node, which is the optimizer's.
RULES = (
    *common.mul_by_1_rule.commute(),
    *common.add_0_rule.commute(),
    common.sub_0_rule,
    common.div_by_1_rule,
    common.two_reshapes_matmul_reshape_rule,
    common.one_reshape_matmul_reshape_rule,
    common.cast_constant_of_shape_rule,
    common.cast_constant_of_shape_without_value_rule,
    common.collapse_slice_rule,
    common.collapse_slice2_rule,
    common.materialize_reshape_shape_rule,
    common.min_min_rule,
    common.max_max_rule,
    common.min_max_rule,
    common.max_min_rule,
    common.successive_clip_relu_rule,
    common.successive_relu_clip_rule,
    common.successive_relu_rule,
    common.successive_clip_rule,
    common.cast_cast_rule,
    common.no_op_cast_rule,
    common.no_op_expand_rule,
    # Flattening makes a Reshape, which the next one joins with its neighbours.
    common.flatten_to_reshape_rule,
    common.reshape_reshape_rule,
    common.no_op_transpose_rule,
    common.transpose_transpose_rule,
    common.unsqueeze_unsqueeze_rule,
    common.squeeze_reshape_1d_rule,
)
# What one round uncovers the next one takes.
ROUNDS = 2


class _FoldConstants(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        folded = fold_constants(model, onnx_shape_inference=False)
        return ir.passes.PassResult(model, modified=folded.modified)


def simplify(model: ir.Model) -> None:
    """Fold constants, join and drop nodes that do nothing, and share what is equal; in place."""
    each_round = (
        _FoldConstants(),
        RewritePass(RULES),
        RemoveUnusedNodesPass(),
        RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        RemoveUnusedOpsetsPass(),
    )
    Sequential(
        InlinePass(),
        PassManager(each_round, steps=ROUNDS, early_stop=True),
        RemoveUnusedNodesPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        LiftSubgraphInitializersToMainGraphPass(),
        DeduplicateInitializersPass(),
        CommonSubexpressionEliminationPass(),
        OutputFixPass(),
        NameFixPass(),
    )(model)
