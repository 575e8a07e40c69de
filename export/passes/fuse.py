"""Operators of ``ingot.cpu`` that take what stands between two of them along."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.match import only_reader, producer, silu_of
from ingot.export.passes.replace import take_place
from ingot.plugins.cpu.operators import DOMAIN, LINEAR, LINEARS, MLP, VERSION

# Of Linear and of Mlp, where what is added to their result is.
RESIDUAL = {LINEAR: 3, MLP: 4}
# Weights of one call; what the kernels take.
MOST = 64


class FuseMlps(GraphPass):
    """Three ``Linear`` and the activation between them -> ``Mlp``.

    Threads are woken for gate and up together, and nothing of what is between leaves the kernel.
    """

    looks_for = (LINEAR,)

    requires = GraphPass.any_graph

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for down in list(model.graph):
            match = _mlp(down)
            if match is None:
                continue
            gate, up, activation = match
            attributes = {
                **_stored(gate, "gate_up_"),
                **_stored(down, "down_"),
                "round_activations": max(_rounds(gate), _rounds(down)),
                "activation": activation,
                "hidden": _size(gate, "in_features"),
                "intermediate": _size(gate, "out_features"),
                "scale": 1.0,
            }
            inputs = [gate.inputs[0], *(node.inputs[1] for node in (gate, up, down))]
            _swap(model, down, MLP, inputs, attributes)
            modified = True
        # Gate, up and what was between.
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(_mlp(node) is None, node, "is the end of an MLP that is left in pieces")


class FuseResiduals(GraphPass):
    """``residual + factor * Linear(x)`` -> a ``Linear``, or an ``Mlp``, that adds it itself."""

    looks_for = (LINEAR, MLP)

    requires = GraphPass.any_graph

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for add in list(model.graph):
            # Looked for as it is reached: the sum before may be what is added to.
            match = _residual(add)
            if match is None:
                continue
            product, residual, factor = match
            place = RESIDUAL[product.op_type]
            inputs = [*product.inputs, *[None] * (place - len(product.inputs)), residual]
            attributes = {name: each.value for name, each in product.attributes.items()}
            _swap(model, add, product.op_type, inputs, {**attributes, "scale": factor})
            modified = True
        # The products as they were, and their factors.
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(_residual(node) is None, node, "adds what a product could add")


class FuseLinears(GraphPass):
    """Every ``Linear`` that reads the same -> one ``Linears``: threads are woken once for all."""

    looks_for = (LINEAR,)

    requires = GraphPass.any_graph

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        groups = _groups(model)
        for first, *others in groups:
            nodes = [first, *others]
            weights = [node.inputs[1] for node in nodes]
            attributes = {
                **_stored(first),
                "round_activations": _rounds(first),
                "in_features": _size(first, "in_features"),
                "out_features": [_size(node, "out_features") for node in nodes],
            }
            made = ir.node(
                LINEARS,
                [first.inputs[0], *weights],
                attributes=attributes,
                domain=DOMAIN,
                version=VERSION,
                num_outputs=len(nodes),
            )
            model.graph.insert_before(first, made)
            for node, result in zip(nodes, made.outputs, strict=True):
                take_place(node.outputs[0], result)
                model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=bool(groups))

    def ensures(self, model: ir.Model) -> None:
        for first, *_ in _groups(model):
            self.ensure(False, first, "reads what others read, and is left by itself")


def _is(node: ir.Node | None, *kinds: str) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type in kinds


def _maker(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value."""
    return None if value is None else value.producer()


def _plain(node: ir.Node | None) -> bool:
    """Whether it is a Linear without bias and residual."""
    return _is(node, LINEAR) and node is not None and not any(node.inputs[2:])


class _Gated(NamedTuple):
    gate: ir.Node
    up: ir.Node
    activation: str


def _mlp(down: ir.Node) -> _Gated | None:
    """The two products before a third, and the activation of the first."""
    if not _plain(down):
        return None
    product = producer(down.inputs[0], "Mul")
    if product is None or only_reader(product) is not down:
        return None
    for left, right in (product.inputs, reversed(product.inputs)):
        up, found = _maker(right), _activated(left, product)
        gate = None if found is None else found[0]
        if up is None or gate is None or found is None or not (_plain(up) and _plain(gate)):
            continue
        same = gate.inputs[0] is up.inputs[0] and _stored(gate) == _stored(up)
        same &= _size(gate, "out_features") == _size(up, "out_features")
        same &= _size(down, "out_features") == _size(gate, "in_features")
        if same and only_reader(up) is product:
            return _Gated(gate, up, found[1])
    return None


def _activated(value: ir.Value | None, product: ir.Node) -> tuple[ir.Node, str] | None:
    """What makes a value before its activation, and which that is; read by nothing else."""
    node = _maker(value)
    if node is None or only_reader(node) is not product:
        return None
    if node.op_type == "Mul":
        maker = _maker(silu_of(node))
        return None if maker is None else (maker, "silu")
    source = _maker(node.inputs[0])
    if source is None or only_reader(source) is not node:
        return None
    if node.op_type == "Gelu":
        tanh = node.attributes.get_string("approximate", "none") == "tanh"
        return source, "gelu_tanh" if tanh else "gelu"
    return (source, "relu") if node.op_type == "Relu" else None


class _Residual(NamedTuple):
    product: ir.Node
    residual: ir.Value
    factor: float


def _residual(add: ir.Node) -> _Residual | None:
    """What an Add adds to what, where one side is a product that nothing else reads."""
    if add.op_type != "Add" or add.domain:
        return None
    first, second = add.inputs
    for value, residual in ((second, first), (first, second)):
        if value is None or residual is None or residual.shape != value.shape:
            continue
        node, factor = _maker(value), 1.0
        reader: ir.Node = add
        if node is not None and node.op_type == "Mul" and only_reader(node) is add:
            scaled = [_factor(each) for each in node.inputs]
            if (scaled[0] is None) == (scaled[1] is None):
                continue
            at = 0 if scaled[0] is None else 1
            factor, reader = scaled[1 - at] or 0.0, node
            node = _maker(node.inputs[at])
        if not _is(node, *RESIDUAL) or node is None or only_reader(node) is not reader:
            continue
        has = len(node.inputs) > RESIDUAL[node.op_type]
        if not has and not residual.is_initializer() and residual is not node.outputs[0]:
            return _Residual(node, residual, factor)
    return None


def _factor(value: ir.Value | None) -> float | None:
    """The number that a constant is; None of anything else."""
    tensor = None if value is None else value.const_value
    if tensor is None or tensor.size != 1 or len(tensor.shape) > 0:
        return None
    return float(tensor.numpy())


def _groups(model: ir.Model) -> list[list[ir.Node]]:
    """Linear layers without more that read the same and are stored alike, in their order."""
    found: dict[tuple[Any, ...], list[ir.Node]] = {}
    for node in model.graph:
        if _plain(node):
            key = (node.inputs[0], *sorted(_stored(node).items()), _rounds(node))
            found.setdefault(key, []).append(node)
    return [nodes for nodes in found.values() if 1 < len(nodes) <= MOST]


def _stored(node: ir.Node, prefix: str = "") -> dict[str, Any]:
    """How a Linear's weight is stored, as attributes say it."""
    names = ("numbers", "block", "zero_points")
    return {f"{prefix}{name}": node.attributes[name].value for name in names}


def _size(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int()


def _rounds(node: ir.Node) -> int:
    return _size(node, "round_activations")


def _swap(
    model: ir.Model,
    old: ir.Node,
    kind: str,
    inputs: Iterable[ir.Value | None],
    attributes: dict[str, Any],
) -> None:
    made = ir.node(kind, list(inputs), attributes=attributes, domain=DOMAIN, version=VERSION)
    model.graph.insert_before(old, made)
    take_place(old.outputs[0], made.outputs[0])
    model.graph.remove(old, safe=True)
