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

from collections.abc import Callable
from functools import partial
from typing import Any

import onnx
import onnx.parser
import torch
import torch.nn.functional as F
from onnx.defs import OpSchema

DOMAIN = "ingot"
NAME = "MoeDispatch"
VERSION = 1
BODY_OPSET = 23

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

# Standard-operator text of each activation, from value `gate` to value `activated`.
_ACTIVATION_BODY = {
    "silu": "sigmoid = Sigmoid(gate)\n            activated = Mul(gate, sigmoid)",
    "gelu": "activated = Gelu(gate)",
    "gelu_tanh": 'activated = Gelu <approximate = "tanh"> (gate)',
    "relu": "activated = Relu(gate)",
}


def route(
    router_logits: torch.Tensor, top_k: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts and their weights.

    Args:
        router_logits: ``[N, E]``, float32 or float64.
        top_k: K, experts per token.
        normalize: divide the K weights by their sum.

    Returns:
        Expert ids ``[N, K]`` int64 in descending order of logit, and weights ``[N, K]`` of the
        logits' dtype.
    """
    # torch.topk leaves the order of ties open; a stable sort puts the lower expert id first.
    ids = torch.sort(router_logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = torch.softmax(router_logits, dim=-1).gather(-1, ids)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights


@torch.library.custom_op("ingot::moe_dispatch", mutates_args=())
def moe_dispatch(
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
        activation: a key of ``ACTIVATIONS``.

    Returns:
        ``[N, H]`` of x's dtype, accumulated in float32 or wider.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    act = ACTIVATIONS[activation]
    ids, weights = route(router_logits.to(compute), top_k, normalize)
    y = torch.zeros(x.shape, dtype=compute, device=x.device)
    for expert in torch.unique(ids).tolist():
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        gate, up = (x[token].to(compute) @ gate_up[expert].to(compute).T).chunk(2, dim=-1)
        out = (act(gate) * up) @ down[expert].to(compute).T
        # A token meets an expert at most once, so no index repeats inside this addition.
        y[token] += weights[token, slot, None] * out
    return y.to(x.dtype)


@moe_dispatch.register_fake
def _(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    normalize: bool,
    activation: str,
) -> torch.Tensor:
    return torch.empty_like(x)


SCHEMA = OpSchema(
    NAME,
    DOMAIN,
    VERSION,
    doc=__doc__ or "",
    inputs=[
        OpSchema.FormalParameter("x", "T", "tokens [N, H]"),
        OpSchema.FormalParameter("router_logits", "tensor(float)", "[N, E]"),
        OpSchema.FormalParameter("gate_up", "T", "[E, 2I, H]"),
        OpSchema.FormalParameter("down", "T", "[E, H, I]"),
    ],
    outputs=[OpSchema.FormalParameter("y", "T", "[N, H]")],
    type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
    attributes=[
        OpSchema.Attribute("top_k", OpSchema.AttrType.INT, "K", required=True),
        OpSchema.Attribute("normalize", OpSchema.AttrType.INT, "0 or 1", required=True),
        OpSchema.Attribute("activation", OpSchema.AttrType.STRING, "silu, gelu or relu"),
    ],
)


def register_schema() -> None:
    """Make the operator known to onnx's registry, once; exporters look it up there."""
    if not onnx.defs.has(NAME, DOMAIN):
        onnx.defs.register_schema(SCHEMA)


def translate(
    x: Any,
    router_logits: Any,
    gate_up: Any,
    down: Any,
    top_k: int,
    normalize: bool,
    activation: str,
) -> Any:
    """Entry of the torch exporter's translation table: one FX call becomes one ONNX node."""
    from onnxscript.values import Opset

    register_schema()
    return Opset(DOMAIN, VERSION).MoeDispatch(
        x,
        router_logits,
        gate_up,
        down,
        top_k=top_k,
        normalize=int(normalize),
        activation=activation,
    )


def function_body(activation: str) -> onnx.FunctionProto:
    """The operator in standard ONNX operators, for runtimes without a kernel of its own.

    Only the experts that some token chose are computed: a Loop runs over the experts hit, gathers
    that expert's weights and its tokens, and adds into the result. No index repeats within one
    ScatterND, and it has no reduction, because ScatterND(add) with repeated indices races in
    ONNX Runtime. One body serves one activation, since a function cannot branch on a string.

    Args:
        activation: a key of ``ACTIVATIONS``.
    """
    text = f"""
    <opset_import: ["" : {BODY_OPSET}], domain: "{DOMAIN}">
    {NAME} <top_k, normalize, activation> (x, router_logits, gate_up, down) => (y)
    {{
        one = Constant <value_ints: ints = [1]> ()
        zero = Constant <value_ints: ints = [0]> ()
        last = Constant <value_ints: ints = [-1]> ()
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

        experts_end = Shape <start = 0, end = 1> (gate_up)
        scalar_shape = Constant <value = int64[0] {{}}> ()
        experts_count = Reshape (experts_end, scalar_shape)
        scalar_zero = Constant <value_int: int = 0> ()
        scalar_one = Constant <value_int: int = 1> ()
        all_experts = Range (scalar_zero, experts_count, scalar_one)
        flat_ids = Reshape (ids, last)
        column_ids = Unsqueeze (flat_ids, last)
        is_expert = Equal (column_ids, all_experts)
        is_expert_int = Cast <to = 7> (is_expert)
        tokens_of_expert = ReduceSum <keepdims = 0> (is_expert_int, zero)
        hit_row = NonZero (tokens_of_expert)
        hit = Reshape (hit_row, last)
        hit_end = Shape (hit)
        trips = Reshape (hit_end, scalar_shape)

        wide = Cast <to = 1> (x)
        start = Sub (wide, wide)
        always = Constant <value = bool {{1}}> ()
        none = Constant <value_float: float = 0.0> ()
        total = Loop (trips, always, start) <body = each_expert (
            int64 trip, bool running, float[tokens, hidden] sum_before
        ) => (bool keep_running, float[tokens, hidden] sum_after) {{
            keep_running = Identity (running)
            expert = Gather <axis = 0> (hit, trip)
            chose = Equal (ids, expert)
            weight_or_none = Where (chose, weights, none)
            token_weight = ReduceSum <keepdims = 1> (weight_or_none, last)
            chose_int = Cast <to = 7> (chose)
            chose_count = ReduceSum <keepdims = 0> (chose_int, last)
            token_row = NonZero (chose_count)
            tokens_here = Reshape (token_row, last)
            x_here = Gather <axis = 0> (wide, tokens_here)
            gate_up_here = Gather <axis = 0> (gate_up, expert)
            gate_up_wide = Cast <to = 1> (gate_up_here)
            both = Gemm <transB = 1> (x_here, gate_up_wide)
            gate, up = Split <axis = -1, num_outputs = 2> (both)
            {_ACTIVATION_BODY[activation]}
            inner = Mul (activated, up)
            down_here = Gather <axis = 0> (down, expert)
            down_wide = Cast <to = 1> (down_here)
            out = Gemm <transB = 1> (inner, down_wide)
            weight_here = Gather <axis = 0> (token_weight, tokens_here)
            weighted = Mul (out, weight_here)
            before_here = Gather <axis = 0> (sum_before, tokens_here)
            after_here = Add (before_here, weighted)
            where_here = Unsqueeze (tokens_here, last)
            sum_after = ScatterND (sum_before, where_here, after_here)
        }}>
        y = CastLike (total, x)
    }}
    """
    return onnx.parser.parse_function(text)
