"""The few calls of CUDA's runtime that a session needs, through NVIDIA's own Python bindings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.session import SessionError

Array = np.ndarray[Any, np.dtype[Any]]


class Device:
    """Memory, one stream and graphs on the current CUDA device.

    Raises:
        SessionError: the bindings are missing, or there is no device.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise SessionError(
                "cuda-bindings is missing; install it with: pip install 'ingot[trt]'"
            ) from error
        self._runtime = runtime
        self.stream = int(self._call("cudaStreamCreate"))

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._runtime, name)(*arguments)
        if int(status) != 0:
            _, text = self._runtime.cudaGetErrorString(status)
            raise SessionError(f"CUDA refused {name}: {text.decode()}")
        return results[0] if results else None

    def allocate(self, size: int) -> int:
        """The address of ``size`` bytes, at least one."""
        return int(self._call("cudaMalloc", max(size, 1)))

    def free(self, address: int) -> None:
        """Give memory back once the stream is past it."""
        self.synchronize()
        self._call("cudaFree", address)

    def zero(self, address: int, size: int) -> None:
        self._call("cudaMemsetAsync", address, 0, size, self.stream)

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous array to the device; it may change once this returns."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, array: Array, address: int) -> None:
        """Fill a contiguous array from the device, after everything enqueued before."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)
        self.synchronize()

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """What ``enqueue`` puts on the stream as a graph to launch again and again."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        enqueue()
        graph = self._call("cudaStreamEndCapture", self.stream)
        return self._call("cudaGraphInstantiate", graph, 0)

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self.stream)
