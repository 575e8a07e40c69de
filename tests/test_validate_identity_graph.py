"""Graphs with one thing otherwise, most of which no input would show."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MakeCheckpoint, MakeIngot
from identity import FAMILIES, Kept, changed
from onnx import TensorProto, helper, numpy_helper
from traces import Traces

from ingot.export.ingot import GRAPH, MANIFEST
from ingot.validate.identity.bodies import is_weight
from ingot.validate.identity.differences import differences
from ingot.validate.identity.graph import check_graph, other_versions
from ingot.validate.locate.graph import unread
from ingot.validate.result import Check

Change = Callable[[onnx.ModelProto], object]
KINDS = [("onnx", "fp32"), ("ort", "fp32"), ("trt", "fp32"), ("trt", "fp16")]


@pytest.fixture(scope="module")
def kept(
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    traces: Traces,
    tiny: Path,
    tiny_onnx: Path,
) -> Kept:
    return Kept(make_checkpoint, make_ingot, traces, tiny, {"onnx": tiny_onnx})


Checked = Callable[..., Check]


@pytest.fixture
def checked(kept: Kept, tmp_path: Path) -> Checked:
    """``checked(family, target, change, ...)``: what is found in a copy with another graph."""

    def check(
        family: str,
        target: str,
        change: Change | None = None,
        precision: str = "fp32",
        said: Callable[[dict[str, Any]], object] | None = None,
    ) -> Check:
        ingot = kept.ingot(family, target, precision)
        copy = changed(ingot, tmp_path / "copy", change, said)
        return check_graph(kept.subject(copy, family))

    return check


def nodes(model: onnx.ModelProto, operator: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == operator]


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    found: onnx.AttributeProto
    (found,) = (each for each in node.attribute if each.name == name)
    return found


def constant(model: onnx.ModelProto, name: str, array: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return name


def behind(model: onnx.ModelProto, value: str, operator: str, *more: str, **said: Any) -> None:
    """Put a node behind the one that makes a value, for all that read it."""
    (place,) = (n for n, node in enumerate(model.graph.node) if value in node.output)
    outputs = model.graph.node[place].output
    outputs[list(outputs).index(value)] = f"{value}.before"
    made = helper.make_node(operator, [f"{value}.before", *more], [value], **said)
    model.graph.node.insert(place + 1, made)


def first(model: onnx.ModelProto, operator: str, number: int = 0) -> str:
    """The output of a node."""
    name: str = nodes(model, operator)[number].output[0]
    return name


def epsilon(model: onnx.ModelProto) -> None:
    attribute(nodes(model, "RMSNormalization")[2], "epsilon").f = 1e-3


def scale(model: onnx.ModelProto) -> None:
    behind(model, first(model, "MatMul", 3), "Mul", constant(model, "k", np.float32(1.003)))


def scale_logits(model: onnx.ModelProto) -> None:
    behind(model, "logits", "Mul", constant(model, "k", np.float32(1.003)))


def through_bfloat16(model: onnx.ModelProto) -> None:
    value = first(model, "MatMul", 1)
    behind(model, value, "Cast", to=TensorProto.FLOAT)
    behind(model, f"{value}.before", "Cast", to=TensorProto.BFLOAT16)


def identity(model: onnx.ModelProto) -> None:
    behind(model, first(model, "MatMul", 1), "Identity")


def swap(model: onnx.ModelProto) -> None:
    node = nodes(model, "MatMul")[0]
    node.input[0], node.input[1] = node.input[1], node.input[0]


def reader(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    found: onnx.NodeProto
    (found,) = (node for node in model.graph.node if name in node.input)
    return found


def axis(model: onnx.ModelProto) -> None:
    attribute(nodes(model, "RMSNormalization")[-1], "axis").i = 1


def rename(model: onnx.ModelProto, old: str = "model.layers.1.mlp.experts.down_proj") -> None:
    node = reader(model, old)
    node.input[list(node.input).index(old)] = "renamed"
    (tensor,) = (each for each in model.graph.initializer if each.name == old)
    tensor.name = "renamed"


def swap_weights(model: onnx.ModelProto) -> None:
    """Two matrices of one shape, each read in the place of the other."""
    key, value = (reader(model, f"model.layers.1.self_attn.{n}_proj.weight") for n in "kv")
    key.input[1], value.input[1] = value.input[1], key.input[1]


def drop(model: onnx.ModelProto) -> None:
    node = nodes(model, "Add")[-1]
    read, made = node.input[0], node.output[0]
    model.graph.node.remove(node)
    for other in model.graph.node:
        for place, name in enumerate(other.input):
            if name == made:
                other.input[place] = read


def other_operator(model: onnx.ModelProto) -> None:
    nodes(model, "Add")[-1].op_type = "Sub"


def frequencies(model: onnx.ModelProto) -> None:
    (found,) = (
        each
        for each in model.graph.initializer
        if each.data_type == TensorProto.FLOAT and not is_weight(each) and len(each.dims) == 1
    )
    array = numpy_helper.to_array(found).copy()
    array[-1] = np.nextafter(array[-1], np.float32(1))
    found.CopyFrom(numpy_helper.from_array(array, found.name))


def opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 22


def in_function(model: onnx.ModelProto) -> None:
    """One of the constants of the operator's body."""
    tensor = next(
        each
        for function in model.functions
        for node in function.node
        if node.op_type == "Constant"
        for each in node.attribute
        if each.name in ("value_int", "value_ints")
    )
    if tensor.name == "value_int":
        tensor.i += 1
    else:
        tensor.ints[0] += 1


def drop_function(model: onnx.ModelProto) -> None:
    del model.functions[0]


def another_function(model: onnx.ModelProto) -> None:
    """A body in place of ONNX's own operator."""
    function = model.functions.add()
    function.domain, function.name = "", "Softmax"


def lie(model: onnx.ModelProto) -> None:
    value = next(each for each in model.graph.value_info if each.name == first(model, "MatMul"))
    value.type.tensor_type.shape.dim[0].Clear()
    value.type.tensor_type.shape.dim[0].dim_value = 2


def metadata(model: onnx.ModelProto) -> None:
    found = model.metadata_props.add()
    found.key, found.value = "ort_config", "{}"


def noted(model: onnx.ModelProto) -> None:
    model.graph.node[7].doc_string = "as if"


def interface(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.INT32


def one_input_more(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def inline(model: onnx.ModelProto) -> None:
    """A weight that is in the graph file itself."""
    name = "model.norm.weight"
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ones(list(tensor.dims), np.float32), name))


def elsewhere(model: onnx.ModelProto) -> None:
    """A weight that is read from where another one of the same shape lies."""
    one, other = (
        next(e for e in model.graph.initializer if e.name == f"model.layers.{n}.mlp.gate.weight")
        for n in (0, 1)
    )
    for mine, theirs in zip(one.external_data, other.external_data, strict=True):
        mine.value = theirs.value


FAULTS: dict[str, tuple[Change, str]] = {
    "epsilon": (epsilon, r"^layer 0, RMSNormalization \S+: attribute epsilon is 0.001, and 1e-05"),
    "a factor": (scale, r"^layer 0, Mul \S+: there is no such node in a fresh capture$"),
    "a factor at the end": (scale_logits, "^outside of the layers, Mul logits: there is no such"),
    "rounding": (through_bfloat16, r"^layer 0, Cast \S+: there is no such node"),
    "nothing": (identity, r"^layer 0, Identity \S+: there is no such node"),
    "order of inputs": (
        swap,
        r"^layer 0, MatMul linear\S*: reads the same values in another order",
    ),
    "axis": (axis, "attribute axis is 1, and -1 in a fresh capture"),
    "a weight's name": (rename, "layer 1, MoeDispatch .*: down is the weight renamed, float32 .*"),
    "two weights": (swap_weights, r"^layer 1, MatMul \S+: B is the weight \S+v_proj.weight,"),
    "a node less": (drop, r"^layer 1, Add \S+: this node of a fresh capture is missing"),
    "operator": (other_operator, r"^layer 1, Sub \S+: is Sub, and Add in a fresh capture"),
    "constant": (frequencies, r"B is a constant float32 \[8\] of sum .*, and a constant float32"),
    "opset": (opset, "^opset ai.onnx is 22, and 23 in a fresh capture"),
    "function": (
        in_function,
        r"^the function ingot::MoeDispatch: Constant \w+: attribute value_i",
    ),
    "no function": (drop_function, "^the function ingot::MoeDispatch of a fresh capture is missin"),
    "own function": (another_function, "^the function ::Softmax is there, and none of that name"),
    "shape": (lie, r"its output is said to be float32 \[2, sequence, 64\], and float32 \[batch, s"),
    "metadata": (metadata, "^its metadata or doc strings are others than in a fresh capture"),
    "doc string": (noted, "has another overload, doc string or metadata than in a fresh capture"),
    "dtype of an input": (interface, "^input attention_mask is int32 .*, and int64 "),
    "input": (one_input_more, "^it has the input more, which is none in a fresh capture"),
    "stored inside": (inline, "^it lacks the weight model.norm.weight of a fresh capture"),
    "read elsewhere": (elsewhere, "^the weight model.layers.0.mlp.gate.weight is read from .*, an"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_graph_with_one_thing_otherwise_fails(checked: Checked, name: str) -> None:
    change, expected = FAULTS[name]
    found = checked("olmoe", "onnx", change)
    assert any(re.search(expected, each) for each in found.problems), found.problems


def test_a_right_graph_has_no_problem(checked: Checked, kept: Kept) -> None:
    found = checked("olmoe", "onnx")
    assert found == Check("graph", found.compared)
    model = onnx.load(str(kept.ingot("olmoe", "onnx") / GRAPH), load_external_data=False)
    assert found.compared == len(model.graph.node)


def test_a_fault_is_located(checked: Checked) -> None:
    found = checked("olmoe", "onnx", swap_weights).location
    assert found is not None
    assert (found.layer, found.operator) == (1, "MatMul")


def test_few_of_many_differences_are_told(checked: Checked) -> None:
    def everywhere(model: onnx.ModelProto) -> None:
        for node in nodes(model, "RMSNormalization"):
            attribute(node, "epsilon").f = 1e-3

    found = checked("olmoe", "onnx", everywhere)
    assert len(found.problems) == 9
    assert found.problems[-1] == "differences beyond these 8, which may follow from them: 1"


def renamed(model: onnx.ModelProto) -> None:
    """All names that say nothing are others."""
    graph = model.graph
    fixed = {value.name for value in (*graph.input, *graph.output)}
    fixed |= {each.name for each in graph.initializer if is_weight(each)} | {""}

    def name(old: str) -> str:
        return old if old in fixed else f"p.{old}"

    for node in graph.node:
        node.name = f"n.{node.name}"
        for names in (node.input, node.output):
            new = [name(each) for each in names]
            del names[:]
            names.extend(new)
    for each in (*graph.initializer, *graph.value_info):
        each.name = name(each.name)


def reordered(model: onnx.ModelProto) -> None:
    """The nodes in another order, each still behind what it reads."""
    draw = random.Random(3)
    rest = list(model.graph.node)
    there = {value.name for value in (*model.graph.input, *model.graph.initializer)} | {""}
    order = []
    while rest:
        node = draw.choice([each for each in rest if all(name in there for name in each.input)])
        rest = [each for each in rest if each is not node]
        there.update(node.output)
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        order.append(copy)
    assert [each.name for each in order] != [each.name for each in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(order)


@pytest.mark.parametrize("change", [renamed, reordered])
def test_names_and_the_order_of_nodes_do_not_count(checked: Checked, change: Change) -> None:
    assert checked("olmoe", "onnx", change).problems == ()


def test_faults_are_found_among_other_names(checked: Checked) -> None:
    def change(model: onnx.ModelProto) -> None:
        renamed(model)
        epsilon(model)
        scale_logits(model)

    problems = checked("olmoe", "onnx", change).problems
    assert [each.split(":")[0].split(" p.")[0] for each in problems] == [
        "layer 0, RMSNormalization",
        "outside of the layers, Mul logits",
    ]


def test_the_capture_is_as_before(kept: Kept) -> None:
    subject = kept.subject(kept.ingot("olmoe", "onnx"), "olmoe")
    values = subject.captured.model.graph.initializers
    before = {name: value.const_value for name, value in values.items()}
    unread(subject.captured.model)
    assert all(values[name].const_value is tensor for name, tensor in before.items())


def made_with(**versions: str) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        raw["tools"].update({name.replace("_", "-"): each for name, each in versions.items()})

    return change


def test_with_other_versions_a_difference_is_left_out(checked: Checked, kept: Kept) -> None:
    other = made_with(torch="2.12.0+cu130", onnx_ir="0.0.1")
    found = checked("olmoe", "onnx", epsilon, said=other)
    assert found.problems == () and found.compared == 0
    here = "the ingot was made with torch 2.12.0+cu130, onnx-ir 0.0.1, and here is torch 2.13.0"
    assert found.left_out.startswith(here)
    # Where the graphs are equal all the same, nothing is.
    found = checked("olmoe", "onnx", said=other)
    assert found.left_out == "" and found.compared > 0


def test_for_which_machine_pytorch_was_built_does_not_count(checked: Checked, kept: Kept) -> None:
    manifest = kept.subject(kept.ingot("olmoe", "onnx"), "olmoe").manifest
    manifest.tools["torch"] = manifest.tools["torch"].partition("+")[0] + "+cu130"
    assert other_versions(manifest) == ""
    del manifest.tools["onnxscript"]
    assert "onnxscript unknown, and here is onnxscript" in other_versions(manifest)


def test_what_the_passes_did_is_held_against_what_they_do(checked: Checked) -> None:
    def one_less(raw: dict[str, Any]) -> None:
        raw["graph"]["passes"].pop()

    (found,) = checked("olmoe", "onnx", said=one_less).problems
    assert re.match(r"graph.passes of ingot.json has \d+ passes, and \d+ in a fresh capture", found)
    (found,) = checked("olmoe", "onnx", said=lambda raw: raw["graph"].pop("passes")).problems
    assert found.startswith("graph.passes of ingot.json has none, and [{'initializers': 25, 'name")


@pytest.mark.slow
def test_passes_that_do_not_lead_to_the_graph_are_a_problem(checked: Checked) -> None:
    """Also where the versions are others, since that is of the ingot alone."""

    def forgotten(raw: dict[str, Any]) -> None:
        raw["graph"]["lowering"][0]["removed"]["MoeDispatch"] = 1
        raw["tools"]["torch"] = "2.0.0"

    found = checked("olmoe", "ort", said=forgotten)
    (problem,) = found.problems
    assert problem.startswith("the graph has 0 MoeDispatch, and the canonical graph with what")

    def no_record(raw: dict[str, Any]) -> None:
        raw["graph"]["lowering"] = 3

    assert checked("olmoe", "ort", said=no_record).problems


TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
branched (bool which, float[n] x, float[n] z) => (float[n] y)
<float low = {-1.0}, float high = {8.0}, int64 trips = {3}, bool yes = {1}>
{
    m = Neg (x)
    w = If (which) <
        then_branch = one () => (float[n] a) { b = Clip (m, low, high) a = Sub (b, z) },
        else_branch = two () => (float[n] c) { c = Tanh (x) }
    >
    y = Loop (trips, yes, w) <
        body = three (int64 i, bool go, float[n] s) => (bool on, float[n] t)
        { on = Identity (go) t = LeakyRelu <alpha = 0.5> (s) }
    >
}
"""
INSIDE = {
    "constant": (
        "high = {8.0}",
        "high = {3.4e38}",
        "in it Clip b: max is 3.4e+38 (float32), and",
    ),
    "inputs": ("Sub (b, z)", "Sub (z, b)", "If w, in it Sub a: reads the same values in another o"),
    "attribute": (
        "alpha = 0.5",
        "alpha = 0.25",
        "Loop y, in it LeakyRelu t: attribute alpha is 0.2",
    ),
    "operator": (
        "Tanh (x)",
        "Relu (x)",
        "If w, in it Relu c: is Relu, and Tanh in a fresh",
    ),
    "outer value": ("Clip (m,", "Clip (x,", "in it Clip b: input is x, and m in a fresh capture"),
    "node": (
        "a = Sub (b, z)",
        "d = Sub (b, z) a = Identity (d)",
        "Identity a: there is no such ",
    ),
    "branches": (
        "then_branch = one () => (float[n] a) { b = Clip (m, low, high) a = Sub (b, z) },",
        "then_branch = one () => (float[n] a) { a = Sub (m, z) },",
        "If w, in it Clip b: this node of a fresh capture is missing",
    ),
    "shape": (
        "(float[n] c) {",
        "(float[2] c) {",
        "Tanh c: its output is said to be float32 [2], ",
    ),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_fault_in_a_branch_or_a_loop_is_found(name: str) -> None:
    before, after, expected = INSIDE[name]
    assert before in TEXT
    fresh = onnx.parser.parse_model(TEXT)
    found = list(differences(onnx.parser.parse_model(TEXT.replace(before, after)), fresh))
    told = ["".join(f"{n.operator[1]} {n.name}, in it " for n in each.nodes) for each in found]
    texts = [
        f"{path.removesuffix(', in it ')}: {each.text}"
        for path, each in zip(told, found, strict=True)
    ]
    assert any(expected in text for text in texts), texts
    assert list(differences(fresh, fresh)) == []


def test_names_inside_of_branches_do_not_count() -> None:
    fresh = onnx.parser.parse_model(TEXT)
    other = TEXT.replace("b = Clip", "q = Clip").replace("Sub (b,", "Sub (q,")
    other = other.replace("float[n] s)", "float[n] u)").replace("(s) }", "(u) }")
    assert list(differences(onnx.parser.parse_model(other), fresh)) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("target", "precision"), KINDS)
def test_the_graph_of_every_kind_of_ingot_is_right_and_an_epsilon_in_it_wrong(
    checked: Checked, family: str, target: str, precision: str
) -> None:
    assert checked(family, target, precision=precision).problems == ()
    (found,) = checked(family, target, epsilon, precision=precision).problems
    assert re.search(r"^layer \d, RMSNormalization \S+: attribute epsilon is 0.001, and 1e-", found)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "precision"), KINDS)
def test_a_clip_that_no_value_reaches_may_not_be_dropped(
    checked: Checked, target: str, precision: str
) -> None:
    """Nor may its limit be another."""

    def without(model: onnx.ModelProto) -> None:
        for node in nodes(model, "Clip"):
            for other in model.graph.node:
                for place, name in enumerate(other.input):
                    if name == node.output[0]:
                        other.input[place] = node.input[0]
            model.graph.node.remove(node)

    def wider(model: onnx.ModelProto) -> None:
        node = nodes(model, "Clip")[0]
        dtype = np.float32 if precision == "fp32" else np.float16
        node.input[2] = constant(model, "wider", dtype(6e4))

    found = checked("clipped", target, without, precision=precision)
    assert re.search(r"^layer 0, Clip \S+: this node of a fresh capture is miss", found.problems[0])
    assert found.location is not None and found.location.layer == 0
    found = checked("clipped", target, wider, precision=precision)
    assert re.search(
        r"^layer 0, Clip \S+: max is 6\S+ .*, and \S+ .* in a fresh", found.problems[0]
    )


def test_faults_at_both_ends_of_a_long_graph_are_told_apart() -> None:
    """Of which no node but the outermost is told from the others by what it reads."""
    model = onnx.ModelProto()
    model.opset_import.add(domain="", version=23)
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]))
    value = "x"
    for number in range(300):
        for operator in ("Neg", "Relu", "Neg"):
            made = f"{value}{operator[0]}" if number < 1 else f"v{len(model.graph.node)}"
            model.graph.node.append(helper.make_node(operator, [value], [made]))
            value = made
    model.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, ["n"]))
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    wrong.graph.node[1].op_type, wrong.graph.node[-2].op_type = "Tanh", "Tanh"
    assert [each.text for each in differences(wrong, model)] == [
        "is Tanh, and Relu in a fresh capture"
    ] * 2


def test_a_file_that_was_not_made_by_an_export_is_a_problem(
    kept: Kept, tiny_onnx: Path, tmp_path: Path
) -> None:
    from ingot.validate.identity.checks import checks

    copy = changed(tiny_onnx, tmp_path / "copy")
    subject = kept.subject(copy, "olmoe")
    (copy / GRAPH).write_bytes(b"\x08\x0a\x3a\xff\xff\xff\xff\x01")
    assert (copy / MANIFEST).is_file()
    found = {check.name: check.problems for check in checks(subject)}
    assert found["graph"] and found["contract"]
