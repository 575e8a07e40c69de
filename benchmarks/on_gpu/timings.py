"""Time of every kernel at released shapes in bfloat16, beside what PyTorch offers.

Calls are captured into one CUDA graph that goes through several sets of weights, so that none is
found in the second-level cache and no time of the host is in it. A peer that waits for the host is
timed as it is called. Shares are of the ceilings that the same run measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.on_gpu import peers, shapes
from benchmarks.on_gpu.bench import Bench
from benchmarks.on_gpu.devices import Seconds
from benchmarks.on_gpu.runner import Found, Item, Refused
from ingot.plugins import torch_kernels
from ingot.plugins.causal_conv import causal_conv
from ingot.plugins.check import Inputs, inputs
from ingot.plugins.library import Library
from ingot.plugins.mamba2_scan import mamba2_scan
from ingot.plugins.moe_dispatch import moe_dispatch
from ingot.plugins.moe_linear import moe_linear

BF16 = torch.bfloat16
# Sets of weights or states, enough to be several times the second-level cache together.
LEAST_BYTES = 256 << 20
LEAST_SETS, MOST_SETS = 3, 64
# Below it some of what is read may still be in the cache, and a share of the bandwidth says little.
COLD_BYTES = 200e6
# The eager recurrence launches a dozen kernels a token.
MOST_EAGER_TOKENS = 512

Call = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """One call and its peers.

    Attributes:
        kernel: one call for each set of weights.
        bytes_moved: least that a call must read and write.
        operations: of its products.
        peers: by name, likewise.
        waiting: names of the peers that wait for the host, which a graph cannot hold.
    """

    kernel: list[Call]
    bytes_moved: float
    operations: float
    peers: dict[str, list[Call]] = field(default_factory=dict)
    waiting: tuple[str, ...] = ()


def items(bench: Bench) -> Iterator[Item]:
    """Each operator over its tokens, decode first."""
    library = bench.library()
    preset = bench.pick("full", "tiny")
    plan = (*_moe(bench, preset), *_states(bench, preset))
    for name, make in plan:
        yield Item(name, partial(measure, bench, name, partial(make, bench, library)))
    for batch, tokens, past in bench.pick(
        ((1, 1, 4096), (16, 1, 4096), (1, 4096, 0)), ((1, 4, 0),)
    ):
        name = f"OLMoE attention (PyTorch) B {batch} T {tokens} S {past + tokens}"
        make_attention = partial(attention, bench, batch, tokens, past)
        yield Item(name, partial(measure, bench, name, make_attention))


Named = tuple[str, Callable[[Bench, Library], Timed]]


def _moe(bench: Bench, preset: str) -> Iterator[Named]:
    of_olmoe = bench.pick((1, 4, 16, 64, 256, 1024, 4096, 8192), (1,))
    of_jetmoe = bench.pick((1, 16, 4096), (3,))
    for shape, counts in zip(shapes.moe(preset), (of_olmoe, of_jetmoe), strict=True):
        for tokens in counts:
            yield f"{shape.model} MoeDispatch N {tokens}", partial(moe, shape=shape, tokens=tokens)
    for linear_shape in shapes.linear(preset):
        way = "out of" if linear_shape.per_choice else "into"
        for tokens in bench.pick((1, 4096), (1,)):
            made = partial(linear, shape=linear_shape, tokens=tokens)
            yield f"{linear_shape.model} MoeLinear {way} attention N {tokens}", made


def _states(bench: Bench, preset: str) -> Iterator[Named]:
    mamba2, codestral = shapes.scans(preset)
    of_mamba2 = bench.pick(((1, 1), (16, 1), (1, 512), (1, 2048), (1, 8192)), ((1, 1), (1, 9)))
    of_codestral = bench.pick(((1, 1), (1, 8192)), ())
    for shape, calls in ((mamba2, of_mamba2), (codestral, of_codestral)):
        for batch, tokens in calls:
            made = partial(scan, shape=shape, batch=batch, tokens=tokens)
            yield f"{shape.model} Mamba2Scan B {batch} T {tokens}", made
    for batch, tokens in bench.pick(((1, 1), (16, 1), (1, 8192)), ((1, 9),)):
        made = partial(conv, shape=mamba2, batch=batch, tokens=tokens)
        yield f"{mamba2.model} CausalConv B {batch} T {tokens}", made


def measure(bench: Bench, name: str, make: Callable[[], Timed]) -> Found:
    """Times of one call and of its peers; the kernel's first and last, so that a drift shows."""
    timed = make()
    device = bench.device

    def time(calls: list[Call]) -> Seconds:
        return device.time(device.capture(lambda: [call() for call in calls]), len(calls))

    first = last = time(timed.kernel)
    found: Found = {"peers": {}, "refused_peers": {}}
    for peer, calls in timed.peers.items():
        try:
            alone = peer in timed.waiting
            took = device.time(calls[0], 1) if alone else time(calls)
            found["peers"][peer] = took.median
        except Exception as error:
            # What a peer cannot do is no failure of ours, but it may have broken a capture.
            found["refused_peers"][peer] = f"{type(error).__name__}: {str(error)[:200]}"
            if not isinstance(error, Refused):
                break
    if device.usable():
        last = time(timed.kernel)
    seconds = min(first.median, last.median)
    bytes_rate, rate = timed.bytes_moved / seconds, timed.operations / seconds
    cold = len(timed.kernel) * timed.bytes_moved >= COLD_BYTES
    found |= {
        "seconds": seconds,
        "spread": max(first.spread, last.spread, abs(first.median - last.median) / seconds),
        "bytes_per_second": bytes_rate,
        "operations_per_second": rate,
    }
    del timed
    device.free()
    beside = "".join(f", {peer} {s / seconds:.2f}x" for peer, s in found["peers"].items())
    beside += "".join(f", {peer} refused" for peer in found["refused_peers"])
    if not cold:
        beside += ", in cache"
    found["text"] = (
        f"{name}: {1e6 * seconds:.1f} us, {bytes_rate / 1e9:.0f} GB/s "
        f"({bench.share(bytes_rate, 'bandwidth')}), {rate / 1e12:.1f} TFLOP/s "
        f"({bench.share(rate, 'rate')}){beside}"
    )
    return found


def _sets(bench: Bench, size: float) -> range:
    """Numbers of the sets, each of which a call reads ``size`` bytes of."""
    enough = math.ceil(LEAST_BYTES / max(size, 1.0))
    return range(bench.pick(min(max(enough, LEAST_SETS), MOST_SETS), 1))


def moe(bench: Bench, library: Library, shape: shapes.Moe, tokens: int) -> Timed:
    """A layer's experts."""
    of_expert = 3 * shape.hidden * shape.intermediate
    make = partial(inputs, moe_dispatch, bench.device.name, BF16, {"tokens": tokens, **shape.sizes})
    first = make()
    _, logits, *_ = first
    chosen = len(torch.unique(logits.topk(shape.top_k).indices))
    moved = 2.0 * (chosen * of_expert + 2 * tokens * shape.hidden)
    sets = [first, *(make() for _ in _sets(bench, moved)[1:])]
    loop = peers.CublasLoop(logits, shape.top_k)
    options = (shape.top_k, shape.normalize, "silu")
    return Timed(
        [partial(torch_kernels.call, moe_dispatch, library, *each, *options) for each in sets],
        moved,
        2.0 * of_expert * tokens * shape.top_k,
        {
            "grouped_mm": [partial(peers.grouped_mm, *each, shape.top_k) for each in sets],
            "cublas_loop": [partial(loop, x, *weights) for x, _, *weights in sets],
            "eager": [partial(peers.eager_moe, *first, shape.top_k)],
        },
        waiting=("eager",),
    )


def linear(bench: Bench, library: Library, shape: shapes.Linear, tokens: int) -> Timed:
    """One of the two mixtures of an attention layer."""
    make = partial(inputs, moe_linear, bench.device.name, BF16, {"tokens": tokens, **shape.sizes})
    first = make()
    x, ids, _ = first
    of_expert = shape.in_features * shape.out_features
    choices = tokens * shape.top_k
    of_tokens = x.numel() + choices * shape.out_features
    moved = 2.0 * (len(torch.unique(ids)) * of_expert + of_tokens)
    sets = [first, *(make() for _ in _sets(bench, moved)[1:])]
    return Timed(
        [partial(torch_kernels.call, moe_linear, library, *each) for each in sets],
        moved,
        2.0 * of_expert * choices,
        {"grouped_mm": [partial(peers.grouped_linear, *each) for each in sets]},
    )


def scan(bench: Bench, library: Library, shape: shapes.Scan, batch: int, tokens: int) -> Timed:
    """A layer's scan."""
    limits = (0.0, math.inf)
    inner = shape.heads * shape.head_size
    state = batch * inner * shape.states
    of_tokens = batch * tokens * (2 * inner + 2 * shape.groups * shape.states)
    moved = 8.0 * state + 2.0 * of_tokens
    sizes = {"batch": batch, "tokens": tokens, **shape.sizes}
    make = partial(inputs, mamba2_scan, bench.device.name, BF16, sizes)
    sets = [make() for _ in _sets(bench, moved)]
    beside = {}
    if tokens <= MOST_EAGER_TOKENS:
        beside["eager"] = [partial(mamba2_scan, *each, 1, *limits) for each in sets[:1]]
    return Timed(
        [partial(torch_kernels.call, mamba2_scan, library, *each, 1, *limits) for each in sets],
        moved,
        4.0 * tokens * state,
        beside,
    )


def conv(bench: Bench, library: Library, shape: shapes.Scan, batch: int, tokens: int) -> Timed:
    """The convolution before the scan."""
    channels, past = shape.channels, shape.width - 1
    sizes = {"batch": batch, "tokens": tokens, "channels": channels, "width": shape.width}
    moved = 4.0 * batch * channels * (tokens + past) + 2.0 * channels * (shape.width + 1)
    sets = [inputs(causal_conv, bench.device.name, BF16, sizes) for _ in _sets(bench, moved)]
    return Timed(
        [partial(torch_kernels.call, causal_conv, library, *each, "silu") for each in sets],
        moved,
        2.0 * batch * tokens * channels * shape.width,
        {"conv1d": [partial(peers.conv1d, *each) for each in sets]},
    )


def attention(bench: Bench, batch: int, tokens: int, past: int) -> Timed:
    """PyTorch's own attention at OLMoE's heads, for comparison with the experts' time."""
    make = Inputs(bench.device.name, tokens)
    heads, size = bench.pick((16, 128), (2, 16))
    seen = past + tokens
    moved = 4.0 * batch * heads * size * (tokens + seen)
    sets = [
        tuple(make.normal(batch, heads, n, size, dtype=BF16) for n in (tokens, seen, seen))
        for _ in _sets(bench, moved)
    ]
    # Half of the products of a prefill are above the diagonal.
    share = 0.5 if past == 0 else 1.0
    return Timed(
        [partial(peers.causal_attention, *each) for each in sets],
        moved,
        4.0 * batch * heads * size * tokens * seen * share,
    )
