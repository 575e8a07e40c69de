"""What TensorRT will run each operator by, decided before anything is built.

One row an operator: a plugin, TensorRT's own layer, or refused with the reason and the way out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ingot.plugins import causal_conv, mamba2_scan, moe_dispatch, moe_linear
from ingot.plugins.errors import IngotError
from ingot.plugins.kernels.table import COMPUTE_CAPABILITIES

HALVES = ("float16", "bfloat16")


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
    for name, (check, wide) in PLUGINS.items():
        count = counts.pop((moe_dispatch.DOMAIN, name), 0)
        if not count:
            continue
        nodes = (node for node in model.graph if node.op_type == name)
        reasons = [reason for node in nodes if (reason := check(node, precision))]
        text = precision if precision == "float32" else f"{precision}; {wide}float32 sums"
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


def _sizes(node: ir.Node, index: int) -> list[int]:
    value = node.inputs[index]
    assert value is not None and value.shape is not None
    return [d if isinstance(d, int) else 0 for d in value.shape]


def _multiples(sizes: dict[str, int], precision: str) -> str:
    """The kernels load 16 bytes at a time, which in half precision are 8 numbers."""
    for name, size in sizes.items():
        if precision in HALVES and size % 8:
            return f"{name} {size} is not a multiple of 8: pad it, or use --precision fp32"
    return ""


def _moe_dispatch(node: ir.Node, precision: str) -> str:
    experts, hidden, intermediate = _sizes(node, 3)
    top_k = node.attributes["top_k"].as_int()
    if experts > MOST_EXPERTS or top_k > MOST_CHOSEN:
        return (
            f"{top_k} of {experts} experts; the kernels choose up to {MOST_CHOSEN} of up to "
            f"{MOST_EXPERTS}: export for --target ort"
        )
    return _multiples({"hidden size": hidden, "intermediate size": intermediate}, precision)


def _moe_linear(node: ir.Node, precision: str) -> str:
    _, out_features, in_features = _sizes(node, 2)
    return _multiples({"input size": in_features, "output size": out_features}, precision)


def _mamba2_scan(node: ir.Node, _precision: str) -> str:
    _, _, head_size, states = _sizes(node, 7)
    if max(head_size, states) > MOST_STATES:
        return (
            f"head size {head_size} and state size {states}; the kernels take up to "
            f"{MOST_STATES} of each: export for --target ort"
        )
    return ""


def _causal_conv(node: ir.Node, _precision: str) -> str:
    width = _sizes(node, 2)[2]
    if width > MOST_WIDTH:
        return f"width {width}; the kernel takes up to {MOST_WIDTH}: export for --target ort"
    return ""


# Limits of the kernels (plugins/csrc); a test holds both sides together.
MOST_EXPERTS, MOST_CHOSEN = 1024, 64
MOST_STATES = 256
MOST_WIDTH = 8

# Operator -> its check, and what is float32 beside the sums.
PLUGINS: dict[str, tuple[Callable[[ir.Node, str], str], str]] = {
    moe_dispatch.NAME: (_moe_dispatch, "routing and "),
    moe_linear.NAME: (_moe_linear, ""),
    mamba2_scan.NAME: (_mamba2_scan, "time step, state and "),
    causal_conv.NAME: (_causal_conv, ""),
}
