"""``ingot::MoeLinear``: a linear layer whose weight each token picks, K times over.

For every token n and choice k::

    y[n, k] = weight[expert_ids[n, k]] @ x[n]         x [N, Kin], one row for all choices
    y[n, k] = weight[expert_ids[n, k]] @ x[n, k]      x [N, K, Kin], a row per choice

Only the chosen experts are computed. An id may stand twice in a row of ``expert_ids``.

Sources: the attention experts of JetMoe (Shen et al. 2024, arXiv:2404.07413), after the mixture of
attention heads (Zhang et al. 2022, arXiv:2210.05144). The first form makes the queries of the
chosen experts, the second brings their heads' results back to the hidden size.

Shape letters: N tokens, E experts, K experts per token, Kin input size, O output size.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx.parser
import torch
from onnx.defs import OpSchema

from plugins import moe_dispatch

DOMAIN = "ingot"
NAME = "MoeLinear"
VERSION = 1
BODY_OPSET = 23


@torch.library.custom_op("ingot::moe_linear", mutates_args=())
def moe_linear(x: torch.Tensor, expert_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Eager reference of the operator; the module docstring has the formula.

    Args:
        x: ``[N, Kin]``, or ``[N, K, Kin]`` with a row per choice.
        expert_ids: ``[N, K]`` int64, each between 0 and E - 1.
        weight: ``[E, O, Kin]`` of x's dtype.

    Returns:
        ``[N, K, O]`` of x's dtype, accumulated in float32 or wider.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty(*expert_ids.shape, weight.shape[1], dtype=compute, device=x.device)
    for expert in torch.unique(expert_ids).tolist():
        token, choice = torch.nonzero(expert_ids == expert, as_tuple=True)
        rows = x[token] if x.dim() == 2 else x[token, choice]
        y[token, choice] = rows.to(compute) @ weight[expert].to(compute).T
    return y.to(x.dtype)


@moe_linear.register_fake
def _(x: torch.Tensor, expert_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*expert_ids.shape, weight.shape[1])


@torch.library.custom_op("ingot::choose_experts", mutates_args=())
def choose_experts(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The ids of the K largest logits of each token; among equal logits the lower id comes first.

    ``torch.topk`` leaves ties open, and the exporter cannot translate a stable ``torch.sort``.
    ONNX's ``TopK`` has the order wanted here, so this operator becomes that node.

    Args:
        router_logits: ``[N, E]``, float32 or float64.
        top_k: K, between 1 and E.

    Returns:
        Ids ``[N, K]`` int64, in descending order of logit.
    """
    ids, _ = moe_dispatch.route(router_logits, top_k, normalize=False)
    return ids.contiguous()


@choose_experts.register_fake
def _(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    return router_logits.new_empty(router_logits.shape[0], top_k, dtype=torch.int64)


SCHEMA = OpSchema(
    NAME,
    DOMAIN,
    VERSION,
    doc=__doc__ or "",
    inputs=[
        OpSchema.FormalParameter("x", "T", "[N, Kin] or [N, K, Kin]"),
        OpSchema.FormalParameter("expert_ids", "tensor(int64)", "[N, K]"),
        OpSchema.FormalParameter("weight", "T", "[E, O, Kin]"),
    ],
    outputs=[OpSchema.FormalParameter("y", "T", "[N, K, O]")],
    type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
)


def register_schema() -> None:
    """Make the operator known to onnx's registry, once; exporters look it up there."""
    if not onnx.defs.has(NAME, DOMAIN):
        onnx.defs.register_schema(SCHEMA)


def translate(x: Any, expert_ids: Any, weight: Any) -> Any:
    """Entry of the torch exporter's translation table: one FX call becomes one ONNX node."""
    from onnxscript.values import Opset

    register_schema()
    return Opset(DOMAIN, VERSION).MoeLinear(x, expert_ids, weight)


def translate_choose_experts(router_logits: Any, top_k: int) -> Any:
    """Entry of the translation table: ``choose_experts`` becomes a standard ``TopK``."""
    from onnxscript import opset23

    k: Any = opset23.Constant(value_ints=[top_k])
    _, ids = opset23.TopK(router_logits, k, axis=-1, largest=1, sorted=1)
    return ids


def function_body() -> onnx.FunctionProto:
    """The operator in standard ONNX operators, for runtimes without a kernel of its own.

    A Loop runs over the experts that some token chose, gathers that expert's weight and its rows,
    and writes their results. As a choice has one expert, no index repeats in a ScatterND, which
    matters: repeated indices race in ONNX Runtime.
    """
    text = f"""
    <opset_import: ["" : {BODY_OPSET}], domain: "{DOMAIN}">
    {NAME} (x, expert_ids, weight) => (y)
    {{
        one = Constant <value_ints: ints = [1]> ()
        zero = Constant <value_ints: ints = [0]> ()
        last = Constant <value_ints: ints = [-1]> ()
        scalar_shape = Constant <value = int64[0] {{}}> ()
        scalar_zero = Constant <value_int: int = 0> ()
        scalar_one = Constant <value_int: int = 1> ()

        experts_end = Shape <start = 0, end = 1> (weight)
        experts_count = Reshape (experts_end, scalar_shape)
        all_experts = Range (scalar_zero, experts_count, scalar_one)
        column_ids = Unsqueeze (expert_ids, last)
        is_expert = Equal (column_ids, all_experts)
        is_expert_int = Cast <to = 7> (is_expert)
        choices_axes = Constant <value_ints: ints = [0, 1]> ()
        choices_of_expert = ReduceSum <keepdims = 0> (is_expert_int, choices_axes)
        hit_row = NonZero (choices_of_expert)
        hit = Reshape (hit_row, last)
        hit_end = Shape (hit)
        trips = Reshape (hit_end, scalar_shape)

        tokens_end = Shape <start = 0, end = 1> (x)
        rows_if_any = Shape <start = 1, end = -1> (x)
        rows_or_one = Concat <axis = 0> (rows_if_any, one)
        rows_per_token = Slice (rows_or_one, zero, one)
        in_end = Shape <start = -1> (x)
        x_shape = Concat <axis = 0> (tokens_end, rows_per_token, in_end)
        x_rows = Reshape <allowzero = 1> (x, x_shape)
        wide = Cast <to = 1> (x_rows)
        wide_index_end = Concat <axis = 0> (tokens_end, rows_per_token)
        wide_index_last = Sub (wide_index_end, one)

        choices_shape = Shape (expert_ids)
        out_end = Shape <start = 1, end = 2> (weight)
        y_shape = Concat <axis = 0> (choices_shape, out_end)
        start = ConstantOfShape <value = float[1] {{0.0}}> (y_shape)
        always = Constant <value = bool {{1}}> ()
        total = Loop (trips, always, start) <body = each_expert (
            int64 trip, bool running, float[tokens, choices, out] y_before
        ) => (bool keep_running, float[tokens, choices, out] y_after) {{
            keep_running = Identity (running)
            expert = Gather <axis = 0> (hit, trip)
            chose = Equal (expert_ids, expert)
            token_and_choice = NonZero (chose)
            where_here = Transpose <perm = [1, 0]> (token_and_choice)
            row_here = Min (where_here, wide_index_last)
            x_here = GatherND (wide, row_here)
            weight_here = Gather <axis = 0> (weight, expert)
            weight_wide = Cast <to = 1> (weight_here)
            out_here = Gemm <transB = 1> (x_here, weight_wide)
            y_after = ScatterND (y_before, where_here, out_here)
        }}>
        y = CastLike (total, x)
    }}
    """
    return onnx.parser.parse_function(text)
