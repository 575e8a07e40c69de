"""``python -m plugins.check``: every GPU kernel against float64, then its time. Needs a GPU.

Correctness first: each operator at odd and even sizes and in each dtype, against its eager
reference in float64. Then time at the shapes of OLMoE-1B-7B and Mamba2-2.7B, beside eager PyTorch
on the same card, as a share of what the card was measured to copy (few tokens) and to multiply
(many).

The checks themselves run on any library, so tests run them over Triton's interpreter.
"""

# A, B, C, D: the letters of the state-space papers.
# ruff: noqa: N806

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from plugins import cuda
from plugins.device import has_gpu
from plugins.library import Library, LibraryError
from plugins.mamba2_scan import mamba2_scan
from plugins.moe_dispatch import ACTIVATIONS, moe_dispatch
from plugins.moe_linear import moe_linear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# RMS of the error over that of the reference. Inputs are exact in the dtype, sums are float32 and
# one or two intermediate results are rounded to the dtype: a few units of its last place.
LIMITS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

Tensors = tuple[torch.Tensor, ...]
Run = Callable[[], Tensors]


@dataclass(frozen=True)
class Case:
    """One call: what the kernel computes, and what it should.

    Attributes:
        name: operator, sizes and dtype.
        dtype: of the activations.
        kernel: the call on the device.
        reference: the same in float64.
        eager: the same in the dtype, as the eager graph has it.
    """

    name: str
    dtype: torch.dtype
    kernel: Run
    reference: Run
    eager: Run

    def errors(self) -> list[float]:
        """Relative RMS error of every output."""
        result = []
        for got, want in zip(self.kernel(), self.reference(), strict=True):
            assert got.shape == want.shape, self.name
            difference = (got.double() - want).square().mean().sqrt()
            result.append(float(difference / want.square().mean().sqrt().clamp(min=1e-30)))
        return result


class Inputs:
    """Seeded tensors on a device, exact in their dtype."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype, gain: float = 1.0) -> torch.Tensor:
        values = gain * torch.randn(*shape, generator=self.generator)
        return values.to(self.device, dtype)

    def uniform(self, *shape: int, low: float, high: float) -> torch.Tensor:
        values = low + (high - low) * torch.rand(*shape, generator=self.generator)
        return values.to(self.device)

    def choices(self, experts: int, tokens: int, top_k: int) -> torch.Tensor:
        scores = torch.rand(tokens, experts, generator=self.generator)
        return scores.topk(top_k).indices.to(self.device)


def wide(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    return (tensor.double() for tensor in tensors)


def moe_dispatch_case(
    library: Library,
    device: str,
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    activation: str = "silu",
    normalize: bool = False,
) -> Case:
    make = Inputs(device, tokens)
    x = make.normal(tokens, hidden, dtype=dtype)
    logits = make.normal(tokens, experts, dtype=torch.float32)
    gate_up = make.normal(experts, 2 * intermediate, hidden, dtype=dtype, gain=hidden**-0.5)
    down = make.normal(experts, hidden, intermediate, dtype=dtype, gain=intermediate**-0.5)
    options = (top_k, normalize, activation)
    sizes = f"N {tokens} H {hidden} I {intermediate} E {experts} K {top_k}"
    return Case(
        f"MoeDispatch {sizes} {activation}{' normalized' if normalize else ''}",
        dtype,
        lambda: (cuda.moe_dispatch(library, x, logits, gate_up, down, *options),),
        lambda: (moe_dispatch(*wide(x, logits, gate_up, down), *options),),
        lambda: (moe_dispatch(x, logits, gate_up, down, *options),),
    )


def moe_linear_case(
    library: Library,
    device: str,
    dtype: torch.dtype,
    tokens: int,
    in_features: int,
    out_features: int,
    experts: int,
    top_k: int,
    per_choice: bool,
) -> Case:
    make = Inputs(device, tokens)
    rows = (tokens, top_k) if per_choice else (tokens,)
    x = make.normal(*rows, in_features, dtype=dtype)
    ids = make.choices(experts, tokens, top_k)
    weight = make.normal(experts, out_features, in_features, dtype=dtype, gain=in_features**-0.5)
    form = "[N, K, Kin]" if per_choice else "[N, Kin]"
    return Case(
        f"MoeLinear {form} N {tokens} Kin {in_features} O {out_features} E {experts} K {top_k}",
        dtype,
        lambda: (cuda.moe_linear(library, x, ids, weight),),
        lambda: (moe_linear(x.double(), ids, weight.double()),),
        lambda: (moe_linear(x, ids, weight),),
    )


def mamba2_scan_case(
    library: Library,
    device: str,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    heads: int,
    head_size: int,
    groups: int,
    states: int,
    padding: int = 0,
) -> Case:
    make = Inputs(device, tokens)
    x = make.normal(batch, tokens, heads, head_size, dtype=dtype)
    dt = make.normal(batch, tokens, heads, dtype=dtype)
    B = make.normal(batch, tokens, groups, states, dtype=dtype)
    C = make.normal(batch, tokens, groups, states, dtype=dtype, gain=states**-0.5)
    A = -make.uniform(heads, low=1.0, high=16.0)
    D = make.uniform(heads, low=0.5, high=1.5)
    dt_bias = make.uniform(heads, low=-6.0, high=-1.0)
    state = make.normal(batch, heads, head_size, states, dtype=torch.float32)
    mask = torch.ones(batch, tokens, dtype=dtype, device=device)
    mask[-1, :padding] = 0
    inputs = (x, dt, A, B, C, D, dt_bias, state, mask)
    limits = (0.0, math.inf)
    sizes = f"B {batch} T {tokens} Hm {heads} Pm {head_size} G {groups} Ns {states}"
    return Case(
        f"Mamba2Scan {sizes}",
        dtype,
        lambda: cuda.mamba2_scan(library, *inputs, *limits),
        lambda: mamba2_scan(*wide(*inputs), 1, *limits),
        lambda: mamba2_scan(*inputs, 1, *limits),
    )


def causal_conv_case(
    library: Library,
    device: str,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    channels: int,
    width: int,
    activation: str = "silu",
) -> Case:
    make = Inputs(device, tokens)
    x = make.normal(batch, tokens, channels, dtype=dtype)
    state = make.normal(batch, channels, width - 1, dtype=dtype)
    weight = make.normal(channels, 1, width, dtype=dtype, gain=width**-0.5)
    bias = make.normal(channels, dtype=dtype)

    def computed_in(compute: torch.dtype) -> Tensors:
        window = torch.cat((state, x.transpose(1, 2)), dim=2).to(compute)
        y = F.conv1d(window, weight.to(compute), bias.to(compute), groups=channels)
        return ACTIVATIONS[activation](y).transpose(1, 2), window[..., 1 - width :]

    return Case(
        f"CausalConv B {batch} T {tokens} C {channels} W {width} {activation}",
        dtype,
        lambda: cuda.causal_conv(library, x, state, weight, bias, activation),
        lambda: computed_in(torch.float64),
        lambda: computed_in(dtype),
    )


def small_cases(library: Library, device: str) -> Iterator[Case]:
    """Odd sizes of every operator, small enough for the interpreter."""
    for dtype in DTYPES:
        # 16-bit kernels load eight numbers at a time.
        odd = 0 if dtype != torch.float32 else 3
        for tokens in (1, 5, 37):
            sizes = (tokens, 40 + odd, 24 + odd, 7, 3)
            yield moe_dispatch_case(library, device, dtype, *sizes)
            yield moe_dispatch_case(library, device, dtype, *sizes, "gelu_tanh", True)
            for per_choice in (False, True):
                sizes = (tokens, 40 + odd, 24 + odd, 7, 3)
                yield moe_linear_case(library, device, dtype, *sizes, per_choice)
        for tokens in (1, 2, 65, 131):
            yield mamba2_scan_case(library, device, dtype, 2, tokens, 4, 12, 2, 20, tokens // 3)
            yield causal_conv_case(library, device, dtype, 2, tokens, 35, 4)


def large_cases(library: Library, device: str) -> Iterator[Case]:
    """Real widths of every operator, where tiles, splits and long chunks come into play."""
    for dtype in DTYPES:
        for tokens in (1, 3, 16, 17, 200, 1000):
            yield moe_dispatch_case(library, device, dtype, tokens, 2048, 1024, 64, 8)
            yield moe_linear_case(library, device, dtype, tokens, 2048, 4096, 8, 2, False)
            yield moe_linear_case(library, device, dtype, tokens, 4096, 2048, 8, 2, True)
        for tokens in (1, 129, 1000):
            yield mamba2_scan_case(library, device, dtype, 2, tokens, 80, 64, 1, 128, tokens // 3)
            yield mamba2_scan_case(library, device, dtype, 1, tokens, 128, 64, 8, 128)
            yield causal_conv_case(library, device, dtype, 2, tokens, 5376, 4)


def check(cases: Iterator[Case]) -> list[str]:
    """Run cases, say each result, and return the failures."""
    failures = []
    for case in cases:
        worst = max(case.errors())
        limit = LIMITS[case.dtype]
        # NaN is no pass.
        passed = worst <= limit
        dtype = str(case.dtype).removeprefix("torch.")
        line = f"{'ok  ' if passed else 'FAIL'} {case.name} {dtype}: {worst:.1e} of {limit:.0e}"
        print(line, flush=True)
        if not passed:
            failures.append(line)
    return failures


@dataclass(frozen=True)
class Card:
    """What a device was measured to do: bytes copied and bfloat16 operations a second."""

    bandwidth: float
    rate: float


def seconds(run: Callable[[], object], least: float = 0.2) -> float:
    """Median time of a call on the device, with a cold second-level cache."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    run()
    while len(times) < 5 or (sum(times) < least and len(times) < 100):
        flush.zero_()
        event: Callable[..., Any] = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def measure_card() -> Card:
    size = 1 << 30
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    side = 8192
    a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    copied = 2 * size / seconds(lambda: target.copy_(source))
    return Card(copied, 2 * side**3 / seconds(lambda: a @ a))


@dataclass(frozen=True)
class Timed:
    """One call to time, beside eager PyTorch.

    Attributes:
        bytes_moved: least that it must read and write.
        operations: of its products.
    """

    name: str
    tokens: int
    kernel: Callable[[], object]
    eager: Callable[[], object]
    bytes_moved: float
    operations: float

    def row(self, card: Card) -> str:
        """A row of the table."""
        kernel, eager = seconds(self.kernel), seconds(self.eager)
        copy, matrix = card.bandwidth * kernel, card.rate * kernel
        cells = (
            self.name,
            str(self.tokens),
            f"{1e3 * kernel:.3f} ms",
            f"{1e3 * eager:.3f} ms",
            f"{eager / kernel:.1f}x",
            f"{self.bytes_moved / copy:.0%}",
            f"{self.operations / matrix:.0%}",
        )
        return "| " + " | ".join(cells) + " |"


HEADER = """| operator | tokens | kernel | eager | ratio | of the copy rate | of the matrix rate |
|---|---|---|---|---|---|---|"""


def timed_moe(library: Library, tokens: int) -> Timed:
    """A layer of OLMoE-1B-7B's shape."""
    hidden, intermediate, experts, top_k = 2048, 1024, 64, 8
    bf16 = torch.bfloat16
    make = Inputs("cuda", tokens)
    x = make.normal(tokens, hidden, dtype=bf16)
    logits = make.normal(tokens, experts, dtype=torch.float32)
    gate_up = make.normal(experts, 2 * intermediate, hidden, dtype=bf16, gain=hidden**-0.5)
    down = make.normal(experts, hidden, intermediate, dtype=bf16, gain=intermediate**-0.5)
    weights = 3 * hidden * intermediate
    chosen = len(set(logits.topk(top_k).indices.flatten().tolist()))
    return Timed(
        "MoeDispatch",
        tokens,
        lambda: cuda.moe_dispatch(library, x, logits, gate_up, down, top_k, False, "silu"),
        lambda: eager_moe(x, logits, gate_up, down, top_k),
        2.0 * (chosen * weights + 2 * tokens * hidden),
        2.0 * weights * tokens * top_k,
    )


def timed_scan(library: Library, tokens: int) -> Timed:
    """A scan of Mamba2-2.7B's shape."""
    heads, head_size, states = 80, 64, 128
    sizes = (1, tokens, heads, head_size, 1, states)
    case = mamba2_scan_case(library, "cuda", torch.bfloat16, *sizes)
    return Timed(
        "Mamba2Scan",
        tokens,
        case.kernel,
        case.eager,
        8.0 * heads * head_size * states + 4.0 * tokens * (heads * head_size + states),
        4.0 * tokens * heads * head_size * states,
    )


def timing(library: Library, card: Card) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield HEADER
    for tokens in (1, 16, 128, 512, 4096):
        yield timed_moe(library, tokens).row(card)
    for tokens in (1, 1024, 8192):
        yield timed_scan(library, tokens).row(card)


def eager_moe(
    x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int
) -> torch.Tensor:
    """The usual loop over experts in the model's own dtype."""
    weights, ids = logits.softmax(-1).topk(top_k)
    y = torch.zeros_like(x)
    for expert in sorted(set(ids.flatten().tolist())):
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down[expert])
        y.index_add_(0, token, (weights[token, slot, None] * out).to(y.dtype))
    return y


def main() -> int:
    if not has_gpu():
        print("python -m plugins.check needs an NVIDIA GPU, and this machine has none.")
        return 2
    try:
        library = Library()
        torch.zeros(1, device="cuda")
        library.prepare()
    except LibraryError as error:
        print(f"error: {error}")
        return 2
    print(torch.cuda.get_device_name())
    failures = check(small_cases(library, "cuda")) + check(large_cases(library, "cuda"))
    if failures:
        print(f"{len(failures)} of the checks failed:", *failures, sep="\n")
        return 1
    card = measure_card()
    print(f"copies {card.bandwidth / 1e12:.2f} TB/s, multiplies {card.rate / 1e12:.0f} TFLOP/s")
    for line in timing(library, card):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
