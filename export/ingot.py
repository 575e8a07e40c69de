"""The ingot: one folder with a graph, its weights, its contract and the proof of its numbers.

Standard library only, so that anything may read a manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ingot.graphs.state import State
from ingot.plugins import whole
from ingot.plugins.errors import IngotError
from ingot.plugins.whole import sha256

# Bytes of an element, by the names that inputs, outputs and states have their dtypes under.
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
SCHEMA_VERSION = 1
MANIFEST = "ingot.json"
GRAPH = "model.onnx"
WEIGHTS = "weights.safetensors"
ENGINE = "model.engine"
TRTEXEC = "trtexec.txt"
REPORT = "report"
# Builder of an engine -> the Python package that builds and runs it.
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

Target = Literal["onnx", "ort", "trt", "trt-rtx"]
TARGETS: tuple[Target, ...] = get_args(Target)
Verdict = Literal["passed", "failed", "skipped"]


class ManifestError(IngotError):
    """A folder that is not an ingot this version can trust."""


@dataclass(frozen=True)
class TensorInfo:
    """One graph input or output: numpy dtype name, and integers or symbolic dimension names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ProfileInfo:
    """One optimisation profile: input name -> its least, usual and largest shape."""

    name: str
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class EngineInfo:
    """What a TensorRT engine was built by and for.

    Attributes:
        builder: ``tensorrt`` or ``tensorrt-rtx``.
        version: of the builder, which an engine is bound to.
        compute_capabilities: of the devices it runs on, major times ten plus minor.
        graph_sha256: of the ONNX file it was built from.
        plugins: the plugin nodes by operator.
        libraries: of the folder; they must be loaded before the engine.
        embedded: whether the engine file holds its plugins itself.
        profiles: the optimisation profiles, in order.
    """

    builder: str
    version: str
    compute_capabilities: tuple[int, ...]
    graph_sha256: str
    plugins: dict[str, int]
    libraries: tuple[str, ...]
    embedded: bool
    profiles: tuple[ProfileInfo, ...]


@dataclass(frozen=True)
class FileInfo:
    """Size and SHA-256 of one file of the folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """``ingot.json``, schema version 1.

    Attributes:
        source: checkpoint name, revision and SHA-256.
        generation: token ids that end or pad a generation, and the longest context, which is None
            where nothing limits it.
        labels: names of a classifier's classes.
        engine: of a TensorRT target; None where it holds the graph alone.
        graph: opset, node count, operator counts, and the bytes of embedding tables that a token
            leaves unread.
        parameters: in all; ``active_parameters`` are those one token uses.
        tools: package versions the ingot was made with.
        files: every other file of the folder.
        validation: verdict and summary figures.
    """

    model_type: str
    task: str
    target: str
    precision: str
    main_output: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    states: tuple[State, ...]
    vocab_size: int
    source: dict[str, Any]
    generation: dict[str, Any]
    graph: dict[str, Any]
    parameters: int
    active_parameters: int
    weight_bytes: int
    tools: dict[str, str]
    labels: tuple[str, ...] = ()
    engine: EngineInfo | None = None
    files: dict[str, FileInfo] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def verdict(self) -> Verdict:
        value: Verdict = self.validation.get("verdict", "skipped")
        return value

    def write(self, folder: Path) -> None:
        """Write ``ingot.json`` into a folder."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``ingot.json``.

        Raises:
            ManifestError: no manifest, or one of another schema version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ManifestError(
                f"{folder} is not an ingot: it has no {MANIFEST}. Make one with "
                "`ingot export --model CHECKPOINT --target ort --out DIR`."
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            version = raw["schema_version"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ManifestError(f"{path} is damaged ({error}); export again.") from error
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"{path} has schema version {version}; this Ingot reads {SCHEMA_VERSION}. "
                "Export again, or use the version of Ingot that wrote it."
            )
        try:
            raw["inputs"] = tuple(_tensor(item) for item in raw["inputs"])
            raw["outputs"] = tuple(_tensor(item) for item in raw["outputs"])
            raw["states"] = tuple(_state(item) for item in raw["states"])
            raw["labels"] = tuple(raw["labels"])
            raw["engine"] = _engine(raw["engine"]) if raw.get("engine") else None
            raw["files"] = {name: FileInfo(**item) for name, item in raw["files"].items()}
            return cls(**raw)
        except (AttributeError, KeyError, TypeError) as error:
            raise ManifestError(f"{path} is damaged ({error}); export again.") from error

    def check_files(
        self,
        folder: Path,
        *,
        hashes: bool = True,
        advance: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        """Prove that the folder holds the files this manifest describes.

        Args:
            folder: the ingot.
            hashes: compare SHA-256 too, not only sizes.
            advance: told the bytes hashed.

        Raises:
            ManifestError: naming the first file that is missing or changed.
        """
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ManifestError(f"{folder} is incomplete: {name} is missing; export again.")
            same = path.stat().st_size == expected.bytes
            if not same or (hashes and sha256(path, advance) != expected.sha256):
                raise ManifestError(
                    f"{path} is not the file that was validated (its "
                    f"{'SHA-256' if same else 'size'} differs from {MANIFEST}); export again."
                )


def _tensor(item: dict[str, Any]) -> TensorInfo:
    return TensorInfo(item["name"], item["dtype"], tuple(item["shape"]))


def _state(item: dict[str, Any]) -> State:
    shapes = {name: tuple(item[name]) for name in ("input_shape", "output_shape")}
    return State(**{**item, **shapes})


def _engine(item: dict[str, Any]) -> EngineInfo:
    made = []
    for profile in item["profiles"]:
        shapes = {}
        for name, shape in profile["shapes"].items():
            least, usual, most = map(tuple, shape)
            shapes[name] = (least, usual, most)
        made.append(ProfileInfo(profile["name"], shapes))
    tuples = {name: tuple(item[name]) for name in ("compute_capabilities", "libraries")}
    return EngineInfo(**{**item, **tuples, "profiles": tuple(made)})


def file_infos(folder: Path, known: dict[str, str]) -> dict[str, FileInfo]:
    """Every file below a folder but the manifest, by relative name.

    Args:
        folder: the folder.
        known: hashes already computed while writing, by relative name.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    names.pop(MANIFEST, None)
    return {
        name: FileInfo(path.stat().st_size, known.get(name) or sha256(path))
        for name, path in names.items()
    }


def check_destination(out: Path, overwrite: bool, *read: Path) -> None:
    """Refuse a destination of an ingot that is taken or cannot be made, before any work is done.

    Args:
        out: the folder to make.
        overwrite: whether an ingot that is there may be replaced.
        read: folders that are read meanwhile.

    Raises:
        ManifestError: ``out`` exists and may not be replaced, cannot be made, or holds or lies in
            one of those.
    """
    try:
        whole.check_destination(
            out, overwrite=overwrite, mark=MANIFEST, foreign="is not an ingot", read=read
        )
    except whole.WriteError as error:
        raise ManifestError(str(error)) from error
