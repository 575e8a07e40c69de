"""What is said of the processor, and which others it can stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.validate import processor as module
from ingot.validate.processor import CPU, FEATURES, ISA, PROCESSOR, THREADS, emulated, processor
from ingot.validate.truth.cache import Cache
from ingot.validate.truth.inputs import make_inputs
from ingot.validate.truth.reference import Reference

INTEL = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8370C
flags\t\t: fpu avx fma avx2 avx512f avx512bw avx512vl avx512_vnni amx_tile hypervisor

processor\t: 1
model name\t: something else
"""
OLD = "model name\t: AMD Old\nflags\t: fpu sse4_1\n"


def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    """A machine whose system says this of its processor."""
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("ingot.validate.processor.platform.machine", lambda: "x86_64")


def test_names_what_kernels_choose_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told(monkeypatch, tmp_path, INTEL)
    for name in module._ORDERS:
        monkeypatch.delenv(name, raising=False)
    found = processor()
    assert tuple(found) == PROCESSOR
    assert found[CPU] == "Intel(R) Xeon(R) Platinum 8370C"
    assert found[FEATURES] == "avx fma avx2 avx512f avx512bw avx512vl avx512_vnni amx_tile"
    assert found[ISA] == torch.backends.cpu.get_cpu_capability()
    assert found[THREADS].startswith(f"{torch.get_num_threads()} of PyTorch, ")


def test_an_order_to_use_fewer_instructions_is_another_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = processor()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    after = processor()
    assert after[ISA].endswith("ONEDNN_MAX_CPU_ISA=AVX2)")
    assert {name for name in PROCESSOR if before[name] != after[name]} == {ISA}


def test_stands_for_processors_with_fewer_instructions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told(monkeypatch, tmp_path, INTEL)
    names = [other.name for other in emulated("AVX512")]
    assert names == ["without AVX", "other matrix products", "AVX2"]
    # Told to use fewer, it can stand for itself.
    assert "AVX-512" in [other.name for other in emulated("AVX2")]
    told(monkeypatch, tmp_path, OLD)
    assert [other.name for other in emulated("DEFAULT")] == ["other matrix products"]


def test_stands_for_no_other_kind_of_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingot.validate.processor.platform.machine", lambda: "aarch64")
    assert emulated("DEFAULT") == []


def test_a_system_that_says_nothing_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "absent")
    found = processor()
    assert found[FEATURES] == "unknown" and found[CPU]


def test_what_eager_computes_is_kept_for_each_processor_and_the_truth_for_all(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(512)

    def keys() -> tuple[str, str]:
        reference = Reference(Checkpoint.open(tiny), "generate", "float32", Cache(tmp_path))
        truth = reference._key(inputs, torch.float64, Stages())
        return truth, reference._key(inputs, torch.float32, Stages(), replayed=True)

    truth, eager = keys()
    assert keys() == (truth, eager)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    other_truth, other_eager = keys()
    assert other_truth == truth and other_eager != eager
