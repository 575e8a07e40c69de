"""``python -m runtime inspect INGOT``: what an ingot is, from its manifest and its weights' header.

Nothing is loaded and nothing is run; only ``weights.safetensors``' first bytes are read.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from ingot.export.ingot import INGOT, SIZES, WEIGHTS, Manifest
from ingot.graphs.state import State
from ingot.plugins.command_line import Command, console
from ingot.plugins.cpu.operators import ATTENTION, EMBEDDING, LINEAR, LINEARS, MIXER, MLP
from ingot.plugins.errors import IngotError
from ingot.plugins.json_fields import Field, FieldError, safe
from ingot.plugins.json_file import MOST_BYTES, JsonError, parse_json
from ingot.plugins.registry import OPERATORS

# The operators of Ingot's own, as a canonical graph and a lowered one have them: what runs each.
_IN_GRAPH = {
    **dict.fromkeys(OPERATORS, "function body of standard operators"),
    **{
        operator.onnx_runtime: f"ONNX Runtime's kernel, for {name}"
        for name, operator in OPERATORS.items()
        if operator.onnx_runtime
    },
    "GroupQueryAttention": "ONNX Runtime's kernel, for Attention and its caches",
}
_PLUGIN = "TensorRT plugin"
# What an ingot's own kernels compute, which is no function body then.
_OWN = dict.fromkeys(
    (LINEAR, LINEARS, MLP, EMBEDDING, ATTENTION, MIXER, *OPERATORS), "Ingot's own kernel"
)
_DTYPE = re.compile("[A-Z0-9_]{1,16}")


@dataclass(frozen=True)
class Weights:
    """Tensors of one name, layer numbers aside.

    Attributes:
        name: with ``*`` for each number.
        count: of tensors.
        dtype: safetensors' name of it.
        bytes: of all.
    """

    name: str
    count: int
    dtype: str
    bytes: int


@dataclass(frozen=True)
class States:
    """States of one kind, one of each layer that has them.

    Attributes:
        kind: ``key``, ``value``, ``conv`` or ``ssm``.
        count: of states.
        dtype: numpy's name of it.
        shape: of one, with names where the size is not fixed.
        bytes: of all, for one sequence; of a cache, for one token of it.
        grows: whether each token adds so many bytes.
        shared: whether past and present are one buffer of a fixed capacity.
    """

    kind: str
    count: int
    dtype: str
    shape: tuple[int | str, ...]
    bytes: int
    grows: bool
    shared: bool


@dataclass(frozen=True)
class Inspection:
    """What is shown.

    Attributes:
        path: of the folder.
        model_type: as are target, task, precision, verdict and source those of the manifest.
        stored: what matrices are stored in, where that is not the precision.
        quantization: how, where that is whole numbers.
        kernels: whose run it, and from which library; empty where the target has no choice.
        operators: every operator of the graph, those inside of branches and loops as well, and how
            often it is there.
        lowered: of the operators that are not ONNX's own, what runs each.
        passes: what led from the canonical graph to this one, each with the nodes it took away.
        parameters: in all.
        active_parameters: that one token uses.
        weight_bytes: of all parameters.
        active_bytes: of those one token reads, on the average width of a parameter: of an
            embedding table that is used for nothing else it reads one row.
        state_bytes_per_token: that each token of a sequence adds.
        state_bytes_per_sequence: of fixed size.
        shared_buffers: whether past and present are one buffer of a fixed capacity.
        context_length: longest sequence; None where nothing limits it.
        weights: by name, with their precision.
        states: by kind, with theirs.
        profiles: of an engine, by name: input -> least, usual and largest shape.
        engine: builder and version.
        files: name -> bytes and SHA-256.
    """

    path: str
    model_type: str
    target: str
    task: str
    precision: str
    stored: str
    quantization: str | None
    kernels: str
    verdict: str
    source: dict[str, Any]
    operators: dict[str, int]
    lowered: dict[str, str]
    passes: tuple[str, ...]
    parameters: int
    active_parameters: int
    weight_bytes: int
    active_bytes: int
    state_bytes_per_token: int
    state_bytes_per_sequence: int
    shared_buffers: bool
    context_length: int | None
    weights: tuple[Weights, ...]
    states: tuple[States, ...]
    profiles: dict[str, dict[str, Any]]
    engine: str | None
    files: dict[str, dict[str, Any]]

    def decode_bytes(self, length: int) -> int:
        """Bytes that one token of one sequence reads and writes at least, after so many tokens."""
        past = self.state_bytes_per_token * length
        return self.active_bytes + past + 2 * self.state_bytes_per_sequence

    def sequence_bytes(self, length: int) -> int:
        """Bytes of the states of one sequence of so many tokens."""
        return self.state_bytes_per_token * length + self.state_bytes_per_sequence


def inspect(folder: Path) -> Inspection:
    """Read what there is to know of an ingot.

    Raises:
        IngotError: not an ingot, or one whose weights have no readable header.
    """
    manifest = Manifest.read(folder)
    engine = manifest.engine
    plugins = engine.plugins if engine is not None else {}
    operators: dict[str, int] = manifest.graph["operators"]
    own = manifest.kernels == INGOT
    # Floats that are stored narrower are widened when a session loads them, but for kernels that
    # read them as they are.
    stored_width = manifest.weight_bytes / manifest.parameters
    widened = manifest.weights and manifest.quantization is None and not own
    width = SIZES[manifest.precision] if widened else stored_width
    unread = round(manifest.graph["unread_bytes"] * width / stored_width)
    states = tuple(_by_kind(manifest.states))
    run = _IN_GRAPH | _OWN if own else _IN_GRAPH
    return Inspection(
        path=str(folder),
        model_type=manifest.model_type,
        target=manifest.target,
        task=manifest.task,
        precision=manifest.precision,
        stored=manifest.weights,
        quantization=None if manifest.quantization is None else str(manifest.quantization),
        kernels=manifest.run_by,
        verdict=manifest.verdict,
        source=manifest.source,
        operators=operators,
        lowered={
            name: _PLUGIN if name in plugins else run[name] for name in operators if name in run
        },
        passes=tuple(_passes(manifest.graph.get("lowering"))),
        parameters=manifest.parameters,
        active_parameters=manifest.active_parameters,
        weight_bytes=manifest.weight_bytes,
        active_bytes=round(manifest.active_parameters * width) - unread,
        state_bytes_per_token=sum(each.bytes for each in states if each.grows),
        state_bytes_per_sequence=sum(each.bytes for each in states if not each.grows),
        shared_buffers=any(each.shared and each.grows for each in states),
        context_length=manifest.generation["context_length"],
        weights=_weights(manifest.listed(folder, WEIGHTS)),
        states=states,
        profiles={p.name: p.shapes for p in engine.profiles} if engine is not None else {},
        engine=f"{engine.builder} {engine.version}" if engine is not None else None,
        files={name: asdict(info) for name, info in manifest.files.items()},
    )


def _passes(recorded: object) -> Iterable[str]:
    """Each pass that changed something, in words; of what is not as passes say it, nothing."""
    for each in recorded if isinstance(recorded, list) else ():
        if not isinstance(each, dict) or not isinstance(each.get("name"), str) or len(each) == 1:
            continue
        removed = each.get("removed")
        counts = removed.items() if isinstance(removed, dict) else ()
        took = ", ".join(f"{count} {name}" for name, count in counts)
        yield safe(f"{each['name']} ({took})" if took else each["name"])


def _by_kind(states: Iterable[State]) -> Iterable[States]:
    groups: dict[tuple[Any, ...], list[State]] = {}
    for state in states:
        key = state.kind, state.dtype, state.input_shape, state.axis is not None, state.shared
        groups.setdefault(key, []).append(state)
    for (kind, dtype, shape, grows, shared), alike in groups.items():
        total = sum(map(_bytes, alike))
        yield States(kind, len(alike), dtype, shape, total, grows, shared)


def _bytes(state: State) -> int:
    """The size of a state for one sequence, or for one token of a sequence where it grows."""
    return SIZES[state.dtype] * math.prod(state.shape(1, 1))


def _weights(path: Path) -> tuple[Weights, ...]:
    # A pipe in its place would be waited for.
    if not path.is_file():
        raise IngotError(
            f"{path} has no readable header (it is missing, or no file); export again."
        )
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            most = path.stat().st_size
            if size > min(most, MOST_BYTES):
                raise FieldError(f"it says to have {size} bytes of it")
            header = parse_json(file.read(size), "the header")
        return tuple(_grouped(Field(header, "the header").members((), None), most))
    except (OSError, struct.error, JsonError, FieldError) as error:
        raise IngotError(f"{path} has no readable header ({error}); export again.") from error


def _grouped(header: Mapping[str, Field], most: int) -> Iterable[Weights]:
    """By name and dtype, of a safetensors header whose file has so many bytes."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        Field(name, "a name in the header").text()
        held = entry.members(("dtype", "shape", "data_offsets"))
        offsets = held["data_offsets"].elements(least=2, most=2)
        begin, end = (each.whole(0, most) for each in offsets)
        if begin > end:
            held["data_offsets"].refuse("where a tensor begins and ends")
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", name), held["dtype"].matching(_DTYPE, "a dtype")
        groups.setdefault(key, []).append(end - begin)
    for (name, dtype), sizes in sorted(groups.items()):
        yield Weights(name, len(sizes), dtype, sum(sizes))


@click.command("inspect", cls=Command)
@click.argument("ingot", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect_command(ingot: Path, as_json: bool) -> None:
    """Show an ingot's operators, weights, states and hashes, without running it."""
    found = inspect(ingot)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
    else:
        _show(found)


def _show(found: Inspection) -> None:
    from rich.table import Table

    # Shapes and paths may hold brackets, which are no markup.
    out = console(markup=False)
    table = Table(title=found.path, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(found):
        table.add_row(name, value)
    out.print(table)
    weights = Table("tensor", "count", "dtype", "bytes", title="weights", title_justify="left")
    for each in found.weights:
        weights.add_row(each.name, str(each.count), each.dtype, f"{each.bytes:,}")
    out.print(weights)
    states = Table("kind", "count", "dtype", "shape", "bytes", title="states", title_justify="left")
    for state in found.states:
        size = f"{state.bytes:,} a {'token' if state.grows else 'sequence'}"
        shape = ", ".join(map(str, state.shape))
        states.add_row(state.kind, str(state.count), state.dtype, f"[{shape}]", size)
    if found.states:
        out.print(states)
    files = Table("file", "bytes", title="files", title_justify="left")
    # In lines of 32 where the terminal is narrow, rather than cut off.
    files.add_column("SHA-256", overflow="fold", min_width=32)
    for name, info in found.files.items():
        files.add_row(name, f"{info['bytes']:,}", info["sha256"])
    out.print(files)


def _named(source: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in source.items() if value is not None)


def _rows(found: Inspection) -> Iterable[tuple[str, str]]:
    yield "model", f"{found.model_type}, {found.task}, {found.precision}, for {found.target}"
    yield "verdict", found.verdict
    yield "checkpoint", _named({**found.source, "adapter": None})
    if found.source.get("adapter") is not None:
        yield "adapter", _named(found.source["adapter"])
    share = found.active_parameters / found.parameters
    stored = {"": "", "checkpoint": ", matrices as the checkpoint has them"}.get(
        found.stored, f", matrices in {found.stored}"
    )
    if found.quantization is not None:
        stored += f", {found.quantization}"
    yield "parameters", f"{found.parameters:,}, {found.weight_bytes:,} bytes{stored}"
    if found.kernels:
        yield "kernels", found.kernels
    yield "active per token", f"{found.active_parameters:,} ({share:.0%})"
    total = sum(found.operators.values())
    most_first = sorted(found.operators.items(), key=lambda item: (-item[1], item[0]))
    counted = ", ".join(f"{count} {name}" for name, count in most_first)
    yield "operators", f"{total}: {counted}"
    for name, how in found.lowered.items():
        yield name, how
    if found.passes:
        yield "passes", ", ".join(found.passes)
    most = found.context_length
    if found.state_bytes_per_token:
        whole = f"; {found.sequence_bytes(most):,} a sequence of {most:,} tokens" if most else ""
        shared = ", in buffers that past and present share" * found.shared_buffers
        yield "cache", f"{found.state_bytes_per_token:,} bytes a token and sequence{whole}{shared}"
    if found.state_bytes_per_sequence:
        yield "state", f"{found.state_bytes_per_sequence:,} bytes a sequence, of fixed size"
    for length in (1, min(1024, most or 1024)):
        read = f"{found.decode_bytes(length):,} bytes: weights touched, and state"
        yield f"decode after {length}", read
    if most is not None:
        yield "context", f"{most:,} tokens"
    if found.engine is not None:
        yield "engine", found.engine
    for name, shapes in found.profiles.items():
        yield f"profile {name}", ", ".join(f"{n} {_least_to_most(s)}" for n, s in shapes.items())


def _least_to_most(shape: Any) -> str:
    return " / ".join("x".join(map(str, each)) for each in shape)
