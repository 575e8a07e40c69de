"""Kernels of ``ingot::MoeDispatch`` and ``ingot::MoeLinear``; ``plugins/csrc/moe.cpp`` plans them.

A *choice* is one of the N*K pairs of a token and an expert it picked, numbered ``token * K + k``.
Each choice has a row of its own in every intermediate tensor, so no two programs ever add into one
place: results do not depend on the order in which programs run.

One token is a matrix-vector product per choice (``*_one``). More tokens are a grouped matrix
product (``gate_up``, ``linear``): a program takes up to ROWS choices of one expert and COLUMNS of
its output features. Which choices those are is found by each program itself while there are few
(``SCAN_CHOICES``), and by ``group`` beforehand where there are many.

Sizes of tensor sides come divided by GRAIN, the elements of 16 bytes: multiplied by it in the
kernel, they tell the compiler that every row starts at a multiple of 16 bytes, which makes loads 16
bytes wide whatever the size. Only float32 has forms with GRAIN 1, for sizes that are no multiple of
4.

The formulas and their sources are in ``plugins/moe_dispatch.py`` and ``plugins/moe_linear.py``.
"""

# ruff: noqa: N803 -- Triton's compile-time constants are written in capitals.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import triton
import triton.language as tl

from ingot.plugins.activations import ACTIVATIONS
from ingot.plugins.kernels.form import COMPUTE_CAPABILITIES, TUNED, Form
from ingot.plugins.moe_dispatch import MOST_CHOSEN, MOST_EXPERTS

# The most choices that the programs of a grouped product search by themselves.
SCAN_CHOICES = 256
# Features that a program of a form for one token takes, and one of combine.
ONE_COLUMNS = 4
COMBINE_BLOCK = 512
# Rows and columns of the tile for few tokens, whose programs search, and of that of float32, where
# three products for one leave no registers for more.
FEW_ROWS, FEW_COLUMNS = 16, 32
FLOAT32_ROWS, FLOAT32_COLUMNS = 64, 32

# What the plans in plugins/csrc/moe.cpp know of the forms.
PLAN_CONSTANTS = {
    "kMaxExperts": MOST_EXPERTS,
    "kMaxTopK": MOST_CHOSEN,
    "kScanChoices": SCAN_CHOICES,
    "kOneColumns": ONE_COLUMNS,
    "kCombineBlock": COMBINE_BLOCK,
    "kFewRows": FEW_ROWS,
    "kFewColumns": FEW_COLUMNS,
    "kFloat32Rows": FLOAT32_ROWS,
    "kFloat32Columns": FLOAT32_COLUMNS,
}

# Triton's interpreter multiplies the bit patterns of bfloat16; there each operand is widened first.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_SILU = tl.constexpr(ACTIVATIONS["silu"].number)
_GELU = tl.constexpr(ACTIVATIONS["gelu"].number)
_GELU_TANH = tl.constexpr(ACTIVATIONS["gelu_tanh"].number)
_RELU = tl.constexpr(ACTIVATIONS["relu"].number)


@triton.jit
def _activate(gate, activation):
    """The activation, a run-time number, of a float32 tensor."""
    result = gate
    if activation == _SILU:
        result = gate * tl.sigmoid(gate)
    elif activation == _GELU:
        result = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif activation == _GELU_TANH:
        # (1 + tanh(z)) / 2 is sigmoid(2 z).
        cubic = gate + 0.044715 * gate * gate * gate
        result = gate * tl.sigmoid(1.5957691216057308 * cubic)
    elif activation == _RELU:
        result = tl.where(gate < 0, 0.0, gate)
    return result


@triton.jit
def route(
    logits, ids, weights, experts, top_k, normalize, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Softmax over all experts, then the K largest logits, the lower id first among equals.

    One program per token. logits ``[N, E]`` float32 -> ids ``[N, K]`` int32, weights ``[N, K]``
    float32. A NaN counts as the lowest logit and makes the token's weights NaN.
    """
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_K)
    logit = tl.load(logits + token * experts + expert, mask=expert < experts, other=float("-inf"))
    key = tl.where(logit == logit, logit, float("-inf"))
    top = tl.max(key, 0)
    total = tl.sum(tl.exp(logit - top), 0)
    free = expert < experts
    chosen_id = tl.zeros([BLOCK_K], tl.int32)
    chosen_weight = tl.zeros([BLOCK_K], tl.float32)
    for k in range(top_k):
        best = tl.max(tl.where(free, key, float("-inf")), 0)
        winner = tl.min(tl.where(free & (key == best), expert, BLOCK_E), 0)
        free = free & (expert != winner)
        chosen_id = tl.where(slot == k, winner, chosen_id)
        chosen_weight = tl.where(slot == k, tl.exp(best - top) / total, chosen_weight)
    if normalize != 0:
        chosen_weight = chosen_weight / tl.sum(chosen_weight, 0)
    tl.store(ids + token * top_k + slot, chosen_id, mask=slot < top_k)
    tl.store(weights + token * top_k + slot, chosen_weight, mask=slot < top_k)


@triton.jit
def _expert_of(ids, choice, choices, experts):
    """Experts of some choices as int32; E stands for an id out of range, E + 1 for no choice."""
    found = tl.load(ids + choice, mask=choice < choices, other=0)
    # Compared before it is narrowed: an int64 id may only look right in its low half.
    known = tl.where((found >= 0) & (found < experts), found, experts).to(tl.int32)
    return tl.where(choice < choices, known, experts + 1)


@triton.jit
def group(ids, order, tiles, choices, experts, tile_rows, CHUNK: tl.constexpr):
    """Sort the choices by expert, and cut each expert's choices into tiles of ``tile_rows``.

    Program e of E + 1 writes what belongs to expert e; the last one has the ids out of range. It
    counts by itself what lies before, so it needs no word from the others.

    ids ``[N*K]`` int32 or int64 -> order ``[N*K]`` int32, the choices by expert and rising within
    one; tiles ``[slots, 3]`` int32, each the expert, the first place in ``order`` and how many of
    the expert's choices are left from there on; a surplus tile has 0 or less.

    With b_e choices before expert e, its tiles begin in slot ``b_e // tile_rows + e``. That leaves
    room for all of them, since ``ceil(n / r) <= (b + n) // r - b // r + 1``, needs no sum over the
    experts before, and fills ``N*K // tile_rows + E + 1`` slots without a gap.
    """
    mine = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    before = tl.zeros([CHUNK], tl.int32)
    equal = tl.zeros([CHUNK], tl.int32)
    for start in range(0, choices, CHUNK):
        expert = _expert_of(ids, start + lane, choices, experts)
        before += (expert < mine).to(tl.int32)
        equal += (expert == mine).to(tl.int32)
    begin = tl.sum(before, 0)
    end = begin + tl.sum(equal, 0)

    first_slot = begin // tile_rows + mine
    end_slot = end // tile_rows + mine + 1
    for start in range(first_slot, end_slot, CHUNK):
        slot = start + lane
        at = begin + (slot - first_slot) * tile_rows
        used = slot < end_slot
        tl.store(tiles + 3 * slot, mine + tl.zeros_like(slot), mask=used)
        tl.store(tiles + 3 * slot + 1, at, mask=used)
        tl.store(tiles + 3 * slot + 2, end - at, mask=used)

    place = begin
    for start in range(0, choices, CHUNK):
        here = (_expert_of(ids, start + lane, choices, experts) == mine).to(tl.int32)
        tl.store(order + place + tl.cumsum(here, 0) - 1, start + lane, mask=here != 0)
        place += tl.sum(here, 0)


@triton.jit
def _product(a, b, total):
    """``total + a @ b``; of float32 in three products of tf32.

    That is exact to about 1e-6 and runs on the tensor cores. "ieee" would be one product on the
    ordinary units, with as many registers for operands as for sums.
    """
    if _INTERPRETED:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def _rows_of_tile(ids, tiles, tile, choices, experts, ROWS: tl.constexpr, SCANNED: tl.constexpr):
    """Expert of a tile, its choices ``[ROWS]`` and how many are left: 0 or less for none of them.

    SCANNED is 0 where ``group`` ran before and ``ids`` is its order. Otherwise it bounds N*K, and a
    tile is one expert's choices of rank ``ROWS * pass`` and up; passes follow one another.
    """
    row = tl.arange(0, ROWS)
    if SCANNED == 0:
        expert = tl.load(tiles + 3 * tile)
        begin = tl.load(tiles + 3 * tile + 1)
        count = tl.load(tiles + 3 * tile + 2)
        choice = tl.load(ids + begin + row, mask=row < count, other=0)
    else:
        # Fewer choices than experts: start from the choices, so that hardly a program is idle.
        per_pass = tl.minimum(choices, experts + 1)
        first_rank = tile // per_pass * ROWS
        expert = tile % per_pass
        lane = tl.arange(0, SCANNED)
        expert_of_lane = _expert_of(ids, lane, choices, experts)
        earlier = 0
        if choices <= experts:
            leader = expert
            expert = tl.sum(tl.where(lane == leader, expert_of_lane, 0), 0)
            # Only the first choice of an expert works for it.
            earlier = tl.sum(((expert_of_lane == expert) & (lane < leader)).to(tl.int32), 0)
        mine = (expert_of_lane == expert).to(tl.int32)
        count = tl.where(earlier > 0, 0, tl.sum(mine, 0) - first_rank)
        rank = tl.cumsum(mine, 0) - 1 - first_rank
        found = (mine[None, :] != 0) & (rank[None, :] == row[:, None])
        choice = tl.sum(tl.where(found, lane[None, :], 0), 1)
    return expert, choice, count


@triton.jit
def gate_up(
    x,
    ids,
    tiles,
    weight,
    inner,
    choices,
    top_k,
    experts,
    hidden_grains,
    intermediate_grains,
    activation,
    GRAIN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCANNED: tl.constexpr,
):
    """``act(gate @ x) * (up @ x)`` of every choice, for one tile of choices and features.

    x ``[N, H]``, weight ``[E, 2I, H]`` -> inner ``[N*K, I]``, all of one dtype, summed in float32.
    Tiles of features run fastest over the programs: those of one expert share its weight in the L2
    cache, as do the tiles of choices that follow.
    """
    hidden = hidden_grains * GRAIN
    intermediate = intermediate_grains * GRAIN
    column_tiles = tl.cdiv(intermediate, COLUMNS)
    tile = tl.program_id(0) // column_tiles
    expert, choice, count = _rows_of_tile(ids, tiles, tile, choices, experts, ROWS, SCANNED)
    if count <= 0:
        return

    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row_used = tl.arange(0, ROWS) < count
    column_used = column < intermediate
    depth = tl.arange(0, BLOCK)
    x_at = x + (choice // top_k).to(tl.int64)[:, None] * hidden + depth[None, :]
    gate_row = expert.to(tl.int64) * 2 * intermediate + column
    gate_at = weight + gate_row[None, :] * hidden + depth[:, None]
    up_at = weight + (gate_row + intermediate)[None, :] * hidden + depth[:, None]

    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, hidden, BLOCK):
        inside = start + depth < hidden
        tokens = tl.load(x_at + start, mask=row_used[:, None] & inside[None, :], other=0.0)
        used = inside[:, None] & column_used[None, :]
        gate_tile = tl.load(gate_at + start, mask=used, other=0.0)
        up_tile = tl.load(up_at + start, mask=used, other=0.0)
        gate = _product(tokens, gate_tile, gate)
        up = _product(tokens, up_tile, up)

    result = (_activate(gate, activation) * up).to(inner.dtype.element_ty)
    to = inner + choice.to(tl.int64)[:, None] * intermediate + column[None, :]
    tl.store(to, result, mask=row_used[:, None] & column_used[None, :])


@triton.jit
def linear(
    x,
    ids,
    tiles,
    weight,
    y,
    choices,
    choices_per_row,
    experts,
    in_grains,
    out_grains,
    GRAIN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCANNED: tl.constexpr,
):
    """``weight[expert] @ x`` of every choice, for one tile of choices and features.

    x ``[N*K / choices_per_row, Kin]`` and weight ``[E, O, Kin]`` of one dtype -> y ``[N*K, O]`` of
    that dtype or float32, summed in float32. The choices of no expert become zeros.
    """
    in_features = in_grains * GRAIN
    out_features = out_grains * GRAIN
    column_tiles = tl.cdiv(out_features, COLUMNS)
    tile = tl.program_id(0) // column_tiles
    expert, choice, count = _rows_of_tile(ids, tiles, tile, choices, experts, ROWS, SCANNED)
    if count <= 0:
        return

    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row_used = tl.arange(0, ROWS) < count
    column_used = column < out_features
    depth = tl.arange(0, BLOCK)
    x_at = x + (choice // choices_per_row).to(tl.int64)[:, None] * in_features + depth[None, :]
    weight_row = expert.to(tl.int64) * out_features + column
    weight_at = weight + weight_row[None, :] * in_features + depth[:, None]

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, tl.where(expert < experts, in_features, 0), BLOCK):
        inside = start + depth < in_features
        rows = tl.load(x_at + start, mask=row_used[:, None] & inside[None, :], other=0.0)
        used = inside[:, None] & column_used[None, :]
        weight_tile = tl.load(weight_at + start, mask=used, other=0.0)
        total = _product(rows, weight_tile, total)

    to = y + choice.to(tl.int64)[:, None] * out_features + column[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=row_used[:, None] & column_used[None, :])


@triton.jit
def combine(rows, weights, y, top_k, hidden_grains, GRAIN: tl.constexpr, BLOCK: tl.constexpr):
    """``y[n] = sum_k weights[n, k] * rows[n, k]``, k rising, in float32.

    rows ``[N, K, H]`` and weights ``[N, K]`` float32 -> y ``[N, H]``.
    """
    hidden = hidden_grains * GRAIN
    blocks = tl.cdiv(hidden, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    used = column < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(top_k):
        choice = token * top_k + k
        total += tl.load(weights + choice) * tl.load(
            rows + choice * hidden + column, mask=used, other=0.0
        )
    tl.store(y + token * hidden + column, total.to(y.dtype.element_ty), mask=used)


@triton.jit
def gate_up_one(
    x,
    ids,
    weight,
    inner,
    hidden_grains,
    intermediate_grains,
    activation,
    GRAIN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``act(gate @ x) * (up @ x)`` of one token's choices, for one choice and tile of features.

    x ``[H]``, ids ``[K]`` int32, weight ``[E, 2I, H]`` -> inner ``[K, I]`` float32. A matrix-vector
    product is bound by reading the weight: a tile of it is kept as products until the end, so that
    nothing but loads and multiplications stands in the loop.
    """
    hidden = hidden_grains * GRAIN
    intermediate = intermediate_grains * GRAIN
    column_tiles = tl.cdiv(intermediate, COLUMNS)
    choice = tl.program_id(0) // column_tiles
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    column_used = column < intermediate
    depth = tl.arange(0, BLOCK)
    gate_row = tl.load(ids + choice).to(tl.int64) * 2 * intermediate + column
    gate_at = weight + gate_row[:, None] * hidden + depth[None, :]
    up_at = weight + (gate_row + intermediate)[:, None] * hidden + depth[None, :]

    gate = tl.zeros([COLUMNS, BLOCK], tl.float32)
    up = tl.zeros([COLUMNS, BLOCK], tl.float32)
    for start in range(0, hidden, BLOCK):
        inside = start + depth < hidden
        used = column_used[:, None] & inside[None, :]
        token = tl.load(x + start + depth, mask=inside, other=0.0).to(tl.float32)[None, :]
        gate_tile = tl.load(gate_at + start, mask=used, other=0.0)
        up_tile = tl.load(up_at + start, mask=used, other=0.0)
        gate += gate_tile.to(tl.float32) * token
        up += up_tile.to(tl.float32) * token

    result = _activate(tl.sum(gate, 1), activation) * tl.sum(up, 1)
    tl.store(inner + choice * intermediate + column, result, mask=column_used)


@triton.jit
def down_one(
    inner,
    ids,
    weights,
    weight,
    y,
    top_k,
    hidden_grains,
    intermediate_grains,
    GRAIN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sum_k weights[k] * down[ids[k]] @ inner[k]`` of one token, for one tile of features.

    inner ``[K, I]`` and weights ``[K]`` float32, ids ``[K]`` int32, weight ``[E, H, I]`` -> y
    ``[H]``. Two experts are read side by side, to have enough bytes under way.
    """
    hidden = hidden_grains * GRAIN
    intermediate = intermediate_grains * GRAIN
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_used = column < hidden
    depth = tl.arange(0, BLOCK)
    total = tl.zeros([COLUMNS, BLOCK], tl.float32)
    for k in range(0, top_k, 2):
        # Of an odd number of experts the last one comes again, with weight 0.
        other = tl.minimum(k + 1, top_k - 1)
        share = tl.load(weights + k)
        other_share = tl.where(other > k, tl.load(weights + other), 0.0)
        row = tl.load(ids + k).to(tl.int64) * hidden + column
        other_row = tl.load(ids + other).to(tl.int64) * hidden + column
        at = weight + row[:, None] * intermediate + depth[None, :]
        other_at = weight + other_row[:, None] * intermediate + depth[None, :]
        for start in range(0, intermediate, BLOCK):
            inside = start + depth < intermediate
            used = column_used[:, None] & inside[None, :]
            tile = tl.load(at + start, mask=used, other=0.0)
            other_tile = tl.load(other_at + start, mask=used, other=0.0)
            part = tl.load(inner + k * intermediate + start + depth, mask=inside, other=0.0)
            other_part = tl.load(
                inner + other * intermediate + start + depth, mask=inside, other=0.0
            )
            total += tile.to(tl.float32) * (share * part)[None, :]
            total += other_tile.to(tl.float32) * (other_share * other_part)[None, :]
    tl.store(y + column, tl.sum(total, 1).to(y.dtype.element_ty), mask=column_used)


@triton.jit
def linear_one(
    x,
    ids,
    weight,
    y,
    choices_per_row,
    experts,
    in_grains,
    out_grains,
    GRAIN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``weight[expert] @ x`` of one token's choices, for one choice and tile of features.

    x ``[K / choices_per_row, Kin]``, ids ``[K]`` int64, weight ``[E, O, Kin]`` -> y ``[K, O]``.
    """
    in_features = in_grains * GRAIN
    out_features = out_grains * GRAIN
    column_tiles = tl.cdiv(out_features, COLUMNS)
    choice = tl.program_id(0) // column_tiles
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    column_used = column < out_features
    depth = tl.arange(0, BLOCK)
    expert = tl.load(ids + choice)
    known = (expert >= 0) & (expert < experts)
    x_at = x + (choice // choices_per_row).to(tl.int64) * in_features + depth
    weight_at = weight + (expert * out_features + column)[:, None] * in_features + depth[None, :]

    total = tl.zeros([COLUMNS, BLOCK], tl.float32)
    for start in range(0, tl.where(known, in_features, 0), BLOCK):
        inside = start + depth < in_features
        row = tl.load(x_at + start, mask=inside, other=0.0).to(tl.float32)[None, :]
        used = column_used[:, None] & inside[None, :]
        total += tl.load(weight_at + start, mask=used, other=0.0).to(tl.float32) * row

    to = y + choice.to(tl.int64) * out_features + column
    tl.store(to, tl.sum(total, 1).to(y.dtype.element_ty), mask=column_used)


def _flavours() -> Iterator[tuple[str, str, int]]:
    """Ending of a form's name, Triton type and GRAIN."""
    yield "fp32", "fp32", 4
    yield "fp32_odd", "fp32", 1
    yield "fp16", "fp16", 8
    yield "bf16", "bf16", 8


def forms() -> list[Form]:
    """Every compiled form."""
    found = [
        Form(
            name=f"moe_route_e{experts}",
            function=route,
            signature={
                "logits": "*fp32",
                "ids": "*i32",
                "weights": "*fp32",
                "experts": "i32",
                "top_k": "i32",
                "normalize": "i32",
            },
            constants={"BLOCK_E": experts, "BLOCK_K": MOST_CHOSEN},
            num_warps=warps,
        )
        for experts, warps in ((64, 1), (256, 1), (MOST_EXPERTS, 4))
    ]
    found += [
        Form(
            name=f"moe_group_{ids}",
            function=group,
            signature={
                "ids": f"*{ids}",
                "order": "*i32",
                "tiles": "*i32",
                "choices": "i32",
                "experts": "i32",
                "tile_rows": "i32",
            },
            constants={"CHUNK": 4096},
            num_warps=8,
        )
        for ids in ("i32", "i64")
    ]
    for name, dtype, grain in _flavours():
        found += _one_token(name, dtype, grain)
        found += _grouped(name, dtype, grain)
    return found


def _one_token(name: str, dtype: str, grain: int) -> Iterator[Form]:
    # What counts is bytes of weight under way. In 16 bits the loads of one turn, gate and up or two
    # experts, are 128 bytes a thread, and the registers admit four blocks: 64 KB in each SM. In
    # float32 half of the elements are as many bytes.
    paired = 512 if dtype == "fp32" else 1024
    pointer = f"*{dtype}"
    yield Form(
        name=f"moe_gate_up_one_n4_{name}",
        function=gate_up_one,
        signature={
            "x": pointer,
            "ids": "*i32",
            "weight": pointer,
            "inner": "*fp32",
            "hidden_grains": "i32",
            "intermediate_grains": "i32",
            "activation": "i32",
        },
        constants={"GRAIN": grain, "COLUMNS": ONE_COLUMNS, "BLOCK": paired},
    )
    yield Form(
        name=f"moe_down_one_n4_{name}",
        function=down_one,
        signature={
            "inner": "*fp32",
            "ids": "*i32",
            "weights": "*fp32",
            "weight": pointer,
            "y": pointer,
            "top_k": "i32",
            "hidden_grains": "i32",
            "intermediate_grains": "i32",
        },
        constants={"GRAIN": grain, "COLUMNS": ONE_COLUMNS, "BLOCK": paired},
    )
    yield Form(
        name=f"moe_linear_one_n4_{name}",
        function=linear_one,
        signature={
            "x": pointer,
            "ids": "*i64",
            "weight": pointer,
            "y": pointer,
            "choices_per_row": "i32",
            "experts": "i32",
            "in_grains": "i32",
            "out_grains": "i32",
        },
        constants={"GRAIN": grain, "COLUMNS": ONE_COLUMNS, "BLOCK": 1024},
    )


def _grouped(name: str, dtype: str, grain: int) -> Iterator[Form]:
    for tile in _tiles(dtype, grain):
        yield from _tile_forms(name, dtype, grain, tile)
    yield Form(
        name=f"moe_combine_{name}",
        function=combine,
        signature={
            "rows": "*fp32",
            "weights": "*fp32",
            "y": f"*{dtype}",
            "top_k": "i32",
            "hidden_grains": "i32",
        },
        constants={"GRAIN": grain, "BLOCK": COMBINE_BLOCK},
    )


class Tile(NamedTuple):
    """What a program of a grouped product takes; plugins/csrc/moe.cpp knows rows and columns."""

    rows: int
    columns: int
    block: int
    warps: int
    stages: int
    capabilities: tuple[int, ...] = COMPUTE_CAPABILITIES

    @property
    def variant(self) -> str:
        """What tells apart tiles of equal rows and columns, in names of forms."""
        return f"b{self.block}w{self.warps}s{self.stages}"


def _tiles(dtype: str, grain: int) -> list[Tile]:
    """The shipped tiles."""
    if dtype == "fp32":
        # Wider tiles, or deeper ones without wide loads, spill registers on Ampere and Ada.
        return [
            Tile(FEW_ROWS, FEW_COLUMNS, 32, 4, 4),
            Tile(FLOAT32_ROWS, FLOAT32_COLUMNS, 32 if grain == 4 else 16, 4, 3),
        ]
    return [
        Tile(FEW_ROWS, FEW_COLUMNS, 128, 4, 4),
        Tile(64, 64, 64, 4, 3),
        Tile(128, 64, 64, 8, 3, (80, 86, 89, 120)),
        Tile(128, 128, 64, 8, 3, (90, 100)),
    ]


def _tile_forms(
    name: str, dtype: str, grain: int, tile: Tile, candidate: str = ""
) -> Iterator[Form]:
    """The forms of one tile; with ``candidate`` they are named by the tile's variant, too."""
    pointer = f"*{dtype}"
    ending = f"m{tile.rows}n{tile.columns}_{name}" + (f"_{tile.variant}" if candidate else "")
    scanned = tile.rows == FEW_ROWS
    constants = {
        "GRAIN": grain,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "BLOCK": tile.block,
        "SCANNED": SCAN_CHOICES if scanned else 0,
    }
    yield Form(
        name=f"moe_gate_up_{ending}",
        function=gate_up,
        signature={
            "x": pointer,
            "ids": "*i32",
            "tiles": "*i32",
            "weight": pointer,
            "inner": pointer,
            "choices": "i32",
            "top_k": "i32",
            "experts": "i32",
            "hidden_grains": "i32",
            "intermediate_grains": "i32",
            "activation": "i32",
        },
        constants=constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        capabilities=tile.capabilities,
        candidate=candidate,
    )
    for use, ids, out in (("down", "i32", "fp32"), ("linear", "i64", dtype)):
        yield Form(
            name=f"moe_{use}_{ending}",
            function=linear,
            signature={
                "x": pointer,
                "ids": f"*{ids}" if scanned else "*i32",
                "tiles": "*i32",
                "weight": pointer,
                "y": f"*{out}",
                "choices": "i32",
                "choices_per_row": "i32",
                "experts": "i32",
                "in_grains": "i32",
                "out_grains": "i32",
            },
            constants=constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
            capabilities=tile.capabilities,
            candidate=candidate,
        )


# Rows, columns, block, warps and stages of the tiles that benchmarks/gpu.py compares on a Hopper
# card with the shipped ones. A gate_up of 128 x 256 would need more registers than an SM has.
_CANDIDATES = (
    (64, 64, 64, 4, 4),
    (64, 64, 64, 8, 3),
    (64, 64, 128, 4, 3),
    (64, 128, 64, 4, 3),
    (64, 128, 64, 8, 3),
    (64, 128, 64, 8, 4),
    (128, 64, 64, 4, 3),
    (128, 64, 64, 8, 3),
    (128, 64, 64, 8, 4),
    (128, 128, 32, 8, 4),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 16, 3),
)


def _candidates() -> Iterator[Tile]:
    return (Tile(*sizes, capabilities=TUNED) for sizes in _CANDIDATES)


def tuning_forms() -> list[Form]:
    """Forms in bfloat16 of other tiles than the shipped ones, to be compared with those."""
    return [
        form
        for tile in _candidates()
        for form in _tile_forms(
            "bf16", "bf16", 8, tile, f"tile {tile.rows}x{tile.columns} {tile.variant}"
        )
    ]


def tuning_tiles() -> list[tuple[int, int, str]]:
    """Rows, columns and variant of every tile to compare; the shipped ones have variant ``""``.

    The names of a candidate's forms end with its variant: ``moe_down_m64n128_bf16_b64w8s4``.
    """
    shipped = [
        (tile.rows, tile.columns, "")
        for tile in _tiles("bf16", 8)
        if tile.rows > 16 and set(TUNED) <= set(tile.capabilities)
    ]
    return shipped + [(tile.rows, tile.columns, tile.variant) for tile in _candidates()]
