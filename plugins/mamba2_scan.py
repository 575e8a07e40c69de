"""``ingot::Mamba2Scan``: the selective state-space recurrence of Mamba-2, as one operator.

For every batch row and head h, whose B and C are those of group ``h // (Hm / G)``, step by step::

    dt'_t = mask_t * clamp(softplus(dt_t + dt_bias), dt_min, dt_max)
    S_t   = exp(dt'_t A) S_{t-1} + dt'_t x_t B_t^T
    y_t   = S_t C_t + D x_t

A padding position (mask 0) leaves the state as it was, whatever finite numbers its x, dt, B and C
hold. ``chunk_size`` says how a chunked implementation cuts T; it has no part in the meaning.

Source: Mamba-2 (Dao and Gu 2024, arXiv:2405.21060): the recurrence in section 3, its chunked form
in section 6 and listing 1.

Shape letters: T new tokens, Hm heads, Pm head size, G groups, Ns state size, q tokens per chunk,
and B batch, which in the formulas is the input matrix.
"""

# The paper's matrices keep their capital names.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ingot.plugins.operator import BODY_OPSET, DOMAIN, Attribute, Operator, tensor

if TYPE_CHECKING:
    import onnx
    import torch

# Limit of the kernels: head size and state size.
MOST_STATES = 256


def eager(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    mask: torch.Tensor,
    chunk_size: int,
    dt_min: float,
    dt_max: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager reference of the operator; the module docstring has the formula.

    Args:
        x: ``[B, T, Hm, Pm]``, float32, float16, bfloat16 or float64.
        dt: raw time steps ``[B, T, Hm]`` of x's dtype.
        A: ``[Hm]``, negative, float32 (float64 where ``x`` is float64; so are the next three).
        B: ``[B, T, G, Ns]`` of x's dtype; G divides Hm.
        C: like ``B``.
        D: ``[Hm]``.
        dt_bias: ``[Hm]``.
        state: the state before the first token, ``[B, Hm, Pm, Ns]``.
        mask: ``[B, T]`` of x's dtype, 1 for a token and 0 for padding.
        chunk_size: not used here.
        dt_min: lower limit of the time step, may be 0.
        dt_max: upper limit of the time step, may be infinite.

    Returns:
        ``y [B, T, Hm, Pm]`` of x's dtype, rounded to it at the end, and the state after the last
        token, ``[B, Hm, Pm, Ns]`` of the state's dtype.
    """
    import torch
    import torch.nn.functional as F

    compute = torch.promote_types(x.dtype, torch.float32)
    batch, tokens, heads, head_size = x.shape
    group_of_head = torch.arange(heads, device=x.device) // (heads // B.shape[2])
    wide, B, C = x.to(compute), B.to(compute), C.to(compute)
    step = F.softplus(dt.to(compute) + dt_bias).clamp(dt_min, dt_max) * mask.to(compute)[..., None]
    decay = torch.exp(step * A)
    # x meets the step before B does: 0 * x * B is 0 where x * B alone could be infinite.
    scaled = step[..., None] * wide
    S = state.clone(memory_format=torch.contiguous_format)
    y = x.new_empty((batch, tokens, heads, head_size), dtype=compute)
    for t in range(tokens):
        B_t, C_t = B[:, t, group_of_head], C[:, t, group_of_head]
        S.mul_(decay[:, t, :, None, None])
        S.addcmul_(scaled[:, t, :, :, None], B_t[:, :, None, :])
        y[:, t] = (S @ C_t[..., None]).squeeze(-1)
    y += D[:, None] * wide
    return y.to(x.dtype), S


def function_body() -> onnx.FunctionProto:
    """The operator in standard ONNX operators, for runtimes without a kernel of its own.

    The chunked form: matrix products over the q = min(chunk_size, T) tokens of a chunk, and a Scan
    that carries the state from chunk to chunk. Names are those of the paper's listing 1. T is
    padded at its end to a multiple of q with steps of 0, which leave the state as it was.

    The decay from token s to token t is the exponential of the *sum* of dt' A over s+1..t, never of
    a difference of two sums that start at the chunk's first token: those grow large and would
    cancel. Every exponent is at most 0.
    """
    import onnx.parser

    text = f"""
    <opset_import: ["" : {BODY_OPSET}], domain: "{DOMAIN}">
    Mamba2Scan <chunk_size, dt_min, dt_max>
        (x, dt, A, B, C, D, dt_bias, state, mask) => (y, new_state)
    {{
        zero = Constant <value_ints: ints = [0]> ()
        one = Constant <value_ints: ints = [1]> ()
        last = Constant <value_ints: ints = [-1]> ()
        groups_and_states = Constant <value_ints: ints = [2, 3]> ()

        # dt' of every token.
        dt_wide = Cast <to = 1> (dt)
        mask_wide = Cast <to = 1> (mask)
        mask_of_head = Unsqueeze (mask_wide, last)
        dt_biased = Add (dt_wide, dt_bias)
        # softplus(v) = max(v, 0) + softplus(-|v|), which no implementation can overflow.
        dt_size = Abs (dt_biased)
        dt_negative = Neg (dt_size)
        dt_fraction = Softplus (dt_negative)
        dt_positive = Relu (dt_biased)
        dt_soft = Add (dt_positive, dt_fraction)
        dt_low = Constant <value_float: float = @dt_min> ()
        dt_high = Constant <value_float: float = @dt_max> ()
        dt_clamped = Clip (dt_soft, dt_low, dt_high)
        step = Mul (dt_clamped, mask_of_head)

        # exp(-200) is 0 in float32 already; the floor keeps sums and products finite.
        dA_floor = Constant <value_float: float = -200.0> ()
        dA_exact = Mul (step, A)
        dA = Max (dA_exact, dA_floor)
        x_wide = Cast <to = 1> (x)
        step_of_row = Unsqueeze (step, last)
        X = Mul (x_wide, step_of_row)
        # Without the mask a large B at a padding position could meet X = 0 as infinity.
        B_wide = Cast <to = 1> (B)
        mask_of_state = Unsqueeze (mask_wide, groups_and_states)
        B_real = Mul (B_wide, mask_of_state)
        C_wide = Cast <to = 1> (C)

        # T is padded to a multiple of q.
        tokens = Shape <start = 1, end = 2> (x)
        chunk = Constant <value_int: int = @chunk_size> ()
        q = Min (tokens, chunk)
        minus_tokens = Neg (tokens)
        missing = Mod (minus_tokens, q)
        pads = Concat <axis = 0> (zero, missing)
        dA_padded = Pad (dA, pads, , one)
        X_padded = Pad (X, pads, , one)
        B_padded = Pad (B_real, pads, , one)
        C_padded = Pad (C_wide, pads, , one)

        # Chunks first, heads split into groups: [chunk, batch, group, head of group, q, ...].
        heads = Shape <start = 2, end = 3> (x)
        head_size = Shape <start = 3, end = 4> (x)
        groups = Shape <start = 2, end = 3> (B)
        states = Shape <start = 3, end = 4> (B)
        heads_of_group = Div (heads, groups)
        X_shape = Concat <axis = 0> (zero, last, q, groups, heads_of_group, head_size)
        X_split = Reshape (X_padded, X_shape)
        X_chunks = Transpose <perm = [1, 0, 3, 4, 2, 5]> (X_split)
        dA_shape = Concat <axis = 0> (zero, last, q, groups, heads_of_group, one)
        dA_split = Reshape (dA_padded, dA_shape)
        dA_chunks = Transpose <perm = [1, 0, 3, 4, 2, 5]> (dA_split)
        BC_shape = Concat <axis = 0> (zero, last, q, groups, one, states)
        B_split = Reshape (B_padded, BC_shape)
        B_chunks = Transpose <perm = [1, 0, 3, 4, 2, 5]> (B_split)
        C_split = Reshape (C_padded, BC_shape)
        C_chunks = Transpose <perm = [1, 0, 3, 4, 2, 5]> (C_split)
        S_shape = Concat <axis = 0> (zero, groups, heads_of_group, head_size, states)
        S_first = Reshape (state, S_shape)

        # 1 where token r comes after token s, in row r and column s.
        below = Constant <value_int: int = -1> ()
        square = Concat <axis = 0> (q, q)
        ones = ConstantOfShape <value = float[1] {{1.0}}> (square)
        after = Trilu <upper = 0> (ones, below)
        rows = Constant <value_int: int = -2> ()
        row_axis = Constant <value_ints: ints = [-2]> ()
        past_end = Constant <value_ints: ints = [{2**63 - 1}]> ()

        S_last, Y_chunks = Scan <num_scan_inputs = 4, body = each_chunk (
            float[batch, groups, heads, head_size, states] S,
            float[batch, groups, heads, q, head_size] X_c,
            float[batch, groups, heads, q, 1] dA_c,
            float[batch, groups, 1, q, states] B_c,
            float[batch, groups, 1, q, states] C_c
        ) => (
            float[batch, groups, heads, head_size, states] S_after,
            float[batch, groups, heads, q, head_size] Y
        ) {{
            # Step 1 of the listing, within the chunk. Above its diagonal L is 1, and CB is 0.
            dA_after = Mul (dA_c, after)
            segment_sum = CumSum (dA_after, rows)
            L = Exp (segment_sum)
            B_T = Transpose <perm = [0, 1, 2, 4, 3]> (B_c)
            CB_all = MatMul (C_c, B_T)
            CB = Trilu <upper = 0> (CB_all)
            M = Mul (CB, L)
            Y_diag = MatMul (M, X_c)

            # Step 4: what the tokens read from the state before the chunk.
            A_cumsum = CumSum (dA_c, rows)
            state_decay_out = Exp (A_cumsum)
            S_T = Transpose <perm = [0, 1, 2, 4, 3]> (S)
            C_S = MatMul (C_c, S_T)
            Y_off = Mul (C_S, state_decay_out)
            Y = Add (Y_diag, Y_off)

            # Steps 2 and 3: the state after the chunk; the last row of L decays to its end.
            L_last = Slice (L, last, past_end, row_axis)
            decay_states = Transpose <perm = [0, 1, 2, 4, 3]> (L_last)
            X_decayed = Mul (X_c, decay_states)
            X_T = Transpose <perm = [0, 1, 2, 4, 3]> (X_decayed)
            S_new = MatMul (X_T, B_c)
            decay_chunk = Slice (state_decay_out, last, past_end, row_axis)
            S_kept = Mul (S, decay_chunk)
            S_after = Add (S_kept, S_new)
        }}> (S_first, X_chunks, dA_chunks, B_chunks, C_chunks)

        state_shape = Shape (state)
        new_state = Reshape (S_last, state_shape)
        Y_split = Transpose <perm = [1, 0, 4, 2, 3, 5]> (Y_chunks)
        Y_shape = Concat <axis = 0> (zero, last, heads, head_size)
        Y_padded = Reshape (Y_split, Y_shape)
        Y_scan = Slice (Y_padded, zero, tokens, one)
        D_of_row = Unsqueeze (D, last)
        skip = Mul (x_wide, D_of_row)
        Y_all = Add (Y_scan, skip)
        y = CastLike (Y_all, x)
    }}
    """
    return onnx.parser.parse_function(text)


def refusal(sizes: Mapping[str, int], dtype: str) -> str:
    """Why the kernels do not take these sizes, and the way out; empty where they do."""
    if max(sizes["Pm"], sizes["Ns"]) > MOST_STATES:
        return (
            f"head size {sizes['Pm']} and state size {sizes['Ns']}; the kernels take up to "
            f"{MOST_STATES} of each: export for --target ort"
        )
    return ""


mamba2_scan = Operator(
    "Mamba2Scan",
    doc=__doc__ or "",
    eager=eager,
    body=lambda _: function_body(),
    refusal=refusal,
    inputs=(
        tensor("x", "T", "B T Hm Pm"),
        tensor("dt", "T", "B T Hm"),
        # Memories long and short, as a model has them.
        tensor("A", "float32", "Hm", draw="uniform -16 -1"),
        tensor("B", "T", "B T G Ns"),
        tensor("C", "T", "B T G Ns", draw="scaled"),
        tensor("D", "float32", "Hm", draw="uniform 0.5 1.5"),
        tensor("dt_bias", "float32", "Hm", draw="uniform -6 -1"),
        tensor("state", "float32", "B Hm Pm Ns"),
        tensor("mask", "T", "B T", draw="ones"),
    ),
    outputs=(tensor("y", "T", "B T Hm Pm"), tensor("new_state", "float32", "B Hm Pm Ns")),
    attributes=(
        Attribute("chunk_size", "int"),
        Attribute("dt_min", "float"),
        Attribute("dt_max", "float"),
    ),
    # The kernels choose their own chunks, which changes no result.
    call="batch=B tokens=T heads=Hm head_size=Pm groups=G states=Ns dt_min dt_max",
    kernels="mamba2",
    wide="time step, state",
    onnx_runtime="LinearAttention",
)
