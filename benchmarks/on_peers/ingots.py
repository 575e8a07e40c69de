"""Our side: a table of export options, each a row."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.on_peers.models import Model
from benchmarks.on_peers.program import Format, Made, PeerError, run_logged
from ingot.export.ingot import MANIFEST, WEIGHTS

NAME = "ingot"
KERNELS = "kernels"
# The kernels that an export takes where it has no option of that name.
ONLY_KERNELS = "ort"
WHOLE = {"block": 32}
# The input of a graph that can leave out the logits of all tokens but the last.
LAST = "logits_to_keep"

# By the options of `ingot export --target ort`.
FORMATS = (
    Format("fp32", {"weights": "fp32", "kernels": "ort"}, exact=True),
    Format("bf16", {"weights": "bf16", "kernels": "ort"}, exact=True),
    Format("int8", {"weights": "int8", "kernels": "ort", **WHOLE}, arithmetic="int8"),
    Format("int4", {"weights": "int4", "kernels": "ort", **WHOLE}, arithmetic="int8"),
    Format("fp32, own kernels", {"weights": "fp32", "kernels": "ingot"}, exact=True),
    Format("bf16, own kernels", {"weights": "bf16", "kernels": "ingot"}, exact=True),
    Format(
        "bf16, own kernels, fast",
        {"weights": "bf16", "kernels": "ingot", "accuracy": "fast"},
        arithmetic="bfloat16",
    ),
    Format(
        "int8, own kernels", {"weights": "int8", "kernels": "ingot", **WHOLE}, arithmetic="int8"
    ),
    Format(
        "int4, own kernels", {"weights": "int4", "kernels": "ingot", **WHOLE}, arithmetic="int8"
    ),
)


@dataclass
class Ingots:
    """``Program`` of this repository.

    Attributes:
        work: where ingots are kept.
        export_options: the names that the command's options have here.
        notes: which rows were dropped, and why.
    """

    work: Path
    export_options: frozenset[str] = frozenset()
    name: str = NAME
    formats: tuple[Format, ...] = FORMATS
    notes: list[str] = field(default_factory=list)

    @classmethod
    def here(cls, work: Path) -> Ingots:
        """With the rows that this version's export can make."""
        from ingot.export.cli import export_command

        options = frozenset(str(option.name) for option in export_command.params)
        found = cls(work, options)
        found.formats, found.notes = possible(FORMATS, options)
        return found

    def prepare(self) -> None:
        return None

    def make(self, model: Model, chosen: Format) -> Made:
        out = self.work / "ingots" / model.family / chosen.folder
        if not out.is_dir():
            log = self.work / "logs" / f"{self.name}-{model.family}-{chosen.folder}.txt"
            asked = arguments(chosen.options, self.export_options)
            command = [sys.executable, "-m", "ingot", "export", "--target", "ort", *asked]
            where = ["--model", model.checkpoint, "--out", out, "--no-validate"]
            try:
                run_logged([*command, *where], log)
            except PeerError as error:
                raise PeerError("cannot be exported", error.details) from error
        given = {"last": has_input(out, LAST)}
        return Made(out, (out / WEIGHTS,), "run_ingot.py", Path(sys.executable), given)

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("ingot-export", "onnxruntime")}


def has_input(ingot: Path, name: str) -> bool:
    """Whether an ingot's graph takes an input."""
    manifest = json.loads((ingot / MANIFEST).read_text())
    return any(each["name"] == name for each in manifest["inputs"])


def possible(
    formats: tuple[Format, ...], export_options: frozenset[str]
) -> tuple[tuple[Format, ...], list[str]]:
    """The rows that can be made, and a note on those that cannot.

    Args:
        formats: by options of an export.
        export_options: the names that it has.
    """
    if KERNELS in export_options:
        return formats, []
    kept = tuple(each for each in formats if each.options[KERNELS] == ONLY_KERNELS)
    dropped = [each.name for each in formats if each not in kept]
    return kept, [f"{NAME}: without {'; '.join(dropped)}, for an export has no --{KERNELS} here"]


def arguments(options: dict[str, Any], export_options: frozenset[str]) -> list[str]:
    """As they are given on the command line."""
    return [
        word
        for name, value in options.items()
        if name != KERNELS or KERNELS in export_options
        for word in (f"--{name}", str(value))
    ]
