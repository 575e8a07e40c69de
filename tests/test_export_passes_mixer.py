"""A Mamba2 block between its projections becomes one operator: graph, numbers and conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import toy_hybrid
from captured import Runs, assert_same, canonical
from text_graph import interface, notices, notices_nothing_done, operators, the, wiring
from traces import Traces

from ingot.export.lower_ort import in_place
from ingot.export.passes.causal_conv import CausalConvToOperator
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.mixer import MixersToOperator
from ingot.plugins.cpu.library import CpuLibrary
from ingot.plugins.cpu.operators import DOMAIN

# Of what a block is made of, between its projections.
PARTS = {"CausalConv", "Mamba2Scan", "Sigmoid", "Split", "Reshape"}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with toy_hybrid.registered():
        yield


@pytest.fixture
def block(traces: Traces) -> ir.Model:
    """Two layers of two groups each, whose convolutions are operators already."""
    model = canonical(traces, "mamba2", n_groups=2)
    CausalConvToOperator()(model)
    return model


def mixers(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Mamba2Mixer"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mamba2", {"n_groups": 2}),
        ("mamba2", {"n_groups": 1, "time_step_limit": [0.01, 0.6], "layer_norm_epsilon": 1e-3}),
        ("mamba2", {"n_groups": 2, "use_conv_bias": False}),
        ("mamba2", {"n_groups": 4, "use_bias": True, "conv_kernel": 2}),
        ("toy_hybrid", {}),
    ],
    ids=str,
)
def test_a_block_is_one_node_with_the_numbers_of_all(
    family: str, changes: dict[str, Any], traces: Traces, cpu_library: CpuLibrary
) -> None:
    model = canonical(traces, family, **changes)
    expected = Runs(model).prefill_and_decode(7)
    CausalConvToOperator()(model)
    before = interface(model)
    scans = [node for node in model.graph if node.op_type == "Mamba2Scan"]
    norms = operators(model.graph)["RMSNormalization"]
    assert scans and MixersToOperator()(model).modified
    assert interface(model) == before
    found = operators(model.graph)
    assert found["Mamba2Mixer"] == len(scans)
    assert not found.keys() & {"CausalConv", "Mamba2Scan", "Split"}
    assert model.opset_imports[DOMAIN] == 1
    made = mixers(model)
    normed = [bool(node.attributes["norm_groups"].as_int()) for node in made]
    assert found["RMSNormalization"] == norms - sum(normed)
    for scan, node in zip(scans, made, strict=True):
        for name in ("dt_min", "dt_max"):
            assert node.attributes[name].as_float() == scan.attributes[name].as_float()
        groups = changes.get("n_groups", 2)
        assert node.attributes["groups"].as_int() == groups
        if family == "mamba2":
            epsilon = changes.get("layer_norm_epsilon", 1e-5)
            assert node.attributes["epsilon"].as_float() == pytest.approx(epsilon)
            assert node.attributes["norm_groups"].as_int() == groups
        assert len(node.inputs) == (10 if node.attributes["norm_groups"].as_int() else 9)
    runs = Runs(model, [cpu_library.path.with_name("libingot_ort.so")])
    assert_same(runs.prefill_and_decode(7), expected)
    assert not MixersToOperator()(model).modified


def of(model: ir.Model, op_type: str, at: int = 0) -> ir.Node:
    return [node for node in model.graph if node.op_type == op_type][at]


def read(model: ir.Model, value: ir.Value | None) -> ir.Value:
    """By one more node."""
    node = ir.node("Relu", [value])
    made = node.outputs[0]
    assert value is not None
    made.type, made.shape = value.type, value.shape
    after = value.producer()
    if after is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(after, node)
    return made


def read_elsewhere(model: ir.Model, value: ir.Value | None) -> None:
    """By a node that gives an output."""
    model.graph.outputs.append(read(model, value))


def mask_of_another(model: ir.Model) -> None:
    """Of what goes into the convolution; the scan keeps its own."""
    wide = the(model, "Unsqueeze")
    wide.replace_input_with(0, read(model, wide.inputs[0]))


def unmasked_scan(model: ir.Model) -> None:
    scan = the(model, "Mamba2Scan")
    scan.replace_input_with(8, read(model, scan.inputs[8]))


def masked_along_tokens(model: ir.Model) -> None:
    wide = the(model, "Unsqueeze")
    axes = ir.val("first", const_value=ir.tensor([1], name="first"))
    model.graph.register_initializer(axes)
    wide.replace_input_with(1, axes)


def gate_read_elsewhere(model: ir.Model) -> None:
    read_elsewhere(model, the(model, "Split").outputs[0])


def inward_read_elsewhere(model: ir.Model) -> None:
    read_elsewhere(model, the(model, "Split").outputs[1])


def steps_read_elsewhere(model: ir.Model) -> None:
    read_elsewhere(model, the(model, "Split").outputs[2])


def masked_read_elsewhere(model: ir.Model) -> None:
    read_elsewhere(model, the(model, "CausalConv").inputs[0])


def mixed_read_elsewhere(model: ir.Model) -> None:
    read_elsewhere(model, the(model, "CausalConv").outputs[0])


def part_read_elsewhere(model: ir.Model) -> None:
    read_elsewhere(model, of(model, "Split", 1).outputs[1])


def heads_read_elsewhere(model: ir.Model) -> None:
    read_elsewhere(model, the(model, "Mamba2Scan").inputs[0])


def result_read_elsewhere(model: ir.Model) -> None:
    read_elsewhere(model, the(model, "Mamba2Scan").outputs[0])


def result_as_an_output(model: ir.Model) -> None:
    model.graph.outputs.append(the(model, "Mamba2Scan").outputs[0])


def mixed_as_an_output(model: ir.Model) -> None:
    model.graph.outputs.append(the(model, "CausalConv").outputs[0])


def steps_of_another_part(model: ir.Model) -> None:
    the(model, "Mamba2Scan").replace_input_with(1, the(model, "Split").outputs[0])


def steps_of_another_layer(model: ir.Model) -> None:
    of(model, "Mamba2Scan", 1).replace_input_with(1, of(model, "Split", 0).outputs[2])


def steps_that_are_changed(model: ir.Model) -> None:
    scan = the(model, "Mamba2Scan")
    scan.replace_input_with(1, read(model, scan.inputs[1]))


def in_and_out_swapped(model: ir.Model) -> None:
    scan = the(model, "Mamba2Scan")
    b, c = scan.inputs[3:5]
    scan.replace_input_with(3, c)
    scan.replace_input_with(4, b)


def gated_by_a_tangent(model: ir.Model) -> None:
    the(model, "Sigmoid").op_type = "Tanh"


def gated_by_another(model: ir.Model) -> None:
    sigmoid = the(model, "Sigmoid")
    sigmoid.replace_input_with(0, read(model, sigmoid.inputs[0]))


def reader(node: ir.Node) -> ir.Node:
    (use,) = node.outputs[0].uses()
    return use.node


def gate_added(model: ir.Model) -> None:
    gated = reader(reader(the(model, "Mamba2Scan")))
    gated.op_type = "Add"


def another_factor(model: ir.Model) -> None:
    the(model, "CausalConv").inputs[0].producer().op_type = "Add"  # type: ignore[union-attr]


def split_along_tokens(model: ir.Model) -> None:
    the(model, "Split").attributes["axis"] = ir.AttrInt64("axis", 1)


LEFT_ALONE = [
    mask_of_another,
    unmasked_scan,
    masked_along_tokens,
    gate_read_elsewhere,
    inward_read_elsewhere,
    steps_read_elsewhere,
    masked_read_elsewhere,
    mixed_read_elsewhere,
    part_read_elsewhere,
    heads_read_elsewhere,
    result_read_elsewhere,
    result_as_an_output,
    mixed_as_an_output,
    steps_of_another_part,
    steps_of_another_layer,
    steps_that_are_changed,
    in_and_out_swapped,
    gated_by_a_tangent,
    gated_by_another,
    gate_added,
    another_factor,
    split_along_tokens,
]


@pytest.mark.parametrize("change", LEFT_ALONE, ids=lambda change: change.__name__)
def test_any_other_block_is_left_alone(change: Callable[[ir.Model], None], block: ir.Model) -> None:
    change(block)
    before = wiring(block)
    MixersToOperator()(block)
    # A layer that is as it was is gathered for itself.
    assert len(mixers(block)) < 2
    left = [node for node in before if node[0] in PARTS]
    if not mixers(block):
        assert [node for node in wiring(block) if node[0] in PARTS] == left
    assert operators(block.graph)["Mamba2Scan"] == 2 - len(mixers(block)) > 0


def ones_that_are_not(model: ir.Model) -> None:
    norm = grouped_norm(model)
    other = np.ones(64, np.float32)
    other[5] = 2
    value = ir.val("not_ones", const_value=ir.tensor(other, name="not_ones"))
    model.graph.register_initializer(value)
    norm.replace_input_with(1, value)


def grouped_norm(model: ir.Model) -> ir.Node:
    norms = (node for node in model.graph if node.op_type == "RMSNormalization")
    return next(n for n in norms if n.inputs[0] is not None and len(n.inputs[0].shape or ()) == 4)


def normed_read_elsewhere(model: ir.Model) -> None:
    read_elsewhere(model, grouped_norm(model).outputs[0])


def normed_over_groups(model: ir.Model) -> None:
    grouped_norm(model).attributes["axis"] = ir.AttrInt64("axis", 2)


def shifted(model: ir.Model) -> None:
    reader(reader(grouped_norm(model))).op_type = "Add"


def gated_read_elsewhere(model: ir.Model) -> None:
    apart = grouped_norm(model).inputs[0].producer()  # type: ignore[union-attr]
    assert apart is not None
    read_elsewhere(model, apart.inputs[0])


@pytest.mark.parametrize(
    "change",
    [ones_that_are_not, normed_read_elsewhere, shifted, normed_over_groups, gated_read_elsewhere],
    ids=lambda change: change.__name__,
)
def test_another_norm_stays_behind_the_block(
    change: Callable[[ir.Model], None], block: ir.Model, cpu_library: CpuLibrary
) -> None:
    change(block)
    runs_alone = change is not normed_over_groups
    assert MixersToOperator()(block).modified
    first, second = mixers(block)
    assert first.attributes["norm_groups"].as_int() == 0 and len(first.inputs) == 9
    assert second.attributes["norm_groups"].as_int() == 2 and len(second.inputs) == 10
    assert grouped_norm(block).op_type == "RMSNormalization"
    if runs_alone:
        Runs(block, [cpu_library.path.with_name("libingot_ort.so")]).prefill_and_decode(5)


def test_ones_that_are_not_give_the_numbers_of_the_norm_that_stays(
    traces: Traces, cpu_library: CpuLibrary
) -> None:
    model = canonical(traces, "mamba2", n_groups=2)
    ones_that_are_not(model)
    expected = Runs(model).prefill_and_decode(7)
    CausalConvToOperator()(model)
    MixersToOperator()(model)
    runs = Runs(model, [cpu_library.path.with_name("libingot_ort.so")])
    assert_same(runs.prefill_and_decode(7), expected)


def test_a_convolution_in_standard_operators_is_left_alone(traces: Traces) -> None:
    model = canonical(traces, "mamba2")
    change: GraphPass = MixersToOperator()
    assert not change(model).modified and DOMAIN not in model.opset_imports


def test_a_state_that_something_else_reads_is_not_written_in_place(block: ir.Model) -> None:
    names = {f"past_states.{layer}.{kind}" for layer in (0, 1) for kind in ("conv", "ssm")}
    MixersToOperator()(block)
    assert in_place(block) == names
    (state,) = (value for value in block.graph.inputs if value.name == "past_states.1.conv")
    read_elsewhere(block, state)
    assert in_place(block) == names - {"past_states.1.conv"}


def test_notices_what_is_left(block: ir.Model) -> None:
    notices_nothing_done(MixersToOperator(), block, "Mamba2Scan .* is in a block that was not")


def rename_a_state(model: ir.Model) -> None:
    next(v for v in model.graph.outputs if "ssm" in (v.name or "")).name = "val_9"


def test_notices_a_state_that_is_lost(block: ir.Model) -> None:
    notices(MixersToOperator(), block, rename_a_state, "the graph had .*present_states")
