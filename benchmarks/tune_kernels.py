"""Which tile and which chunk length is fastest on this machine's GPU; needs one.

Run with ``.venv/bin/python benchmarks/tune_kernels.py``. The host layer is linked once for each
candidate, with the choice forced, and the calls take turns. The best of each row belongs into the
tables ``kTilings`` (plugins/csrc/moe.cpp) and ``kChunkLengths`` (plugins/csrc/mamba2.cpp).
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from plugins.check import seconds, timed_moe, timed_scan
from plugins.device import compute_capability, has_gpu
from plugins.kernels.build import FOLDER, all_forms, compile_all
from plugins.kernels.host import Compiled, link
from plugins.kernels.table import runs_on
from plugins.library import Library

MOE_TOKENS = (32, 64, 128, 256, 512, 1024, 4096)
SCAN_TOKENS = (128, 256, 1024, 4096, 8192)
CHUNKS = (64, 128, 256)


def tiles(compiled: list[Compiled]) -> list[tuple[int, int]]:
    """Tiles of rows and columns that the grouped products in bfloat16 were compiled with."""
    found = {
        tuple(map(int, match.groups()))
        for form in compiled
        if (match := re.fullmatch(r"moe_gate_up_m(\d+)n(\d+)_bf16", form.name))
    }
    return sorted((rows, columns) for rows, columns in found if rows >= 64)


def table(
    title: str, names: list[str], tokens: tuple[int, ...], calls: Callable[[int], list[float]]
) -> None:
    print(f"\n{title}, ms\n")
    print("| tokens | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for count in tokens:
        times = calls(count)
        best = min(times)
        cells = (f"**{1e3 * t:.3f}**" if t == best else f"{1e3 * t:.3f}" for t in times)
        print(f"| {count} | " + " | ".join(cells) + " |", flush=True)


def main() -> int:
    if not has_gpu():
        print("benchmarks/tune_kernels.py needs an NVIDIA GPU, and this machine has none.")
        return 2
    device = compute_capability()
    forms = all_forms().values()
    wanted = max(c for form in forms for c in form.capabilities if runs_on(c, device))
    compiled = [made for made, _ in compile_all(forms, (wanted,), FOLDER)]
    with tempfile.TemporaryDirectory() as name:

        def library(label: str, flag: str) -> Library:
            folder = Path(name) / label
            out = folder / "libingot_kernels.so"
            link(compiled, out, folder, flag)
            return Library(out)

        shapes = tiles(compiled)
        labels = [f"{rows}x{columns}" for rows, columns in shapes]
        by_tile = [
            library(label, f"-DINGOT_FORCED_TILE={rows},{columns}")
            for label, (rows, columns) in zip(labels, shapes, strict=True)
        ]
        table(
            f"MoeDispatch by tile, compute capability {device}",
            labels,
            MOE_TOKENS,
            lambda tokens: [seconds(timed_moe(each, tokens).kernel) for each in by_tile],
        )
        by_chunk = [library(f"chunk{n}", f"-DINGOT_FORCED_CHUNK={n}") for n in CHUNKS]
        table(
            f"Mamba2Scan by chunk length, compute capability {device}",
            [str(chunk) for chunk in CHUNKS],
            SCAN_TOKENS,
            lambda tokens: [seconds(timed_scan(each, tokens).kernel) for each in by_chunk],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
