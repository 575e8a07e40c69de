"""What products take along: the graph, numbers and conditions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from cpu_weights import drawn
from text_graph import notices_nothing_done, operators

from ingot.export.passes.fuse import FuseLinears, FuseMlps, FuseResiduals
from ingot.plugins.cpu.library import CpuLibrary
from ingot.plugins.cpu.operators import DOMAIN
from ingot.plugins.cpu.panels import Format
from ingot.runtime.onnxruntime_session import open_session

FORM = Format("bfloat16")
HIDDEN, INNER = 40, 24
X = np.random.default_rng(1).standard_normal((2, 3, HIDDEN)).astype(np.float32)


class Builder:
    """A graph of ``ingot.cpu``'s operators over an input ``x [2, 3, 40]``."""

    def __init__(self) -> None:
        self.x = ir.val("x", ir.DataType.FLOAT, (2, 3, HIDDEN))
        self.nodes: list[ir.Node] = []
        self.weights: dict[str, ir.Value] = {}
        self.matrices: dict[str, np.ndarray] = {}

    def linear(self, name: str, x: ir.Value, rows: int, form: Format = FORM) -> ir.Value:
        assert x.shape is not None
        columns = x.shape.numpy()[-1]
        data, self.matrices[name] = drawn(form, rows, columns, len(self.weights))
        self.weights[name] = ir.val(
            name, ir.DataType.UINT8, data.shape, const_value=ir.tensor(data, name=name)
        )
        attributes = {
            "in_features": columns,
            "out_features": rows,
            "numbers": form.numbers,
            "block": form.block,
            "zero_points": 0,
            "round_activations": 0,
            "scale": 1.0,
        }
        return self.add(
            "Linear", x, self.weights[name], shape=(2, 3, rows), domain=DOMAIN, **attributes
        )

    def number(self, value: float) -> ir.Value:
        name = f"number_{len(self.weights)}"
        made = ir.tensor(np.array(value, np.float32), name=name)
        self.weights[name] = ir.val(name, ir.DataType.FLOAT, (), const_value=made)
        return self.weights[name]

    def add(
        self, kind: str, *inputs: ir.Value, shape: Any = None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes, domain=domain)
        node.outputs[0].name = f"{kind}_{len(self.nodes)}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = inputs[0].shape if shape is None else ir.Shape(shape)
        self.nodes.append(node)
        return node.outputs[0]

    def model(self, *outputs: ir.Value) -> ir.Model:
        graph = ir.Graph(
            [self.x],
            outputs,
            nodes=self.nodes,
            initializers=list(self.weights.values()),
            opset_imports={"": 23, DOMAIN: 1},
            name="products",
        )
        return ir.Model(graph, ir_version=10)


def computed(cpu_library: CpuLibrary, model: ir.Model) -> list[np.ndarray]:
    library = cpu_library.path.with_name("libingot_ort.so")
    data = ir.serde.serialize_model(model).SerializeToString()
    return list(open_session(data, threads=2, libraries=[library]).run(None, {"x": X}))


def mlp(build: Builder, activation: str = "silu") -> ir.Value:
    gate = build.linear("gate", build.x, INNER)
    if activation == "silu":
        active = build.add("Mul", gate, build.add("Sigmoid", gate))
    elif activation == "gelu_tanh":
        active = build.add("Gelu", gate, approximate="tanh")
    else:
        active = build.add(activation.capitalize(), gate)
    return build.linear(
        "down", build.add("Mul", active, build.linear("up", build.x, INNER)), HIDDEN
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_a_gated_mlp_is_one_operator(cpu_library: CpuLibrary, activation: str) -> None:
    build = Builder()
    model = build.model(mlp(build, activation))
    before = computed(cpu_library, model)
    assert FuseMlps()(model).modified
    (node,) = model.graph
    assert (node.op_type, node.attributes["activation"].value) == ("Mlp", activation)
    (found,) = computed(cpu_library, model)
    np.testing.assert_allclose(found, before[0], rtol=0, atol=1e-4 * np.abs(found).max())


def test_an_mlp_whose_pieces_others_read_stays() -> None:
    for reader in ("Mul_2", "Linear_0", "Linear_3"):
        build = Builder()
        out = mlp(build)
        value = next(v for node in build.nodes for v in node.outputs if v.name == reader)
        model = build.model(out, build.add("Neg", value))
        assert not FuseMlps()(model).modified, reader


def test_gate_and_up_of_two_formats_stay_apart() -> None:
    build = Builder()
    gate = build.linear("gate", build.x, INNER)
    up = build.linear("up", build.x, INNER, Format("float32"))
    product = build.add("Mul", build.add("Relu", gate), up)
    model = build.model(build.linear("down", product, HIDDEN))
    assert not FuseMlps()(model).modified


@pytest.mark.parametrize("factor", [None, 0.25])
@pytest.mark.parametrize("first", [False, True])
def test_a_residual_is_added_by_the_product(
    cpu_library: CpuLibrary, factor: float | None, first: bool
) -> None:
    """Twice in a row: what the first makes is what the second adds to."""
    build, total = Builder(), None
    total = build.x
    for name in ("one", "two"):
        product = build.linear(name, build.add("Neg", total), HIDDEN)
        if factor is not None:
            product = build.add("Mul", product, build.number(factor))
        pair = (product, total) if first else (total, product)
        total = build.add("Add", *pair)
    total.name = "hidden_states.1"
    model = build.model(total)
    before = computed(cpu_library, model)
    assert FuseResiduals()(model).modified
    assert operators(model.graph) == {"Linear": 2, "Neg": 2}
    assert model.graph.outputs[0].name == "hidden_states.1"
    scales = {node.attributes["scale"].value for node in model.graph if node.op_type == "Linear"}
    assert scales == {1.0 if factor is None else factor}
    (found,) = computed(cpu_library, model)
    np.testing.assert_allclose(found, before[0], rtol=0, atol=1e-5 * np.abs(found).max())


def test_a_product_that_others_read_or_that_is_broadcast_adds_nothing() -> None:
    build = Builder()
    product = build.linear("one", build.x, HIDDEN)
    model = build.model(build.add("Add", build.x, product), build.add("Neg", product))
    assert not FuseResiduals()(model).modified
    build = Builder()
    product = build.linear("one", build.x, HIDDEN)
    model = build.model(build.add("Add", product, build.number(2.0)))
    assert not FuseResiduals()(model).modified


def test_layers_that_read_the_same_are_one_call(cpu_library: CpuLibrary) -> None:
    build = Builder()
    outputs = [build.linear(name, build.x, rows) for name, rows in (("q", 48), ("k", 16))]
    other = build.linear("v", build.x, 16, Format("float32"))
    alone = build.linear("o", build.add("Neg", build.x), 16)
    names = [value.name for value in (*outputs, other, alone)]
    model = build.model(*outputs, other, alone)
    before = computed(cpu_library, model)
    assert FuseLinears()(model).modified
    assert operators(model.graph) == {"Linears": 1, "Linear": 2, "Neg": 1}
    assert [value.name for value in model.graph.outputs] == names
    for one, found in zip(before, computed(cpu_library, model), strict=True):
        np.testing.assert_array_equal(one, found)


def test_notice_what_is_left() -> None:
    build = Builder()
    notices_nothing_done(FuseMlps(), build.model(mlp(build)), "an MLP that is left in pieces")
    build = Builder()
    added = build.add("Add", build.x, build.linear("one", build.x, HIDDEN))
    notices_nothing_done(FuseResiduals(), build.model(added), "adds what a product could add")
    build = Builder()
    both = [build.linear(name, build.x, 16) for name in ("q", "k")]
    notices_nothing_done(FuseLinears(), build.model(*both), "is left by itself")
