"""The GPU self-check's own cases, over Triton's interpreter, and that it can fail."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from plugins import check as subject
from plugins.device import has_gpu
from plugins.library import Library

if TYPE_CHECKING:
    from plugins.kernels.interpret import InterpretedLibrary


def test_every_small_case_passes(device: InterpretedLibrary) -> None:
    assert subject.check(subject.small_cases(device, "cpu")) == []


def test_a_wrong_number_and_a_nan_are_failures(
    device: InterpretedLibrary, capsys: pytest.CaptureFixture[str]
) -> None:
    case = subject.causal_conv_case(device, "cpu", torch.float32, 1, 5, 8, 4)

    def changed(value: float) -> subject.Case:
        def kernel() -> subject.Tensors:
            y, state = case.kernel()
            y[0, 2, 3] = value
            return y, state

        return replace(case, kernel=kernel)

    cases = iter([case, changed(1.0), changed(float("nan"))])
    assert len(subject.check(cases)) == 2
    assert capsys.readouterr().out.count("FAIL") == 2


@pytest.mark.skipif(has_gpu(), reason="a GPU is here")
def test_says_that_it_needs_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "plugins.check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert (
        done.stdout == "python -m plugins.check needs an NVIDIA GPU, and this machine has none.\n"
    )


@pytest.mark.gpu
def test_every_case_passes_on_the_gpu() -> None:
    library = Library()
    torch.zeros(1, device="cuda")
    assert subject.check(subject.small_cases(library, "cuda")) == []
    assert subject.check(subject.large_cases(library, "cuda")) == []
