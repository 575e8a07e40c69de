"""Our side: a checkpoint exported in each format, and what is computed from it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from traces import Traces

from benchmarks.on_weights.figures import Floats, Ids, Scores, score
from benchmarks.on_weights.rates import Rates
from ingot.export.build import build
from ingot.export.ingot import GRAPH, WEIGHTS
from ingot.export.progress import Stages
from ingot.export.quantization import BITS, BLOCKS
from ingot.export.request import CALIBRATED, ExportError, ExportRequest
from ingot.graphs.checkpoint import read_header
from ingot.plugins.errors import IngotError
from ingot.runtime.loading import load

RATES = Path(__file__).with_name("ingot_rates.py")
# Of the tensors of weights in whole numbers: their dtype, and the ends of names beside them.
CODES, ZERO_POINTS, SCALES = "U8", ".zero_points", ".scales"
FAST = {"accuracy": "fast"}


@dataclass(frozen=True)
class Format:
    """One way to store weights.

    Attributes:
        name: in the table.
        options: fields of the ``ExportRequest``.
    """

    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, said: str) -> Format:
        """From ``weights=int4 block=64``: values are JSON, or else text.

        Raises:
            ExportError: what is no field of an export.
        """
        options: dict[str, Any] = {}
        known = [field.name for field in fields(ExportRequest)]
        words: list[str] = []
        for part in said.split():
            name, _, value = part.partition("=")
            # Where a file lies says nothing of the format.
            words += [name, Path(value).name]
            if name not in known:
                raise ExportError(f"{name} is no field of an export; they are {', '.join(known)}.")
            try:
                options[name] = json.loads(value)
            except json.JSONDecodeError:
                options[name] = Path(value) if name == "calibration" else value
        return cls(" ".join(words), options)

    @property
    def exact(self) -> Format | None:
        """The same weights with float32 activations; None where none are rounded.

        What differs between the two is what the kernels' rounding costs, beside that of weights.
        """
        if self.options.get("weights") not in BITS or self.options.get("accuracy") == "exact":
            return None
        return Format(f"{self.name} exact", {**self.options, "accuracy": "exact"})

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        return self.name.replace(" ", "-")


def formats(calibration: Path | None = None) -> Iterator[Format]:
    """Every way to store weights that the table has.

    Args:
        calibration: a text on which numbers are chosen; None leaves out what needs one.
    """
    yield Format("fp32", {})
    yield Format("bf16", {"weights": "bf16"})
    for weights in ("int8", "int4"):
        for symmetric in (True, False):
            for block in BLOCKS:
                zero = "symmetric" if symmetric else "asymmetric"
                name = f"{weights} {block} {zero}"
                options = {"weights": weights, "block": block, "symmetric": symmetric, **FAST}
                yield Format(name, options)
                for method in CALIBRATED if calibration is not None else ():
                    chosen = {"calibration": calibration, "method": method}
                    yield Format(f"{name} {method}", {**options, **chosen})


def at_the_bytes_of(name: str, size: int, like: Path, calibration: Path) -> Format:
    """int4, some of it int8, by a budget that takes as many bytes as another program's format.

    Args:
        name: of that format.
        size: bytes of its tensors.
        like: an int4 ingot of the same checkpoint, which says what stays in float32.
        calibration: a text by which it is measured what needs more bits.
    """
    entries = read_header(like / WEIGHTS)
    numbers = fixed = 0
    for tensor, entry in entries.items():
        if entry.dtype == CODES and not tensor.endswith(ZERO_POINTS):
            numbers += 2 * math.prod(entry.shape)
        elif not tensor.endswith((ZERO_POINTS, SCALES)):
            fixed += entry.end - entry.begin
    # Cut and not rounded, for a byte more would make it another class of size.
    bits = math.floor(1000 * 8 * (size - fixed) / numbers) / 1000
    options = {"weights": "int4", "bits": bits, "calibration": calibration, **FAST}
    return Format(f"int4 at the bytes of {name}", options)


def export(checkpoint: Path, chosen: Format, out: Path, traces: Traces) -> None:
    """Make the ingot ``out``, without its validation.

    Args:
        checkpoint: a Hugging Face folder.
        chosen: how its weights are stored.
        out: must not be there.
        traces: of an export of the same checkpoint; tracing takes longer than the rest of it.

    Raises:
        IngotError: what the export refuses.
    """
    request = ExportRequest(str(checkpoint), "ort", out, **chosen.options)
    build(request, Stages(), None, capture=traces)


def weight_bytes(ingot: Path) -> int:
    """Bytes of the weights alone, without the names before them."""
    with (ingot / WEIGHTS).open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return (ingot / WEIGHTS).stat().st_size - 8 - header


def file_bytes(ingot: Path) -> int:
    """Bytes of the weights' file and the graph's, which are what runs."""
    return sum((ingot / name).stat().st_size for name in (WEIGHTS, GRAPH))


def score_ingot(ingot: Path, windows: Ids, truth: Floats, threads: int) -> Scores:
    """Compare what an ingot computes with the truth."""
    session = load(ingot, threads=threads)

    def logits(ids: Ids) -> Floats:
        session.reset(1, len(ids))
        return session.step(ids[None], np.ones_like(ids[None]))[0]

    return score(logits, windows, truth)


def rates(ingot: Path, prompt: int, new: int, threads: int) -> Rates:
    """Tokens a second of one prompt and of the tokens behind it, in a process of its own.

    Raises:
        IngotError: the session ends with an error.
    """
    given = {"ingot": str(ingot), "prompt": prompt, "new": new, "threads": threads}
    command = [sys.executable, RATES, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise IngotError(f"{ingot} is not timed: {done.stderr.strip()[-400:]}")
    return Rates(**json.loads(done.stdout.splitlines()[-1]))
