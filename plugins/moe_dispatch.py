"""``ingot::MoeDispatch``: top-k routing and the chosen experts' gated MLPs, as one operator.

For every token n, with p = softmax(router_logits[n]) over all E experts and S the K experts of
largest logit (ties go to the lower expert id)::

    w_k = p[S_k]                      normalize = 0   (OLMoE)
    w_k = p[S_k] / sum_j p[S_j]       normalize = 1   (Mixtral, JetMoe)
    y[n] = sum_k w_k * down[S_k] @ (act(gate[S_k] @ x[n]) * (up[S_k] @ x[n]))

where ``gate_up[e]`` holds the rows of gate[e], then the rows of up[e].

Sources: OLMoE (Muennighoff et al. 2024, arXiv:2409.02060, section 2) and the routing of Mixtral
(Jiang et al. 2024, arXiv:2401.04088, section 2.1) for the normalised form.

Shape letters: N tokens, H hidden size, E experts, K experts per token, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ingot.plugins.activations import activate, activation_body
from ingot.plugins.operator import (
    BODY_OPSET,
    DOMAIN,
    Attribute,
    Operator,
    not_multiple_of_8,
    tensor,
)
from ingot.plugins.tiles import TILES_BODY

if TYPE_CHECKING:
    import onnx
    import torch

# Limits of the kernels.
MOST_EXPERTS, MOST_CHOSEN = 1024, 64


def eager(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    normalize: bool,
    activation: str,
) -> torch.Tensor:
    """Eager reference of the operator; the module docstring has the formula.

    Args:
        x: tokens ``[N, H]``.
        router_logits: ``[N, E]`` float32 (float64 where ``x`` is float64).
        gate_up: ``[E, 2I, H]`` of x's dtype.
        down: ``[E, H, I]`` of x's dtype.
        top_k: K, between 1 and E.
        normalize: whether the chosen weights are divided by their sum.
        activation: a key of ``plugins.activations.ACTIVATIONS``.

    Returns:
        ``[N, H]`` of x's dtype, accumulated in float32 or wider.
    """
    import torch

    from ingot.plugins import experts

    compute = torch.promote_types(x.dtype, torch.float32)
    ids, weights = experts.route(router_logits.to(compute), top_k, normalize)
    y = torch.zeros(x.shape, dtype=compute, device=x.device)
    for expert in torch.unique(ids).tolist():
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        gate, up = (x[token].to(compute) @ gate_up[expert].to(compute).T).chunk(2, dim=-1)
        out = (activate(activation, gate) * up) @ down[expert].to(compute).T
        # A token meets an expert at most once, so no index repeats inside this addition.
        y[token] += weights[token, slot, None] * out
    return y.to(x.dtype)


def function_body(activation: str) -> onnx.FunctionProto:
    """The operator in standard ONNX operators, for runtimes without a kernel of its own.

    A Loop runs over tiles of rows of one expert (``TILES_BODY``), gathers that expert's weights and
    the tile's tokens, and hands out the tile; afterwards each token gathers its K rows and adds
    them. So the products of the chosen experts are computed, up to the rows missing in a tile, and
    all sizes follow from shapes, as TensorRT wants it. One body serves one activation, since a
    function cannot branch on a string.

    Args:
        activation: a key of ``plugins.activations.ACTIVATIONS``.
    """
    import onnx.parser

    # The condition stops ONNX Runtime after the last tile. TensorRT's scan output is `trips` long
    # whatever the condition says, and its older parsers take no notice of it: `expert_of_tile` is
    # valid there too, and nothing reads the surplus.
    #
    # Products are weight @ columns rather than rows @ weight.T, because ONNX Runtime copies the
    # right side into panels first, and the weight is the larger by far. The Reshape keeps it from
    # folding the Transpose into the MatMul, which then had no fast case for a single column. The
    # results are turned back after the Loop: TensorRT-RTX 1.7 fails on a Transpose in there whose
    # result is the scan output.
    text = f"""
    <opset_import: ["" : {BODY_OPSET}], domain: "{DOMAIN}">
    MoeDispatch <top_k, normalize, activation> (x, router_logits, gate_up, down) => (y)
    {{
        one = Constant <value_ints: ints = [1]> ()
        zero = Constant <value_ints: ints = [0]> ()
        last = Constant <value_ints: ints = [-1]> ()
        scalar_shape = Constant <value = int64[0] {{}}> ()
        scalar_zero = Constant <value_int: int = 0> ()
        scalar_one = Constant <value_int: int = 1> ()
        top_k_value = Constant <value_int: int = @top_k> ()
        k = Reshape (top_k_value, one)
        top_logits, ids = TopK <axis = -1, largest = 1, sorted = 1> (router_logits, k)
        probabilities = Softmax <axis = -1> (router_logits)
        chosen = GatherElements <axis = -1> (probabilities, ids)
        chosen_sum = ReduceSum <keepdims = 1> (chosen, last)
        normalize_value = Constant <value_int: int = @normalize> ()
        normalize_flag = Cast <to = 9> (normalize_value)
        unit = Constant <value_float: float = 1.0> ()
        divisor = Where (normalize_flag, chosen_sum, unit)
        weights = Div (chosen, divisor)

        experts = Shape <start = 0, end = 1> (gate_up)
        {TILES_BODY}
        token_of_tile = Div (choice_of_tile, top_k_value)

        wide = Cast <to = 1> (x)
        hidden = Shape <start = 1, end = 2> (x)
        columns_shape = Concat <axis = 0> (hidden, last)
        done = Loop (trips, any_tile) <body = each_tile (
            int64 trip, bool running
        ) => (bool keep_running, float[hidden, rows] out) {{
            next = Add (trip, scalar_one)
            keep_running = Less (next, tiles)
            expert = Gather <axis = 0> (expert_of_tile, trip)
            tokens_here = Gather <axis = 0> (token_of_tile, trip)
            x_here = Gather <axis = 0> (wide, tokens_here)
            x_turned = Transpose <perm = [1, 0]> (x_here)
            x_columns = Reshape (x_turned, columns_shape)
            gate_up_here = Gather <axis = 0> (gate_up, expert)
            gate_up_wide = Cast <to = 1> (gate_up_here)
            both = MatMul (gate_up_wide, x_columns)
            gate, up = Split <axis = 0, num_outputs = 2> (both)
            {activation_body(activation, "gate")}
            inner = Mul (activated, up)
            down_here = Gather <axis = 0> (down, expert)
            down_wide = Cast <to = 1> (down_here)
            out = MatMul (down_wide, inner)
        }}>
        rows_shape = Concat <axis = 0> (last, hidden)
        done_rows = Transpose <perm = [0, 2, 1]> (done)
        out_of_slot = Reshape (done_rows, rows_shape)
        out_of_choice = Gather <axis = 0> (out_of_slot, slot)
        by_token_shape = Concat <axis = 0> (tokens, top, hidden)
        out_by_token = Reshape <allowzero = 1> (out_of_choice, by_token_shape)
        weights_column = Unsqueeze (weights, last)
        weighted = Mul (out_by_token, weights_column)
        total = ReduceSum <keepdims = 0> (weighted, one)
        y = CastLike (total, x)
    }}
    """
    return onnx.parser.parse_function(text)


def refusal(sizes: Mapping[str, int], dtype: str) -> str:
    """Why the kernels do not take these sizes, and the way out; empty where they do."""
    if sizes["E"] > MOST_EXPERTS or sizes["top_k"] > MOST_CHOSEN:
        return (
            f"{sizes['top_k']} of {sizes['E']} experts; the kernels choose up to {MOST_CHOSEN} of "
            f"up to {MOST_EXPERTS}: export for --target ort"
        )
    return not_multiple_of_8({"hidden size": sizes["H"], "intermediate size": sizes["I"]}, dtype)


moe_dispatch = Operator(
    "MoeDispatch",
    doc=__doc__ or "",
    eager=eager,
    body=lambda node: function_body(node.attributes["activation"].as_string()),
    refusal=refusal,
    inputs=(
        tensor("x", "T", "N H"),
        tensor("router_logits", "float32", "N E", draw="logits"),
        tensor("gate_up", "T", "E 2I H", draw="scaled"),
        tensor("down", "T", "E H I", draw="scaled"),
    ),
    outputs=(tensor("y", "T", "N H"),),
    attributes=(
        Attribute("top_k", "int"),
        Attribute("normalize", "bool"),
        Attribute("activation", "activation"),
    ),
    call="activation normalize top_k experts=E tokens=N hidden=H intermediate=I",
    kernels="moe",
    wide="routing",
    onnx_runtime="MoE",
)
