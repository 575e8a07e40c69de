"""What the tracer leaves composite, as operators that the exporter translates.

``torch.onnx.export`` decomposes a program by tracing it a second time, which is half the time of an
export. Of what our graphs hold, all but a few operators are translated as they are, and those few
are other operators under another name. A program with anything else is decomposed as ever.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten

_RENAMED = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
}


def translated(
    program: ExportedProgram, translate: Callable[[ExportedProgram], torch.onnx.ONNXProgram]
) -> torch.onnx.ONNXProgram:
    """What ``translate`` makes of ``program``, which it decomposes only where it must.

    Args:
        program: of ``torch.export.export``; renamed in place.
        translate: a call of ``torch.onnx.export``, which calls ``run_decompositions`` of its
            argument first.

    Raises:
        torch.onnx.OnnxExporterError: the program has an operator that is not translated, even
            decomposed.
    """
    if any(_changes_its_input(node) for node in program.graph.nodes):
        return translate(program)
    for node in list(program.graph.nodes):
        _rename(node, program)
    program.run_decompositions = lambda *_: program
    try:
        return translate(program)
    except torch.onnx.OnnxExporterError:
        del program.run_decompositions
        return translate(program)


def _changes_its_input(node: Node) -> bool:
    """Only decomposed, such an operator is one that makes a new tensor."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _rename(node: Node, program: ExportedProgram) -> None:
    if node.target in _RENAMED:
        node.target = _RENAMED[node.target]
    elif node.target is aten.to.dtype:
        value, dtype = node.args[:2]
        assert isinstance(value, Node)
        if value.meta["val"].dtype == dtype:
            # Gone before an output's name is given to it, which has to be its source's.
            node.replace_all_uses_with(value)
            program.graph_signature.replace_all_uses(node.name, value.name)
            node.graph.erase_node(node)
        else:
            node.target = aten._to_copy.default
            node.args, node.kwargs = (value,), {"dtype": dtype}
    elif node.target is aten.promote_types.default and not node.users:
        # The tracer notes it of two dtypes, and nothing reads it.
        node.graph.erase_node(node)
