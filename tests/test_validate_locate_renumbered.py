"""A wrong node is found however the values of its graph are numbered, and in half precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MakeCheckpoint, MakeIngot
from located import (
    FAMILIES,
    GRANITE,
    JETMOE,
    LAYER,
    MAMBA2,
    OLMOE,
    TARGETS,
    Find,
    Subjects,
    bypass,
    check,
    finder,
    graph,
    nodes,
    reader,
    round_state,
    weight,
)
from traces import Traces

from ingot.export.request import EXTRA_OUTPUTS


@pytest.fixture(scope="module")
def subjects(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> Subjects:
    return Subjects(make_checkpoint, make_ingot)


@pytest.fixture
def find(subjects: Subjects, traces: Traces, tmp_path: Path) -> Find:
    """``find(family, target, change, ...)``: see ``located.finder``."""
    return finder(subjects, traces, tmp_path)


# Family and half precision; each is a trace of its own, and so most of them are slow.
HALVES = [
    pytest.param(family, precision, marks=[pytest.mark.slow] * (precision != fast))
    for family, fast in (
        ("granite", ""),
        ("jetmoe", ""),
        ("mamba2", "fp16"),
        ("olmoe", "bf16"),
    )
    for precision in ("fp16", "bf16")
]


# By family: a weight, and the layer and operator that read it.
DAMAGED: dict[str, list[tuple[str, int | None, str]]] = {
    "granite": [
        (f"{GRANITE}mlp.down_proj.weight", 1, "MatMul"),
        ("model.norm.weight", None, "RMSNormalization"),
    ],
    "jetmoe": [
        (f"{JETMOE}self_attention.experts.router.layer.weight", 1, "Gemm"),
        (f"{JETMOE}mlp.input_linear.weight", 1, "MoeDispatch"),
    ],
    "mamba2": [
        (f"{MAMBA2}in_proj.weight", 1, "MatMul"),
        (f"{MAMBA2}conv1d.weight", 1, "CausalConv"),
        # It stays float32.
        (f"{MAMBA2}D", 1, "Mamba2Scan"),
    ],
    "olmoe": [
        ("model.embed_tokens.weight", None, "Gather"),
        (f"{OLMOE}self_attn.o_proj.weight", 1, "MatMul"),
        (f"{OLMOE}mlp.gate.weight", 1, "Gemm"),
        (f"{OLMOE}mlp.experts.down_proj", 1, "MoeDispatch"),
        ("lm_head.weight", None, "MatMul"),
    ],
}


@pytest.mark.parametrize(("family", "precision"), HALVES)
def test_finds_a_weight_in_half_precision(find: Find, family: str, precision: str) -> None:
    assert find(family, "trt", lambda _folder: None, precision=precision) is None
    for name, layer, operator in DAMAGED[family]:
        change = weight(name, lambda a: (a.astype(np.float32) * np.float32(1.01)).astype(a.dtype))
        check(find(family, "trt", change, precision=precision), "trt", layer, operator)


def test_finds_a_state_that_is_rounded_to_another_half_precision(find: Find) -> None:
    found = find("mamba2", "trt", graph(round_state), precision="fp16")
    check(found, "trt", 1, "Cast")


def test_names_a_cast_that_only_rounds(find: Find) -> None:
    """To the graph's own precision: it changes nothing where all is computed in float32."""
    rounded = partial(round_state, to=onnx.TensorProto.FLOAT16)
    found = find("mamba2", "trt", graph(rounded), precision="fp16")
    assert found is not None
    assert (found.value, found.operator, found.ratio) == ("present_states.1.ssm", "Cast", 0.0)


@pytest.mark.slow
def test_finds_a_bfloat16_value_in_a_float32_graph(find: Find) -> None:
    """ONNX Runtime hands out no such array, since numpy has no such dtype."""

    def change(graph: onnx.GraphProto) -> None:
        norm = reader(graph, f"{OLMOE}self_attn.q_norm.weight")
        reshape = reader(graph, norm.output[0])
        narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
        back = onnx.helper.make_node("Cast", [reshape.output[0]], ["back"], to=wide)
        for node in graph.node:
            if reshape.output[0] in node.input:
                node.input[list(node.input).index(reshape.output[0])] = "back"
        reshape.input[0] = "narrow"
        at = list(graph.node).index(reshape)
        graph.node.insert(at + 1, back)
        cast = onnx.helper.make_node("Cast", [norm.output[0]], ["narrow"], to=narrow)
        graph.node.insert(at, cast)

    check(find("olmoe", "onnx", graph(change)), "onnx", 1, "Cast")


Harmless = Callable[[onnx.GraphProto], None]


def numbered(graph: onnx.GraphProto) -> list[str]:
    """The values whose names say nothing, in the order of computation."""
    outputs = {value.name for value in graph.output}
    made = [name for node in graph.node for name in node.output if name]
    return [n for n in made if n not in outputs and n.partition(".")[0] not in EXTRA_OUTPUTS]


def rename(graph: onnx.GraphProto, names: dict[str, str], begin: int = 0) -> None:
    """Other names for values, where nodes from one on read them, branches included."""
    for node in graph.node[begin:]:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        for attribute in node.attribute:
            rename(attribute.g, names)


def insert(graph: onnx.GraphProto, value: str, *operators: str, **attributes: Any) -> None:
    """Nodes of one input behind a value; what read it reads the last. Their names have a blank."""
    (at,) = (index for index, node in enumerate(graph.node) if value in node.output)
    made = [f"{value} {number}" for number in range(len(operators))]
    rename(graph, {value: made[-1]}, at + 1)
    for operator, source, name in zip(operators, [value, *made], made, strict=False):
        at += 1
        node = onnx.helper.make_node(operator, [source], [name], **attributes)
        graph.node.insert(at, node)


def renumbered(change: Harmless) -> Harmless:
    """A change, after which values are named as the exporter names them: in their order.

    So a value more takes the name of the one that was at its place.
    """

    def apply(graph: onnx.GraphProto) -> None:
        before = numbered(graph)
        change(graph)
        counted = [*before, *(f"last_{number}" for number in range(999))]
        names = dict(zip(numbered(graph), counted, strict=False))
        assert sum(old != new for old, new in names.items()) > len(before) / 3
        rename(graph, names)
        for node in graph.node:
            for index, name in enumerate(node.output):
                node.output[index] = names.get(name, name)

    return apply


def identity_first(graph: onnx.GraphProto) -> None:
    insert(graph, graph.node[0].output[0], "Identity")


def doubled_negations(graph: onnx.GraphProto) -> None:
    for norm in nodes(graph, "RMSNormalization"):
        insert(graph, norm.output[0], "Neg", "Neg")


def casts(graph: onnx.GraphProto) -> None:
    """To what the value is, behind every product but that of the head, which is an output."""
    weight = next(t for t in graph.initializer if "layers.1" in t.name and "norm" in t.name)
    for product in nodes(graph, "MatMul")[:-1]:
        insert(graph, product.output[0], "Cast", to=weight.data_type)


def weights_by_another_name(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            other = f"{tensor.name} "
            rename(graph, {tensor.name: other})
            graph.node.insert(0, onnx.helper.make_node("Identity", [tensor.name], [other]))


def all_of_them(graph: onnx.GraphProto) -> None:
    for change in (casts, doubled_negations, identity_first, weights_by_another_name):
        change(graph)


def no_guard(graph: onnx.GraphProto) -> None:
    """Without the first node that keeps a buffer from being used again, which none is here."""
    experts = nodes(graph, "MoE")[0].output[0]
    (guard,) = (node for node in nodes(graph, "Where") if node.input[1] == experts)
    bypass(graph, guard, guard.input[1])


def another_operator(family: str, graph: onnx.GraphProto) -> None:
    """Another function of one value in layer 1."""
    right, wrong = ("Sigmoid", "Tanh") if family == "mamba2" else ("Neg", "Abs")
    if nodes(graph, "RotaryEmbedding"):
        right = wrong = "RotaryEmbedding"
    layer = LAYER[family].removesuffix("mixer.")
    norm = next(n for n in nodes(graph, "RMSNormalization") if n.input[1].startswith(layer))
    behind = graph.node[list(graph.node).index(norm) :]
    # The names of what was inserted have a blank.
    node = next(n for n in behind if n.op_type == right and " " not in n.output[0])
    node.op_type, node.doc_string = wrong, "wrong"
    for each in node.attribute:
        # Pairs are neighbours, and not half a head apart.
        each.i = 1 if each.name == "interleaved" else each.i


@pytest.fixture
def find_renumbered(find: Find) -> Find:
    """``find(family, target, harmless, ...)``: the place in an ingot whose values are renumbered.

    Beside the harmless change it has another operator in layer 1, and its value is what is found.
    """

    def find_in_renumbered(
        family: str, target: str, harmless: Harmless, precision: str = "fp32"
    ) -> None:
        wrong = onnx.NodeProto()

        def damage(graph: onnx.GraphProto) -> None:
            harmless(graph)
            another_operator(family, graph)

        def change(graph: onnx.GraphProto) -> None:
            renumbered(damage)(graph)
            (node,) = (node for node in graph.node if node.doc_string == "wrong")
            wrong.CopyFrom(node)

        found = find(family, target, graph(change), precision=precision)
        assert found is not None and found.ratio > 100
        assert (found.layer, found.operator, found.value) == (1, wrong.op_type, wrong.output[0])

    return find_in_renumbered


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f != "olmoe")) for f in FAMILIES]
)
def test_names_the_node_however_the_values_are_numbered(
    find_renumbered: Find, family: str, target: str
) -> None:
    find_renumbered(family, target, all_of_them)


@pytest.mark.parametrize(
    "harmless", [identity_first, doubled_negations, casts, weights_by_another_name]
)
def test_names_the_node_whatever_else_the_graph_has(
    find_renumbered: Find, harmless: Harmless
) -> None:
    find_renumbered("granite", "onnx", harmless)


def test_names_the_node_where_the_graph_has_one_less(find_renumbered: Find) -> None:
    find_renumbered("olmoe", "ort", no_guard)


def test_names_the_node_of_a_renumbered_graph_in_float16(find_renumbered: Find) -> None:
    find_renumbered("mamba2", "trt", all_of_them, precision="fp16")


@pytest.mark.parametrize("target", TARGETS)
def test_finds_nothing_where_nodes_change_no_number(find: Find, target: str) -> None:
    assert find("olmoe", target, graph(renumbered(doubled_negations))) is None


def test_finds_a_wrong_node_more(find: Find) -> None:
    def change(graph: onnx.GraphProto) -> None:
        product = reader(graph, "model.layers.0.self_attn.k_proj.weight")
        (heads,) = (node for node in graph.node if product.output[0] in node.input)
        insert(graph, heads.output[0], "Neg")

    found = find("granite", "onnx", graph(change))
    check(found, "onnx", 0, "Neg")
