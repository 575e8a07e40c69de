"""The graph in an ingot against a fresh capture and lowering: structure, attributes, constants.

What is run shows a constant only where it binds, so a clip that no value reaches, or an epsilon
that is small beside every mean, can differ and nothing tells. Here every node counts, whether or
not any input would show it. Everything in the file is compared: what is executed, and also
metadata, from which a runtime may take options, and what is said of the dtypes and shapes of
values, by which it plans its memory. Only names of nodes and of inner values are free, and so is
the order of nodes that do not depend on each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from ingot.export.ingot import GRAPH, WEIGHTS, Manifest
from ingot.export.manifest import passes, versions
from ingot.graphs.checkpoint import read_header
from ingot.plugins.errors import named, shown
from ingot.validate.identity.bodies import all_nodes, is_weight
from ingot.validate.identity.differences import FRESH, Difference, differences, path
from ingot.validate.identity.subject import Subject
from ingot.validate.locate.graph import AFTER, BEFORE, Graph, unread
from ingot.validate.result import Check, Location
from ingot.version import __version__

NAME = "graph"
# What decides the graph of a checkpoint.
DECIDING = ("ingot", "torch", "onnx", "onnx-ir", "onnxscript")
# Of ``graph`` of ``ingot.json``, what ``export.manifest.passes`` says.
RECORD = ("passes", "canonical", "lowering")
# Differences that are told; one fault may be in every layer.
MOST = 8
# Differences that are looked for.
MOST_SOUGHT = 1000


def check_graph(subject: Subject) -> Check:
    """Hold the graph of an ingot against the one that an export makes now.

    Where the tools that decide a graph are those that made the ingot, any difference is a problem.
    Where they are others, an equal graph is one all the same; of one that differs, nothing is known
    but that (``Check.left_out``).

    Args:
        subject: the ingot and its checkpoint.

    Raises:
        IngotError: the checkpoint does not give the graph that the manifest speaks of.
    """
    manifest = subject.manifest
    fresh = unread(subject.captured.model)
    found = onnx.load(str(subject.folder / GRAPH), load_external_data=False)
    told = list(islice(differences(found, fresh), MOST_SOUGHT))
    # These need no fresh capture.
    plain = [*_stored(found, subject.folder), *_counted(found, manifest)]
    others = other_versions(manifest)
    # Passes of another version may do the same in another way.
    record = [] if others else _record(manifest, passes(subject.captured))
    if others and told:
        return Check(NAME, 0, tuple(plain), left_out=f"{others}, which may make another graph")
    places = _Places(found, fresh)
    problems = [places.sentence(each) for each in told[:MOST]]
    if len(told) > MOST:
        more = len(told) - MOST
        problems.append(f"differences beyond these {MOST}, which may follow from them: {more}")
    place = next((places.location(each) for each in told if each.nodes), None)
    nodes = sum(1 for _ in all_nodes(found.graph))
    return Check(NAME, nodes, (*problems, *plain, *record), place)


def other_versions(manifest: Manifest) -> str:
    """Which of the tools that decide a graph are others here than made the ingot; "" where none.

    The local part of a version, such as PyTorch's ``+cpu``, says for which machine it was built.
    """
    here = {"ingot": __version__, **versions(DECIDING)}
    made = {name: manifest.tools.get(name, "unknown") for name in DECIDING}
    differ = [n for n in DECIDING if _public(made[n]) != _public(here.get(n, "missing"))]
    if not differ:
        return ""
    both = [
        ", ".join(f"{name} {said.get(name, 'missing')}" for name in differ) for said in (made, here)
    ]
    return f"the ingot was made with {both[0]}, and here is {both[1]}"


def _public(version: str) -> str:
    return version.partition("+")[0]


def _stored(model: onnx.ModelProto, folder: Path) -> Iterator[str]:
    """Weights that the graph reads from elsewhere than where the weights' file has them."""
    header = read_header(folder / WEIGHTS)
    for tensor in model.graph.initializer:
        if not is_weight(tensor):
            continue
        name, entry = named(tensor.name), header.get(tensor.name)
        place = {each.key: each.value for each in tensor.external_data}
        if entry is None:
            yield f"the weight {name} is read from {shown(place)}, and {WEIGHTS} has none"
            continue
        expected = {
            "location": WEIGHTS,
            "offset": str(entry.begin),
            "length": str(entry.end - entry.begin),
        }
        if place != expected:
            yield (
                f"the weight {name} is read from {shown(place)}, and it lies at {shown(expected)}"
            )
        kind = (helper.tensor_dtype_to_string(tensor.data_type), tuple(tensor.dims))
        dtype = f"TensorProto.{_DTYPES.get(entry.dtype, entry.dtype)}"
        if kind != (dtype, entry.shape):
            yield f"the weight {name} is read as {kind}, and it is stored as {(dtype, entry.shape)}"


# Of safetensors, those that an export writes.
_DTYPES = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "I64": "INT64", "U8": "UINT8"}


def _counted(model: onnx.ModelProto, manifest: Manifest) -> Iterator[str]:
    """What the recorded passes leave unexplained of the way from the canonical graph to this one.

    The canonical graph's operators and what each pass of the lowering took away and added must sum
    up to the operators that the file has.
    """
    canonical, lowering = (manifest.graph.get(name) for name in ("canonical", "lowering"))
    if canonical is None or lowering is None:
        return
    operators = Counter(node.op_type for node in all_nodes(model.graph))
    try:
        expected = Counter(canonical)
        for each in lowering:
            expected.update(each.get("added", {}))
            expected.subtract(each.get("removed", {}))
    # What passes say is for people, so that no reader of a manifest looks at it.
    except (AttributeError, TypeError, ValueError):
        yield "graph.lowering of ingot.json is not what passes say; export again"
        return
    for name in sorted(operators.keys() | expected.keys()):
        if operators[name] != expected[name]:
            yield (
                f"the graph has {operators[name]} {named(name)}, and the canonical graph with what "
                f"its passes are recorded to have done has {expected[name]}"
            )


def _record(manifest: Manifest, expected: Mapping[str, Any]) -> list[str]:
    """What ``ingot.json`` says of passes, where they do something else now."""
    problems = []
    for name in RECORD:
        found, fresh = manifest.graph.get(name), expected.get(name)
        if found != fresh:
            one, other = _apart(found, fresh)
            problems.append(f"graph.{name} of ingot.json has {one}, and {other} {FRESH}")
    return problems


def _apart(found: Any, fresh: Any) -> tuple[str, str]:
    """Where two records are apart first."""
    if isinstance(found, list) and isinstance(fresh, list):
        for one, other in zip(found, fresh, strict=False):
            if one != other:
                return shown(one), shown(other)
        return f"{len(found)} passes", str(len(fresh))
    return tuple("none" if each is None else shown(each) for each in (found, fresh))  # type: ignore[return-value]


class _Places:
    """The layers of the nodes of an ingot's graph and of a fresh capture's."""

    def __init__(self, found: onnx.ModelProto, fresh: onnx.ModelProto) -> None:
        self._found, self._fresh = _positions(found), _positions(fresh)

    def sentence(self, difference: Difference) -> str:
        """A difference with the layer and the node that has it."""
        if not difference.nodes:
            return difference.text
        number = self._layer(difference)
        where = "outside of the layers" if number is None else f"layer {number}"
        nodes = ", in it ".join(map(path, difference.nodes))
        return f"{where}, {nodes}: {difference.text}"

    def location(self, difference: Difference) -> Location:
        """Where a difference of a node is."""
        node = difference.nodes[-1]
        return Location(self._layer(difference), node.operator[1], node.name, 0.0)

    def _layer(self, difference: Difference) -> int | None:
        """By the fresh node where there is one: a layer is told by the weights that are read."""
        if difference.fresh is not None:
            place = self._fresh.get(difference.fresh.name, BEFORE)
        else:
            place = self._found.get(difference.nodes[0].name, BEFORE)
        return None if place in (BEFORE, AFTER) else place


def _positions(model: onnx.ModelProto) -> Mapping[str, int]:
    def read(name: str) -> Any:
        raise AssertionError(f"{name} is not to be read")

    return Graph(model, read, "float32").positions
