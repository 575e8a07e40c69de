"""A piece of a graph that may be damaged, computed by ONNX Runtime in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ingot.plugins.cpu.operators import DOMAIN, installed
from ingot.plugins.errors import IngotError
from ingot.runtime.onnxruntime_session import open_session, ort_value, said
from ingot.validate.locate.graph import Array, Graph, Values, uses
from ingot.validate.locate.widen import widen, widened


class LocateError(IngotError):
    """A graph that is too damaged for its values to be computed one by one."""


def run_graph(session: Any, values: Sequence[str], inputs: Mapping[str, Array]) -> Values:
    """Some outputs of ONNX Runtime's session of a graph that may be damaged, by name.

    Raises:
        LocateError: it cannot be run, for example because shapes do not fit each other.
    """
    try:
        found = session.run(list(values), dict(inputs))
    # ONNX Runtime's exceptions share no public base class.
    except Exception as error:
        raise LocateError(f"ONNX Runtime cannot run the graph: {said(error)}") from error
    # One that is no tensor, such as a sequence, is not compared.
    pairs = zip(values, found, strict=True)
    return {name: array for name, array in pairs if isinstance(array, np.ndarray)}


class Part:
    """The piece of a graph between some values that are given and some that are asked for.

    It is computed in float32, whatever the graph's precision.

    Args:
        graph: of which it is.
        values: that are asked for; all can be computed from ``given``.
        given: values by name, as an example of their dtypes and number of axes.
    """

    def __init__(self, graph: Graph, values: Sequence[str], given: Mapping[str, Array]) -> None:
        seen: set[str] = set()
        for value in values:
            graph.walk(value, given, seen)
        nodes = [n for n in graph.model.graph.node if any(name in seen for name in n.output)]
        read = {name for node in nodes for name in uses(node)}
        self.values = list(values)
        # A graph may hand out what it was given.
        self.inputs = [name for name in given if name in read or name in values]
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
            # Only kernels of ours are called so, and only this installation's are run.
            own = any(each.domain == DOMAIN for each in model.opset_import)
            self._session = open_session(
                model.SerializeToString(),
                weights=self._weights,
                libraries=[installed()] if own else [],
            )

    def run(self, known: Mapping[str, Array]) -> Values:
        """Every value asked for, by name.

        Raises:
            LocateError: see ``run_graph``.
        """
        if self._session is None:
            return {}
        inputs = {name: known[name] for name in self.inputs if name in known}
        return run_graph(self._session, self.values, inputs)


def _input(name: str, array: Array) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(name, dtype, [None] * array.ndim)
