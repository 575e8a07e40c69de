"""Which kernels load on this card, and what the machine is."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.on_gpu.bench import ROOT, Bench
from benchmarks.on_gpu.runner import Found, Item, Wrong
from ingot.plugins.errors import IngotError
from ingot.plugins.library import PATH

# In order: what is shipped, the same made by Triton's other ptxas, and a build on the spot.
OTHER = PATH.parent / "other-ptxas" / PATH.name
BUILT = ROOT / "build" / "on_gpu" / PATH.name
BUILD_SECONDS = 50.0


def items(bench: Bench) -> Iterator[Item]:
    """The machine, then the first library that loads."""
    yield Item("machine", lambda: machine(bench))
    if "machine" in bench.found:
        yield Item("kernels", lambda: kernels(bench))


def machine(bench: Bench) -> Found:
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": _nvidia_smi("driver_version"),
        "card": "no card (rehearsal)",
    }
    if not bench.rehearsal:
        if not torch.cuda.is_available():
            raise Wrong("PyTorch finds no CUDA device; run nvidia-smi to see whether there is one")
        bench.device.start()
        properties: Any = torch.cuda.get_device_properties(0)
        facts["card"] = properties.name
        facts["capability"] = 10 * properties.major + properties.minor
        facts["memory"] = properties.total_memory
        facts["clocks"] = _nvidia_smi("clocks.max.sm,clocks.max.mem,power.limit")
    text = f"{facts['card']}, driver {facts['driver']}, torch {facts['torch']}"
    return {"text": text, "keep": {"machine": facts}}


def _version(module: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return "none"


def _nvidia_smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()


def kernels(bench: Bench) -> Found:
    refusals = []
    for path in (None,) if bench.rehearsal else (PATH, OTHER, BUILT):
        try:
            if path == BUILT:
                build_here(bench.found["machine"]["capability"])
            library = bench.library(path)
        except (IngotError, subprocess.TimeoutExpired) as error:
            refusals.append(f"{path and path.relative_to(ROOT)}: {error}")
            continue
        brought = "" if path != BUILT else "BUILT HERE, not what is shipped: "
        return {
            "text": f"{brought}kernels from {path.relative_to(ROOT) if path else 'the rehearsal'}",
            "lines": library.build_line.split("; "),
            "refused": refusals,
            "keep": {"library": path and str(path)},
        }
    raise Wrong("; ".join(refusals))


def build_here(capability: int) -> None:
    """Compile the kernels for this card alone, with the Triton that is here.

    Raises:
        IngotError: Triton or the compiler is missing, or refuses a kernel.
    """
    command = [sys.executable, "-m", "ingot.plugins.kernels.build", "--sm", str(capability)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--out", BUILT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=BUILD_SECONDS,
    )
    if done.returncode:
        raise IngotError((done.stderr or done.stdout).strip()[-300:])
