"""What the linked library says of itself, and where its kernels cannot be loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import triton

from ingot.plugins.kernels.build import all_forms
from ingot.plugins.library import LibraryError

if TYPE_CHECKING:
    from ingot.plugins.kernels.interpret import InterpretedLibrary

INVALID_IMAGE, OUT_OF_MEMORY, NO_BINARY_FOR_GPU, UNSUPPORTED_PTX_VERSION = 200, 2, 209, 222
CUDA_12_4, CUDA_13_0 = 12040, 13000


def linked(folder: Path, ptxas: str) -> InterpretedLibrary:
    from ingot.plugins.kernels.interpret import InterpretedLibrary

    name = "mamba2_step_bf16_n128"
    return InterpretedLibrary({name: all_forms()[name]}, folder, ptxas=ptxas)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> InterpretedLibrary:
    """As if the ptxas of CUDA 13.4 had made its kernels."""
    return linked(tmp_path_factory.mktemp("newer"), "13.4.59")


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> InterpretedLibrary:
    """As if that of CUDA 12.9 had."""
    return linked(tmp_path_factory.mktemp("older"), "12.9.86")


@pytest.mark.parametrize("device", [75, 101, 103, 121])
def test_names_what_the_library_has_for_a_device_without_kernels(
    older: InterpretedLibrary, device: int
) -> None:
    older.fail_loads(0, CUDA_13_0)
    older.set_capability(device)
    has = re.escape(
        f"no kernel is compiled for compute capability {device // 10}.{device % 10}; this library "
        "has 8.0, 8.6, 8.9, 9.0, 10.0, 12.0."
    )
    with pytest.raises(LibraryError, match=f"^{has}$"):
        older.prepare()


def test_a_newer_minor_version_takes_the_best_before_it(older: InterpretedLibrary) -> None:
    older.fail_loads(NO_BINARY_FOR_GPU, CUDA_13_0)
    for device, best in ((80, "8.0"), (87, "8.6"), (89, "8.9"), (120, "12.0")):
        older.set_capability(device)
        with pytest.raises(LibraryError, match=f"compute capability {re.escape(best)}, which"):
            older.prepare()
    older.fail_loads(0, CUDA_13_0)
    older.set_capability(87)
    older.prepare()


@pytest.mark.parametrize(
    "result", [INVALID_IMAGE, NO_BINARY_FOR_GPU, UNSUPPORTED_PTX_VERSION, OUT_OF_MEMORY]
)
def test_an_old_driver_is_named_whatever_it_answers(newer: InterpretedLibrary, result: int) -> None:
    newer.set_capability(90)
    newer.fail_loads(result, CUDA_12_4)
    with pytest.raises(LibraryError) as caught:
        newer.prepare()
    assert str(caught.value) == (
        "the kernels for compute capability 9.0 need NVIDIA's driver R580 or later and this one "
        "supports CUDA 12.4; update the driver, or rebuild them with: "
        "python -m ingot.plugins.kernels.build --ptxas older"
    )


def test_no_rebuild_helps_a_card_that_needs_the_driver_itself(older: InterpretedLibrary) -> None:
    older.set_capability(120)
    older.fail_loads(NO_BINARY_FOR_GPU, CUDA_12_4)
    with pytest.raises(LibraryError) as caught:
        older.prepare()
    assert str(caught.value) == (
        "the kernels for compute capability 12.0 need NVIDIA's driver R570 or later and this one "
        "supports CUDA 12.4; update the driver."
    )


@pytest.mark.parametrize("result", [INVALID_IMAGE, NO_BINARY_FOR_GPU, UNSUPPORTED_PTX_VERSION])
def test_a_driver_that_should_load_the_kernels_is_not_called_old(
    newer: InterpretedLibrary, result: int
) -> None:
    newer.set_capability(90)
    newer.fail_loads(result, CUDA_13_0)
    with pytest.raises(LibraryError) as caught:
        newer.prepare()
    assert str(caught.value) == (
        "NVIDIA's driver, which supports CUDA 13.0, refuses the kernels for compute capability "
        "9.0, which ptxas 13.4.59 made (the interpreter met an error); rebuild them with: "
        "python -m ingot.plugins.kernels.build --ptxas older"
    )


def test_other_failures_of_a_new_driver_keep_its_words(newer: InterpretedLibrary) -> None:
    newer.set_capability(90)
    newer.fail_loads(OUT_OF_MEMORY, CUDA_13_0)
    with pytest.raises(LibraryError, match=r"^cuModuleLoadData: the interpreter met an error$"):
        newer.prepare()


def test_the_build_line_names_tools_and_drivers(
    older: InterpretedLibrary, newer: InterpretedLibrary
) -> None:
    """CUDA 12 needs R525 and CUDA 13 R580, but 10.0 and 12.0 need R570 themselves."""
    begin = f"triton {triton.__version__}; 8.0 ptxas "
    drivers = {"8.0": 525, "8.6": 525, "8.9": 525, "9.0": 525, "10.0": 570, "12.0": 570}
    made = "; ".join(f"{c} ptxas 12.9.86 driver R{release}" for c, release in drivers.items())
    assert older.build_line == f"triton {triton.__version__}; {made}"
    assert newer.build_line.startswith(begin + "13.4.59 driver R580; 8.6")
    assert newer.build_line.count("driver R580") == 6
