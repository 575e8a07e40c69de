"""What the card itself does at most, which every later figure is a share of."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.on_gpu.bench import Bench
from benchmarks.on_gpu.runner import Found, Item


def items(bench: Bench) -> Iterator[Item]:
    """A copy within the device, a read, and a bfloat16 product on random data."""
    bench.device.start()
    yield Item("copy", lambda: copy(bench))
    yield Item("product", lambda: product(bench))


def copy(bench: Bench) -> Found:
    """Bytes a second, read and written counted."""
    size = bench.pick(2 << 30, 1 << 16)
    source = torch.ones(size, dtype=torch.uint8, device=bench.device.name)
    target = torch.empty_like(source)
    replay = bench.device.capture(lambda: target.copy_(source))
    time = bench.device.time(replay, 1)
    rate = 2 * size / time.median
    text = f"device copy {rate / 1e12:.2f} TB/s (spread {time.spread:.0%})"
    return {"text": text, "bytes_per_second": rate, "keep": {"bandwidth": rate}}


def product(bench: Bench) -> Found:
    """bfloat16 operations a second of cuBLAS; zeros would run faster than real data."""
    side = bench.pick(8192, 16)
    a, b = (torch.randn(side, side, device=bench.device.name).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    replay = bench.device.capture(lambda: torch.mm(a, b, out=out))
    time = bench.device.time(replay, 1, least=0.3)
    rate = 2 * side**3 / time.median
    text = f"bfloat16 product of {side} {rate / 1e12:.0f} TFLOP/s (spread {time.spread:.0%})"
    return {"text": text, "operations_per_second": rate, "keep": {"rate": rate}}
