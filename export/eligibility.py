"""What TensorRT will run each operator by, decided before anything is built.

One row an operator: a plugin, TensorRT's own layer, or refused with the reason and the way out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ingot.plugins.errors import IngotError
from ingot.plugins.kernels.form import COMPUTE_CAPABILITIES
from ingot.plugins.operator import DOMAIN, Operator
from ingot.plugins.registry import OPERATORS


class EligibilityError(IngotError):
    """A graph with an operator that the target cannot run."""


@dataclass(frozen=True)
class Eligibility:
    """How one operator runs.

    Attributes:
        operator: its ONNX name.
        count: nodes of it.
        runs_as: ``plugin``, ``TensorRT`` or ``refused``.
        precision: of its activations, and what stays float32.
        capabilities: compute capabilities, major times ten plus minor; empty where TensorRT
            decides.
        note: why it is refused and the way out, or what to know.
    """

    operator: str
    count: int
    runs_as: str
    precision: str
    capabilities: tuple[int, ...] = ()
    note: str = ""


def eligibility(model: ir.Model, precision: str) -> list[Eligibility]:
    """The table of a lowered graph, plugins first.

    Args:
        model: a graph that ``lower_trt`` prepared.
        precision: ``float32``, ``float16`` or ``bfloat16``.
    """
    rows = []
    counts = Counter((node.domain, node.op_type) for node in model.graph)
    for name, operator in OPERATORS.items():
        count = counts.pop((DOMAIN, name), 0)
        if not count:
            continue
        nodes = (node for node in model.graph if node.op_type == name)
        sizes = (_sizes(operator, node) for node in nodes)
        reasons = [reason for each in sizes if (reason := operator.refusal(each, precision))]
        wide = f"{operator.wide} and float32 sums" if operator.wide else "float32 sums"
        text = precision if precision == "float32" else f"{precision}; {wide}"
        state = "refused" if reasons else "plugin"
        note = reasons[0] if reasons else ""
        rows.append(Eligibility(name, count, state, text, COMPUTE_CAPABILITIES, note))
    attention = counts.pop(("", "Attention"), 0)
    if attention:
        note = "fused where TensorRT has a kernel for the head size, else taken apart"
        rows.append(Eligibility("Attention", attention, "TensorRT", precision, note=note))
    rest = sum(counts.values())
    rows.append(Eligibility(f"{len(counts)} others", rest, "TensorRT", precision))
    return rows


def require(rows: Sequence[Eligibility]) -> None:
    """Refuse a graph with a refused operator.

    Raises:
        EligibilityError: one sentence for each.
    """
    refused = [f"{row.operator}: {row.note}" for row in rows if row.runs_as == "refused"]
    if refused:
        raise EligibilityError("; ".join(refused))


def _sizes(operator: Operator, node: ir.Node) -> dict[str, int]:
    """Sizes of the dimensions, as far as they are fixed, and integer attributes, by their names."""
    sizes = {
        attribute.name: node.attributes[attribute.name].as_int()
        for attribute in operator.attributes
        if attribute.kind == "int"
    }
    for tensor, value in zip(operator.inputs, node.inputs, strict=True):
        if value is not None and value.shape is not None:
            form = tensor.shapes[tensor.ranks.index(len(value.shape))]
            found = zip(form, value.shape, strict=True)
            sizes |= {letter: size for letter, size in found if isinstance(size, int)}
    return sizes
