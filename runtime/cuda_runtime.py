"""The few calls of CUDA's runtime that a session needs, through NVIDIA's own Python bindings."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from ingot.runtime.session import SessionError

Array = np.ndarray[Any, np.dtype[Any]]


class Device:
    """Memory, one stream and graphs on the current CUDA device.

    Whatever of them is left when the object goes away, or the program ends, is given back then.

    Attributes:
        stream: the ``cudaStream_t`` as a number.
        close: gives everything back at once; the object is of no use afterwards.

    Raises:
        SessionError: the bindings are missing, there is no device, or a call that CUDA refuses.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise SessionError(
                "cuda-bindings is missing; install it with: pip install cuda-bindings"
            ) from error
        self._runtime = runtime
        self.stream = int(self._call("cudaStreamCreate"))
        self._blocks: set[int] = set()
        self._graphs: set[int] = set()
        # In place of __del__, which may come when the interpreter has taken its modules apart.
        self.close = weakref.finalize(
            self, _give_back, runtime, self.stream, self._blocks, self._graphs
        )

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._runtime, name)(*arguments)
        if int(status) != 0:
            # CUDA keeps it, and TensorRT would take it for a failure of its own next launch.
            self._runtime.cudaGetLastError()
            _, text = self._runtime.cudaGetErrorString(status)
            raise SessionError(
                f"CUDA refused {name}: {text.decode()}; give it less, or see nvidia-smi."
            )
        return results[0] if results else None

    def allocate(self, size: int) -> int:
        """The address of ``size`` bytes, at least one."""
        address = int(self._call("cudaMalloc", max(size, 1)))
        self._blocks.add(address)
        return address

    def free(self, address: int) -> None:
        """Give memory back once the stream is past it."""
        self.synchronize()
        self._call("cudaFree", address)
        self._blocks.discard(address)

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

    def capture(self, enqueue: Callable[[], None]) -> int:
        """What ``enqueue`` puts on the stream as a graph to launch again and again.

        Returns:
            The executable graph; ``destroy`` it when it is of no more use.

        Raises:
            SessionError: CUDA refuses the graph.
            Exception: what ``enqueue`` raises; the stream is as it was before.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
        except BaseException:
            # A stream that still captures refuses all else. A capture that the failed call made
            # void gives no graph, and the failure to be told is the first.
            with contextlib.suppress(SessionError):
                self._call("cudaGraphDestroy", self._call("cudaStreamEndCapture", self.stream))
            raise
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            executable = int(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            # The executable does not refer to it.
            self._call("cudaGraphDestroy", graph)
        self._graphs.add(executable)
        return executable

    def launch(self, graph: int) -> None:
        self._call("cudaGraphLaunch", graph, self.stream)

    def destroy(self, graph: int) -> None:
        """Give an executable graph back once the stream is past it."""
        self.synchronize()
        self._call("cudaGraphExecDestroy", graph)
        self._graphs.discard(graph)


def _give_back(runtime: Any, stream: int, blocks: set[int], graphs: set[int]) -> None:
    # Nobody is left to be told of a failure, and one must not keep the rest.
    runtime.cudaStreamSynchronize(stream)
    for graph in graphs:
        runtime.cudaGraphExecDestroy(graph)
    for address in blocks:
        runtime.cudaFree(address)
    runtime.cudaStreamDestroy(stream)
