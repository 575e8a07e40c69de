"""``python -m benchmarks.on_gpu.sanitized``: what runs under compute-sanitizer.

Small cases once each, in bfloat16, and with ``--plant`` a write past the end of an output, which
memcheck must report. Markers on the standard output say how far it came.
"""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path

import click
import torch

from benchmarks.on_gpu.runner import die_with_parent
from ingot.plugins import check
from ingot.plugins.library import PATH, Library, LibraryError
from ingot.plugins.moe_linear import moe_linear
from ingot.plugins.operator import DTYPES

FINISHED = "=== every case ran"
PLANTED = "=== a write past the end follows"

# Of a rehearsal, whose tool is not there.
FEW = 3


@click.command()
@click.option("--library", type=click.Path(path_type=Path), default=PATH)
@click.option("--rehearse", type=click.Path(path_type=Path), help="Folder of the rehearsal.")
@click.option("--plant", is_flag=True, help="Write past the end of an output behind the cases.")
def main(library: Path, rehearse: Path | None, plant: bool) -> None:
    """Run the cases."""
    die_with_parent()
    if rehearse is None:
        torch.cuda.init()
        loaded, device, most = Library(library), "cuda", None
    else:
        from benchmarks.on_gpu.rehearsal import reopen

        loaded, device, most = reopen(rehearse), "cpu", FEW
    loaded.prepare()
    for case in islice(check.small_cases(loaded, device, (torch.bfloat16,)), most):
        case.kernel()
    _wait(device)
    print(FINISHED, flush=True)
    if plant:
        # The tool prints from a process of its own; what it found so far is to stand before this.
        time.sleep(1.0 if device == "cuda" else 0.0)
        print(PLANTED, flush=True)
        write_past_the_end(loaded, device)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def write_past_the_end(library: Library, device: str) -> None:
    """A product of 2048 features into an output of 16 elements."""
    if device != "cuda":
        # A tool's stand-in sees nothing, and the memory behind the output is somebody's.
        return
    x = torch.ones(1, 16, dtype=torch.bfloat16, device=device)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    weight = torch.ones(1, 2048, 16, dtype=torch.bfloat16, device=device)
    short = torch.empty(16, dtype=torch.bfloat16, device=device)
    parameters = moe_linear.structure(
        dtype=DTYPES["bfloat16"],
        top_k=1,
        experts=1,
        tokens=1,
        in_features=16,
        out_features=2048,
        x=x.data_ptr(),
        expert_ids=ids.data_ptr(),
        weight=weight.data_ptr(),
        y=short.data_ptr(),
    )
    try:
        library.run(parameters, None, 0, torch.cuda.current_stream().cuda_stream)
        _wait(device)
    except (LibraryError, RuntimeError) as error:
        print(f"the planted write ended with: {error}", flush=True)


if __name__ == "__main__":
    main()
