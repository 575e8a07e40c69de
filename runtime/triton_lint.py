"""What Triton does not check before it loads a model, or never: ``ingot triton --check REPO``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingot.export.ingot import ENGINE, GRAPH, INGOT, LIBRARY, MANIFEST, Manifest
from ingot.plugins.errors import IngotError, install_hint, shown
from ingot.plugins.json_fields import Field, FieldError, safe
from ingot.plugins.json_file import JsonError, read_json
from ingot.plugins.links import LinkError, require_inside
from ingot.plugins.whole import sha256
from ingot.runtime.triton_plan import (
    CONFIG,
    NAMES,
    PLUGINS,
    RECORD,
    SCHEMA_VERSION,
    TYPES,
    TritonError,
)

Shape = Sequence[int | str]
# One that is written here has some kilobytes.
_MOST_CONFIG = 1 << 20
# Of a sentence.
_MOST_LETTERS = 1000
_MODEL = re.compile(rf"{NAMES.pattern}(?:_generate)?")


def lint(repository: Path) -> list[str]:
    """Everything wrong with a repository, a sentence each; none where nothing was found.

    Raises:
        TritonError: not a repository of ours, or the parser of configs is not installed.
    """
    record = _record(repository)
    problems = list(_files(repository, record))
    place = repository / record.ingot
    manifest = None
    try:
        manifest = Manifest.read(place)
        manifest.check_files(place)
    except IngotError as error:
        problems.append(str(error))
    for name in record.models:
        folder = repository / name
        config = _config(folder, problems)
        if config is None:
            continue
        if config.name != name:
            problems.append(
                f"{name}/{CONFIG} names the model {shown(config.name)}, and not {name!r}."
            )
        found = (
            _generate(folder, config, manifest)
            if config.backend == "python"
            else _graph(folder, config, manifest)
        )
        problems += [f"{name}/{CONFIG}: {problem}" for problem in found]
    # Names and dims in them are those of files that anybody may have edited.
    return [safe(problem, _MOST_LETTERS) for problem in problems]


@dataclass(frozen=True)
class Record:
    """``triton.json``.

    Attributes:
        models: folders of the repository.
        ingot: where in it the ingot lies.
        files: name -> SHA-256 of what nobody is to edit.
    """

    models: tuple[str, ...]
    ingot: str
    files: dict[str, str]


def _record(repository: Path) -> Record:
    path = repository / RECORD
    if not path.is_file():
        raise TritonError(f"{repository} has no {RECORD}; make it with `ingot triton INGOT --out`.")
    try:
        raw = Field(read_json(path))
        version = raw.members(("schema_version",), None)["schema_version"].value
        if type(version) is not int or version != SCHEMA_VERSION:
            raise TritonError(
                f"{path} has schema version {shown(version)}; this Ingot reads {SCHEMA_VERSION}."
            )
        held = raw.members(("schema_version", "models", "ingot", "settings", "files"))
        files = held["files"].entries(most=1000)
        return Record(
            tuple(
                each.matching(_MODEL, "the name of a model")
                for each in held["models"].elements(least=1, most=2)
            ),
            held["ingot"].file_name(),
            {
                Field(name, "a name in files").file_name(): digest.sha256()
                for name, digest in files.items()
            },
        )
    except (JsonError, FieldError) as error:
        raise TritonError(f"{path} is damaged ({error}); make the repository again.") from error


def _files(repository: Path, record: Record) -> Iterator[str]:
    """What is not as it was written, and what was added where the Python model imports from."""
    for file, digest in record.files.items():
        try:
            path = require_inside(repository, file)
            if not path.is_file():
                yield f"{file} is missing."
            elif sha256(path) != digest:
                yield f"{file} is not the file that was written (its SHA-256 differs)."
        except LinkError as error:
            yield str(error)
        except OSError as error:
            yield f"{file} cannot be read: {error.strerror or error}."
    for name in record.models:
        version = repository / name / "1"
        if f"{name}/1/model.py" not in record.files:
            continue
        for path in sorted(version.rglob("*")):
            file = path.relative_to(repository).as_posix()
            # A link to a folder is a package to Python, and not followed here.
            folder = path.is_dir() and not path.is_symlink()
            if file not in record.files and not folder and not _compiled(path, version, record):
                yield f"{file} was not written here, and lies where the Python model imports from."


def _compiled(path: Path, version: Path, record: Record) -> bool:
    """Whether a file is what Python itself leaves, of a file of ours beside it."""
    source = path.parent.parent / f"{path.name.partition('.')[0]}.py"
    if path.is_symlink() or path.parent.name != "__pycache__" or path.suffix != ".pyc":
        return False
    return (
        version.parent.name / Path("1") / source.relative_to(version)
    ).as_posix() in record.files


def _config(folder: Path, problems: list[str]) -> Any:
    """The parsed config of a model; None, and a problem more, where there is none."""
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise TritonError(
            f"{error.name} is missing; install it with: {install_hint('triton')}"
        ) from error
    path = folder / CONFIG
    if not path.is_file():
        problems.append(f"{folder.name}/{CONFIG} is missing.")
        return None
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_CONFIG + 1)
        if len(data) > _MOST_CONFIG:
            problems.append(f"{folder.name}/{CONFIG} is larger than {_MOST_CONFIG:,} bytes.")
            return None
        return text_format.Parse(data.decode("utf-8"), model_config_pb2.ModelConfig())
    # Beside ParseError: text that is no UTF-8, numbers of thousands of digits, and messages without
    # end inside of messages that the parser does not know.
    except (text_format.Error, ValueError, RecursionError, OSError) as error:
        problems.append(f"{folder.name}/{CONFIG} cannot be read: {_first_line(error)}")
        return None


def _first_line(error: BaseException) -> str:
    """What an exception of a library says, on one line of some length."""
    return safe((str(error).splitlines() or [type(error).__name__])[0])


def _number(text: str, least: int) -> bool:
    """Whether a parameter is a number that a server can read; it may be of any length."""
    return len(text) < 10 and text.isascii() and text.isdecimal() and int(text) >= least


def _is_file(path: Path) -> bool:
    """Whether a file is there; a config may name what no system takes for a path."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _generate(folder: Path, config: Any, manifest: Manifest | None) -> Iterator[str]:
    """The Python model's."""
    if not config.model_transaction_policy.decoupled:
        yield "model_transaction_policy.decoupled must be true, for a response for each token."
    if config.max_batch_size != 0:
        yield f"max_batch_size is {config.max_batch_size}; it must be 0."
    settings = {name: value.string_value for name, value in config.parameters.items()}
    for name, least in (("streams", 1), ("threads", 0), ("capacity", 2), ("max_new_tokens", 1)):
        value = settings.get(name, "")
        if not _number(value, least):
            found = shown(value)
            yield f"the parameter {name} is {found}; it must be a number of at least {least}."
    if settings.get("verify") not in ("true", "false"):
        yield f"the parameter verify is {shown(settings.get('verify'))}; it must be true or false."
    place = settings.get("ingot")
    if place is None or not _is_file(folder / place / MANIFEST):
        yield f"the parameter ingot is {shown(place)}, where no ingot lies."
    if manifest is not None and manifest.kernels == INGOT:
        yield from _operators(folder, settings.get("operators"), manifest)
    if not (folder / "1" / "model.py").is_file():
        yield "1/model.py is missing."


def _operators(folder: Path, library: str | None, manifest: Manifest) -> Iterator[str]:
    """The library of kernels that the Python model loads."""
    if library is None or not _is_file(folder / library):
        yield f"the parameter operators is {shown(library)}, where no {LIBRARY} lies."
        return
    try:
        same = sha256(folder / library) == manifest.files[LIBRARY].sha256
    except OSError as error:
        yield f"{safe(library)} cannot be read: {error.strerror or error}."
        return
    if not same:
        yield f"{safe(library)} is not the {LIBRARY} that the ingot was made with."


def _graph(folder: Path, config: Any, manifest: Manifest | None) -> Iterator[str]:
    """The graph's own model."""
    engine = config.backend == "tensorrt"
    file = config.default_model_filename or (ENGINE if engine else GRAPH)
    if not _is_file(folder / "1" / file):
        yield f"1/{safe(file)}, which it runs, is missing."
    graph = folder / "1" / GRAPH
    if not graph.is_file():
        return
    try:
        inputs, outputs = _tensors(graph)
    # onnx's parser raises protobuf's errors, of any implementation.
    except Exception as error:
        yield f"1/{GRAPH} cannot be read: {_first_line(error)}"
        return
    batching = config.max_batch_size > 0
    if not batching:
        yield "max_batch_size is 0, but the graph's first dimension is the batch's."
    for kind, configured, known in (
        ("input", config.input, inputs),
        ("output", config.output, outputs),
    ):
        for tensor in configured:
            yield from _tensor(kind, tensor.name, tensor.data_type, tensor.dims, known)
    states = list(config.sequence_batching.state)
    yield from _names(config, states, inputs, outputs)
    for state in states:
        yield from _state(state, inputs, outputs, manifest)
    if states and config.model_warmup:
        yield (
            "model_warmup and state exclude each other: a warm-up request belongs to no sequence, "
            "so the model would not load."
        )
    if manifest is not None:
        yield from _engine(folder, config, manifest)


def _tensors(graph: Path) -> tuple[dict[str, tuple[str, Shape]], dict[str, tuple[str, Shape]]]:
    """Inputs and outputs of an ONNX file: name -> Triton's dtype, and the shape."""
    import onnx

    model = onnx.load(graph, load_external_data=False)

    def described(value: Any) -> tuple[str, Shape]:
        tensor = value.type.tensor_type
        name = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        shape = [d.dim_param or "?" if d.dim_param or not d.HasField("dim_value") else d.dim_value
                 for d in tensor.shape.dim]  # fmt: skip
        return TYPES.get(name, name), shape

    weights = {weight.name for weight in model.graph.initializer}
    return (
        {value.name: described(value) for value in model.graph.input if value.name not in weights},
        {value.name: described(value) for value in model.graph.output},
    )


def _tensor(
    what: str, name: str, data_type: int, dims: Sequence[int], known: dict[str, tuple[str, Shape]]
) -> Iterator[str]:
    """Compare a name, a dtype and dims without the batch's with the graph."""
    if name not in known:
        yield f"{what} {name} is not in {GRAPH}."
        return
    wanted, shape = known[name]
    found = _type_name(data_type)
    if found != wanted:
        yield f"{what} {name} is {found}; in {GRAPH} it is {wanted}."
    rest = list(shape[1:])
    fits = len(dims) == len(rest) and all(
        dim == size if isinstance(size, int) else dim == -1 or dim > 0
        for dim, size in zip(dims, rest, strict=True)
    )
    if not fits:
        yield f"{what} {name} has dims {list(dims)}; in {GRAPH}, behind the batch, {rest}."


def _names(
    config: Any,
    states: list[Any],
    inputs: dict[str, tuple[str, Shape]],
    outputs: dict[str, tuple[str, Shape]],
) -> Iterator[str]:
    """Every input of the graph must come from somewhere, and once."""
    given = [tensor.name for tensor in config.input] + [state.input_name for state in states]
    given += [control.name for control in config.sequence_batching.control_input]
    for name in sorted(set(inputs) - set(given)):
        yield f"{name}, an input of {GRAPH}, is neither an input nor a state."
    for name in _repeated(given):
        yield f"{name} is given more than once."
    for name in _repeated(state.output_name for state in states):
        yield f"{name} is the output of more than one state."


def _repeated(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _type_name(number: int) -> str:
    """Triton's name of a dtype; a config may hold the number of one that it does not have."""
    from tritonclient.grpc import model_config_pb2

    known = dict(model_config_pb2.DataType.items())
    return next((name for name, each in known.items() if each == number), str(number))


def _state(
    state: Any,
    inputs: dict[str, tuple[str, Shape]],
    outputs: dict[str, tuple[str, Shape]],
    manifest: Manifest | None,
) -> Iterator[str]:
    name, dims = state.input_name, list(state.dims)
    yield from _tensor("state input", name, state.data_type, dims, inputs)
    yield from _tensor("state output", state.output_name, state.data_type, dims, outputs)
    if len(state.initial_state) != 1:
        yield (
            f"state {name} has {len(state.initial_state)} initial states; without exactly one a "
            "sequence would start from memory that was never written."
        )
        return
    first = state.initial_state[0]
    if first.data_type != state.data_type:
        types = [_type_name(each) for each in (first.data_type, state.data_type)]
        yield f"the initial state of {name} is {types[0]} and the state {types[1]}."
    if not first.name:
        yield f"the initial state of {name} has no name."
    if first.WhichOneof("state_data") != "zero_data" or not first.zero_data:
        yield f"the initial state of {name} is not zero_data; the model begins with zeros."
    fits = len(first.dims) == len(dims) and all(
        start > 0 and dim in (-1, start) for start, dim in zip(first.dims, dims, strict=True)
    )
    if not fits:
        yield f"the initial state of {name} has dims {list(first.dims)}, which do not fit {dims}."
    known = None if manifest is None else {s.input: s for s in manifest.states}.get(name)
    if known is None:
        if manifest is not None:
            yield f"{name} is no state of the ingot."
        return
    if known.output != state.output_name:
        yield f"{name} goes on as {known.output}, and not as {state.output_name}."
    if known.shared and -1 in dims:
        yield f"{name} is appended to in place, so its dims must be fixed, with the capacity."
    if known.axis is not None and not known.shared and -1 not in dims:
        yield f"{name} grows by the tokens of each request, so its dims cannot all be fixed."
    alone = state.use_same_buffer_for_input_output or state.use_growable_memory
    if alone and not known.shared:
        yield f"{name} is read while {known.output} is written, so they cannot be one buffer."


def _engine(folder: Path, config: Any, manifest: Manifest) -> Iterator[str]:
    """What else the ingot says about its states and its engine."""
    given = {state.input_name for state in config.sequence_batching.state}
    for state in manifest.states:
        if state.input not in given:
            yield f"{state.input}, a state of the ingot, is not among the states."
    if any(state.axis is not None for state in manifest.states) and config.max_batch_size > 1:
        yield (
            f"max_batch_size is {config.max_batch_size}; Triton does not compare the lengths of a "
            "batch's caches, so it must be 1."
        )
    if config.backend != "tensorrt":
        return
    engine = manifest.engine
    if engine is None:
        yield "the ingot holds no engine for the TensorRT backend."
        return
    if engine.graph_sha256 != manifest.files[GRAPH].sha256:
        yield f"{ENGINE} was built from another {GRAPH}."
    if engine.builder != "tensorrt":
        yield f"Triton's TensorRT backend loads no engine of {engine.builder}."
    if engine.plugins and not engine.embedded and not (folder / "1" / PLUGINS).is_file():
        yield f"1/{PLUGINS}, which the engine needs, is missing."
    most = engine.profiles[0].shapes["input_ids"][2][0]
    if config.max_batch_size > most:
        yield f"max_batch_size is {config.max_batch_size}; the engine was built for {most}."
    for group in config.instance_group:
        for profile in group.profile:
            if not _number(profile, 0) or int(profile) >= len(engine.profiles):
                yield f"the engine has no profile {profile}."
