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

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ingot.plugins.operator import BODY_OPSET, DOMAIN, Operator, not_multiple_of_8, tensor
from ingot.plugins.tiles import TILES_BODY

if TYPE_CHECKING:
    import onnx
    import torch


def eager(x: torch.Tensor, expert_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Eager reference of the operator; the module docstring has the formula.

    Args:
        x: ``[N, Kin]``, or ``[N, K, Kin]`` with a row per choice.
        expert_ids: ``[N, K]`` int64, each between 0 and E - 1.
        weight: ``[E, O, Kin]`` of x's dtype.

    Returns:
        ``[N, K, O]`` of x's dtype, accumulated in float32 or wider.
    """
    import torch

    compute = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty(*expert_ids.shape, weight.shape[1], dtype=compute, device=x.device)
    for expert in torch.unique(expert_ids).tolist():
        token, choice = torch.nonzero(expert_ids == expert, as_tuple=True)
        rows = x[token] if x.dim() == 2 else x[token, choice]
        y[token, choice] = rows.to(compute) @ weight[expert].to(compute).T
    return y.to(x.dtype)


def function_body() -> onnx.FunctionProto:
    """The operator in standard ONNX operators, for runtimes without a kernel of its own.

    A Loop runs over tiles of rows of one expert (``TILES_BODY``), gathers that
    expert's weight and the tile's rows, and hands out the tile; afterwards each choice gathers its
    row. All sizes follow from shapes, as TensorRT wants it. ``moe_dispatch.function_body`` says why
    the products stand as they do and how the Loop ends.
    """
    import onnx.parser

    text = f"""
    <opset_import: ["" : {BODY_OPSET}], domain: "{DOMAIN}">
    MoeLinear (x, expert_ids, weight) => (y)
    {{
        one = Constant <value_ints: ints = [1]> ()
        zero = Constant <value_ints: ints = [0]> ()
        last = Constant <value_ints: ints = [-1]> ()
        scalar_shape = Constant <value = int64[0] {{}}> ()
        scalar_zero = Constant <value_int: int = 0> ()
        scalar_one = Constant <value_int: int = 1> ()
        ids = Identity (expert_ids)
        experts = Shape <start = 0, end = 1> (weight)
        {TILES_BODY}

        rows_if_any = Shape <start = 1, end = -1> (x)
        rows_or_one = Concat <axis = 0> (rows_if_any, one)
        rows_per_token = Slice (rows_or_one, zero, one)
        rows_before = Mul (choice_of_tile, rows_per_token)
        row_of_tile = Div (rows_before, top)
        in_size = Shape <start = -1> (x)
        x_shape = Concat <axis = 0> (last, in_size)
        x_rows = Reshape (x, x_shape)
        wide = Cast <to = 1> (x_rows)
        columns_shape = Concat <axis = 0> (in_size, last)
        done = Loop (trips, any_tile) <body = each_tile (
            int64 trip, bool running
        ) => (bool keep_running, float[out_size, rows] out) {{
            next = Add (trip, scalar_one)
            keep_running = Less (next, tiles)
            expert = Gather <axis = 0> (expert_of_tile, trip)
            rows_here = Gather <axis = 0> (row_of_tile, trip)
            x_here = Gather <axis = 0> (wide, rows_here)
            x_turned = Transpose <perm = [1, 0]> (x_here)
            x_columns = Reshape (x_turned, columns_shape)
            weight_here = Gather <axis = 0> (weight, expert)
            weight_wide = Cast <to = 1> (weight_here)
            out = MatMul (weight_wide, x_columns)
        }}>
        out_size = Shape <start = 1, end = 2> (weight)
        done_shape = Concat <axis = 0> (last, out_size)
        done_rows = Transpose <perm = [0, 2, 1]> (done)
        out_of_slot = Reshape (done_rows, done_shape)
        out_of_choice = Gather <axis = 0> (out_of_slot, slot)
        y_shape = Concat <axis = 0> (tokens, top, out_size)
        y_wide = Reshape <allowzero = 1> (out_of_choice, y_shape)
        y = CastLike (y_wide, x)
    }}
    """
    return onnx.parser.parse_function(text)


def refusal(sizes: Mapping[str, int], dtype: str) -> str:
    """Why the kernels do not take these sizes, and the way out; empty where they do."""
    return not_multiple_of_8({"input size": sizes["Kin"], "output size": sizes["O"]}, dtype)


moe_linear = Operator(
    "MoeLinear",
    doc=__doc__ or "",
    eager=eager,
    body=lambda _: function_body(),
    refusal=refusal,
    inputs=(
        tensor("x", "T", "N Kin", "N K Kin"),
        tensor("expert_ids", "int64", "N K", draw="ids"),
        tensor("weight", "T", "E O Kin", draw="scaled"),
    ),
    outputs=(tensor("y", "T", "N K O"),),
    call="per_choice=form top_k=K experts=E tokens=N in_features=Kin out_features=O",
    kernels="moe",
)
