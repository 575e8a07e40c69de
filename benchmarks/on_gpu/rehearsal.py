"""A rehearsal's kernels: the host layer over a driver that computes, or one that only records.

Triton's interpreter computes where it can; with some versions of NumPy it cannot, and then every
launch is recorded and its grid and arguments are checked.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

from ingot.plugins.library import Library

INTERPRET = "TRITON_INTERPRET"
# Files in the rehearsal's folder.
HOW = "how"
TOOL = "compute-sanitizer"

# compute-sanitizer's place: it runs the command and reports what a clean run with the planted fault
# would give.
STAND_IN = """#!/bin/sh
tool=$2
shift 6
"$@" || exit
if [ "$tool" = racecheck ]; then
    echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
else
    echo "========= Invalid __global__ write of size 2 bytes"
    echo "=========     at linear_one+0x7d0"
    echo "========= ERROR SUMMARY: 1 error"
fi
"""


def prepare(folder: Path, how: str = "auto") -> str:
    """Say which library a rehearsal has, and put its tool there; before Triton is imported.

    Args:
        folder: of the rehearsal; the library is built there when it is opened.
        how: ``interpreter``, ``recorder``, or ``auto`` for the first where it works.

    Returns:
        Which it is.
    """
    if how == "auto":
        how = "interpreter" if _interpreter_works() else "recorder"
    (folder / HOW).write_text(how)
    tool = folder / TOOL
    tool.write_text(STAND_IN)
    tool.chmod(0o755)
    return how


def reopen(folder: Path) -> Library:
    """The library that ``prepare`` built, in this process or in another."""
    how = (folder / HOW).read_text()
    os.environ[INTERPRET] = "1" if how == "interpreter" else "0"
    from ingot.plugins.kernels.build import all_forms, tuning_forms
    from ingot.plugins.kernels.interpret import InterpretedLibrary
    from ingot.plugins.kernels.record import RecordingLibrary

    forms = {**all_forms(), **tuning_forms()}
    return (InterpretedLibrary if how == "interpreter" else RecordingLibrary)(forms, folder)


def _interpreter_works() -> bool:
    """Tried in a process of its own, since Triton decides when it is imported."""
    process = multiprocessing.get_context("fork").Process(target=_interpret_one_kernel)
    process.start()
    process.join()
    return process.exitcode == 0


def _interpret_one_kernel() -> None:
    os.environ[INTERPRET] = "1"
    # Whatever it prints is no news: the recorder takes its place.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import torch

    from ingot.plugins.kernels.moe import combine

    rows = torch.ones(1, 2, 8)
    out = torch.zeros(1, 8)
    combine[(1,)](rows, torch.ones(1, 2), out, 2, 8, GRAIN=1, BLOCK=8)
    os._exit(0 if out.tolist() == [[2.0] * 8] else 1)
