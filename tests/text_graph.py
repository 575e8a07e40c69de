"""Graphs written in text, for tests of passes: parsed, run by ONNX Runtime, and spoiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from unittest import mock

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from one_node import session, weight

from ingot.export.passes.graph_pass import GraphPass

Arrays = dict[str, np.ndarray]


def parsed(text: str, weights: Mapping[str, np.ndarray] | None = None) -> ir.Model:
    """The model of a text, with some of its inputs made weights, and every shape inferred."""
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = ir.serde.deserialize_model(proto)
    inputs = {value.name: value for value in model.graph.inputs}
    for name, array in (weights or {}).items():
        value = inputs[name]
        model.graph.inputs.remove(value)
        value.const_value = weight(name, array).const_value
        model.graph.register_initializer(value)
    return model


def run(model: ir.Model, feeds: Arrays) -> Arrays:
    """Every output by name; the model stays as it is."""
    runner = session(model)
    names = [value.name for value in runner.get_outputs()]
    wanted = {value.name: feeds[value.name] for value in runner.get_inputs()}
    return dict(zip(names, map(np.asarray, runner.run(names, wanted)), strict=True))


def operators(graph: ir.Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph)


def interface(model: ir.Model) -> list[tuple[str | None, str, str]]:
    values = (*model.graph.inputs, *model.graph.outputs)
    return [(value.name, str(value.shape), str(value.dtype)) for value in values]


def wiring(model: ir.Model) -> list[list[str | None]]:
    """Op type, inputs and outputs of each node."""
    nodes = [(node.op_type, *node.inputs, *node.outputs) for node in model.graph]
    return [[v.name if isinstance(v, ir.Value) else v for v in node] for node in nodes]


def the(model: ir.Model, op_type: str) -> ir.Node:
    """The first node of a type."""
    return next(node for node in model.graph.all_nodes() if node.op_type == op_type)


def refuses(change: GraphPass, model: ir.Model, why: str) -> None:
    """A precondition that ``model`` does not meet, by its sentence; nothing is changed."""
    before = wiring(model)
    with pytest.raises(ir.passes.PreconditionError, match=why):
        change(model)
    assert wiring(model) == before


def notices(
    change: GraphPass, model: ir.Model, spoil: Callable[[ir.Model], object], why: str
) -> None:
    """A postcondition that trips where ``spoil`` changes what the pass has made."""
    honest = change.call

    def call(model: ir.Model) -> ir.passes.PassResult:
        result = honest(model)
        spoil(model)
        return result

    with (
        mock.patch.object(change, "call", call),
        pytest.raises(ir.passes.PostconditionError, match=why),
    ):
        change(model)


def notices_nothing_done(change: GraphPass, model: ir.Model, why: str) -> None:
    """A postcondition that trips where the pass leaves the graph as it was."""
    nothing = ir.passes.PassResult(model, modified=False)
    with (
        mock.patch.object(change, "call", return_value=nothing),
        pytest.raises(ir.passes.PostconditionError, match=why),
    ):
        change(model)
