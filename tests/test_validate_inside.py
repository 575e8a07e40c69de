"""What is wrong inside of a node: in a branch, in the body of a loop, in a function."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

from ingot.validate.locate.graph import Graph
from ingot.validate.locate.inside import differs, first_inside
from ingot.validate.locate.overflow import beyond, halves
from ingot.validate.locate.pairs import pair_values

RIGHT = """
<ir_version: 10, opset_import: ["": 21, "own": 1]>
main (float[n] x, bool c) => (float[n] y, float[n] z)
<float[1] scale = {3.0}, int64[1] steps = {4}>
{
    a = Neg(x)
    y = If(c) <
        then_branch = then_graph () => (float[n] t) {
            p = Exp(a)
            t = Mul(p, scale)
        },
        else_branch = else_graph () => (float[n] e) {
            half = Constant <value = float {0.5}> ()
            q = Sub(a, x)
            e = Mul(q, half)
        }
    >
    z = own.F <alpha: float = 2.0> (y, a)
}
<domain: "own", opset_import: ["": 21]>
F <alpha> (u, v) => (r)
{
    k = Constant <value_float: float = @alpha> ()
    m = Sub(u, v)
    n = Softplus(m)
    r = Mul(n, k)
}
"""


def parsed(text: str) -> Graph:
    model = onnx.parser.parse_model(text)
    return Graph(model, lambda _name: pytest.fail("no weight is read"), "float32")


def changed(*changes: tuple[str, str]) -> Graph:
    text = RIGHT
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return parsed(text)


def inside(graph: Graph, value: str) -> tuple[bool, str]:
    """Whether a node differs from the right one, and what in it does."""
    reference = parsed(RIGHT)
    pairs = pair_values(reference, graph)
    node, found = reference.makers[value], graph.makers[pairs[value]]
    return (
        differs(reference, node, graph, found),
        first_inside(reference, node, graph, found, pairs),
    )


def test_nothing_is_wrong_in_what_is_the_same() -> None:
    for value in ("y", "z"):
        assert inside(parsed(RIGHT), value) == (False, "")


def test_names_of_values_inside_say_nothing() -> None:
    text = RIGHT
    for old, new in (("p = Exp", "w = Exp"), ("Mul(p", "Mul(w"), ("m = ", "o = "), ("(m)", "(o)")):
        text = text.replace(old, new)
    for value in ("y", "z"):
        assert inside(parsed(text), value) == (False, "")
    # Nor do those of the outer graph that a branch reads.
    text = (
        RIGHT.replace("a = Neg", "other = Neg").replace("(a", "(other").replace(", a)", ", other)")
    )
    assert inside(parsed(text), "y") == (False, "")


@pytest.mark.parametrize(
    ("old", "new", "value", "place"),
    [
        ("Exp(a)", "Softplus(a)", "y", "then_branch: Softplus output p"),
        ("Mul(p, scale)", "Mul(p, p)", "y", "then_branch: Mul output t"),
        ("{0.5}", "{0.25}", "y", "else_branch: Mul output e"),
        ("e = Mul(q, half)", "g = Neg(q) e = Mul(g, half)", "y", "else_branch: Neg output g"),
        ("Sub(a, x)", "Identity(a)", "y", "else_branch: Sub output q, which it does not have"),
        ("Softplus(m)", "Relu(m)", "z", "body: Relu output n"),
        ("m = Sub(u, v)", "m = Sub(v, u)", "z", "body: Sub output m"),
        ("r = Mul(n, k)", "i = Neg(n) r = Mul(i, k)", "z", "body: Neg output i"),
        ("r = Mul(n, k)", "r = Identity(n)", "z", "body: Identity output r"),
    ],
)
def test_names_the_first_operator_that_is_wrong(old: str, new: str, value: str, place: str) -> None:
    assert inside(changed((old, new)), value) == (True, place)


def test_names_an_operator_that_reads_outer_values_in_another_order() -> None:
    """What it makes is wrong; that its node is another is not seen from the outside."""
    assert inside(changed(("Sub(a, x)", "Sub(x, a)")), "y") == (
        False,
        "else_branch: Sub output q",
    )


def test_a_constant_of_the_outer_graph_is_told_by_its_numbers() -> None:
    found = inside(changed(("{3.0}", "{4.0}")), "y")
    assert found == (True, "then_branch: Mul output t")


def test_a_function_sees_no_constant_of_the_graph_that_calls_it() -> None:
    """Whatever that graph calls its own."""
    text = NESTED.replace("int64[1] steps = {4}", "int64[1] m = {4}, float[1] j = {1.0}")
    reference, graph = parsed(NESTED), parsed(text)
    node, found = reference.makers["z"], graph.makers["z"]
    assert not differs(reference, node, graph, found)
    pairs = pair_values(reference, graph)
    assert first_inside(reference, node, graph, found, pairs) == ""
    # Nor does a branch inside of it.
    loop = NESTED.replace(
        "w = Constant <value_int: int = 1> () n = own.G(m)",
        "w = Constant <value_int: int = 1> () b = Cast <to: int = 9> (w) "
        "n = If (b) <then_branch = s () => (s) { s = Abs(m) }, "
        "else_branch = d () => (d) { d = Neg(m) }>",
    )
    other = loop.replace("int64[1] steps = {4}", "int64[1] m = {4}")
    reference, graph = parsed(loop), parsed(other)
    assert not differs(reference, reference.makers["z"], graph, graph.makers["z"])


def test_an_attribute_of_the_call_is_of_the_node_itself() -> None:
    assert inside(changed(("float = 2.0", "float = 3.0")), "z") == (True, "")


NESTED = (
    RIGHT.replace("n = Softplus(m)", "w = Constant <value_int: int = 1> () n = own.G(m)")
    + """
<domain: "own", opset_import: ["": 21]>
G (i) => (o)
{
    j = Abs(i)
    o = Sqrt(j)
}
"""
)


def test_names_what_is_wrong_in_a_function_of_a_function() -> None:
    reference, wrong = parsed(NESTED), parsed(NESTED.replace("Sqrt(j)", "Exp(j)"))
    pairs = pair_values(reference, wrong)
    node, found = reference.makers["z"], wrong.makers["z"]
    place = first_inside(reference, node, wrong, found, pairs)
    assert place == "body: G output n, body: Exp output o"


# --- what float16 cannot hold


def numbers(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("expected", "found", "half", "largest"),
    [
        (numbers(1, -70000), numbers(1, -70000), True, 70000.0),
        (numbers(1, 65504), numbers(1, 65504), True, None),
        # It is rounded to the largest.
        (numbers(1, 65519), numbers(1, 65519), True, None),
        (numbers(1, 65520), numbers(1, 65520), True, 65520.0),
        # A mask is infinite as it should be.
        (numbers(1, -np.inf), numbers(1, -np.inf), True, None),
        (numbers(1, 70000), numbers(1, 70000), False, None),
        # A cast that should not be there.
        (numbers(1, 70000), numbers(1, np.inf), False, 70000.0),
        (numbers(1, 2), numbers(1, np.nan), False, None),
    ],
)
def test_finds_what_float16_cannot_hold(
    expected: np.ndarray, found: np.ndarray, half: bool, largest: float | None
) -> None:
    assert beyond(expected, found, expected, half=half) == largest


def test_padding_may_overflow() -> None:
    expected, other = numbers(1, 70000), numbers(1, 90000)
    assert beyond(expected, expected, other, half=True) is None
    assert beyond(expected[:1], expected, other, half=True) is None


def test_tells_the_values_that_are_float16() -> None:
    text = """
    <ir_version: 10, opset_import: ["": 21]>
    main (float[n] x) => (float[n] y)
    {
        h = Cast <to: int = 10> (x)
        g = Neg(h)
        y = Cast <to: int = 1> (g)
    }
    """
    assert halves(parsed(text)) == {"h", "g"}


def test_is_no_stop_where_types_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_model: onnx.ModelProto) -> None:
        raise RuntimeError

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fails)
    assert halves(parsed(RIGHT)) == set()
