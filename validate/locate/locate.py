"""Where a wrong ingot first goes wrong: the layer, and the node in it.

The canonical graph is captured again from the checkpoint and lowered as the ingot's target was.
That is deterministic, so this *reference* has the names of the ingot's own values. Both graphs are
then run layer by layer in ONNX Runtime with every value of the layer as an output. What enters a
layer, states included, is the reference's on both sides: each layer and each call is judged by
itself, so no earlier error and no router that it turned can hide or fake a later one.

Both run in float32, also where the ingot is in half precision (``validate.locate.widen``). Only one
layer's weights are in memory at a time, and nothing is written. What is not in the graph,
such as a session that counts positions wrongly or an engine with a faulty kernel, is not seen here.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper

from ingot.export.capture import Captured
from ingot.export.graph import Capture, Recipe
from ingot.export.ingot import GRAPH, Manifest
from ingot.export.request import EXTRA_OUTPUTS
from ingot.export.write_weights import weights_of
from ingot.graphs.checkpoint import Checkpoint
from ingot.runtime.onnxruntime_session import open_session, ort_value
from ingot.validate.judge.metrics import relative_error
from ingot.validate.locate.widen import widen, widened
from ingot.validate.result import Location
from ingot.validate.truth.inputs import Inputs

Array = npt.NDArray[Any]
Values = dict[str, Array]

# Relative RMS error of one layer's values that rounding explains. Both sides run the same
# kernels on the same inputs, so right values are nearly always equal to the bit; where a changed
# graph makes ONNX Runtime fuse nodes or split sums otherwise, they are near this. Measured: 2e-7
# between a layer as it is run here and the same without optimizations and on one thread, H = 64.
FLOOR = 1e-6
# A value is bad from this many floors on. The smallest change worth finding is far above: it has
# to move the logits by a multiple of their own floor through all the layers behind it.
LIMIT = 10.0

BEFORE, AFTER = -1, sys.maxsize
LAYER = re.compile(r"\.(\d+)\.")


def locate(
    folder: Path,
    checkpoint: Checkpoint,
    inputs: Inputs,
    calls: int | None = None,
    *,
    capture: Capture | None = None,
) -> Location | None:
    """Name the first layer and the first node of an ingot beyond the floor.

    Args:
        folder: an ingot; its hashes are not checked, and an engine is not run.
        checkpoint: what it was made from.
        inputs: for which its numbers are wrong; two or more calls show a fault in decode.
        calls: only the first so many of ``inputs.steps``, where it is known that one of them fails;
            every layer is run for every call.
        capture: traces the eager graph, ``export.capture.capture`` by default.

    Returns:
        The first bad value, by layer, then by call, then in the order of computation. Where all
        values are right, the first node that is another operator or has other attributes than it
        should, with a ratio of 0. None where the graph is as it should be.
    """
    manifest = Manifest.read(folder)
    captured = _captured(manifest, checkpoint, capture)
    reference = _reference(captured.model, manifest.precision)
    actual = _ingot(folder, manifest.precision)
    known = _Calls(captured, inputs, manifest.vocab_size, calls)
    positions, there = _positions(reference), _positions(actual)
    anchors = _anchors(reference)
    for position in sorted(set(positions.values())):
        # In the order of computation.
        values = [name for name, where in positions.items() if where == position]
        kept = _leaving(reference, positions, position)
        pairs = {
            name
            for name in values
            if name in anchors & actual.makers.keys()
            or (
                there.get(name) == position
                and _operator(reference, name) == _operator(actual, name)
            )
        }
        found = _first_bad(reference, actual, known, values, kept, pairs)
        if found is not None:
            return _location(position, *found, actual, reference)
    changed = next((n for n in positions if _differs(reference, actual, n)), None)
    if changed is not None:
        return _location(positions[changed], changed, 0.0, actual, reference)
    return None


def _anchors(graph: _Graph) -> set[str]:
    """Values whose name says what they are, in whatever graph: outputs, routers, hidden states.

    Other names are numbered, so that a node more or less makes another value of the same name.
    """
    outputs = {value.name for value in graph.model.graph.output}
    return outputs | {n for n in graph.makers if n.partition(".")[0] in EXTRA_OUTPUTS}


def _operator(graph: _Graph, value: str) -> tuple[str, str]:
    node = graph.makers[value]
    return node.domain, node.op_type


def _location(
    position: int, value: str, ratio: float, actual: _Graph, reference: _Graph
) -> Location:
    node = actual.makers.get(value) or reference.makers[value]
    layer = None if position in (BEFORE, AFTER) else position
    return Location(layer, node.op_type, value, ratio)


def _captured(manifest: Manifest, checkpoint: Checkpoint, capture: Capture | None) -> Captured:
    """The graph as the export makes it, lowered for the ingot's target."""
    # A factor is folded over a hidden state only where that is no output, and what is folded
    # shifts the names behind it, so the reference has the outputs that the ingot has.
    named = {output.name.partition(".")[0] for output in manifest.outputs}
    extra = tuple(name for name in EXTRA_OUTPUTS if name in named)
    recipe = Recipe(manifest.target, manifest.task, manifest.precision, extra)
    return recipe.graph(recipe.eager(checkpoint), capture=capture)


class _Graph:
    """One side: its nodes by what they make, and its weights, read when they are needed.

    Attributes:
        model: without the weights' data.
        read: gives a weight by name.
        precision: of the graph, by PyTorch's name.
        makers: value -> the node it is an output of, in the order of computation.
        initializers: weights and constants by name.
    """

    def __init__(
        self, model: onnx.ModelProto, read: Callable[[str], Array], precision: str
    ) -> None:
        self.model = model
        self.read = read
        self.precision = precision
        self.makers = {name: node for node in model.graph.node for name in node.output if name}
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}

    def is_weight(self, name: str) -> bool:
        """Whether it comes from the checkpoint; other constants are inside the graph file."""
        tensor = self.initializers.get(name)
        return tensor is not None and tensor.data_location == onnx.TensorProto.EXTERNAL


def _reference(model: ir.Model, precision: str) -> _Graph:
    weights = {value.name: value.const_value for value in weights_of(model)}
    for value in weights_of(model):
        tensor = value.const_value
        assert tensor is not None
        # A stand-in: writing a lazy tensor into the model would read it.
        value.const_value = ir.ExternalTensor(
            "nowhere",
            0,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
        )

    def read(name: str) -> Array:
        tensor = weights[name]
        assert tensor is not None
        return tensor.numpy()

    return _Graph(ir.serde.serialize_model(model), read, precision)


def _ingot(folder: Path, precision: str) -> _Graph:
    model = onnx.load(str(folder / GRAPH), load_external_data=False)
    entries = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            file, offset = folder / place["location"], int(place.get("offset", 0))
            entries[tensor.name] = (file, dtype, offset, tuple(tensor.dims))

    def read(name: str) -> Array:
        file, dtype, offset, shape = entries[name]
        return np.memmap(file, dtype, "r", offset, shape)

    return _Graph(model, read, precision)


def _uses(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those inside its branches included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _uses(inner)


def _positions(graph: _Graph) -> dict[str, int]:
    """By value: its layer, ``BEFORE`` the first or ``AFTER`` the last; in the order of computation.

    A value belongs to the last layer whose weights or states it depends on, and behind the layers
    once a weight of no layer meets such a value: the final norm, the head. What depends on no input
    of the graph is left out: a transposed weight says no more than the node that reads it.
    """
    inputs = {value.name: _named_layer(value.name) for value in graph.model.graph.input}
    positions: dict[str, int] = {}
    for node in graph.model.graph.node:
        names = set(_uses(node))
        before = [at[name] for name in names for at in (inputs, positions) if name in at]
        if not before:
            continue
        weights = [_named_layer(name) for name in names if graph.is_weight(name)]
        position = max(before + weights)
        if position != BEFORE and BEFORE in weights:
            position = AFTER
        positions.update({name: position for name in node.output if name})
    return positions


def _named_layer(name: str) -> int:
    """The layer in the name of a weight or a state; ``BEFORE`` where there is none."""
    match = LAYER.search(name)
    return int(match.group(1)) if match else BEFORE


def _leaving(graph: _Graph, positions: Mapping[str, int], position: int) -> set[str]:
    """The values of one position that a later one reads, and the graph's outputs among them."""
    read = {value.name for value in graph.model.graph.output}
    for node in graph.model.graph.node:
        if any(positions.get(name, BEFORE) > position for name in node.output):
            read.update(_uses(node))
    return {name for name, where in positions.items() if where == position and name in read}


class _Calls:
    """What is known of every call: its inputs, and of the reference what later layers read.

    Attributes:
        known: by call, values by name.
        padded: the same with other tokens in the padding; empty where there is no padding. An
            element that differs between the two belongs to padding, wherever its tensor has it.
    """

    def __init__(
        self,
        captured: Captured,
        inputs: Inputs,
        vocab_size: int,
        most: int | None,
    ) -> None:
        self._most = most
        self.states = captured.states
        self._batch = inputs.input_ids.shape[0]
        self.known = self._begin(inputs)
        self.padded: list[Values] = []
        masked = inputs.attention_mask == 0
        if masked.any():
            ids = np.where(masked, (inputs.input_ids + 1) % vocab_size, inputs.input_ids)
            self.padded = self._begin(replace(inputs, input_ids=ids))

    def _begin(self, inputs: Inputs) -> list[Values]:
        """Every call's token inputs, and the states of the first."""
        cached = any(state.axis is not None for state in self.states)
        steps = inputs.steps[: self._most]
        known: list[Values] = [dict(inputs.feeds(at, cached=cached)) for _, at in steps]
        for state in self.states:
            known[0][state.input] = np.zeros(state.shape(self._batch, 0), dtype=np.float32)
        return known

    def keep(self, known: list[Values], call: int, found: Values, kept: Collection[str]) -> None:
        """Note what later layers and the next call read, and forget the states just used."""
        for state in self.states:
            if state.output not in found:
                continue
            # Caches of all layers and calls would fill the memory.
            known[call].pop(state.input, None)
            if call + 1 < len(known):
                known[call + 1][state.input] = found[state.output]
        states = {state.output for state in self.states}
        known[call].update({name: found[name] for name in kept if name not in states})


def _first_bad(
    reference: _Graph,
    actual: _Graph,
    calls: _Calls,
    values: Sequence[str],
    kept: Collection[str],
    pairs: Collection[str],
) -> tuple[str, float] | None:
    """The first value of one layer beyond the limit, and its error over the floor.

    Args:
        reference: one side.
        actual: the other.
        calls: what is known of each.
        values: of the layer.
        kept: those that later layers read.
        pairs: those that are the same on both sides.
    """
    given = calls.known[0]
    shared, broken = _computable(actual, [n for n in values if n in pairs], given)
    expected_part = _Part(reference, values, given)
    actual_part = _Part(actual, shared, given)
    for call, known in enumerate(calls.known):
        expected = expected_part.run(known)
        other = expected
        if calls.padded:
            other = expected_part.run(calls.padded[call])
            calls.keep(calls.padded, call, other, kept)
        found = actual_part.run(known)
        calls.keep(calls.known, call, expected, kept)
        for name in shared:
            ratio = relative_error(expected[name], found[name], other[name]) / FLOOR
            if ratio > LIMIT:
                return name, ratio
    missing = next((n for n in values if n in kept and n not in actual.makers), None)
    wrong = broken or missing
    return (wrong, math.inf) if wrong else None


def _computable(
    graph: _Graph, values: Sequence[str], given: Collection[str]
) -> tuple[list[str], str | None]:
    """The values up to the first that reads what is not there at its place, and that one."""
    seen: set[str] = set()
    for index, value in enumerate(values):
        if not _walk(graph, value, given, seen):
            return list(values[:index]), value
    return list(values), None


def _walk(graph: _Graph, value: str, given: Collection[str], seen: set[str]) -> bool:
    """Add to ``seen`` what one value is computed from; False where an input is not given."""
    inputs = {item.name for item in graph.model.graph.input}
    rest = [value]
    while rest:
        name = rest.pop()
        if name in seen or name in given:
            continue
        seen.add(name)
        if name in inputs:
            return False
        if name in graph.makers:
            rest += _uses(graph.makers[name])
    return True


class _Part:
    """The piece of a graph between some values that are given and some that are asked for."""

    def __init__(self, graph: _Graph, values: Sequence[str], given: Values) -> None:
        seen: set[str] = set()
        for value in values:
            _walk(graph, value, given, seen)
        nodes = [n for n in graph.model.graph.node if any(name in seen for name in n.output)]
        read = {name for node in nodes for name in _uses(node)}
        self.values = list(values)
        self.inputs = [name for name in given if name in read]
        weights = [name for name in graph.initializers if name in read and graph.is_weight(name)]
        # They must outlive the session.
        self._weights = {name: ort_value(widened(graph.read(name))) for name in weights}
        model = onnx.ModelProto(
            ir_version=graph.model.ir_version,
            opset_import=graph.model.opset_import,
            functions=graph.model.functions,
            graph=onnx.GraphProto(
                name="part",
                node=nodes,
                input=[_input(name, given[name]) for name in self.inputs],
                output=[onnx.ValueInfoProto(name=name) for name in values],
                initializer=[t for name, t in graph.initializers.items() if name in read],
            ),
        )
        widen(model, graph.precision)
        self._session: Any = None
        if values:
            self._session = open_session(model.SerializeToString(), weights=self._weights)

    def run(self, known: Values) -> Values:
        """Every value asked for, by name."""
        if self._session is None:
            return {}
        found = self._session.run(self.values, {name: known[name] for name in self.inputs})
        return dict(zip(self.values, found, strict=True))


def _input(name: str, array: Array) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(name, dtype, [None] * array.ndim)


def _differs(reference: _Graph, actual: _Graph, value: str) -> bool:
    """Whether the node that makes a value is missing, or another than it should be."""
    expected, found = reference.makers[value], actual.makers.get(value)
    if found is None:
        return True
    return _kind(expected) != _kind(found)


def _kind(node: onnx.NodeProto) -> tuple[str, str, dict[str, bytes]]:
    attributes = {a.name: a.SerializeToString(deterministic=True) for a in node.attribute}
    return node.domain, node.op_type, attributes
