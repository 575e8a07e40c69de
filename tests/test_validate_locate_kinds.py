"""A fault of every kind is found in its layer, in every family, target and precision."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import MakeCheckpoint, MakeIngot
from located import Change, Find, Subjects, bypass, finder, graph, weight
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file
from traces import Traces

from ingot.export.ingot import GRAPH
from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.validate.locate.graph import Graph
from ingot.validate.run import examine
from ingot.validate.truth.inputs import QUICK
from ingot.validate.truth.reference import Reference

# Minutes of tracing; one of them is quick, since other tests trace the same graphs.
SUBJECTS = [
    pytest.param(
        family,
        target,
        precision,
        marks=[pytest.mark.slow] * ((family, target, precision) != ("olmoe", "onnx", "fp32")),
    )
    for target, precision in (("onnx", "fp32"), ("ort", "fp32"), ("trt", "fp16"), ("trt", "bf16"))
    for family in ("granite", "jetmoe", "mamba2", "olmoe")
]
LAYER = 1


@pytest.fixture(scope="module")
def subjects(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> Subjects:
    return Subjects(make_checkpoint, make_ingot)


@pytest.fixture
def find(subjects: Subjects, traces: Traces, tmp_path: Path) -> Find:
    """``find(family, target, change, ...)``: see ``located.finder``."""
    return finder(subjects, traces, tmp_path)


def of_layer(graph: onnx.GraphProto, operator: str, at: int = 0) -> onnx.NodeProto:
    """One of the nodes of an operator in the middle layer, in the order of computation."""
    positions = Graph(onnx.ModelProto(graph=graph), lambda _name: np.zeros(1), "").positions
    nodes = [node for node in graph.node if node.op_type == operator]
    found: onnx.NodeProto = [n for n in nodes if positions.get(n.output[0]) == LAYER][at]
    return found


def behind(graph: onnx.GraphProto, node: onnx.NodeProto, *made: onnx.NodeProto) -> None:
    """Nodes from ``IN``, which is what the node makes, to ``OUT``, which its readers read."""
    value = node.output[0]
    names = {"IN": value, "OUT": f"{value}.new"}
    for other in graph.node:
        for place, name in enumerate(other.input):
            other.input[place] = names["OUT"] if name == value else name
    at = list(graph.node).index(node) + 1
    for offset, new in enumerate(made):
        for field in (new.input, new.output):
            for place, name in enumerate(field):
                field[place] = names.get(name, name)
        graph.node.insert(at + offset, new)


def dtype_of(graph: onnx.GraphProto, node: onnx.NodeProto) -> int:
    """Of the weight that a product reads, which is that of what it makes."""
    (found,) = (t.data_type for t in graph.initializer if t.name == node.input[1])
    return int(found)


def more(graph: onnx.GraphProto) -> str:
    behind(graph, of_layer(graph, "MatMul"), helper.make_node("Neg", ["IN"], ["OUT"]))
    return "Neg"


def rounded(graph: onnx.GraphProto) -> str:
    """By another half type than the graph's."""
    node = of_layer(graph, "MatMul")
    own, half = dtype_of(graph, node), onnx.TensorProto
    to = half.FLOAT16 if own == half.BFLOAT16 else half.BFLOAT16
    narrow = helper.make_node("Cast", ["IN"], ["narrow"], to=to)
    behind(graph, node, narrow, helper.make_node("Cast", ["narrow"], ["OUT"], to=own))
    return "Cast"


def like_another(graph: onnx.GraphProto) -> str:
    """The same by the type of another value."""
    node = of_layer(graph, "MatMul")
    own, half = dtype_of(graph, node), onnx.TensorProto
    to = half.FLOAT16 if own == half.BFLOAT16 else half.BFLOAT16
    graph.initializer.append(helper.make_tensor("like", to, [], [1.0]))
    narrow = helper.make_node("CastLike", ["IN", "like"], ["narrow"])
    behind(graph, node, narrow, helper.make_node("Cast", ["narrow"], ["OUT"], to=own))
    return "CastLike"


def other_operator(graph: onnx.GraphProto) -> str:
    node = of_layer(graph, "Add", -1)
    node.op_type = "Sub"
    return "Sub"


def one_less(graph: onnx.GraphProto) -> str:
    """The norm at the begin of the layer; what reads it first is wrong."""
    node = of_layer(graph, "RMSNormalization")
    read = node.output[0]
    reader = next(other for other in graph.node if read in other.input)
    bypass(graph, node, node.input[0])
    return str(reader.op_type)


def by_several(graph: onnx.GraphProto) -> str:
    """A sum by a difference from the opposite, whose sign is then lost."""
    node = of_layer(graph, "Add", -1)
    at = list(graph.node).index(node)
    graph.node.insert(at, helper.make_node("Neg", [node.input[1]], ["opposite"]))
    graph.node.insert(at + 1, helper.make_node("Abs", ["opposite"], ["size"]))
    node.op_type, node.input[1] = "Sub", "size"
    return "Neg Abs Sub"


def attribute(graph: onnx.GraphProto) -> str:
    node = of_layer(graph, "RMSNormalization")
    (epsilon,) = (each for each in node.attribute if each.name == "epsilon")
    epsilon.f *= 1e4
    return "RMSNormalization"


def constant(graph: onnx.GraphProto) -> str:
    """A factor that only this layer reads, where the weights had none."""
    # The last, since a norm behind the first would undo it.
    node = of_layer(graph, "MatMul", -1)
    own = helper.tensor_dtype_to_np_dtype(dtype_of(graph, node))
    graph.initializer.append(numpy_helper.from_array(np.array(1.125, own), "factor"))
    behind(graph, node, helper.make_node("Mul", ["IN", "factor"], ["OUT"]))
    return "Mul"


def swapped_inputs(graph: onnx.GraphProto) -> str:
    """A difference of the residual and what is added to it, the other way round."""
    node = of_layer(graph, "Add", -1)
    node.op_type = "Sub"
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return "Sub"


FAULTS = (
    more,
    rounded,
    like_another,
    other_operator,
    one_less,
    by_several,
    attribute,
    constant,
    swapped_inputs,
)


@pytest.mark.parametrize(("family", "target", "precision"), SUBJECTS)
def test_names_the_layer_and_the_operator(
    find: Find, family: str, target: str, precision: str
) -> None:
    missed = []
    for fault in FAULTS:
        operators: list[str] = []

        def plant(
            graph: onnx.GraphProto,
            fault: Callable[[onnx.GraphProto], str] = fault,
            operators: list[str] = operators,
        ) -> None:
            operators.append(fault(graph))

        found = find(family, target, graph(plant), calls=1, precision=precision)
        if (
            found is None
            or found.layer != LAYER
            or found.operator not in operators[0].split()
            or found.ratio < 100
        ):
            missed.append((fault.__name__, operators, str(found)))
    assert missed == []


@pytest.mark.parametrize(("family", "target", "precision"), SUBJECTS)
def test_names_the_layer_of_a_weight(find: Find, family: str, target: str, precision: str) -> None:
    names: list[str] = []

    def note(graph: onnx.GraphProto) -> None:
        names.append(of_layer(graph, "MatMul").input[1])

    def change(folder: Path) -> None:
        note(onnx.load(str(folder / GRAPH), load_external_data=False).graph)
        apply: Change = weight(
            names[0], lambda a: (a.astype(np.float32) * np.float32(1.05)).astype(a.dtype)
        )
        apply(folder)

    found = find(family, target, change, calls=1, precision=precision)
    # A product of rows that are sorted by expert tells of itself where they are joined again.
    assert found is not None and found.layer == LAYER and found.operator in ("MatMul", "Concat")


def over_and_back(graph: onnx.GraphProto) -> None:
    """By 2^30 and back: equal in float32, and infinite on the way in float16."""
    for name, factor in (("up", 2.0**15), ("down", 2.0**-15)):
        graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float16), name))
    products = [("IN", "up", "a"), ("a", "up", "b"), ("b", "down", "c"), ("c", "down", "OUT")]
    made = [helper.make_node("Mul", [read, by], [value]) for read, by, value in products]
    behind(graph, of_layer(graph, "MatMul", -1), *made)


@pytest.mark.slow
def test_names_an_overflow(find: Find) -> None:
    found = find("olmoe", "trt", graph(over_and_back), calls=1, precision="fp16")
    assert found is not None and found.overflow is not None
    assert (found.layer, found.operator) == (LAYER, "Mul") and found.overflow > 65504
    assert str(found).startswith("overflow in layer 1, Mul output ")
    # Where the graph is one of float32 it is none.
    assert find("olmoe", "trt", graph(wide_over_and_back), calls=1, precision="fp32") is None


def wide_over_and_back(graph: onnx.GraphProto) -> None:
    over_and_back(graph)
    for tensor in graph.initializer:
        if tensor.name in ("up", "down"):
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


@pytest.mark.slow
@pytest.mark.usefixtures("shared_traces")
@pytest.mark.parametrize("planted", [False, True], ids=["checkpoint", "ingot"])
def test_says_whether_eager_pytorch_overflows_too(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path, planted: bool
) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    checkpoint = make_checkpoint("olmoe")

    def enlarge(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        # Finite in float16, unlike sums of it.
        weights[name] *= 6e4 / weights[name].abs().max()
        save_file(weights, path, {"format": "pt"})

    right = Checkpoint.open(checkpoint)
    if not planted:
        enlarge(checkpoint)
        right = Checkpoint.open(checkpoint)
    ingot = make_ingot(checkpoint, "trt", builder="none", precision="fp16")
    folder = shutil.copytree(ingot, tmp_path / "copy")
    if planted:
        weight(name, lambda a: (a.astype(np.float32) * 2e5).astype(a.dtype))(folder)
    reference = Reference(right, "generate", "float16")
    report = examine(folder, reference, Stages(), plan=QUICK, verify=False)
    assert report.verdict == "failed" and report.place is not None
    assert report.place.startswith("overflow in layer 1, MatMul output ")
    said = "does not overflow" if planted else "overflows too: use --precision bf16"
    assert f"eager PyTorch in float16 {said}" in report.place
    fits = [each for each in report.failures if "does not fit float16" in each]
    assert bool(fits) is not planted
