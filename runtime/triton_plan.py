"""Which models an ingot has in Triton, with the user's settings and the limits of both."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ingot.export.ingot import INGOT, EngineInfo, Manifest
from ingot.graphs.state import State
from ingot.plugins import library
from ingot.plugins.errors import IngotError, shown

SCHEMA_VERSION = 1
RECORD = "triton.json"
CONFIG = "config.pbtxt"
PLUGINS = library.PLUGINS.name
MOST_CAPACITY = 4096
NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
}


class TritonError(IngotError):
    """A repository that cannot be made: what does not fit, and what to do."""


@dataclass(frozen=True)
class Settings:
    """What the user chooses.

    Attributes:
        name: of the graph's model; the other is called ``NAME_generate``.
        streams: generations at once.
        threads: of ONNX Runtime; 0 lets it choose.
        capacity: most tokens of a sequence; 0 is the model's context, at most 4096.
        max_batch: most sequences in one call of the graph.
    """

    name: str = ""
    streams: int = 4
    threads: int = 0
    capacity: int = 0
    max_batch: int = 8


@dataclass(frozen=True)
class Plan:
    """What the repository is to hold.

    Attributes:
        settings: with every default filled in.
        graph: whether one of Triton's own backends can run the graph.
        generate: whether the Python model can.
        why: a sentence for the README on what is left out; empty where nothing is.
    """

    settings: Settings
    graph: bool
    generate: bool
    why: str = ""

    @property
    def models(self) -> list[str]:
        """Their names."""
        name = self.settings.name
        return [name] * self.graph + [f"{name}_generate"] * self.generate


def make_plan(folder: Path, manifest: Manifest, settings: Settings) -> Plan:
    """Decide which models an ingot has in Triton.

    Raises:
        TritonError: none, or a setting that does not fit.
    """
    if manifest.verdict == "failed":
        raise TritonError(
            f"{folder} failed its validation, so its numbers are wrong; export it again."
        )
    for option, value, least, most in (
        ("--streams", settings.streams, 1, 1024),
        ("--threads", settings.threads, 0, 1024),
        ("--max-batch", settings.max_batch, 1, 1024),
    ):
        if not least <= value <= most:
            raise TritonError(f"{option} is {value}; it must be {least} to {most}.")
    engine = manifest.engine
    graph, why = True, ""
    if engine is None and manifest.target.startswith("trt"):
        raise TritonError(
            f"{folder} holds a graph for TensorRT and no engine, and Triton builds none; export it "
            "with --builder tensorrt, or with --target ort."
        )
    if engine is None and manifest.precision != "float32":
        raise TritonError(
            f"{folder} holds a {manifest.precision} graph and no engine; export it in float32."
        )
    if engine is not None:
        if engine.plugins and not engine.libraries and not engine.embedded:
            raise TritonError(
                f"{folder} was built without the GPU kernels of {', '.join(engine.plugins)}; run "
                "make plugins and export again."
            )
        graph, why = _triton_runs(engine)
    if manifest.kernels == INGOT:
        # A repository does not know where it will lie.
        graph = False
        why = (
            "the graph needs a library of operators, which Triton's ONNX Runtime backend takes by "
            "an absolute path alone; one exported with --kernels ort needs none"
        )
    generate = manifest.task == "generate"
    if not graph and not generate:
        raise TritonError(
            f"{folder} was exported with --task {manifest.task}, so only its graph could be "
            f"served, and {why}."
        )
    if not generate:
        why = f"the ingot was exported with --task {manifest.task} and has no next token to stream"
    return Plan(_filled(manifest, settings), graph, generate, why)


def _triton_runs(engine: EngineInfo) -> tuple[bool, str]:
    """Whether Triton's TensorRT backend can load an engine, and if not, why."""
    if engine.builder != "tensorrt":
        return False, f"Triton's TensorRT backend loads no engine of {engine.builder}"
    if engine.plugins and not engine.embedded and PLUGINS not in engine.libraries:
        return False, f"Triton's TensorRT backend needs the plugins as {PLUGINS}"
    return True, ""


def _filled(manifest: Manifest, settings: Settings) -> Settings:
    context = manifest.generation.get("context_length") or MOST_CAPACITY
    limits = [min(context, MOST_CAPACITY)]
    max_batch = settings.max_batch
    if manifest.engine is not None:
        most = manifest.engine.profiles[0].shapes["input_ids"][2]
        limits.append(most[1])
        max_batch = min(max_batch, most[0])
    if any(state.axis is not None for state in manifest.states):
        # ONNX Runtime's GroupQueryAttention refuses several rows of several tokens after a past.
        # Where caches grow, Triton takes their length from the batch's first and does not compare:
        # see the config.
        max_batch = 1
    capacity = settings.capacity or min(limits)
    # The default is at most MOST_CAPACITY, and what is asked for is limited by these alone.
    longest = min([manifest.generation.get("context_length") or sys.maxsize, *limits[1:]])
    if not 2 <= capacity <= longest:
        allowed = "at least 2" if longest == sys.maxsize else f"2 to {longest}"
        raise TritonError(f"--capacity is {settings.capacity}; it must be {allowed}.")
    name = settings.name or manifest.model_type
    if not NAMES.fullmatch(name):
        raise TritonError(
            f"--name {shown(name)} is no model name; give at most 40 letters, digits, _ and -."
        )
    return replace(settings, name=name, capacity=capacity, max_batch=max_batch)


def growth(state: State) -> str:
    """How a state grows: ``shared`` in one buffer of its capacity, ``appended``, or ``fixed``."""
    if state.axis is None:
        return "fixed"
    return "shared" if state.shared else "appended"
