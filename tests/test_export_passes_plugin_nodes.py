"""Nodes name their TensorRT plugin; other runtimes compute what they did."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import Arrays, notices, notices_nothing_done, parsed, refuses, run, the

from ingot.export.passes.functions import AttachFunctionBodies
from ingot.export.passes.plugin_nodes import NamePlugins

TEXT = """
<ir_version: 10, opset_import: ["" : 23, "ingot" : 1]>
small (float[n, 6] x, int64[n, 2] ids, float[3, 4, 6] w) => (float[n, 2, 4] y)
<float[n, 2, 4] z>
{
    z = ingot.MoeLinear (x, ids, w)
    y = Relu (z)
}
"""
WEIGHTS = {"w": np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)}


def with_bodies() -> ir.Model:
    model = parsed(TEXT, WEIGHTS)
    AttachFunctionBodies()(model)
    return model


def test_every_node_of_ours_names_its_plugin() -> None:
    model = with_bodies()
    random = np.random.default_rng(1)
    feeds: Arrays = {
        "x": random.normal(size=(5, 6)).astype(np.float32),
        "ids": random.integers(0, 3, (5, 2)),
    }
    expected = run(model, feeds)["y"]
    assert NamePlugins()(model).modified
    node = the(model, "MoeLinear")
    assert node.attributes["plugin_namespace"].as_string() == "ingot"
    assert node.attributes["plugin_version"].as_string() == "1"
    assert not the(model, "Relu").attributes
    (function,) = model.functions.values()
    assert {"plugin_namespace", "plugin_version"} <= function.attributes.keys()
    # Any runtime takes the node, since its function knows both attributes.
    assert np.array_equal(run(model, feeds)["y"], expected)
    assert expected.std() > 0.1


def test_a_graph_of_standard_operators_stays() -> None:
    model = parsed("""
        <ir_version: 10, opset_import: ["" : 23]>
        small (float[n] x) => (float[n] y) { y = Relu (x) }
    """)
    assert not NamePlugins()(model).modified


def test_needs_the_bodies_first() -> None:
    refuses(NamePlugins(), parsed(TEXT, WEIGHTS), "MoeLinear z has no function body yet")


def test_notices_what_is_left() -> None:
    notices_nothing_done(NamePlugins(), with_bodies(), "MoeLinear z names no plugin")


def name_no_version(model: ir.Model) -> None:
    del the(model, "MoeLinear").attributes["plugin_version"]


def forget_the_function(model: ir.Model) -> None:
    for function in model.functions.values():
        del function.attributes["plugin_namespace"]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (name_no_version, "MoeLinear z names no plugin"),
        (forget_the_function, "MoeLinear z has {'plugin_namespace'}, which its function does not"),
    ],
)
def test_notices_its_own_mistakes(spoil: Callable[[ir.Model], None], why: str) -> None:
    notices(NamePlugins(), with_bodies(), spoil, why)
