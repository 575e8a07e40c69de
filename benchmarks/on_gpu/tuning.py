"""Candidate tiles and chunk lengths against the built-in ones, and the best ones to commit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from benchmarks.on_gpu import shapes
from benchmarks.on_gpu.bench import Bench
from benchmarks.on_gpu.runner import Found, Item, Refused, Wrong
from ingot.plugins import torch_kernels
from ingot.plugins.check import inputs, relative_rms
from ingot.plugins.kernels.build import TUNE_PATH
from ingot.plugins.library import Library, LibraryError
from ingot.plugins.mamba2_scan import mamba2_scan
from ingot.plugins.moe_dispatch import moe_dispatch

BF16 = torch.bfloat16
# Of the built-in result: candidates add up in another order.
SAME = 1e-2
# A difference below it is noise.
NEAR = 1.03
BUILT_IN = "built-in"
# Which table an item is for.
TILES, CHUNKS = "tiles", "chunks"


def items(bench: Bench) -> Iterator[Item]:
    """Tiles for each number of tokens, then chunk lengths and variants of the scan."""
    brought = TUNE_PATH.is_file() and not bench.rehearsal
    library = bench.library(TUNE_PATH if brought else None)
    tokens = bench.pick((32, 64, 128, 256, 512, 1024, 2048, 4096, 8192), (17,))
    for count in tokens:
        yield Item(f"MoeDispatch N {count}", partial(tiles, bench, library, count))
    for count in bench.pick((128, 256, 512, 1024, 2048, 4096, 8192), (9,)):
        yield Item(f"Mamba2Scan T {count}", partial(chunks, bench, library, count))


def _candidates(
    bench: Bench,
    library: Library,
    choices: dict[str, Callable[[], None]],
    calls: list[Callable[[], tuple[torch.Tensor, ...]]],
) -> dict[str, float]:
    """Seconds of a call by every candidate.

    Raises:
        Wrong: one computes something else than the built-in choice does.
        Refused: the library has none of them.
    """
    library.tune()
    want = calls[0]()[0]
    times: dict[str, float] = {}
    wrong: list[str] = []
    for name, choose in {BUILT_IN: library.tune, **choices}.items():
        try:
            choose()
            got = calls[0]()[0]
            difference = relative_rms(got, want)
            if bench.computes and not difference < SAME:
                wrong.append(f"{name} (off by {difference:.1e})")
                continue
            replay = bench.device.capture(lambda: [call() for call in calls])
            times[name] = bench.device.time(replay, len(calls), least=0.05).median
        except LibraryError:
            # Not in this library: what does not compile for a card is left out of it.
            continue
        finally:
            library.tune()
    if wrong:
        raise Wrong(f"candidates that compute something else: {', '.join(wrong)}")
    if len(times) < 2:
        raise Refused("this library has no candidates")
    return times


def _found(name: str, times: dict[str, float], table: str, at: int) -> Found:
    best = min(times, key=times.__getitem__)
    text = f"{name}: {best} {1e6 * times[best]:.1f} us, built-in {1e6 * times[BUILT_IN]:.1f} us"
    return {"text": text, "seconds_of": times, "table": table, "at": at}


def tiles(bench: Bench, library: Library, tokens: int) -> Found:
    """Tiles of OLMoE's grouped products for so many tokens."""
    from ingot.plugins.kernels.moe import tuning_tiles

    shape = shapes.moe(bench.pick("full", "tiny"))[0]
    make = partial(inputs, moe_dispatch, bench.device.name, BF16, {"tokens": tokens, **shape.sizes})
    sets = [make() for _ in range(bench.pick(2, 1))]
    options = (shape.top_k, shape.normalize, "silu")

    def call(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, logits, gate_up, down = tensors
        return (torch_kernels.call(moe_dispatch, library, x, logits, gate_up, down, *options),)

    choices = {
        f"{rows}x{columns} {variant}".strip(): partial(
            library.tune, tile=(rows, columns), tile_variant=variant
        )
        for rows, columns, variant in tuning_tiles()[: bench.pick(None, 2)]
    }
    times = _candidates(bench, library, choices, [partial(call, each) for each in sets])
    mean_rows = tokens * shape.top_k // shape.experts
    return _found(f"MoeDispatch N {tokens}", times, TILES, mean_rows)


def chunks(bench: Bench, library: Library, tokens: int) -> Found:
    """Chunk lengths and variants of Mamba2-2.7B's scan for so many tokens."""
    from ingot.plugins.kernels.mamba2 import tuning_variants

    shape = shapes.scans(bench.pick("full", "tiny"))[0]
    given = inputs(
        mamba2_scan, bench.device.name, BF16, {"batch": 1, "tokens": tokens, **shape.sizes}
    )

    def call() -> tuple[torch.Tensor, ...]:
        y, state = torch_kernels.call(mamba2_scan, library, *given, 1, 0.0, math.inf)
        return y, state

    choices = {
        f"{chunk} {variant}".strip(): partial(library.tune, chunk=chunk, scan_variant=variant)
        for chunk in bench.pick((64, 128, 256), (64,))
        for variant in tuning_variants()[: bench.pick(None, 2)]
    }
    times = _candidates(bench, library, choices, [call])
    return _found(f"Mamba2Scan T {tokens}", times, CHUNKS, tokens)


def tables(items: Iterable[Found], capability: int) -> list[str]:
    """Lines for kTilings (plugins/csrc/moe.cpp) and kScans (plugins/csrc/mamba2.cpp).

    Args:
        items: what the phase found, as far as it came.
        capability: of the card, major times ten plus minor.
    """
    times: dict[str, dict[int, dict[str, float]]] = {TILES: {}, CHUNKS: {}}
    for found in items:
        if "table" in found:
            times[found["table"]][found["at"]] = found["seconds_of"]
    lines = []
    if times[TILES]:
        lines.append("// kTilings; a variant needs its form in plugins/kernels/moe.py as well.")
    for from_rows, name in steps(times[TILES]):
        size, _, variant = name.partition(" ")
        rows, columns = size.split("x")
        note = f"  // {variant}" if variant else ""
        lines.append(f"{{{capability}, {from_rows}, {{{rows}, {columns}}}}},{note}")
    if times[CHUNKS]:
        longest = _without_built_in(times[CHUNKS][max(times[CHUNKS])])
        chunk, _, variant = min(longest, key=longest.__getitem__).partition(" ")
        lines.append("// kScans, by the longest prompt.")
        lines.append(f'{{{capability}, {chunk}, "{"_" * bool(variant)}{variant}"}},')
    return lines


def steps(times: dict[int, dict[str, float]]) -> list[tuple[int, str]]:
    """From which mean number of rows on which tile is best; a tile stays while it is near it."""
    result: list[tuple[int, str]] = []
    for mean_rows, every in sorted(times.items()):
        candidates = _without_built_in(every)
        best = min(candidates, key=candidates.__getitem__)
        stays = result and candidates.get(result[-1][1], math.inf) <= NEAR * candidates[best]
        if not stays:
            result.append((mean_rows if result else 0, best))
    return result


def _without_built_in(times: dict[str, float]) -> dict[str, float]:
    return {name: seconds for name, seconds in times.items() if name != BUILT_IN}
