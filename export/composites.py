"""What the tracer leaves composite, as operators that the exporter translates.

``torch.onnx.export`` decomposes a program by tracing it a second time, which is half the time of an
export. Of what our graphs hold, all but a few operators are translated as they are, and those few
are other operators under another name. A program with anything else is decomposed as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten

_RENAMED = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
}


def rename_composites(program: ExportedProgram) -> bool:
    """Name composite operators as they are translated; whether what there is may be translated so.

    It may not where an operator changes its input: only decomposed it is one that makes a new one.

    Args:
        program: of ``torch.export.export``; changed in place.
    """
    if any(_changes_its_input(node) for node in program.graph.nodes):
        return False
    for node in list(program.graph.nodes):
        _rename(node, program)
    return True


@contextmanager
def undecomposed(program: ExportedProgram) -> Iterator[None]:
    """``torch.onnx.export`` of ``program`` translates it as it is."""
    program.run_decompositions = lambda *_: program
    try:
        yield
    finally:
        del program.run_decompositions


def _changes_its_input(node: Node) -> bool:
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
