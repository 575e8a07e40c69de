"""Contexts, and what is loaded into them, by a driver that refuses what CUDA's refuses."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from ctypes import c_int
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from ingot.plugins import torch_kernels
from ingot.plugins.library import Library, LibraryError
from ingot.plugins.moe_linear import moe_linear

if TYPE_CHECKING:
    from ingot.plugins.kernels.interpret import InterpretedLibrary


@pytest.fixture
def fresh(device: InterpretedLibrary) -> Iterator[InterpretedLibrary]:
    """The library in a thread without a context, on devices into which nothing was loaded."""
    device.set_capability(90)
    device.driver.fake_driver_remake(1)
    device.driver.fake_driver_enter(-1)
    yield device
    device.set_capability(90)
    device.driver.fake_driver_enter(-1)


def counted(library: InterpretedLibrary, what: str) -> list[int]:
    """Contexts ``retained`` or ``bound``, by device."""
    return list((c_int * 2).in_dll(library.driver, f"fake_driver_{what}"))


def loads(library: InterpretedLibrary) -> int:
    return c_int.in_dll(library.driver, "fake_driver_loads").value


def call(library: Library) -> None:
    """A call of one launch, with its result checked."""
    x, weight = torch.eye(4)[:1], torch.arange(16.0).reshape(1, 4, 4)
    y = torch_kernels.call(moe_linear, library, x, torch.zeros(1, 1, dtype=torch.int64), weight)
    assert y.flatten().tolist() == [0, 4, 8, 12]


def test_a_thread_without_a_context_gets_the_first_device(fresh: InterpretedLibrary) -> None:
    fresh.prepare()
    call(fresh)
    assert (counted(fresh, "retained"), counted(fresh, "bound")) == ([1, 0], [1, 0])
    found: list[object] = []

    def other() -> None:
        call(fresh)
        found.append(counted(fresh, "bound"))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [[2, 0]]


def test_a_context_that_is_current_stays_so(fresh: InterpretedLibrary) -> None:
    fresh.driver.fake_driver_enter(1)
    call(fresh)
    assert (counted(fresh, "retained"), counted(fresh, "bound")) == ([0, 0], [0, 0])


def test_each_device_is_loaded_once(fresh: InterpretedLibrary) -> None:
    found = []
    for number in (0, 1, 0, 1):
        fresh.driver.fake_driver_enter(number)
        fresh.prepare()
        call(fresh)
        found.append(loads(fresh))
    once = found[0]
    assert once > 50
    assert found == [once, 2 * once, 2 * once, 2 * once]


def test_a_context_remade_at_its_address_is_loaded_again(fresh: InterpretedLibrary) -> None:
    call(fresh)
    before = loads(fresh)
    fresh.driver.fake_driver_remake(0)
    call(fresh)
    assert loads(fresh) == 2 * before


def test_a_driver_without_ids_tells_contexts_by_address(
    fresh: InterpretedLibrary, tmp_path: Path
) -> None:
    """That of CUDA 11."""
    import ctypes

    from ingot.plugins.kernels.interpret import FAKE_DRIVER
    from ingot.plugins.kernels.link import run_compiler

    # The same file under another name is another library to the loader, with a driver of its own.
    library = Library(Path(shutil.copy(fresh.path, tmp_path)))
    run_compiler(FAKE_DRIVER, "-DFAKE_DRIVER_WITHOUT_IDS", out=tmp_path / "driver.so")
    library.use_driver(tmp_path / "driver.so")
    driver = ctypes.CDLL(str(tmp_path / "driver.so"))
    count = c_int.in_dll(driver, "fake_driver_loads")
    library.prepare()
    once = count.value
    assert once > 50
    library.prepare()
    assert count.value == once
    # Another device at the same address.
    driver.fake_driver_set(None, 80)
    library.prepare()
    assert count.value > 50


def test_what_was_prepared_can_be_called_while_a_graph_is_captured(
    fresh: InterpretedLibrary,
) -> None:
    fresh.driver.fake_driver_capture(1)
    with pytest.raises(LibraryError):
        call(fresh)
    fresh.driver.fake_driver_capture(0)
    fresh.prepare()
    fresh.driver.fake_driver_capture(1)
    call(fresh)
