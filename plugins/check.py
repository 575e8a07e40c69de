"""``python -m ingot.plugins.check``: every GPU kernel against float64. Needs a GPU.

Each operator at odd and even sizes and in each dtype, against its eager reference in float64. The
outputs and the workspace begin as NaN, and a call that is repeated must give the same bits.

The cases run on any library, so tests run them over Triton's interpreter; ``benchmarks/gpu.py``
runs them at the sizes of released models, and times the kernels.
"""

# A, B, C, D: the letters of the state-space papers.
# ruff: noqa: N806

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ingot.plugins import torch_kernels
from ingot.plugins.causal_conv import causal_conv
from ingot.plugins.command_line import ended
from ingot.plugins.device import has_gpu
from ingot.plugins.library import Library, LibraryError
from ingot.plugins.mamba2_scan import mamba2_scan
from ingot.plugins.moe_dispatch import moe_dispatch
from ingot.plugins.moe_linear import moe_linear
from ingot.plugins.operator import Operator, Tensor, size_of

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
        sample: what of the kernel's outputs ``reference`` computes.
        reference: the same in float64.
    """

    name: str
    dtype: torch.dtype
    kernel: Run
    sample: Callable[[Tensors], Tensors]
    reference: Run

    def outputs(self) -> Tensors:
        """The kernel's outputs, all of whose memory began as NaN."""
        with poisoned():
            return self.kernel()

    def errors(self, outputs: Tensors) -> list[float]:
        """Relative RMS error of every output; NaN where one was not written."""
        result = []
        for got, want in zip(self.sample(outputs), self.reference(), strict=True):
            assert got.shape == want.shape, self.name
            result.append(relative_rms(got, want))
        return result

    def run(self, repeats: int = 2) -> tuple[bool, str]:
        """Whether the numbers are right and repeat to the bit, and a line that says so."""
        outputs = self.outputs()
        worst, limit = max(self.errors(outputs)), LIMITS[self.dtype]
        moved = any(
            not _same_bits(first, again)
            for _ in range(repeats)
            for first, again in zip(outputs, self.outputs(), strict=True)
        )
        # NaN is no pass.
        right = worst <= limit
        text = f"{self.name} {dtype_name(self.dtype)}: {worst:.1e} of {limit:.0e}"
        return right and not moved, text + (", and other bits when repeated" if moved else "")


# What makes a case on a library's device.
Make = Callable[[Library, str], Case]


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """RMS of the difference over that of ``want``; NaN where either has one."""
    difference = (got.double() - want.double()).square().mean().sqrt()
    return float(difference / want.double().square().mean().sqrt())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors begin as NaN, bytes as 255: an element that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    # What fills them is a part of PyTorch's deterministic mode.
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Inputs:
    """Seeded tensors drawn on a device, exact in their dtype."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype, gain: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(shape, dtype=dtype, device=self.device, generator=self.generator)
        return drawn.mul_(gain)

    def uniform(self, *shape: int, low: float, high: float) -> torch.Tensor:
        drawn = torch.rand(shape, device=self.device, generator=self.generator)
        return drawn.mul_(high - low).add_(low)

    def router_logits(self, tokens: int, experts: int, top_k: int, skewed: bool) -> torch.Tensor:
        """``[N, E]`` float32; ``skewed`` makes K experts the choice of every token."""
        logits = self.normal(tokens, experts, dtype=torch.float32)
        if skewed:
            logits[:, experts - top_k :] += 100.0
        return logits


def inputs(
    operator: Operator,
    device: str,
    dtype: torch.dtype,
    sizes: Mapping[str, int],
    *,
    skewed: bool = False,
) -> Tensors:
    """An operator's inputs, each drawn as its declaration says.

    ``normal`` has variance 1. ``scaled`` has that of one over the last side, so that activations
    stay near 1. ``uniform`` lies between two numbers. ``logits`` are those of a router, ``ids`` its
    choices.

    Args:
        operator: whose.
        device: to draw on.
        dtype: of T.
        sizes: members of the kernels' structure by name, those that are sizes or a form; and
            ``top_k`` of what a router made.
        skewed: whether a router gives every token the same experts.
    """
    make = Inputs(device, sizes["tokens"])
    letters = {letter: sizes[member] for member, letter in operator.sizes.items()}
    forms = [sizes[member] for member, source in operator.members.items() if source == "form"]

    def drawn(tensor: Tensor, form: int) -> torch.Tensor:
        shape = [size_of(dim, letters) for dim in tensor.shapes[form]]
        kind = dtype if tensor.dtype == "T" else torch.float32
        how, *limits = tensor.draw.split()
        if how == "ones":
            return torch.ones(shape, dtype=kind, device=device)
        if how == "uniform":
            low, high = map(float, limits)
            return make.uniform(*shape, low=low, high=high)
        if how in ("logits", "ids"):
            top_k = sizes["top_k"]
            logits = make.router_logits(sizes["tokens"], sizes["experts"], top_k, skewed)
            return logits if how == "logits" else logits.topk(top_k).indices
        return make.normal(*shape, dtype=kind, gain=shape[-1] ** -0.5 if how == "scaled" else 1.0)

    first, *rest = operator.inputs
    return (drawn(first, *forms or [0]), *(drawn(tensor, 0) for tensor in rest))


def spread(count: int, most: int | None) -> torch.Tensor:
    """Up to ``most`` indices below ``count``, the first and the last among them, on the CPU."""
    if most is None or count <= most:
        return torch.arange(count)
    return torch.linspace(0, count - 1, most).round().long()


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
    *,
    skewed: bool = False,
    rows: int | None = None,
) -> Case:
    """``ingot::MoeDispatch``; the reference has at most ``rows`` of the tokens."""
    sizes = {
        "tokens": tokens,
        "hidden": hidden,
        "intermediate": intermediate,
        "experts": experts,
        "top_k": top_k,
    }
    x, logits, gate_up, down = inputs(moe_dispatch, device, dtype, sizes, skewed=skewed)
    options = (top_k, normalize, activation)
    kept = spread(tokens, rows).to(device)
    named = f"N {tokens} H {hidden} I {intermediate} E {experts} K {top_k}"
    notes = " normalized" * normalize + " skewed" * skewed
    return Case(
        f"MoeDispatch {named} {activation}{notes}",
        dtype,
        lambda: (torch_kernels.call(moe_dispatch, library, x, logits, gate_up, down, *options),),
        lambda outputs: (outputs[0][kept],),
        lambda: (moe_dispatch(*wide(x[kept], logits[kept], gate_up, down), *options),),
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
    *,
    skewed: bool = False,
    rows: int | None = None,
) -> Case:
    """``ingot::MoeLinear``; the reference has at most ``rows`` of the tokens."""
    sizes = {
        "tokens": tokens,
        "in_features": in_features,
        "out_features": out_features,
        "experts": experts,
        "top_k": top_k,
        "per_choice": per_choice,
    }
    x, ids, weight = inputs(moe_linear, device, dtype, sizes, skewed=skewed)
    kept = spread(tokens, rows).to(device)
    form = "[N, K, Kin]" if per_choice else "[N, Kin]"
    named = f"N {tokens} Kin {in_features} O {out_features} E {experts} K {top_k}"
    return Case(
        f"MoeLinear {form} {named}{' skewed' * skewed}",
        dtype,
        lambda: (torch_kernels.call(moe_linear, library, x, ids, weight),),
        lambda outputs: (outputs[0][kept],),
        lambda: (moe_linear(x[kept].double(), ids[kept], weight.double()),),
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
    *,
    rows: int | None = None,
    kept_heads: int | None = None,
) -> Case:
    """``ingot::Mamba2Scan``; the reference has some rows of the batch and some heads of each."""
    sizes = {
        "batch": batch,
        "tokens": tokens,
        "heads": heads,
        "head_size": head_size,
        "groups": groups,
        "states": states,
    }
    given = inputs(mamba2_scan, device, dtype, sizes)
    x, dt, A, B, C, D, dt_bias, state, mask = given
    mask[-1, :padding] = 0
    limits = (0.0, math.inf)
    row, head = spread(batch, rows).to(device), spread(heads, kept_heads).to(device)
    group = head // (heads // groups)

    def reference() -> Tensors:
        # A kept head with the B and C of its group is a group of its own.
        of_heads = (x[row][:, :, head], dt[row][:, :, head], A[head])
        of_groups = (B[row][:, :, group], C[row][:, :, group])
        rest = (D[head], dt_bias[head], state[row][:, head], mask[row])
        arguments: list[Any] = [*wide(*of_heads, *of_groups, *rest), 1, *limits]
        result: Tensors = mamba2_scan(*arguments)
        return result

    named = f"B {batch} T {tokens} Hm {heads} Pm {head_size} G {groups} Ns {states}"
    return Case(
        f"Mamba2Scan {named}{' padded' if padding else ''}",
        dtype,
        lambda: torch_kernels.call(mamba2_scan, library, *given, 1, *limits),
        lambda outputs: (outputs[0][row][:, :, head], outputs[1][row][:, head]),
        reference,
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
    *,
    kept_channels: int | None = None,
) -> Case:
    """``ingot::CausalConv``; the reference has some of the channels."""
    sizes = {"batch": batch, "tokens": tokens, "channels": channels, "width": width}
    x, state, weight, bias = inputs(causal_conv, device, dtype, sizes)
    kept = spread(channels, kept_channels).to(device)

    def reference() -> Tensors:
        of_channels = (x[:, :, kept], state[:, kept], weight[kept], bias[kept])
        arguments: list[Any] = [*wide(*of_channels), activation]
        result: Tensors = causal_conv(*arguments)
        return result

    return Case(
        f"CausalConv B {batch} T {tokens} C {channels} W {width} {activation}",
        dtype,
        lambda: torch_kernels.call(causal_conv, library, x, state, weight, bias, activation),
        lambda outputs: (outputs[0][:, :, kept], outputs[1][:, kept]),
        reference,
    )


def small_cases(
    library: Library, device: str, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> Iterator[Case]:
    """``small`` on a device."""
    return (make(library, device) for make in small(dtypes))


def small(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Make]:
    """Odd sizes of every operator, small enough for the interpreter; what makes each case."""
    for dtype in dtypes:
        # 16-bit kernels load eight numbers at a time.
        odd = 0 if dtype != torch.float32 else 3
        sizes = (40 + odd, 24 + odd, 7, 3)
        for tokens in (1, 5, 37):
            yield _make(moe_dispatch_case, dtype, tokens, *sizes)
            yield _make(moe_dispatch_case, dtype, tokens, *sizes, "gelu_tanh", True)
            for per_choice in (False, True):
                yield _make(moe_linear_case, dtype, tokens, *sizes, per_choice)
        for tokens in (1, 2, 65, 131):
            yield _make(mamba2_scan_case, dtype, 2, tokens, 4, 12, 2, 20, tokens // 3)
            yield _make(causal_conv_case, dtype, 2, tokens, 35, 4)


def _make(case: Callable[..., Case], *arguments: Any) -> Make:
    return lambda library, device: case(library, device, *arguments)


def check(cases: Iterator[Case], repeats: int = 2) -> list[str]:
    """Run cases, say each result, and return the failures."""
    failures = []
    for case in cases:
        passed, text = case.run(repeats)
        line = f"{'ok  ' if passed else 'FAIL'} {text}"
        print(line, flush=True)
        if not passed:
            failures.append(line)
    return failures


def main() -> int:
    if not has_gpu():
        print("python -m ingot.plugins.check needs an NVIDIA GPU, and this machine has none.")
        return 2
    try:
        library = Library()
        torch.zeros(1, device="cuda")
        library.prepare()
    except LibraryError as error:
        print(f"error: {error}")
        return 2
    print(torch.cuda.get_device_name())
    failures = check(small_cases(library, "cuda"))
    if failures:
        print(f"{len(failures)} of the checks failed:", *failures, sep="\n")
        return 1
    return 0


if __name__ == "__main__":
    with ended():
        sys.exit(main())
