"""The processor that computed: what kernels choose their instructions by.

PyTorch, the libraries below it and ONNX Runtime each look at the processor and take other kernels
on another one, which sum in another order. So figures differ in their last bits between machines of
one kind, and between settings of one machine.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

# What a machine's name of itself is called in a report's environment, and all that is of it.
ISA = "instruction set"
THREADS = "threads"
CPU = "processor"
FEATURES = "processor features"
PROCESSOR = (CPU, FEATURES, ISA, THREADS)
# Of those, what ONNX Runtime looks at, which takes no order from the environment.
HARDWARE = (CPU, FEATURES)

# Names of Linux for what the kernels of any of the libraries ask for, in the order they came.
_DISPATCHED = (
    *("sse4_1", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)
# How a user tells a library to use fewer instructions than the processor has.
_ORDERS = (
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"),
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"),
)
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Emulated:
    """Another processor, as far as this one can stand for it.

    Attributes:
        name: in words.
        environment: variables under which PyTorch and the libraries below it take its kernels.
        processors: how many of them; None for all.
    """

    name: str
    environment: dict[str, str]
    processors: int | None = None


def processor() -> dict[str, str]:
    """What the figures of this process depend on beside versions, by the names of ``PROCESSOR``.

    PyTorch's instruction set and threads are what it really uses, so it is imported.
    """
    import torch

    facts = _facts()
    orders = [f"{name}={os.environ[name]}" for name in _ORDERS if name in os.environ]
    isa = torch.backends.cpu.get_cpu_capability()
    return {
        CPU: facts.get("model name") or platform.processor() or "unknown",
        FEATURES: " ".join(features(facts)) or "unknown",
        ISA: f"{isa} ({', '.join(orders)})" if orders else isa,
        THREADS: f"{torch.get_num_threads()} of PyTorch, {_available()} available",
    }


def features(facts: dict[str, str]) -> list[str]:
    """The instructions that kernels ask for and this processor has, under the names of Linux."""
    has = set((facts.get("flags") or facts.get("Features") or "").split())
    return [name for name in _DISPATCHED if name in has]


def emulated(now: str | None) -> list[Emulated]:
    """Other processors that this one can stand for, by using fewer instructions.

    Args:
        now: the instruction set that is used, as ``processor`` says it; it is none of the others.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    has = set(features(_facts()))
    # Also each library by itself, since another processor changes one and not the other.
    others = {
        "DEFAULT": Emulated("without AVX", _order("default", "SSE41", "COMPATIBLE")),
        "MKL": Emulated("other matrix products", {"MKL_CBWR": "COMPATIBLE"}),
    }
    if {"avx2", "fma"} <= has:
        others["AVX2"] = Emulated("AVX2", _order("avx2", "AVX2", "AVX2"))
    if {"avx512f", "avx512bw", "avx512vl"} <= has:
        others["AVX512"] = Emulated("AVX-512", _order("avx512", "AVX512_CORE", "AVX512"))
    return [other for name, other in others.items() if name != now]


def one_processor() -> Emulated | None:
    """This machine with one processor, so one thread; None where it has no more."""
    if _available() < 2 or not hasattr(os, "sched_setaffinity"):
        return None
    return Emulated("one thread", {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, 1)


def _order(aten: str, onednn: str, mkl: str) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_CBWR": mkl}


def _available() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _facts() -> dict[str, str]:
    """What Linux says of the first processor, by its names; empty on another system."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    first = text.partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
