"""The machine's ceilings, by ``ceilings.cpp``, which is compiled for it first."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.on_peers.program import run_logged
from ingot.plugins.whole import sha256

SOURCE = Path(__file__).with_name("ceilings.cpp")
# Loops over vectors say which instructions they use; -O2 alone would leave the plain sum scalar.
OPTIONS = ("-O2", "-ftree-vectorize", "-std=c++17", "-pthread")
READ = "read"
# In the order of a table.
KINDS = (READ, "float32", "bfloat16", "int8")
# Kind of ceiling -> loop -> bytes or operations a second.
Rates = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Best:
    """The highest of several loops.

    Attributes:
        loop: which.
        rate: its bytes or operations a second.
    """

    loop: str
    rate: float


def build(folder: Path) -> Path:
    """The program, compiled where that was not done for this source.

    Raises:
        PeerError: no compiler, or one that refuses it.
    """
    program = folder / f"ceilings-{sha256(SOURCE)[:12]}"
    if not program.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "ceilings-compile.txt"
        part = program.with_suffix(".part")
        run_logged(["g++", *OPTIONS, SOURCE, "-o", part], log)
        part.rename(program)
    return program


def measure(program: Path, threads: int, seconds: float, mebibytes: int) -> Rates:
    """Every ceiling once.

    Args:
        program: by ``build``.
        threads: at once.
        seconds: of each loop.
        mebibytes: that are read over; several times the last cache.
    """
    asked = [program, str(threads), str(seconds), str(mebibytes)]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    found: Rates = json.loads(done.stdout)
    return found


def best(rounds: Iterable[Rates]) -> dict[str, Best]:
    """Of each kind the highest over all loops and rounds, since other work only slows them."""
    found: dict[str, Best] = {}
    for rates in rounds:
        for kind, loops in rates.items():
            for loop, rate in loops.items():
                if kind not in found or rate > found[kind].rate:
                    found[kind] = Best(loop, rate)
    return {kind: found[kind] for kind in KINDS if kind in found}


def peak_of(arithmetic: str, found: Mapping[str, Best]) -> tuple[str, Best] | None:
    """The peak for a kind of products, or float32's where the machine has none of its own.

    Returns:
        The kind and its peak; None where nothing was measured.
    """
    for kind in (arithmetic, "float32"):
        if kind in found:
            return kind, found[kind]
    return None
