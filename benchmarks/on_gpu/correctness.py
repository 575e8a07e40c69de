"""Every kernel against float64: odd sizes in every dtype, then the sizes of released models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import TypeVar

import torch

from benchmarks.on_gpu import shapes
from benchmarks.on_gpu.bench import Bench
from benchmarks.on_gpu.load import OTHER
from benchmarks.on_gpu.runner import Found, Item, Wrong
from ingot.plugins import check
from ingot.plugins.check import Make
from ingot.plugins.library import Library

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# The reference has so many of the tokens, of the rows of a batch, of the heads, of the channels.
ROWS, BATCH_ROWS, HEADS, CHANNELS = 256, 2, 6, 256

T = TypeVar("T")
Named = tuple[str, Make]


def small(bench: Bench) -> Iterator[Item]:
    """Odd sizes of every operator; a rehearsal has one dtype of them."""
    library = bench.library()
    makes = check.small(bench.pick(check.DTYPES, (BF16,)))
    # Every third still has each operator and each of its paths.
    for make in islice(makes, 0, None, 3 if bench.rehearsal and bench.computes else 1):
        case = make(library, bench.device.name)
        name = f"{case.name} {check.dtype_name(case.dtype)}"
        yield Item(name, partial(prove, bench, library, name, make))


def large(bench: Bench) -> Iterator[Item]:
    """Released shapes, one token to 8192, alone and in a batch, evenly and unevenly routed.

    bfloat16 has them all; the other types have those that take another path of the host layer.
    """
    library = bench.library()
    preset = bench.pick("full", "tiny")
    for name, make in (*_of_experts(preset, bench), *_of_states(preset, bench)):
        yield Item(name, partial(prove, bench, library, name, make))


def _some(bench: Bench, models: tuple[T, ...]) -> tuple[T, ...]:
    """All models, or one: those of a rehearsal are of nearly the same sizes."""
    return models[:1] if bench.rehearsal else models


def prove(bench: Bench, library: Library, name: str, make: Make) -> Found:
    """One case, whose tensors are made here and dropped at the end.

    Raises:
        Wrong: its numbers, or other bits when it is repeated.
    """
    case = make(library, bench.device.name)
    if not bench.computes:
        # A recorder has checked each launch by the time the call returns.
        case.kernel()
        return {"text": f"{name}: launches recorded"}
    passed, text = case.run(repeats=bench.pick(2, 0))
    if not passed:
        text += _by_the_other_ptxas(bench, make)
    del case
    bench.device.free()
    if not passed:
        raise Wrong(text)
    return {"text": text}


def _by_the_other_ptxas(bench: Bench, make: Make) -> str:
    """Whether the same kernels are wrong when another compiler made them, where these are here."""
    if bench.rehearsal or not OTHER.is_file():
        return ""
    passed, _ = make(bench.library(OTHER), bench.device.name).run(repeats=2)
    return (
        f"; by the other ptxas it is {'RIGHT: the compiler is at fault' if passed else 'wrong too'}"
    )


def _of_experts(preset: str, bench: Bench) -> Iterator[Named]:
    for moe in _some(bench, shapes.moe(preset)):
        for dtype, tokens, skewed in _calls(bench):
            yield (
                f"{moe.model} MoeDispatch {_call(dtype, tokens, skewed)}",
                partial(
                    check.moe_dispatch_case,
                    dtype=dtype,
                    tokens=tokens,
                    **moe.sizes,
                    normalize=moe.normalize,
                    skewed=skewed,
                    rows=ROWS,
                ),
            )
    for linear in shapes.linear(preset):
        way = "out of" if linear.per_choice else "into"
        for dtype, tokens, skewed in _calls(bench):
            yield (
                f"{linear.model} MoeLinear {way} attention {_call(dtype, tokens, skewed)}",
                partial(
                    check.moe_linear_case,
                    dtype=dtype,
                    tokens=tokens,
                    **linear.sizes,
                    skewed=skewed,
                    rows=ROWS,
                ),
            )


def _calls(bench: Bench) -> Iterator[tuple[torch.dtype, int, bool]]:
    """dtype, tokens, and whether all tokens choose the same experts."""
    for tokens in bench.pick((1, 2, 4, 16, 17, 64, 256, 1024, 4096, 8192), (17,)):
        yield BF16, tokens, False
    for tokens in bench.pick((16, 300, 8192), (3,)):
        yield BF16, tokens, True
    # One token, few, many, and enough for tall tiles.
    for tokens in bench.pick((1, 16, 300, 2048), ()):
        yield FP16, tokens, False
        yield FP32, tokens, False


def _call(dtype: torch.dtype, tokens: int, skewed: bool) -> str:
    return f"N {tokens}{' skewed' * skewed} {check.dtype_name(dtype)}"


def _of_states(preset: str, bench: Bench) -> Iterator[Named]:
    for scan in _some(bench, shapes.scans(preset)):
        for dtype, batch, tokens in _sequences(bench):
            call = f"B {batch} T {tokens} {check.dtype_name(dtype)}"
            yield (
                f"{scan.model} Mamba2Scan {call}",
                partial(
                    check.mamba2_scan_case,
                    dtype=dtype,
                    batch=batch,
                    tokens=tokens,
                    **scan.sizes,
                    padding=tokens // 3,
                    rows=BATCH_ROWS,
                    kept_heads=HEADS,
                ),
            )
            yield (
                f"{scan.model} CausalConv {call}",
                partial(
                    check.causal_conv_case,
                    dtype=dtype,
                    batch=batch,
                    tokens=tokens,
                    channels=scan.channels,
                    width=scan.width,
                    kept_channels=CHANNELS,
                ),
            )


def _sequences(bench: Bench) -> Iterator[tuple[torch.dtype, int, int]]:
    """dtype, batch and tokens; both sides of the chunk lengths, and workspaces that are sliced."""
    for batch, tokens in bench.pick(
        ((1, 1), (16, 1), (1, 2), (1, 129), (2, 257), (1, 1024), (1, 8192), (16, 8192)),
        ((2, 66),),
    ):
        yield BF16, batch, tokens
    for batch, tokens in bench.pick(((1, 1), (2, 300)), ()):
        yield FP16, batch, tokens
        yield FP32, batch, tokens
