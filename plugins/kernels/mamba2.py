"""Triton kernels of ``ingot::Mamba2Scan`` and of the causal convolution before it.

One token goes through ``_scan_step``. Several go through the chunked form: T is cut into chunks of
Q tokens and five kernels follow one another::

    _scan_times     dt' of every token, and the running sums of dt' A within its chunk
    _scan_states    what each chunk alone adds to the state
    _scan_carry     the state before each chunk, chunk after chunk
    _scan_products  C B^T within each chunk, once for all heads of a group
    _scan_outputs   y

The host layer (``plugins/csrc/mamba2.cpp``) picks Q, a multiple of 64, and all grids. It may do a
call in parts, several rows or a stretch of one row's tokens: ``first_row`` and ``first_token``, the
begin of a chunk, say where a part lies in the operator's tensors. Workspace holds one part alone.

Source: Mamba-2 (Dao and Gu 2024, arXiv:2405.21060), section 6 and listing 1. Letters are those of
docs/design.md; in shapes of the workspace, B and T are those of the part, and ``padded`` is T
rounded up to whole chunks. Sums are float32, but for those of dt' A.
"""

# Compile-time constants are in capitals, and the paper's state keeps its name.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import triton
import triton.language as tl

from ingot.plugins.activations import ACTIVATIONS
from ingot.plugins.causal_conv import MOST_WIDTH
from ingot.plugins.kernels.form import DTYPES, TUNED, Form
from ingot.plugins.mamba2_scan import MOST_STATES

# Triton's interpreter multiplies the bit patterns of bfloat16; there each operand is widened first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

LOG2_E = tl.constexpr(1.4426950408889634)
# exp(-200) is 0 in float32 already; the floor keeps sums of dt' A finite.
DECAY_FLOOR = tl.constexpr(-200.0)

# What is none of these is the identity.
SILU = tl.constexpr(ACTIVATIONS["silu"].number)
GELU = tl.constexpr(ACTIVATIONS["gelu"].number)
GELU_TANH = tl.constexpr(ACTIVATIONS["gelu_tanh"].number)
RELU = tl.constexpr(ACTIVATIONS["relu"].number)

# Tiles of 4 KiB of a step: one row of Mamba2-2.7B is 640 blocks, which fill every GPU of the table.
FEW_STATES, STEP_ROWS_FEW = 64, 16
MANY_STATES, STEP_ROWS = 128, 8
# Of the chunked form: tokens, rows of a head and states.
TILE = 64
TIMES_HEADS = 16
CARRY_BLOCK = 512
# Of the convolution. Larger tiles of eight taps spill registers.
CONV_CHANNELS = 128
FEW_TAPS, CONV_TOKENS_FEW_TAPS = 4, 16
CONV_TOKENS_MANY_TAPS = 4

# What the plans in plugins/csrc/mamba2.cpp know of the forms.
PLAN_CONSTANTS = {
    "kFewStates": FEW_STATES,
    "kStepRowsFew": STEP_ROWS_FEW,
    "kStepRows": STEP_ROWS,
    "kTile": TILE,
    "kTimesHeads": TIMES_HEADS,
    "kCarryBlock": CARRY_BLOCK,
    "kConvChannels": CONV_CHANNELS,
    "kFewTaps": FEW_TAPS,
    "kConvTokensFewTaps": CONV_TOKENS_FEW_TAPS,
    "kConvTokensManyTaps": CONV_TOKENS_MANY_TAPS,
    "kMaxSide": MOST_STATES,
    "kMaxWidth": MOST_WIDTH,
}


@triton.jit
def _time_step(dt, dt_bias, mask, dt_min, dt_max):
    """dt' = mask * clamp(softplus(dt + dt_bias), dt_min, dt_max), all float32."""
    v = dt + dt_bias
    e = tl.exp(tl.where(v > 20.0, 0.0, v))
    # log1p(e), which Triton does not have: the error of 1 + e cancels in log(u) / (u - 1). With
    # log(1 + e) alone a step of 1e-4 would have three digits.
    u = 1.0 + e
    small = u == 1.0
    log1p = tl.where(small, e, tl.log(u) * (e / tl.where(small, 1.0, u - 1.0)))
    softplus = tl.where(v > 20.0, v, log1p)
    return mask * tl.clamp(softplus, dt_min, dt_max, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _product(a, b, total):
    """total + a @ b of one dtype. tf32 alone has 11 bits; in three passes it has float32's."""
    if INTERPRETED:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def _halves(wide):
    """A number as the sum of two bfloat16, to 17 bits; exact for bfloat16 and float16."""
    high = wide.to(tl.bfloat16)
    return high, (wide.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _mixed_product(a, b, total):
    """total + a @ b, where one is float32 whatever the other's dtype.

    Rounding the float32 side (state, or x and C B^T times decays) to bfloat16 costs 2e-3 of the
    result; its two halves cost 1e-5 and one more pass, and these kernels wait for memory, not for
    products. Halves in float16 could overflow, so float16 goes through bfloat16 too.
    """
    if a.dtype == b.dtype:
        total = _product(a, b, total)
    else:
        a_high, a_low = _halves(a)
        b_high, b_low = _halves(b)
        total = _product(a_high, b_high, total)
        if a.dtype != tl.bfloat16:
            total = _product(a_low, b_high, total)
        if b.dtype != tl.bfloat16:
            total = _product(a_high, b_low, total)
    return total


@triton.jit
def _scan_step(
    x,
    dt,
    a,
    b,
    c,
    d,
    dt_bias,
    state,
    mask,
    y,
    new_state,
    heads,
    head_size,
    groups,
    states,
    dt_min,
    dt_max,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The recurrence for T = 1; reads and writes each element of the state once.

    Grid (B * Hm, tiles of Pm). ``new_state`` may be ``state``.
    """
    row = tl.program_id(0)
    batch = row // heads
    head = row % heads
    group = batch * groups + head // (heads // groups)
    step = _time_step(
        tl.load(dt + row).to(tl.float32),
        tl.load(dt_bias + head),
        tl.load(mask + batch).to(tl.float32),
        dt_min,
        dt_max,
    )
    decay = tl.exp(step * tl.load(a + head))

    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_p = p < head_size
    at_x = row.to(tl.int64) * head_size + p
    x_row = tl.load(x + at_x, mask=in_p, other=0.0).to(tl.float32)
    scaled = step * x_row
    # One reduction behind the loop, not one in each turn: it is faster, and what it adds are
    # rounded numbers. Of products it would be fused multiply-adds, by which threads that add the
    # same numbers get different last bits.
    products = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for first in range(0, states, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        in_n = n < states
        inside = in_p[:, None] & in_n[None, :]
        at = row.to(tl.int64) * head_size * states + (p[:, None] * states + n[None, :])
        at_group = group.to(tl.int64) * states + n
        b_row = tl.load(b + at_group, mask=in_n, other=0.0).to(tl.float32)
        c_row = tl.load(c + at_group, mask=in_n, other=0.0).to(tl.float32)
        old = tl.load(state + at, mask=inside, other=0.0)
        new = decay * old + scaled[:, None] * b_row[None, :]
        tl.store(new_state + at, new, mask=inside)
        products += new * c_row[None, :]
    result = tl.sum(products, axis=1) + tl.load(d + head) * x_row
    tl.store(y + at_x, result.to(y.dtype.element_ty), mask=in_p)


@triton.jit
def _scan_times(
    dt,
    a,
    dt_bias,
    mask,
    steps,
    sums_high,
    sums_low,
    tokens,
    heads,
    chunk,
    dt_min,
    dt_max,
    first_row,
    first_token,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dt' and the running sums of dt' A / ln 2 in each chunk, ``[B, Hm, padded]`` float32.

    A decay is 2 to a difference of two sums. They may be thousands where the difference is small,
    and float32 would leave it no digits; so they are summed in float64 and kept as two float32.

    Grid (tiles of Hm, chunks, B). dt' is 0 past T, whose mask is read as 0.
    """
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h = h < heads
    batch = tl.program_id(2).to(tl.int64)
    padded = tl.num_programs(1) * chunk
    token = (first_row + batch) * tokens + first_token
    a_row = tl.load(a + h, mask=in_h, other=0.0)
    bias_row = tl.load(dt_bias + h, mask=in_h, other=0.0)
    carried = tl.zeros([BLOCK_H], tl.float64)
    for first in range(0, chunk, BLOCK_T):
        t = tl.program_id(1) * chunk + first + tl.arange(0, BLOCK_T)
        in_t = t < tokens - first_token
        inside = in_t[:, None] & in_h[None, :]
        at = (token + t)[:, None] * heads + h[None, :]
        step = _time_step(
            tl.load(dt + at, mask=inside, other=0.0).to(tl.float32),
            bias_row[None, :],
            tl.load(mask + token + t, mask=in_t, other=0.0).to(tl.float32)[:, None],
            dt_min,
            dt_max,
        )
        decay = tl.maximum(step * a_row[None, :], DECAY_FLOOR, tl.PropagateNan.ALL)
        decay = decay.to(tl.float64) * LOG2_E
        sums = carried[None, :] + tl.cumsum(decay, axis=0)
        high = sums.to(tl.float32)
        low = (sums - high.to(tl.float64)).to(tl.float32)
        to = (batch * heads + h)[None, :] * padded + t[:, None]
        tl.store(steps + to, step, mask=in_h[None, :])
        tl.store(sums_high + to, high, mask=in_h[None, :])
        tl.store(sums_low + to, low, mask=in_h[None, :])
        carried += tl.sum(decay, axis=0)


@triton.jit
def _scan_states(
    x,
    b,
    steps,
    sums_high,
    sums_low,
    carried,
    tokens,
    heads,
    head_size,
    groups,
    states,
    chunk,
    first_row,
    first_token,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Each chunk's own part of the state at its end, ``carried [B, chunks, Hm, Pm, Ns]`` float32.

    Grid (B * Hm, tiles of Pm times tiles of Ns, chunks); neighbours share B in the cache.
    """
    row = tl.program_id(0)
    batch = (row // heads).to(tl.int64)
    head = row % heads
    p_tiles = tl.cdiv(head_size, BLOCK_P)
    p = tl.program_id(1) % p_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(1) // p_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    in_p = p < head_size
    in_n = n < states
    begin = tl.program_id(2) * chunk
    left = tokens - first_token - begin
    token = (first_row + batch) * tokens + first_token + begin
    x += (token * heads + head) * head_size
    b += (token * groups + head // (heads // groups)) * states
    times = row.to(tl.int64) * (tl.num_programs(2) * chunk) + begin
    last_high = tl.load(sums_high + times + chunk - 1)
    last_low = tl.load(sums_low + times + chunk - 1)

    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for first in range(0, min(chunk, left), BLOCK_K):
        t = first + tl.arange(0, BLOCK_K)
        in_t = t < left
        to_end = (last_high - tl.load(sums_high + times + t)) + (
            last_low - tl.load(sums_low + times + t)
        )
        weight = tl.load(steps + times + t) * tl.exp2(to_end)
        x_tile = tl.load(
            x + (t[:, None] * (heads * head_size) + p[None, :]),
            mask=in_t[:, None] & in_p[None, :],
            other=0.0,
        )
        b_tile = tl.load(
            b + (t[:, None] * (groups * states) + n[None, :]),
            mask=in_t[:, None] & in_n[None, :],
            other=0.0,
        )
        # x meets the step before B does: 0 * x * B is 0 where x * B alone could be infinite.
        scaled = x_tile.to(tl.float32) * weight[:, None]
        total = _mixed_product(tl.trans(scaled), b_tile, total)
    carried += ((batch * tl.num_programs(2) + tl.program_id(2)) * heads + head) * (
        head_size * states
    )
    tl.store(
        carried + (p[:, None] * states + n[None, :]), total, mask=in_p[:, None] & in_n[None, :]
    )


@triton.jit
def _scan_carry(
    state,
    sums_high,
    sums_low,
    carried,
    new_state,
    heads,
    size,
    chunks,
    chunk,
    first_row,
    BLOCK: tl.constexpr,
):
    """Turn each chunk's part into the state before that chunk, in place, and find the last state.

    Grid (B * Hm, tiles of ``size`` = Pm * Ns). ``new_state`` may be ``state``.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    # The sums of a chunk's last token.
    last = row * chunks * chunk + chunk - 1
    place = carried + (row // heads * chunks * heads + row % heads) * size + i
    of_state = (first_row.to(tl.int64) * heads + row) * size + i
    S = tl.load(state + of_state, mask=inside, other=0.0)
    # A tile, since the interpreter cannot broadcast a comparison of two scalars.
    count = tl.full([BLOCK], chunks, tl.int32)
    own = tl.load(place, mask=inside & (count > 0), other=0.0)
    for k in range(chunks):
        # Read before the write that would make it wait.
        following = tl.load(place + heads * size, mask=inside & (count > k + 1), other=0.0)
        decay = tl.exp2(tl.load(sums_high + last) + tl.load(sums_low + last))
        tl.store(place, S, mask=inside)
        S = decay * S + own
        own = following
        place += heads * size
        last += chunk
    tl.store(new_state + of_state, S, mask=inside)


@triton.jit
def _scan_products(
    b,
    c,
    products,
    tokens,
    groups,
    states,
    chunk,
    padded,
    first_row,
    first_token,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """C B^T of each chunk, ``products [B, G, padded, Q]`` float32; no tile above the diagonal.

    Grid (B * G, tiles of T, tiles of Q).
    """
    batch = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    row_begin = tl.program_id(1) * BLOCK_T
    begin = row_begin // chunk * chunk
    column_begin = begin + tl.program_id(2) * BLOCK_T
    if column_begin <= row_begin:
        rows = tl.arange(0, BLOCK_T)
        left = tokens - first_token
        token = (first_row + batch) * tokens + first_token
        c += ((token + row_begin) * groups + group) * states
        b += ((token + column_begin) * groups + group) * states
        total = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        for first in range(0, states, BLOCK_K):
            n = first + tl.arange(0, BLOCK_K)
            at = rows[:, None] * (groups * states) + n[None, :]
            in_n = (n < states)[None, :]
            c_tile = tl.load(c + at, mask=(row_begin + rows < left)[:, None] & in_n, other=0.0)
            b_tile = tl.load(b + at, mask=(column_begin + rows < left)[:, None] & in_n, other=0.0)
            total = _product(c_tile, tl.trans(b_tile), total)
        products += (tl.program_id(0).to(tl.int64) * padded + row_begin) * chunk
        columns = column_begin - begin + rows
        tl.store(products + (rows[:, None] * chunk + columns[None, :]), total)


@triton.jit
def _scan_outputs(
    x,
    c,
    d,
    steps,
    sums_high,
    sums_low,
    carried,
    products,
    y,
    tokens,
    heads,
    head_size,
    groups,
    states,
    chunk,
    padded,
    first_row,
    first_token,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y of every token: from the tokens before it in its chunk, from the state before, and D x.

    Grid (B * Hm, tiles of Pm, tiles of T); neighbours share C B^T and C in the cache.
    """
    row = tl.program_id(0)
    batch = (row // heads).to(tl.int64)
    head = row % heads
    group = head // (heads // groups)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_p = p < head_size
    row_begin = tl.program_id(2) * BLOCK_T
    begin = row_begin // chunk * chunk
    rows = tl.arange(0, BLOCK_T)
    left = tokens - first_token
    in_rows = row_begin + rows < left
    times = row.to(tl.int64) * padded
    high = tl.load(sums_high + times + row_begin + rows)
    low = tl.load(sums_low + times + row_begin + rows)

    chunk_index = batch * (padded // chunk) + begin // chunk
    carried += (chunk_index * heads + head) * (head_size * states)
    token = (first_row + batch) * tokens + first_token
    c += ((token + row_begin) * groups + group) * states
    total = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
    for first in range(0, states, BLOCK_K):
        n = first + tl.arange(0, BLOCK_K)
        in_n = n < states
        c_tile = tl.load(
            c + (rows[:, None] * (groups * states) + n[None, :]),
            mask=in_rows[:, None] & in_n[None, :],
            other=0.0,
        )
        S = tl.load(
            carried + (p[:, None] * states + n[None, :]),
            mask=in_p[:, None] & in_n[None, :],
            other=0.0,
        )
        total = _mixed_product(c_tile, tl.trans(S), total)
    total *= tl.exp2(high + low)[:, None]

    x += (token * heads + head) * head_size
    products += ((batch * groups + group) * padded + row_begin) * chunk
    for column_begin in range(begin, row_begin + BLOCK_T, BLOCK_K):
        t = column_begin + tl.arange(0, BLOCK_K)
        step = tl.load(steps + times + t)
        exponent = (high[:, None] - tl.load(sums_high + times + t)[None, :]) + (
            low[:, None] - tl.load(sums_low + times + t)[None, :]
        )
        # Above the diagonal the exponent is positive; at a padding position C B^T may be infinite.
        used = (row_begin + rows[:, None] >= t[None, :]) & (step != 0.0)[None, :]
        weight = tl.load(products + (rows[:, None] * chunk + (t - begin)[None, :]))
        weight = tl.where(used, weight, 0.0) * tl.exp2(tl.where(used, exponent, 0.0))
        weight *= step[None, :]
        x_tile = tl.load(
            x + (t.to(tl.int64)[:, None] * (heads * head_size) + p[None, :]),
            mask=(t < left)[:, None] & in_p[None, :],
            other=0.0,
        )
        total = _mixed_product(weight, x_tile, total)

    at = (row_begin + rows).to(tl.int64)[:, None] * (heads * head_size) + p[None, :]
    inside = in_rows[:, None] & in_p[None, :]
    total += tl.load(d + head) * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    y += (token * heads + head) * head_size
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _activate(v, activation):
    """The activation of this number, float32."""
    if activation == SILU:
        v = v / (1.0 + tl.exp(-v))
    elif activation == GELU:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif activation == GELU_TANH:
        # (1 + tanh(u)) / 2 is the logistic function of 2u.
        v = v / (1.0 + tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v)))
    elif activation == RELU:
        v = tl.maximum(v, 0.0, tl.PropagateNan.ALL)
    return v


@triton.jit
def _conv(
    x,
    state,
    weight,
    bias,
    y,
    new_state,
    tokens,
    channels,
    width,
    has_bias,
    activation,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TAPS: tl.constexpr,
):
    """The causal depthwise convolution with state; ``width`` is at most TAPS, a power of two.

    Grid (tiles of C times tiles of T, B). ``new_state`` may be ``state`` where T is at most 1.
    """
    c_tiles = tl.cdiv(channels, BLOCK_C)
    t_tile = tl.program_id(0) // c_tiles
    c = tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    t = t_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    batch = tl.program_id(1).to(tl.int64)
    past = width - 1
    x += batch * tokens * channels
    state += batch * channels * past
    tile = (t_tile * BLOCK_T).to(tl.int64) * channels

    # Tiles, since the interpreter cannot broadcast a comparison of two scalars.
    biased = tl.full([BLOCK_C], has_bias, tl.int32) != 0
    taps = tl.full([BLOCK_C], width, tl.int32)
    total = tl.load(bias + c, mask=in_c & biased, other=0.0).to(tl.float32)[None, :]
    total = tl.broadcast_to(total, [BLOCK_T, BLOCK_C])
    for back in tl.static_range(TAPS):
        # The tap that lies ``back`` tokens back: of x, or of the state before x.
        used = in_c & (taps > back)
        w = tl.load(weight + c * width + (past - back), mask=used, other=0.0).to(tl.float32)
        source = t - back
        inside = (source < tokens)[:, None] & used[None, :]
        at = tile + ((source - t_tile * BLOCK_T)[:, None] * channels + c[None, :])
        value = tl.load(x + at, mask=inside & (source >= 0)[:, None], other=0.0).to(tl.float32)
        if back > 0:
            value += tl.load(
                state + (c[None, :] * past + (source + past)[:, None]),
                mask=inside & (source < 0)[:, None],
                other=0.0,
            ).to(tl.float32)
        total += value * w[None, :]
    y += batch * tokens * channels
    at = tile + (tl.arange(0, BLOCK_T)[:, None] * channels + c[None, :])
    result = _activate(total, activation).to(y.dtype.element_ty)
    tl.store(y + at, result, mask=(t < tokens)[:, None] & in_c[None, :])

    if t_tile == tl.num_programs(0) // c_tiles - 1:
        column = tl.arange(0, TAPS)
        kept = in_c[:, None] & (column < past)[None, :]
        last = (tokens - past + column)[None, :]
        of_x = tl.load(
            x + (last.to(tl.int64) * channels + c[:, None]), mask=kept & (last >= 0), other=0.0
        )
        of_state = tl.load(
            state + (c[:, None] * past + (last + past)), mask=kept & (last < 0), other=0.0
        )
        # One thread may write what another has yet to read, where new_state is state.
        tl.debug_barrier()
        tl.store(
            new_state + batch * channels * past + (c[:, None] * past + column[None, :]),
            tl.where(last >= 0, of_x, of_state),
            mask=kept,
        )


def _signature(dtype: str, **types: str) -> dict[str, str]:
    """Argument types, ``*T`` standing for a pointer to the operator's dtype."""
    return {name: f"*{dtype}" if kind == "*T" else kind for name, kind in types.items()}


def _step_forms(dtype: str) -> list[Form]:
    signature = _signature(
        dtype,
        x="*T",
        dt="*T",
        a="*fp32",
        b="*T",
        c="*T",
        d="*fp32",
        dt_bias="*fp32",
        state="*fp32",
        mask="*T",
        y="*T",
        new_state="*fp32",
        heads="i32",
        head_size="i32",
        groups="i32",
        states="i32",
        dt_min="fp32",
        dt_max="fp32",
    )
    aligned = frozenset({"head_size", "states"})
    return [
        Form(f"mamba2_step_{dtype}_{name}", _scan_step, signature, constants, multiples)
        for name, constants, multiples in (
            ("n64", {"BLOCK_P": STEP_ROWS_FEW, "BLOCK_N": FEW_STATES}, aligned),
            ("n128", {"BLOCK_P": STEP_ROWS, "BLOCK_N": MANY_STATES}, aligned),
            ("any", {"BLOCK_P": STEP_ROWS, "BLOCK_N": MANY_STATES}, frozenset[str]()),
        )
    ]


class Pipeline(NamedTuple):
    """How a product of the chunked form runs through its depth; its tile of 64 by 64 stays."""

    block: int
    warps: int
    stages: int

    @property
    def variant(self) -> str:
        """What tells its forms from those of the plain pipeline, in their names."""
        return f"b{self.block}w{self.warps}s{self.stages}"


# Eight warps and a depth of 32 keep float32, whose products are three, within the registers.
_SHIPPED = Pipeline(32, 8, 2)
# The 16-bit types on a Hopper card, measured: 0.75 of the time of the above at every length. Its
# shared memory would leave room for one block where a multiprocessor has 100 KB of it.
_HOPPER = Pipeline(64, 8, 2)

# What benchmarks/gpu.py compares on a Hopper card with the shipped one.
_CANDIDATES = (
    Pipeline(32, 4, 3),
    Pipeline(32, 8, 3),
    Pipeline(64, 4, 2),
    Pipeline(64, 8, 3),
)

_SUMS = {"steps": "*fp32", "sums_high": "*fp32", "sums_low": "*fp32"}
_SIZES = {"heads": "i32", "head_size": "i32", "groups": "i32", "states": "i32", "chunk": "i32"}
# Where a slice of a call begins.
_PART = {"first_row": "i32", "first_token": "i32"}


def _chunk_forms(dtype: str) -> list[Form]:
    forms = [
        Form(
            f"mamba2_times_{dtype}",
            _scan_times,
            _signature(
                dtype,
                dt="*T",
                a="*fp32",
                dt_bias="*fp32",
                mask="*T",
                **_SUMS,
                tokens="i32",
                heads="i32",
                chunk="i32",
                dt_min="fp32",
                dt_max="fp32",
                **_PART,
            ),
            {"BLOCK_T": TILE, "BLOCK_H": TIMES_HEADS},
            frozenset({"chunk", "first_token"}),
        )
    ]
    for name, aligned in (
        ("aligned", frozenset({"head_size", "states"})),
        ("any", frozenset[str]()),
    ):
        forms += [
            _states_form(dtype, name, aligned),
            _products_form(dtype, name, aligned),
            _outputs_form(dtype, name, aligned),
        ]
    if dtype != "fp32":
        forms += [
            replace(form, capabilities=TUNED)
            for form in _variant(dtype, frozenset({"head_size", "states"}), _HOPPER)
        ]
    return forms


def _variant(dtype: str, aligned: frozenset[str], pipeline: Pipeline) -> tuple[Form, Form]:
    name = f"aligned_{pipeline.variant}"
    return (
        _states_form(dtype, name, aligned, pipeline),
        _outputs_form(dtype, name, aligned, pipeline),
    )


def _states_form(
    dtype: str, name: str, aligned: frozenset[str], pipeline: Pipeline = _SHIPPED
) -> Form:
    return Form(
        f"mamba2_states_{dtype}_{name}",
        _scan_states,
        _signature(
            dtype, x="*T", b="*T", **_SUMS, carried="*fp32", tokens="i32", **_SIZES, **_PART
        ),
        {"BLOCK_P": TILE, "BLOCK_N": TILE, "BLOCK_K": pipeline.block},
        frozenset({"chunk", "first_token", *aligned}),
        num_warps=pipeline.warps,
        num_stages=pipeline.stages,
    )


def _products_form(dtype: str, name: str, aligned: frozenset[str]) -> Form:
    return Form(
        f"mamba2_products_{dtype}_{name}",
        _scan_products,
        _signature(
            dtype,
            b="*T",
            c="*T",
            products="*fp32",
            tokens="i32",
            groups="i32",
            states="i32",
            chunk="i32",
            padded="i32",
            **_PART,
        ),
        {"BLOCK_T": TILE, "BLOCK_K": _SHIPPED.block},
        frozenset({"chunk", "padded", "first_token", *aligned & {"states"}}),
        num_warps=_SHIPPED.warps,
        num_stages=_SHIPPED.stages,
    )


def _outputs_form(
    dtype: str, name: str, aligned: frozenset[str], pipeline: Pipeline = _SHIPPED
) -> Form:
    return Form(
        f"mamba2_outputs_{dtype}_{name}",
        _scan_outputs,
        _signature(
            dtype,
            x="*T",
            c="*T",
            d="*fp32",
            **_SUMS,
            carried="*fp32",
            products="*fp32",
            y="*T",
            tokens="i32",
            **_SIZES,
            padded="i32",
            **_PART,
        ),
        {"BLOCK_T": TILE, "BLOCK_P": TILE, "BLOCK_K": pipeline.block},
        frozenset({"chunk", "padded", "first_token", *aligned}),
        num_warps=pipeline.warps,
        num_stages=pipeline.stages,
    )


def tuning_forms() -> list[Form]:
    """Forms in bfloat16 with other pipelines than the shipped one, to be compared with it."""
    aligned = frozenset({"head_size", "states"})
    return [
        replace(form, capabilities=TUNED, candidate=f"scan {pipeline.variant}")
        for pipeline in _CANDIDATES
        for form in _variant("bf16", aligned, pipeline)
    ]


def tuning_variants() -> list[str]:
    """What the names of the scan's forms end with; the first two are shipped."""
    return ["", _HOPPER.variant, *(pipeline.variant for pipeline in _CANDIDATES)]


def _carry_forms() -> list[Form]:
    signature = {
        "state": "*fp32",
        "sums_high": "*fp32",
        "sums_low": "*fp32",
        "carried": "*fp32",
        "new_state": "*fp32",
        "heads": "i32",
        "size": "i32",
        "chunks": "i32",
        "chunk": "i32",
        "first_row": "i32",
    }
    return [
        Form(f"mamba2_carry_{name}", _scan_carry, signature, {"BLOCK": CARRY_BLOCK}, multiples)
        for name, multiples in (
            ("aligned", frozenset({"size", "chunk"})),
            ("any", frozenset({"chunk"})),
        )
    ]


def _conv_forms(dtype: str) -> list[Form]:
    signature = _signature(
        dtype,
        x="*T",
        state="*T",
        weight="*T",
        bias="*T",
        y="*T",
        new_state="*T",
        tokens="i32",
        channels="i32",
        width="i32",
        has_bias="i32",
        activation="i32",
    )
    return [
        Form(
            f"mamba2_conv_{dtype}_{name}",
            _conv,
            signature,
            {"BLOCK_T": block, "BLOCK_C": CONV_CHANNELS, "TAPS": taps},
            multiples,
        )
        for name, block, taps, multiples in (
            ("one_w4", 1, FEW_TAPS, frozenset({"channels"})),
            ("one_any", 1, MOST_WIDTH, frozenset[str]()),
            ("many_w4", CONV_TOKENS_FEW_TAPS, FEW_TAPS, frozenset({"channels"})),
            ("many_any", CONV_TOKENS_MANY_TAPS, MOST_WIDTH, frozenset[str]()),
        )
    ]


def forms() -> list[Form]:
    """Every compiled form of this file."""
    result = _carry_forms()
    for dtype in DTYPES:
        result += _step_forms(dtype) + _chunk_forms(dtype) + _conv_forms(dtype)
    return result
