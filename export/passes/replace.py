"""One value in place of another, the name of a graph output included."""

from __future__ import annotations

import onnx_ir as ir


def take_place(old: ir.Value, new: ir.Value) -> None:
    """Give ``new`` every use, the name, the shape and the type of ``old``, also as an output."""
    new.shape, new.type, name = old.shape, old.type, old.name
    old.name = None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.name = name
