"""OLMoE-1B-7B and Mamba2-2.7B in bfloat16, with weights drawn on the card: eager against kernels.

Right means: two layers are within twice eager's own error of float64; and of the whole model,
greedy tokens equal eager's up to its first near-tie, and logits after eager's tokens are within
twice eager's own error of float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.on_gpu.bench import Bench
from benchmarks.on_gpu.decoding import (
    CapturedDecoder,
    Decoder,
    agreement,
    drawn,
    in_dtype,
    read_bytes,
)
from benchmarks.on_gpu.runner import Found, Item, Wrong
from ingot.graphs.family import Family, find_family
from ingot.graphs.preset import preset_config
from ingot.plugins import torch_kernels
from ingot.plugins.check import relative_rms
from ingot.plugins.registry import OPERATORS

BF16 = torch.bfloat16
FAMILIES = ("olmoe", "mamba2")
# Kernels may be off by so much more than the eager graph is in its own precision. A rehearsal's
# interpreter cuts bfloat16 off where a card rounds it.
LIMIT, REHEARSED_LIMIT = 2.0, 4.0


def items(bench: Bench) -> Iterator[Item]:
    """Two layers of each model, then the whole of each."""
    library = bench.library()
    torch_kernels.register(library, bench.device.name)
    for name in FAMILIES:
        yield Item(f"{name} two layers", partial(two_layers, bench, name))
    for name in FAMILIES:
        yield Item(f"{name} whole", partial(whole, bench, name))


@contextlib.contextmanager
def kernels(bench: Bench, *, on: bool) -> Iterator[None]:
    """The eager graph's operators by the kernels, or by their references."""
    with contextlib.ExitStack() as stack:
        if not on:
            for operator in OPERATORS.values():
                stack.enter_context(operator.custom_op.set_kernel_enabled(bench.device.name, False))
            # cuDNN makes a plan for every length of a cache that grows, each in part of a second.
            flag: Any = torch.backends.cuda
            stack.callback(flag.enable_cudnn_sdp, flag.cudnn_sdp_enabled())
            flag.enable_cudnn_sdp(False)
        yield


def _config(bench: Bench, name: str, **changes: Any) -> tuple[Family, dict[str, Any]]:
    family = find_family(name)
    return family, {**preset_config(family, bench.pick("full", "tiny")), **changes}


def _prompt(bench: Bench, config: dict[str, Any], tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, config["vocab_size"], (1, tokens), generator=generator)
    return ids.to(bench.device.name)


def two_layers(bench: Bench, name: str) -> Found:
    """A prefill and some decode steps, in float64, in bfloat16, and on the kernels."""
    family, config = _config(bench, name, num_hidden_layers=2)
    device = bench.device.name
    model = drawn(family, config, BF16, device)
    prompt = _prompt(bench, config, bench.pick(512, 5))
    following = _prompt(bench, config, bench.pick(4, 1))

    def run(of: Any, dtype: torch.dtype, *, on: bool) -> torch.Tensor:
        decoder = Decoder(of, dtype, device)
        with kernels(bench, on=on):
            rows = [decoder.step(prompt)]
            rows += [decoder.step(following[:, i : i + 1]) for i in range(following.shape[1])]
        return torch.cat(rows)

    fast = run(model, BF16, on=True)
    if not bench.computes:
        return {"text": f"{name} two layers: launches recorded"}
    wide = in_dtype(model, family, config, torch.float64)
    truth = run(wide, torch.float64, on=False)
    own, of_kernels = (relative_rms(got, truth) for got in (run(model, BF16, on=False), fast))
    del model, wide, truth, fast
    bench.device.free()
    figures = f"error {of_kernels:.2e}, eager's own {own:.2e}"
    _require(bench, of_kernels, own, figures)
    return {"text": f"{name} two layers: {figures}", "error": of_kernels, "eager_error": own}


def _require(bench: Bench, of_kernels: float, own: float, figures: str) -> None:
    limit = bench.pick(LIMIT, REHEARSED_LIMIT)
    # NaN is no pass.
    if not of_kernels <= limit * own:
        raise Wrong(f"{figures}; at most {limit} times that is right")


def whole(bench: Bench, name: str) -> Found:
    """Prefill and greedy tokens of the whole model, and their times."""
    family, config = _config(bench, name)
    prompt_tokens, count = bench.pick((512, 64), (5, 3))
    room = prompt_tokens + count
    device = bench.device.name
    model: Any = drawn(family, config, BF16, device)
    prompt = _prompt(bench, config, prompt_tokens)

    with kernels(bench, on=True):
        fast = Decoder(model, BF16, device)
        first = fast.step(prompt)[-1].clone()
        captured = CapturedDecoder(fast, room, bench.device)
        found = _times(bench, model, prompt, captured, count)
    found["text"] = f"{name} whole: {_speed(found)}"
    if bench.computes:
        found |= _proof(bench, family, config, model, prompt, first, captured, count)
        found["lines"] = [_numbers(found)]
    return found


def _proof(
    bench: Bench,
    family: Family,
    config: dict[str, Any],
    model: Any,
    prompt: torch.Tensor,
    first: torch.Tensor,
    captured: CapturedDecoder,
    count: int,
) -> Found:
    device = bench.device.name
    with kernels(bench, on=False):
        eager_tokens, eager_logits = Decoder(model, BF16, device).greedy(prompt, count)
        wide = in_dtype(model, family, config, torch.float32)
        ids = torch.tensor([eager_tokens[:-1]], device=device)
        everything = torch.cat((prompt, ids), dim=1)
        truth = Decoder(wide, torch.float32, device).step(everything)[-count:].clone()
        del wide
    with kernels(bench, on=True):
        forced = torch.cat((first[None], captured.forced(eager_tokens[:-1])))
        tokens = captured.greedy(int(first.argmax()), count)
    own, of_kernels = relative_rms(eager_logits, truth), relative_rms(forced, truth)
    until, differs = agreement(tokens, eager_tokens, eager_logits, truth)
    bench.device.free()
    figures = f"error {of_kernels:.2e}, eager's own {own:.2e}"
    _require(bench, of_kernels, own, f"logits after eager's tokens: {figures}")
    if differs is not None and differs < until:
        raise Wrong(
            f"token {differs} is {tokens[differs]} and eager's is {eager_tokens[differs]}, before "
            f"its first near-tie at {until}"
        )
    return {
        "error": of_kernels,
        "eager_error": own,
        "first_near_tie": until,
        "first_difference": differs,
        "tokens": tokens,
        "eager_tokens": eager_tokens,
    }


def _times(
    bench: Bench, model: Any, prompt: torch.Tensor, captured: CapturedDecoder, count: int
) -> Found:
    """Seconds of a prefill and of a decode step, and the step's share of what it must read."""
    device = bench.device

    def prefill() -> None:
        Decoder(model, BF16, device.name).step(prompt)

    def decode() -> None:
        captured.rewind()
        for _ in range(count):
            captured.replay()

    took = device.time(decode, count, least=0.5)
    top_k = model.config.facts.experts_per_token
    tied = bool(model.config.tie_word_embeddings)
    least = read_bytes(model, top_k, captured.caches, tied)
    return {
        "prefill_tokens": prompt.shape[1],
        "prefill_seconds": device.time(prefill, 1).median,
        "step_seconds": took.median,
        "step_spread": took.spread,
        "bytes_read": least,
        "read_floor": bench.share(least / took.median, "bandwidth"),
    }


def _speed(found: Found) -> str:
    step = found["step_seconds"]
    return (
        f"{1 / step:.0f} tokens/s ({1e3 * step:.2f} ms, its read floor is {found['read_floor']} of "
        f"that), prefill of {found['prefill_tokens']} in {1e3 * found['prefill_seconds']:.1f} ms"
    )


def _numbers(found: Found) -> str:
    differs = found["first_difference"]
    return (
        f"error {found['error']:.1e}, eager's own {found['eager_error']:.1e}; tokens equal "
        f"{'to the end' if differs is None else f'up to {differs}'}, first near-tie at "
        f"{found['first_near_tie']}"
    )
