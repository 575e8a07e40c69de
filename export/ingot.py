"""The ingot: one folder with a graph, its weights, its contract and the proof of its numbers.

Standard library only, so that anything may read a manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ingot.export.external_data import GraphError, external_files
from ingot.export.ingot_schema import FIELDS, OF_QUANTIZATION, OPTIONAL, ORT, PORTABLE, check
from ingot.export.ingot_schema import INGOT as INGOT
from ingot.export.ingot_schema import LIBRARY as LIBRARY
from ingot.export.ingot_schema import MODULES as MODULES
from ingot.export.ingot_schema import SIZES as SIZES
from ingot.export.ingot_schema import TARGETS as TARGETS
from ingot.export.ingot_schema import Target as Target
from ingot.export.ingot_schema import Verdict as Verdict
from ingot.export.quantization import SCALES, Quantization
from ingot.graphs.state import State
from ingot.plugins import whole
from ingot.plugins.errors import IngotError, shown
from ingot.plugins.json_fields import Field, FieldError
from ingot.plugins.json_file import JsonError, read_json
from ingot.plugins.links import require_inside

SCHEMA_VERSION = 1
MANIFEST = "ingot.json"
GRAPH = "model.onnx"
WEIGHTS = "weights.safetensors"
ENGINE = "model.engine"
TRTEXEC = "trtexec.txt"
REPORT = "report"
# What is read beside the graph: whoever can add one of these changes what a text's tokens are.
SIDE_FILES = (
    "*token*.json",
    "*.jinja",
    "*.model",
    "additional_chat_templates/*",
    "chat_templates/*",
    "generation_config.json",
    "merges.txt",
    "vocab.*",
)

# Whose kernels run an ort ingot, for people.
_KERNELS = {ORT: "ONNX Runtime's", PORTABLE: "standard operators alone", INGOT: "Ingot's own"}


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
        source: checkpoint name, revision and SHA-256, which is of the merged weights where
            ``adapter`` has the same of an adapter.
        generation: token ids that end or pad a generation, and the longest context, which is None
            where nothing limits it.
        labels: names of a classifier's classes.
        engine: of a TensorRT target; None where it holds the graph alone.
        graph: opset, node count, operator counts, and the bytes of embedding tables that a token
            leaves unread.
        parameters: in all; ``active_parameters`` are those one token uses.
        weights: what matrices are stored in, of ``export.ingot_schema.STORED``; the precision where
            it is empty.
        quantization: how, where that is whole numbers.
        kernels: of ``export.ingot_schema.SAID_KERNELS``, whose run an ort ingot; ONNX Runtime's
            where it is empty.
        activations: ``bfloat16`` where products with weights of it may round their activations to
            it; else empty. Of whole numbers ``quantization`` says so.
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
    weights: str = ""
    quantization: Quantization | None = None
    kernels: str = ""
    activations: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def verdict(self) -> Verdict:
        value: Verdict = self.validation.get("verdict", "skipped")
        return value

    @property
    def run_by(self) -> str:
        """Whose kernels run it, and from which library; empty where the target has no choice."""
        if self.target != "ort":
            return ""
        whose = _KERNELS[self.kernels or ORT]
        if self.kernels != INGOT:
            return whose
        return f"{whose}, in {LIBRARY} with the SHA-256 {self.files[LIBRARY].sha256}"

    @property
    def by_token(self) -> bool:
        """Whether several rows of several tokens after a past are fed a token at a time.

        ONNX Runtime's GroupQueryAttention, which appends to shared buffers, refuses them.
        """
        caches = any(state.shared and state.axis is not None for state in self.states)
        return caches and self.kernels != INGOT

    def write(self, folder: Path) -> None:
        """Write ``ingot.json`` into a folder."""
        said = asdict(self)
        for name in OPTIONAL:
            if not said[name]:
                del said[name]
        for name in OF_QUANTIZATION if self.quantization is not None else ():
            if said["quantization"][name] in ({}, SCALES[0]):
                del said["quantization"][name]
        text = json.dumps(said, indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``ingot.json``, and refuse whatever is not as ``export.ingot_schema`` has it.

        Raises:
            ManifestError: no manifest, a damaged one, or one of another schema version.
            LinkError: it is a link out of the folder.
        """
        path = require_inside(folder, MANIFEST)
        try:
            there = path.is_file()
        # A path that is too long, or below a folder that may not be read.
        except OSError as error:
            raise ManifestError(f"{path} cannot be read ({error.strerror}).") from error
        if not there:
            raise ManifestError(
                f"{folder} is not an ingot: it has no {MANIFEST}. Make one with "
                "`ingot export --model CHECKPOINT --target ort --out DIR`."
            )
        try:
            raw = read_json(path)
            version = Field(raw).members(("schema_version",), None)["schema_version"].value
            if type(version) is not int or version != SCHEMA_VERSION:
                raise ManifestError(
                    f"{path} has schema version {shown(version)}; this Ingot reads "
                    f"{SCHEMA_VERSION}. Export again, or use the version of Ingot that wrote it."
                )
            later = {each.name for each in fields(cls)} - set(FIELDS)
            check(Field(raw).members(FIELDS, later))
        except JsonError as error:
            raise ManifestError(f"{error}; it is damaged, export again.") from error
        except FieldError as error:
            raise ManifestError(f"{path} is damaged ({error}); export again.") from error
        raw["inputs"] = tuple(_tensor(item) for item in raw["inputs"])
        raw["outputs"] = tuple(_tensor(item) for item in raw["outputs"])
        raw["states"] = tuple(_state(item) for item in raw["states"])
        raw["labels"] = tuple(raw["labels"])
        raw["engine"] = _engine(raw["engine"]) if raw["engine"] else None
        if "quantization" in raw:
            raw["quantization"] = Quantization(**raw["quantization"])
        raw["files"] = {name: FileInfo(**item) for name, item in raw["files"].items()}
        manifest = cls(**raw)
        for name in manifest.loaded:
            manifest.listed(folder, name)
        return manifest

    @property
    def loaded(self) -> tuple[str, ...]:
        """The files that a session opens by itself; the weights are those that the graph names."""
        if self.engine is not None:
            return (GRAPH, ENGINE, *self.engine.libraries)
        return (GRAPH, LIBRARY) if self.kernels == INGOT else (GRAPH,)

    def listed(self, folder: Path, name: str) -> Path:
        """The path of a file of the folder that is about to be read.

        Raises:
            ManifestError: ``files`` lacks it, so that nobody vouches for it.
            LinkError: it lies elsewhere.
        """
        if name not in self.files:
            raise ManifestError(
                f"{folder / MANIFEST} lists no {shown(name)}, so what lies there was never "
                "exported or validated; export again."
            )
        return require_inside(folder, name)

    def check_files(
        self,
        folder: Path,
        *,
        hashes: bool = True,
        advance: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        """Prove that the folder holds the files this manifest describes, and no others are read.

        Beside the files that are listed this looks at what is going to be opened: the graph, its
        weights by the names that it has for them, the engine and its libraries, and what tokenizers
        and chat templates are read from. A file that nothing reads may lie there unlisted.

        Args:
            folder: the ingot.
            hashes: compare SHA-256 too, not only sizes.
            advance: told the bytes hashed.

        Raises:
            ManifestError: naming the first file that is missing, changed, or read and not listed.
            LinkError: naming a file that is a link out of the folder.
        """
        try:
            self._check_files(folder, hashes, advance)
        except OSError as error:
            raise ManifestError(
                f"{error.filename or folder} cannot be read: {error.strerror or error}."
            ) from error

    def _check_files(self, folder: Path, hashes: bool, advance: Callable[[int], None]) -> None:
        for name, expected in self.files.items():
            path = self.listed(folder, name)
            if not path.is_file():
                raise ManifestError(f"{folder} is incomplete: {name} is missing; export again.")
            same = path.stat().st_size == expected.bytes
            if not same or (hashes and whole.sha256(path, advance) != expected.sha256):
                raise ManifestError(
                    f"{path} is not the file that was validated (its "
                    f"{'SHA-256' if same else 'size'} differs from {MANIFEST}); export again."
                )
        side_files = (path for pattern in SIDE_FILES for path in folder.glob(pattern))
        for name in sorted(path.relative_to(folder).as_posix() for path in side_files):
            self.listed(folder, name)
        try:
            weights = external_files(self.listed(folder, GRAPH).read_bytes())
        except GraphError as error:
            raise ManifestError(f"{folder / GRAPH} is damaged ({error}); export again.") from error
        for name in sorted(weights):
            self.listed(folder, name)


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
        name: FileInfo(path.stat().st_size, known.get(name) or whole.sha256(path))
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
