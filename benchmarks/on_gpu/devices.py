"""The card, and what stands for it in a rehearsal: memory, graphs and time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], object]

# Half a millisecond or so.
SLEEP_CYCLES = 1_000_000


@dataclass(frozen=True)
class Seconds:
    """Time of one call, over several samples."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Seconds:
        return cls(statistics.median(samples), min(samples), max(samples))

    @property
    def spread(self) -> float:
        """The samples' range as a share of the median."""
        return (self.most - self.least) / self.median if self.median else 0.0


class Device(Protocol):
    """What phases ask of a device.

    Attributes:
        name: for PyTorch.
    """

    name: str

    def start(self) -> None:
        """Make it this process's device."""

    def usable(self) -> bool:
        """Whether it still takes work: after an illegal access a process's context is lost."""

    def capture(self, run: Call) -> Call:
        """``run`` as a graph; the result replays it. ``run`` is called before, to warm up."""

    def time(self, replay: Call, calls: int, least: float = 0.1) -> Seconds:
        """One of the ``calls`` that a replay makes, each sample a replay."""

    def free(self) -> None:
        """Give back memory that nothing refers to."""


class Card:
    """The first CUDA device."""

    name = "cuda"

    def start(self) -> None:
        torch.cuda.init()

    def usable(self) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        # A capture that broke off leaves its own stream the current one.
        return bool(torch.cuda.current_stream() == torch.cuda.default_stream())

    def capture(self, run: Call) -> Call:
        # cuBLAS and others allocate at their first call, which a capture may not.
        stream: Any = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay: Call = graph.replay
        return replay

    def time(self, replay: Call, calls: int, least: float = 0.1) -> Seconds:
        samples: list[float] = []
        replay()
        while len(samples) < 5 or (sum(samples) * calls < least and len(samples) < 500):
            event: Any = torch.cuda.Event
            start, end = event(enable_timing=True), event(enable_timing=True)
            # Keeps the card busy until the replay is enqueued: without it the time of the host's
            # call would be in a short one.
            torch.cuda._sleep(SLEEP_CYCLES)
            start.record()
            replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) / 1e3 / calls)
        return Seconds.of(samples)

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class Host:
    """The CPU in the card's place; its times mean nothing."""

    name = "cpu"

    def start(self) -> None:
        torch.set_num_threads(1)

    def usable(self) -> bool:
        return True

    def capture(self, run: Call) -> Call:
        # The interpreter is slow: nothing is run twice where nothing has to warm up.
        return run

    def time(self, replay: Call, calls: int, least: float = 0.1) -> Seconds:
        start = time.perf_counter()
        replay()
        return Seconds.of([(time.perf_counter() - start) / calls])

    def free(self) -> None:
        gc.collect()
