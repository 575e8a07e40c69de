"""The GPU self-check's own cases, over Triton's interpreter, and that it can fail."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from ingot.plugins import check as subject
from ingot.plugins.device import has_gpu
from ingot.plugins.library import PATH, Library
from ingot.plugins.registry import OPERATORS

if TYPE_CHECKING:
    from ingot.plugins.kernels.interpret import InterpretedLibrary


@pytest.mark.slow
def test_every_small_case_passes(device: InterpretedLibrary) -> None:
    """In one dtype: the rehearsal of benchmarks/gpu.py has another, the kernels' own tests all."""
    cases = subject.small_cases(device, "cpu", (torch.float32,))
    assert subject.check(cases, repeats=0) == []


def test_a_small_case_of_every_operator_passes(device: InterpretedLibrary) -> None:
    cases = subject.small_cases(device, "cpu", (torch.float32,))
    by_operator = {case.name.split()[0]: case for case in cases}
    assert by_operator.keys() == OPERATORS.keys()
    assert subject.check(iter(by_operator.values()), repeats=0) == []


def spoiled(case: subject.Case, spoil: Callable[[subject.Tensors, int], object]) -> subject.Case:
    """A case whose outputs are changed behind the kernel, which is told how often it ran."""
    runs = itertools.count()

    def kernel() -> subject.Tensors:
        outputs = case.kernel()
        spoil(outputs, next(runs))
        return outputs

    return replace(case, kernel=kernel)


def test_a_wrong_number_and_a_nan_are_failures(
    device: InterpretedLibrary, capsys: pytest.CaptureFixture[str]
) -> None:
    case = subject.causal_conv_case(device, "cpu", torch.float32, 1, 5, 8, 4)

    def changed(value: float) -> subject.Case:
        return spoiled(case, lambda outputs, _: outputs[0][0, 2, 3].fill_(value))

    cases = iter([case, changed(1.0), changed(float("nan"))])
    assert len(subject.check(cases)) == 2
    assert capsys.readouterr().out.count("FAIL") == 2


def test_other_bits_when_repeated_are_a_failure(device: InterpretedLibrary) -> None:
    case = subject.causal_conv_case(device, "cpu", torch.float32, 1, 5, 8, 4)
    moved = spoiled(case, lambda outputs, run: outputs[0][0, 2, 3].mul_(1 + 1e-7 * (run == 2)))
    assert case.run(repeats=2)[0]
    passed, text = moved.run(repeats=2)
    assert not passed and text.endswith("and other bits when repeated")


def test_what_a_kernel_does_not_write_is_nan(device: InterpretedLibrary) -> None:
    case = subject.causal_conv_case(device, "cpu", torch.bfloat16, 1, 5, 8, 4)

    def lazy() -> subject.Tensors:
        y, state = case.kernel()
        unwritten = torch.empty_like(y)
        unwritten[:, 1:] = y[:, 1:]
        return unwritten, state

    passed, text = replace(case, kernel=lazy).run(repeats=0)
    assert not passed and "nan of" in text


@pytest.mark.parametrize("dtype", subject.DTYPES)
def test_a_sampled_reference_finds_what_the_whole_one_does(
    device: InterpretedLibrary, dtype: torch.dtype
) -> None:
    """The samples are rows of the same tensors: both are right, and both see a wrong last row."""
    common = (device, "cpu", dtype)
    cases = (
        subject.moe_dispatch_case(*common, 9, 16, 8, 4, 2, rows=3),
        subject.moe_linear_case(*common, 9, 16, 8, 4, 2, True, rows=3),
        subject.mamba2_scan_case(*common, 3, 5, 4, 8, 2, 8, 2, rows=2, kept_heads=3),
        subject.causal_conv_case(*common, 2, 5, 24, 4, kept_channels=5),
    )
    for case in cases:
        assert case.run(repeats=0)[0], case.name
        wrong = spoiled(case, lambda outputs, _: outputs[0][-1].flatten()[-1].add_(9.0))
        assert not wrong.run(repeats=0)[0], case.name


@pytest.mark.skipif(has_gpu(), reason="a GPU is here")
def test_says_that_it_needs_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ingot.plugins.check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert (
        done.stdout
        == "python -m ingot.plugins.check needs an NVIDIA GPU, and this machine has none.\n"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not PATH.is_file(), reason="the GPU kernels are not built")
def test_every_small_case_passes_on_the_gpu() -> None:
    library = Library()
    torch.zeros(1, device="cuda")
    assert subject.check(subject.small_cases(library, "cuda")) == []
