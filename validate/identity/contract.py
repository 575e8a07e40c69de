"""What ``ingot.json`` promises, recomputed from the checkpoint and read off the graph file.

A session feeds and stops by these fields, and a user plans by them; no run shows most of them to be
wrong. They are worked out twice: as an export makes them now, and apart from the export, from the
graph file and from the checkpoint's JSON alone (``validate.identity.stated``), so that a fault of
the one function that makes a manifest does not hide behind itself.

Not compared, because nothing here could: the name that the checkpoint's folder had, the versions of
tools, and a context that the user of the export gave (``generation.context_given``).
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import onnx
from onnx import helper

from ingot.export.engine import custom_nodes, trtexec_options
from ingot.export.generation import read_generation
from ingot.export.ingot import GRAPH, TRTEXEC, Manifest
from ingot.export.ingot_schema import CHECKPOINT, INGOT, STORED
from ingot.export.manifest import make_manifest
from ingot.export.quantization import BITS
from ingot.graphs.family import find_family
from ingot.plugins.cpu.operators import ATTENTION, DOMAIN, MIXER
from ingot.plugins.cpu.panels import TO_BFLOAT16, TO_INT8
from ingot.plugins.errors import IngotError, named, shown
from ingot.validate.identity.bodies import all_nodes, is_weight
from ingot.validate.identity.options import options_problem
from ingot.validate.identity.side_files import side_files
from ingot.validate.identity.stated import stated
from ingot.validate.identity.subject import Subject
from ingot.validate.identity.weights_blocks import is_packed, is_side
from ingot.validate.identity.weights_checkpoint import Tensors
from ingot.validate.identity.weights_graph import Graph
from ingot.validate.result import Check

NAME = "contract"
# Of ``ingot.json``: what is recomputed. The graph's facts are read off the file, and its passes are
# a part of the graph.
RECOMPUTED = (
    *("model_type", "task", "target", "precision", "main_output", "inputs", "outputs", "states"),
    *("vocab_size", "labels", "generation", "parameters", "active_parameters", "weight_bytes"),
)
# Fields that are told; what is wrong of one state is often wrong of all.
MOST = 12
# Elements of lists that have a name of their own.
KEYS = ("name", "input")
# What writes new states where the old ones are: an operator's domain and name, and its inputs.
SHARING = {
    ("com.microsoft", "GroupQueryAttention"): (3, 4),
    (DOMAIN, ATTENTION): (3, 4),
    (DOMAIN, MIXER): (2, 3),
}
# What multiplies by whole numbers, and the level at which it may round activations to int8.
IN_BLOCKS, ROUNDED = ("MatMulNBits", "QMoE"), 4
ROUNDS = "round_activations"
ROUNDINGS = {TO_INT8: "int8", TO_BFLOAT16: "bfloat16"}
# Inputs of what looks rows of a table up: the table, and its scales and zero points.
LOOKED_UP = {
    ("Gather", 0),
    ("Embedding", 1),
    *(("GatherBlockQuantized", place) for place in (0, 2, 3)),
}


def check_contract(subject: Subject) -> Check:
    """Hold every field of ``ingot.json`` that can be known against the checkpoint and the graph.

    Args:
        subject: the ingot and its checkpoint.
    """
    manifest = subject.manifest
    model = onnx.load(str(subject.folder / GRAPH), load_external_data=False)
    fields = _Fields()
    fields.compare(_read_off(manifest, model, _counted(subject)), "in the graph")
    fields.compare(_engine(subject), "in the graph")
    problems = [*_precision(manifest, model.graph), *_accuracy(manifest, model.graph)]
    problems += _profiles(subject)
    left_out = ""
    try:
        fields.compare(_stated(subject), "in the checkpoint's files")
        fields.compare(_recomputed(manifest, _expected(subject)), "in a new export")
        fields.compare(_format(subject), "in a new export")
        files, left_out = side_files(subject)
        problems += files
    # Nothing can be made of the checkpoint that is as the manifest says.
    except IngotError as error:
        problems.append(f"no such ingot can be made: {' '.join(str(error).split())}".rstrip("."))
    return Check(NAME, len(fields.names), (*fields.problems, *problems), None, left_out)


# A field, what the manifest has and what it should have.
Field = tuple[str, Any, Any]


class _Fields:
    """The fields that were compared, and what is wrong with them, each told once.

    Attributes:
        names: of the fields.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._wrong: dict[str, str] = {}

    @property
    def problems(self) -> list[str]:
        """One sentence a field that is wrong, up to ``MOST`` of them."""
        told = list(self._wrong.values())
        more = len(told) - MOST
        return told if more <= 0 else [*told[:MOST], f"{more} more fields are wrong"]

    def compare(self, fields: Iterable[Field], where: str) -> None:
        """Note each field that is not what it is ``where``."""
        for name, found, expected in fields:
            self.names.add(name)
            if found != expected or type(found) is not type(expected):
                both = f"{_said(found)}, and {_said(expected)} {where}"
                self._wrong.setdefault(name, f"{name} of ingot.json is {both}")


def _said(value: Any) -> str:
    return "absent" if value is None else shown(value)


def _expected(subject: Subject) -> Manifest:
    """The manifest of a new export of the checkpoint."""
    checkpoint, opened = subject.checkpoint, subject.opened
    weights = opened.family.weight_map(opened.model, checkpoint, subject.recipe.task)
    for name in sorted({part.name for parts in weights.values() for part in parts}):
        # The checkpoint's hash is over all that was read.
        if name not in checkpoint.digests:
            checkpoint.read(name)
    generation = read_generation(checkpoint, opened.model.config)
    return make_manifest(subject.recipe, opened, checkpoint, subject.captured, generation)


def _recomputed(manifest: Manifest, expected: Manifest) -> Iterator[Field]:
    """Every single value of a field, with what a new export has there."""
    found, fresh = (json.loads(json.dumps(asdict(each))) for each in (manifest, expected))
    if manifest.generation.get("context_given") is True:
        del fresh["generation"]["context_length"]
    for name in RECOMPUTED:
        yield from _leaves(name, found[name], fresh[name])
    for name in ("sha256", "adapter"):
        # What an adapter's folder is called may be another here.
        pair = [each["source"].get(name) for each in (found, fresh)]
        sums = [each["sha256"] if isinstance(each, dict) else each for each in pair]
        yield f"source.{name}", *sums
    name = "unread_bytes"
    yield f"graph.{name}", found["graph"].get(name), fresh["graph"][name]


def _leaves(name: str, found: Any, fresh: Any) -> Iterator[Field]:
    if isinstance(fresh, dict) and isinstance(found, dict):
        for key in fresh:
            yield from _leaves(f"{name}.{key}", found.get(key), fresh[key])
    elif (keyed := _keyed(found, fresh)) is not None:
        mine, theirs = keyed
        yield f"the order of {name}", list(mine), list(theirs)
        for key in [key for key in theirs if key in mine]:
            yield from _leaves(f"{name}[{key}]", mine[key], theirs[key])
    else:
        yield name, found, fresh


def _keyed(found: Any, fresh: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Two lists of objects by their names; None where they are none."""
    for key in KEYS:
        if all(
            isinstance(each, list) and all(isinstance(e, dict) and key in e for e in each)
            for each in (found, fresh)
        ):
            mine, theirs = ({each[key]: each for each in side} for side in (found, fresh))
            return mine, theirs
    return None


def _stated(subject: Subject) -> Iterator[Field]:
    """What the checkpoint's JSON says in plain words."""
    manifest = subject.manifest
    own = {"vocab_size": manifest.vocab_size, "labels": list(manifest.labels)}
    has = {**own, **manifest.generation}
    for name, expected in stated(subject.checkpoint).items():
        if name == "context_length" and manifest.generation.get("context_given") is True:
            continue
        if name == "labels" and manifest.task != "classify":
            continue
        yield name if name in own else f"generation.{name}", has.get(name), expected


# How many numbers of the checkpoint a tensor of the graph has.
Count = Callable[[onnx.TensorProto], int]


def _counted(subject: Subject) -> Count:
    """Counts what is in blocks of whole numbers by the checkpoint: what fills blocks is none."""
    graph = Graph.read(subject.folder, GRAPH)
    base, *adapters = subject.checkpoint.folders
    tensors = Tensors(base, adapters[0] if adapters else None, tuple(graph.weights))

    def count(tensor: onnx.TensorProto) -> int:
        if tensor.name in graph.weights and is_side(graph, tensor.name):
            return 0
        in_blocks = tensor.name in graph.weights and is_packed(graph, tensor.name)
        made = tensors.make(tensor.name) if in_blocks else None
        return math.prod(tensor.dims if made is None else made.shape)

    return count


def _read_off(manifest: Manifest, model: onnx.ModelProto, count: Count) -> Iterator[Field]:
    """What the graph file itself says of inputs, outputs, states and operators."""
    graph = model.graph
    opsets = {each.domain: each.version for each in model.opset_import}
    yield "graph.opset", manifest.graph["opset"], opsets.get("", opsets.get("ai.onnx"))
    for kind, tensors, values in (
        ("inputs", manifest.inputs, graph.input),
        ("outputs", manifest.outputs, graph.output),
    ):
        yield kind, [each.name for each in tensors], [each.name for each in values]
        kinds = {value.name: _kind(value.type) for value in values}
        for each in tensors:
            if each.name in kinds:
                yield f"{kind}[{each.name}]", (each.dtype, each.shape), kinds[each.name]
    operators = Counter(node.op_type for node in all_nodes(graph))
    yield "graph.nodes", manifest.graph["nodes"], operators.total()
    yield "graph.operators", dict(manifest.graph["operators"]), dict(operators)
    yield from _sizes(manifest, graph, count)
    written = _written_in_place(graph)
    for state in manifest.states:
        yield f"states[{state.input}].shared", state.shared, state.input in written


def _written_in_place(graph: onnx.GraphProto) -> set[str]:
    """Inputs whose kernel writes over them, and that nothing else reads."""
    readers = Counter(name for node in all_nodes(graph) for name in node.input)
    return {
        name
        for node in graph.node
        for place, name in enumerate(node.input)
        if place in SHARING.get((node.domain, node.op_type), ()) and readers[name] == 1
    }


def _sizes(manifest: Manifest, graph: onnx.GraphProto, counted: Count) -> Iterator[Field]:
    """Every parameter is a number of some weight, and of a table a token reads one row."""
    uses: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for node in reversed(list(all_nodes(graph))):
        for index, name in enumerate(node.input):
            same = node.op_type == "Reshape" and index == 0
            uses[name] |= uses[node.output[0]] if same else {(node.op_type, index)}
    numbers = weight_bytes = unread = 0
    for tensor in filter(is_weight, graph.initializer):
        itemsize = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        size = math.prod(tensor.dims) * itemsize
        numbers, weight_bytes = numbers + counted(tensor), weight_bytes + size
        if len(tensor.dims) >= 2 and uses[tensor.name] and uses[tensor.name] <= LOOKED_UP:
            unread += size - size // tensor.dims[0]
    yield "parameters", manifest.parameters, numbers
    yield "weight_bytes", manifest.weight_bytes, weight_bytes
    yield "graph.unread_bytes", manifest.graph.get("unread_bytes"), unread


def _kind(proto: onnx.TypeProto) -> tuple[str, tuple[int | str, ...]]:
    """Dtype and shape, as a manifest has them."""
    tensor = proto.tensor_type
    try:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError:
        dtype = f"dtype {tensor.elem_type}"
    return dtype, tuple(
        each.dim_value if each.HasField("dim_value") else each.dim_param
        for each in tensor.shape.dim
    )


def _precision(manifest: Manifest, graph: onnx.GraphProto) -> Iterator[str]:
    """A precision that is not what the graph's main output and its weights are of."""
    precision, kept = manifest.precision, find_family(manifest.model_type).keep_in_fp32
    for value in graph.output:
        dtype = _kind(value.type)[0]
        if value.name == manifest.main_output and dtype != precision:
            yield (
                f"precision of ingot.json is {precision}, and {value.name}, the main output of the "
                f"graph, is {dtype}"
            )
    others = []
    weights = [tensor for tensor in graph.initializer if is_weight(tensor)]
    for tensor in weights:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        expected = {"float32" if tensor.name.endswith(kept) else precision}
        # Of which matrices, is for the weights and the graph to say.
        expected |= set(STORED) if _of_checkpoint(manifest) else {manifest.weights}
        if manifest.weights in BITS or manifest.kernels == INGOT:
            expected.add("uint8")
        if dtype not in expected:
            others.append((dtype, tensor.name))
    if others:
        yield (
            f"precision of ingot.json is {precision}, and {len(others)} of {len(weights)} weights "
            f"of the graph are of another; {named(others[0][1])}, the first, is {others[0][0]}"
        )


def _of_checkpoint(manifest: Manifest) -> bool:
    """Whether matrices are stored in what the checkpoint has them in."""
    return manifest.weights == CHECKPOINT or _given(manifest)


def _given(manifest: Manifest) -> bool:
    """Whether an ingot has the whole numbers of its checkpoint."""
    return manifest.quantization is not None and manifest.quantization.method == "given"


def _format(subject: Subject) -> Iterator[Field]:
    """How the checkpoint's own whole numbers are stored."""
    manifest = subject.manifest
    if manifest.quantization is None or not _given(manifest):
        return
    fresh = subject.recipe.as_given(subject.opened, manifest.quantization.accuracy)
    yield "weights", manifest.weights, fresh.weights
    if fresh.quantization is not None:
        found, wanted = asdict(manifest.quantization), asdict(fresh.quantization)
        yield from _leaves("quantization", found, wanted)


def _rounds(node: onnx.NodeProto) -> int | None:
    """What a product rounds its activations to, of ``ROUNDINGS``; None of what may not round.

    Of Ingot's own kernels that is said by the attribute; of others by a level.
    """
    given = {each.name: each.i for each in node.attribute}
    if node.domain == DOMAIN and ROUNDS in given:
        stored = {each.s for each in node.attribute if each.name.endswith("numbers")}
        return given[ROUNDS] if stored - {b"float32"} else None
    if node.op_type not in IN_BLOCKS:
        return None
    # Experts of eight bits have no other kernel.
    eight = any(value == 8 for name, value in given.items() if name.endswith("weight_bits"))
    level = given.get("accuracy_level", 0)
    return int(level == ROUNDED or (node.op_type == "QMoE" and eight))


def _whole(node: onnx.NodeProto) -> bool:
    """Whether a product has weights in whole numbers."""
    stored = [each.s for each in node.attribute if each.name.endswith("numbers")]
    return node.op_type in IN_BLOCKS or any(each.startswith(b"int") for each in stored)


def _accuracy(manifest: Manifest, graph: onnx.GraphProto) -> Iterator[str]:
    """Products that round their activations where the manifest says that none does, or not so."""
    quantization, activations = manifest.quantization, manifest.activations
    products = [
        (node, rounds) for node in all_nodes(graph) if (rounds := _rounds(node)) is not None
    ]
    if quantization is not None:
        wanted = TO_INT8 * (quantization.accuracy == "fast")
        whole = [each for each in products if _whole(each[0])]
        said = f"quantization.accuracy of ingot.json is {quantization.accuracy}"
        yield from _otherwise(whole, wanted, said, "in whole numbers")
    floats = [each for each in products if not _whole(each[0])]
    said = f"activations of ingot.json is {activations or 'absent'}"
    yield from _otherwise(floats, TO_BFLOAT16 * bool(activations), said, "in floats")


def _otherwise(
    products: Sequence[tuple[onnx.NodeProto, int]], wanted: int, said: str, what: str
) -> Iterator[str]:
    """That some of these round otherwise than they should."""
    others = [each for each in products if each[1] != wanted]
    if not others:
        return
    first, rounds = others[0]
    does = "does not round its activations"
    if rounds:
        to = f" to {ROUNDINGS.get(rounds, 'something else')}" if wanted else ""
        does = f"rounds its activations{to}"
    yield (
        f"{said}, and {len(others)} of {len(products)} products {what} are not so; "
        f"{first.op_type} {named(first.output[0])}, the first, {does}"
    )


def _engine(subject: Subject) -> Iterator[Field]:
    """What an engine's facts say of the graph it was built of."""
    folder, manifest = subject.folder, subject.manifest
    engine = manifest.engine
    if engine is None:
        return
    yield "engine.graph_sha256", engine.graph_sha256, manifest.files[GRAPH].sha256
    yield "engine.plugins", engine.plugins, custom_nodes(folder / GRAPH)
    for profile in engine.profiles:
        for tensor in manifest.inputs:
            for axis, size in enumerate(tensor.shape):
                sizes = [shape[axis] for shape in profile.shapes[tensor.name]]
                if isinstance(size, int):
                    name = f"engine.profiles[{profile.name}].{tensor.name}"
                    yield name, sizes, [size] * len(sizes)


def _profiles(subject: Subject) -> Iterator[str]:
    """Options for trtexec that build another engine than the one there is, or than there can be."""
    engine, options = subject.manifest.engine, subject.folder / TRTEXEC
    if engine is None and not options.is_file():
        return
    # Anybody may have written it.
    text = options.read_bytes().decode(errors="replace") if options.is_file() else ""
    if engine is not None and text != trtexec_options(engine.profiles):
        yield f"{TRTEXEC} does not build the profiles that engine.profiles of ingot.json has"
    elif problem := options_problem(text, subject.manifest):
        yield f"{TRTEXEC} {problem}"
