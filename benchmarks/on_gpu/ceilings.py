"""What the card itself does at most, which every later figure is a share of."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.on_gpu.bench import Bench
from benchmarks.on_gpu.runner import Found, Item


def items(bench: Bench) -> Iterator[Item]:
    """Device memory, and a bfloat16 product on random data."""
    bench.device.start()
    yield Item("memory", lambda: memory(bench))
    yield Item("product", lambda: product(bench))


def memory(bench: Bench) -> Found:
    """Bytes a second, read and written counted, by the fastest of several ways.

    The card's copy engine, which is what a copy becomes in a graph, is slower than kernels are, and
    kernels that mostly read are faster than those that also write.
    """
    count = bench.pick(1 << 29, 1 << 14)
    source = torch.ones(count, device=bench.device.name)
    target, total = torch.empty_like(source), torch.empty((), device=bench.device.name)
    size = source.nbytes
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "copy engine": (2 * size, lambda: target.copy_(source)),
        "copy": (2 * size, lambda: torch.mul(source, 1.0, out=target)),
        "read": (size, lambda: torch.sum(source, dim=0, out=total)),
    }
    rates, spread = {}, 0.0
    for name, (moved, run) in ways.items():
        time = bench.device.time(bench.device.capture(run), 1)
        rates[name] = moved / time.median
        spread = max(spread, time.spread)
    each = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in rates.items())
    text = f"device memory, TB/s: {each} (spread at most {spread:.0%})"
    best = max(rates.values())
    return {"text": text, "bytes_per_second": rates, "keep": {"bandwidth": best}}


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
