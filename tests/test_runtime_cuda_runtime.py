"""The calls of CUDA's runtime, over one that knows what was made and not given back."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from host_cuda import HostCuda

from ingot.runtime.cuda_runtime import Device
from ingot.runtime.session import SessionError


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    return HostCuda().install(monkeypatch)


def write(device: Device, address: int, value: float) -> None:
    device.upload(address, np.full(4, value, dtype=np.float32))


def read(device: Device, address: int) -> list[float]:
    found = np.empty(4, dtype=np.float32)
    device.download(found, address)
    return [float(value) for value in found]


def test_launches_what_was_captured_and_keeps_no_graph_of_it(cuda: HostCuda) -> None:
    device = Device()
    address = device.allocate(16)
    write(device, address, 1.0)
    graph = device.capture(lambda: device.zero(address, 16))
    assert (read(device, address), cuda.graphs) == ([1.0] * 4, {})
    device.launch(graph)
    assert read(device, address) == [0.0] * 4
    device.destroy(graph)
    assert cuda.executables == {}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_while_capturing_ends_the_capture(
    cuda: HostCuda, error: type[BaseException]
) -> None:
    device = Device()
    address = device.allocate(16)

    def enqueue() -> None:
        device.zero(address, 16)
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        device.capture(enqueue)
    assert cuda.graphs == cuda.executables == {}
    write(device, address, 2.0)
    assert read(device, address) == [2.0] * 4
    device.launch(device.capture(lambda: device.zero(address, 16)))
    assert read(device, address) == [0.0] * 4


def test_a_capture_that_cuda_makes_void_says_why_and_ends(cuda: HostCuda) -> None:
    device = Device()
    with pytest.raises(SessionError, match="cudaStreamSynchronize: not allowed in a capture"):
        device.capture(device.synchronize)
    assert cuda.graphs == cuda.executables == {}
    device.synchronize()


def test_a_graph_that_cannot_be_instantiated_is_destroyed(cuda: HostCuda) -> None:
    device = Device()
    cuda.room = 0
    with pytest.raises(SessionError, match="refused cudaGraphInstantiate: out of memory; give it"):
        device.capture(lambda: None)
    assert cuda.graphs == {}


def test_leaves_no_error_behind_for_the_next_who_asks(cuda: HostCuda) -> None:
    """TensorRT asks after each of its launches."""
    device = Device()
    with pytest.raises(SessionError, match="refused cudaMalloc: out of memory"):
        device.allocate(cuda.room + 1)
    assert cuda.cudaGetLastError() == (0,)


def test_gives_everything_back_when_it_goes_away(cuda: HostCuda) -> None:
    device = Device()
    addresses = [device.allocate(16) for _ in range(3)]
    device.free(addresses[1])
    graphs = [device.capture(lambda: None) for _ in range(3)]
    device.destroy(graphs[0])
    assert (len(cuda.blocks), len(cuda.executables), cuda.alive) == (2, 2, 5)
    del device
    gc.collect()
    assert cuda.alive == 0


def test_closes_once(cuda: HostCuda) -> None:
    device = Device()
    device.allocate(16)
    device.close()
    assert cuda.alive == 0
    device.close()


AT_EXIT = """
import atexit, sys
import pytest
from host_cuda import HostCuda
from ingot.runtime.cuda_runtime import Device

cuda = HostCuda().install(pytest.MonkeyPatch())
# What is registered first runs last, with every module still whole.
atexit.register(lambda: print(cuda.alive))
device = Device()
device.allocate(16)
device.capture(lambda: None)
device.itself = device
print(cuda.alive)
"""


def test_gives_everything_back_at_the_end_of_the_program() -> None:
    """Also where a cycle, or a global, keeps it to the very end."""
    folder = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT],
        env={"PYTHONPATH": f"{folder}:{folder.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.splitlines(), done.stderr) == (["3", "0"], "")
