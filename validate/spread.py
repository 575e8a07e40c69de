"""How far the figures of one ingot move where nothing is wrong, measured as a baseline is saved.

Two runs in this process show what moves by itself, such as on a GPU. Runs in processes of their
own, with fewer instructions and with one thread, show what moves between processors: eager PyTorch
there computes the same numbers in another order. ONNX Runtime cannot be told to use fewer
instructions, so what its errors move is taken to be what eager PyTorch's do.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from ingot.export.progress import Stages
from ingot.plugins.json_file import JsonError, read_json
from ingot.validate.baseline import Spread
from ingot.validate.processor import ISA, Emulated, emulated, one_processor
from ingot.validate.result import Report

WORKER = "ingot.validate.spread_worker"
# As a baseline: some hundred bytes for each tensor after each call.
MOST_BYTES = 64 << 20

# Error and floor by stage, tensor and kind.
Figures = dict[tuple[str, str, str], tuple[float, float]]


@dataclass(frozen=True)
class Task:
    """One validation that a process of its own makes again.

    Attributes:
        ingot: the folder.
        checkpoint: the folder it was made from.
        adapter: the adapter's folder, if there is one.
        against: the folder of another ingot that it is compared with, if there is one.
        plan: the fields of the plan.
        seed: of the token ids.
    """

    ingot: str
    checkpoint: str
    adapter: str | None
    against: str | None
    plan: dict[str, Any]
    seed: int


def measure(
    first: Report,
    second: Report,
    task: Task,
    stages: Stages,
    ask: Callable[[Task, Emulated], Figures | None],
) -> Spread:
    """The spread of a report's figures.

    Args:
        first: of the run that is kept.
        second: of another like it in this process.
        task: the same again, for processes of their own.
        stages: shows the steps.
        ask: ``elsewhere``, or what stands for it; None where that process came to no end.
    """
    here = figures(first)
    tensor: dict[str, float] = {}
    mean: dict[str, float] = {}
    measured = []
    for other in emulated(first.environment.get(ISA)):
        with stages.stage(f"measure the spread, {other.name}"):
            there = ask(task, other)
        if there is not None:
            measured.append(other.name)
            tensor = _wider(tensor, largest(here, there, "floor"))
            mean = _wider(mean, of_means(here, there))
    threads: dict[str, float] = {}
    single = one_processor()
    if single is not None:
        with stages.stage(f"measure the spread, {single.name}"):
            there = ask(task, single)
        if there is not None:
            threads = largest(here, there, "error")
            # What a count of threads moves, another processor may too.
            tensor = _wider(tensor, largest(here, there, "floor"), threads) if measured else tensor
    return Spread(largest(here, figures(second), "score"), threads, tensor, mean, tuple(measured))


def elsewhere(task: Task, other: Emulated) -> Figures | None:
    """What a process of its own finds on a processor that this one stands for.

    Returns:
        Its figures; None where it came to no end, so that nothing was measured.
    """
    with TemporaryDirectory(prefix="ingot-spread-") as folder:
        out = Path(folder) / "figures.json"
        request = json.dumps({**asdict(task), "out": str(out), "processors": other.processors})
        done = subprocess.run(
            [sys.executable, "-m", WORKER],
            input=request.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # What was kept was computed by other kernels.
            env={**os.environ, **other.environment, "INGOT_CACHE": "off"},
        )
        if done.returncode != 0:
            return None
        try:
            rows = read_json(out, most_bytes=MOST_BYTES)
        except JsonError:
            return None
    return {(stage, name, kind): (error, floor) for stage, name, kind, error, floor in rows}


def figures(report: Report) -> Figures:
    """Error and floor of every tensor that has both."""
    return {
        (tensor.stage, tensor.name, tensor.kind): (tensor.error, tensor.floor)
        for tensor in report.tensors
        if tensor.error is not None and tensor.floor is not None
    }


def largest(
    one: Figures, other: Figures, what: Literal["error", "floor", "score"]
) -> dict[str, float]:
    """The largest difference of two validations, as a share of the smaller figure, by kind."""
    found: dict[str, float] = defaultdict(float)
    for (_, _, kind), first, second in _pairs(one, other, what):
        found[kind] = max(found[kind], max(first, second) / min(first, second) - 1)
    return dict(found)


def of_means(one: Figures, other: Figures) -> dict[str, float]:
    """As ``largest``, of the geometric mean of each tensor's floors over all calls."""
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (_, name, kind), first, second in _pairs(one, other, "floor"):
        ratios[kind, name].append(math.log(second / first))
    found: dict[str, float] = defaultdict(float)
    for (kind, _), logarithms in ratios.items():
        apart = math.expm1(abs(sum(logarithms) / len(logarithms)))
        found[kind] = max(found[kind], apart)
    return dict(found)


def _pairs(
    one: Figures, other: Figures, what: Literal["error", "floor", "score"]
) -> Iterable[tuple[tuple[str, str, str], float, float]]:
    """A figure of both validations, where both have one beyond zero."""
    for key, first in one.items():
        second = other.get(key)
        if second is None:
            continue
        values = [_figure(figure, what) for figure in (first, second)]
        if all(value > 0 and math.isfinite(value) for value in values):
            yield key, values[0], values[1]


def _figure(figure: tuple[float, float], what: Literal["error", "floor", "score"]) -> float:
    error, floor = figure
    if what == "score":
        return error / floor if floor else 0.0
    return error if what == "error" else floor


def _wider(*spreads: dict[str, float]) -> dict[str, float]:
    """Each kind's largest."""
    return {
        kind: max(spread.get(kind, 0.0) for spread in spreads)
        for kind in dict.fromkeys(kind for spread in spreads for kind in spread)
    }
