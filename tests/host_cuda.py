"""``cuda.bindings.runtime`` over the host's memory: addresses are real, a graph is a list of calls.

It knows what lives, so that a test can see what is given back; and a capture that is not ended
keeps the stream from all other work, as CUDA's does.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SUCCESS, OUT_OF_MEMORY, STREAM_CAPTURE, CAPTURE_INVALIDATED = 0, 2, 900, 901

Work = Callable[[], None]


class Capture:
    """What a stream was given since its capture began.

    Attributes:
        work: in order.
        valid: until something is asked of the stream that cannot be captured.
    """

    def __init__(self) -> None:
        self.work: list[Work] = []
        self.valid = True


class HostCuda:
    """The module.

    Attributes:
        blocks: memory by address.
        streams: and what each captures.
        graphs: not destroyed yet.
        executables: likewise.
        captured: executables made so far.
        launched: launches of them.
        zeroed: address and bytes of every ``cudaMemsetAsync``.
        room: bytes left to allocate.
        error: what ``cudaGetLastError`` will say.
    """

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self) -> None:
        self.blocks: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.streams: dict[int, Capture | None] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.executables: dict[int, list[Work]] = {}
        self.captured = 0
        self.launched = 0
        self.zeroed: list[tuple[int, int]] = []
        self.room = 1 << 30
        self.error = SUCCESS
        self._names = iter(range(70, 1 << 20))

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        """``cudaStreamCreate`` is ``stream_create``, and its failure is remembered."""
        if not name.startswith("cuda"):
            raise AttributeError(name)
        function = getattr(self, re.sub(r"(?<!^)(?=[A-Z])", "_", name[4:]).lower())

        def call(*arguments: Any) -> tuple[Any, ...]:
            found: tuple[Any, ...] = function(*arguments)
            self.error = found[0] or self.error
            return found

        return function if name == "cudaGetLastError" else call

    def install(self, monkeypatch: pytest.MonkeyPatch) -> HostCuda:
        """Be what ``from cuda.bindings import runtime`` finds."""
        modules = {"cuda": ModuleType("cuda"), "cuda.bindings": ModuleType("cuda.bindings")}
        vars(modules["cuda.bindings"])["runtime"] = self
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return self

    @property
    def alive(self) -> int:
        """Blocks, streams and graphs of either kind that were not given back."""
        graphs = len(self.graphs) + len(self.executables)
        return len(self.blocks) + len(self.streams) + graphs

    def block_of(self, address: int, size: int) -> None:
        """Assert that so many bytes lie in one live block."""
        assert any(a <= address and address + size <= a + len(b) for a, b in self.blocks.items())

    def enqueue(self, stream: int, work: Work) -> int:
        """Do some work, or record it where the stream captures; gives the status."""
        capture = self.streams[stream]
        if capture is None:
            work()
        else:
            capture.work.append(work)
        return SUCCESS

    def get_last_error(self) -> tuple[int]:
        found, self.error = self.error, SUCCESS
        return (found,)

    def get_error_string(self, status: int) -> tuple[int, bytes]:
        return SUCCESS, {OUT_OF_MEMORY: b"out of memory"}.get(status, b"not allowed in a capture")

    def malloc(self, size: int) -> tuple[int, int | None]:
        if size > self.room:
            return OUT_OF_MEMORY, None
        block = (ctypes.c_char * size)()
        # What new memory holds must not matter.
        ctypes.memset(block, 0x7F, size)
        address = ctypes.addressof(block)
        self.blocks[address] = block
        return SUCCESS, address

    def free(self, address: int) -> tuple[int]:
        del self.blocks[address]
        return (SUCCESS,)

    def stream_create(self) -> tuple[int, int]:
        stream = next(self._names)
        self.streams[stream] = None
        return SUCCESS, stream

    def stream_destroy(self, stream: int) -> tuple[int]:
        del self.streams[stream]
        return (SUCCESS,)

    def stream_synchronize(self, stream: int) -> tuple[int]:
        capture = self.streams[stream]
        if capture is None:
            return (SUCCESS,)
        capture.valid = False
        return (STREAM_CAPTURE,)

    def memset_async(self, address: int, value: int, size: int, stream: int) -> tuple[int]:
        self.block_of(address, size)
        self.zeroed.append((address, size))
        return (self.enqueue(stream, lambda: void(ctypes.memset(address, value, size))),)

    def memcpy_async(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        self.block_of(to if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice else source, size)
        return (self.enqueue(stream, lambda: void(ctypes.memmove(to, source, size))),)

    def stream_begin_capture(self, stream: int, mode: int) -> tuple[int]:
        if self.streams[stream] is not None:
            return (STREAM_CAPTURE,)
        self.streams[stream] = Capture()
        return (SUCCESS,)

    def stream_end_capture(self, stream: int) -> tuple[int, int | None]:
        capture, self.streams[stream] = self.streams[stream], None
        assert capture is not None
        if not capture.valid:
            return CAPTURE_INVALIDATED, None
        graph = next(self._names)
        self.graphs[graph] = capture.work
        return SUCCESS, graph

    def graph_instantiate(self, graph: int, flags: int) -> tuple[int, int | None]:
        if not self.room:
            return OUT_OF_MEMORY, None
        executable = next(self._names)
        self.executables[executable] = list(self.graphs[graph])
        self.captured += 1
        return SUCCESS, executable

    def graph_destroy(self, graph: int) -> tuple[int]:
        del self.graphs[graph]
        return (SUCCESS,)

    def graph_exec_destroy(self, executable: int) -> tuple[int]:
        del self.executables[executable]
        return (SUCCESS,)

    def graph_launch(self, executable: int, stream: int) -> tuple[int]:
        self.launched += 1
        for work in self.executables[executable]:
            self.enqueue(stream, work)
        return (SUCCESS,)


def void(_: object) -> None:
    """Drop a result."""
