"""Values of two graphs are paired by what they compute, however they are numbered."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from ingot.validate.locate.graph import AFTER, BEFORE, Graph
from ingot.validate.locate.pairs import pair_values

# Two layers of a rotation, a projection and a sum, and a head.
RIGHT = """
    cos = Cos(positions)
    sin = Sin(positions)
    hidden_states.0 = Relu(ids)
    turned = Neg(hidden_states.0)
    by_cos = Mul(hidden_states.0, cos)
    by_sin = Mul(turned, sin)
    sum = Add(by_cos, by_sin)
    out = MatMul(sum, layers.0.weight)
    hidden_states.1 = Add(hidden_states.0, out)
    turned_1 = Neg(hidden_states.1)
    by_cos_1 = Mul(hidden_states.1, cos)
    by_sin_1 = Mul(turned_1, sin)
    sum_1 = Add(by_cos_1, by_sin_1)
    out_1 = MatMul(sum_1, layers.1.weight)
    hidden_states.2 = Add(hidden_states.1, out_1)
    head = MatMul(hidden_states.2, weight)
    logits = Mul(head, three)
"""
LINE = re.compile(r"([\w.]+) = (\w+)\((.*)\)")
VALUES = [value for value, _, _ in LINE.findall(RIGHT)]


def graph(text: str, called: Callable[[str], str] = str) -> Graph:
    """A graph of two inputs, as its lines say.

    Args:
        text: a line a node; weights are named by their layer, other numbers by their words.
        called: what the graph calls a value.
    """
    nodes = [
        helper.make_node(operator, list(map(called, inputs.split(", "))), [called(value)])
        for value, operator, inputs in LINE.findall(text)
    ]
    tensors = [
        numpy_helper.from_array(np.array(number, np.float32), word)
        for word, number in (("one", 1), ("two", 2), ("three", 3))
    ]
    for name in ("layers.0.weight", "layers.1.weight", "weight"):
        external = onnx.TensorProto.EXTERNAL
        tensors.append(onnx.TensorProto(name=name, data_location=external))
    made = onnx.GraphProto(
        node=nodes,
        initializer=tensors,
        input=[onnx.ValueInfoProto(name=name) for name in ("ids", "positions")],
        output=[onnx.ValueInfoProto(name="logits")],
    )
    return Graph(
        onnx.ModelProto(graph=made), lambda _name: pytest.fail("no weight is read"), "float32"
    )


def changed(*changes: tuple[str, str]) -> str:
    """The right graph with other lines in place of some."""
    text = RIGHT
    for line, others in changes:
        assert text.count(f" {line}\n") == 1
        text = text.replace(f" {line}\n", f" {others}\n".replace("; ", "\n    "))
    return text


def paired(text: str, reference: str = RIGHT) -> dict[str, str]:
    """By the reference's values those of another graph, which numbers all without a name."""
    values = [value for value, _, _ in LINE.findall(text)]
    numbers = {
        value: f"val_{number}"
        for number, value in enumerate(values)
        if "." not in value and value != "logits"
    }
    names = {number: value for value, number in numbers.items()}
    found = pair_values(graph(reference), graph(text, lambda value: numbers.get(value, value)))
    assert found.pop("ids") == "ids" and found.pop("positions") == "positions"
    return {value: names.get(other, other) for value, other in found.items()}


def same(*without: str) -> dict[str, str]:
    """Every value paired with itself, but for some that are not paired."""
    return {value: value for value in VALUES if value not in without}


def test_pairs_the_values_of_a_graph_that_is_only_numbered_otherwise() -> None:
    assert paired(RIGHT) == same()


OUT = "out = MatMul(sum, layers.0.weight)"
SUM = "sum = Add(by_cos, by_sin)"
# What changes no number, and what is then the same as the line's value: itself, or the new one.
HARMLESS = [
    ("cos = Cos(positions)", "new = Cos(positions); cos = Identity(new)", "new"),
    (SUM, "new = Add(by_cos, by_sin); sum = Mul(new, one)", "new"),
    (SUM, "new = Mul(by_cos, one); sum = Add(new, by_sin)", "sum"),
    ("by_sin = Mul(turned, sin)", "a = Neg(turned); b = Neg(a); by_sin = Mul(b, sin)", "by_sin"),
    (SUM, f"a = Add(sin, sin); b = Sub(a, sin); {SUM}", "sum"),
    (OUT, "w = Identity(layers.0.weight); out = MatMul(sum, w)", "out"),
    ("logits = Mul(head, three)", "a = Neg(two); logits = Mul(head, three)", "logits"),
]


@pytest.mark.parametrize(("line", "others", "equal"), HARMLESS)
def test_a_node_more_or_less_changes_no_other_pair(line: str, others: str, equal: str) -> None:
    text = changed((line, others))
    name = line.partition(" ")[0]
    assert paired(text) == {**same(), name: equal}
    assert paired(RIGHT, text) == {**same(name), equal: name}


def test_a_node_more_in_each_layer_changes_no_pair() -> None:
    """Also early, where it would number all values anew, and several in a row."""
    out_1 = "out_1 = MatMul(sum_1, layers.1.weight)"
    text = changed(
        ("cos = Cos(positions)", "a = Neg(positions); b = Neg(a); cos = Cos(b)"),
        (SUM, "c = Identity(by_cos); sum = Add(c, by_sin)"),
        (OUT, "d = Neg(sum); e = Neg(d); out = MatMul(e, layers.0.weight)"),
        ("sum_1 = Add(by_cos_1, by_sin_1)", "f = Identity(by_cos_1); sum_1 = Add(f, by_sin_1)"),
        (out_1, "g = Neg(sum_1); h = Neg(g); out_1 = MatMul(h, layers.1.weight)"),
    )
    assert paired(text) == same()
    assert paired(RIGHT, text) == same()


FAULTS = {
    "operator": ("by_sin_1 = Mul(turned_1, sin)", "by_sin_1 = Div(turned_1, sin)"),
    "operator of one value": ("turned_1 = Neg(hidden_states.1)", "turned_1 = Abs(hidden_states.1)"),
    "what it reads": ("by_sin_1 = Mul(turned_1, sin)", "by_sin_1 = Mul(turned_1, cos)"),
    "order": ("by_sin_1 = Mul(turned_1, sin)", "by_sin_1 = Mul(sin, turned_1)"),
    "weight": (
        "out_1 = MatMul(sum_1, layers.1.weight)",
        "out_1 = MatMul(sum_1, layers.0.weight)",
    ),
    "constant": ("logits = Mul(head, three)", "logits = Mul(head, two)"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("line", ["", *dict.fromkeys(line for line, _, _ in HARMLESS)])
def test_a_faulty_node_is_paired_with_the_right_one(line: str, fault: str) -> None:
    """With all that stands behind it, and whether an earlier node is more or less or not."""
    for before, others, equal in HARMLESS:
        if before == line:
            text = changed((before, others), FAULTS[fault])
            name = before.partition(" ")[0]
            assert paired(text) == {**same(), name: equal}
    assert paired(changed(FAULTS[fault])) == same()


def test_what_only_the_reference_has_is_not_paired() -> None:
    text = changed(
        ("by_sin_1 = Mul(turned_1, sin)", ""),
        ("sum_1 = Add(by_cos_1, by_sin_1)", "sum_1 = Add(by_cos_1, turned_1)"),
    )
    assert paired(text) == same("by_sin_1")
    # The later layer reads what the earlier was given, and begins to differ where it has a weight.
    text = changed(("hidden_states.1 = Add(hidden_states.0, out)", ""))
    found = paired(text.replace("hidden_states.1", "hidden_states.0"))
    assert "hidden_states.1" not in found and found["out_1"] == "out_1"
    assert found.items() <= same().items()


def test_what_is_found_by_its_name_is_nothing_else() -> None:
    text = RIGHT.replace("logits =", "elsewhere =")
    assert paired(text) == same("logits")


def test_the_order_of_nodes_that_do_not_depend_on_each_other_does_not_count() -> None:
    lines = RIGHT.strip().split("\n")
    lines[1], lines[2] = lines[2], lines[1]
    lines[3], lines[4] = lines[4], lines[3]
    assert paired("\n".join(["", *lines, ""])) == same()


def test_places_values_by_the_layers_that_they_depend_on() -> None:
    positions = graph(changed(HARMLESS[5][:2])).positions
    assert {value: positions[value] for value in VALUES} == {
        **dict.fromkeys(VALUES[:7], BEFORE),
        **dict.fromkeys(VALUES[7:13], 0),
        **dict.fromkeys(VALUES[13:15], 1),
        **dict.fromkeys(VALUES[15:], AFTER),
    }
    # A weight under another name is one all the same, and has no place of its own.
    assert "w" not in positions
