"""The base of every pass: when conditions run, and what their sentences say."""

from __future__ import annotations

import importlib
import pkgutil
from typing import ClassVar

import onnx_ir as ir
import pytest
from text_graph import operators, parsed

from ingot.export import passes
from ingot.export.passes.graph_pass import Applied, GraphPass, PassError, run
from ingot.plugins.errors import IngotError

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
small (float[n] x) => (float[n] y) { y = Relu (x) }
"""
BRANCHED = """
<ir_version: 10, opset_import: ["" : 23]>
branched (bool which, float[n] x) => (y) {
    y = If (which) <
        then_branch = one () => (float[n] a) { a = Relu (x) },
        else_branch = two () => (float[n] b) { b = Tanh (x) }
    >
}
"""


class Unmet(GraphPass):
    """Leaves the graph as it is, and says of every node what it was asked to say."""

    looks_for: ClassVar[tuple[str, ...] | None] = ("Relu",)

    def __init__(self, *, before: bool = True, after: bool = True) -> None:
        super().__init__()
        self.before = before
        self.after = after
        self.called = 0

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            self.require(self.before, node, "is early")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.called += 1
        return ir.passes.PassResult(model, modified=False)

    def ensures(self, model: ir.Model) -> None:
        for value in model.graph.inputs:
            self.ensure(self.after, value, "is late")


class AddOutput(Unmet):
    """Gives the graph another output."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        model.graph.outputs.append(model.graph.inputs[0])
        return ir.passes.PassResult(model, modified=True)


class MayAddOutput(AddOutput):
    """The same, and says so."""

    keeps_interface = False


class AnyNode(Unmet):
    """What counts every node."""

    looks_for = None


def every_pass() -> list[type[GraphPass]]:
    for module in pkgutil.iter_modules(passes.__path__, f"{passes.__name__}."):
        importlib.import_module(module.name)
    ours = GraphPass.__subclasses__()
    return [each for each in ours if each.__module__.startswith(f"{passes.__name__}.")]


def test_finds_the_passes() -> None:
    assert {"SimplifyReshapes", "NoteFactors", "NamePlugins"} < {p.__name__ for p in every_pass()}


@pytest.mark.parametrize("change", every_pass())
def test_every_pass_states_both_conditions(change: type[GraphPass]) -> None:
    assert {"requires", "ensures"} <= vars(change).keys()


def test_names_the_pass_and_the_node() -> None:
    with pytest.raises(ir.passes.PreconditionError) as refused:
        Unmet(before=False)(parsed(TEXT))
    assert str(refused.value) == "Unmet cannot run: Relu y is early"
    with pytest.raises(ir.passes.PostconditionError) as noticed:
        Unmet(after=False)(parsed(TEXT))
    assert str(noticed.value) == "Unmet went wrong: the value x is late"


def test_a_refused_graph_is_not_changed() -> None:
    change = Unmet(before=False)
    with pytest.raises(ir.passes.PreconditionError):
        change(parsed(TEXT))
    assert change.called == 0


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_switch_nothing_is_checked(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INGOT_DEBUG")
    if value is not None:
        monkeypatch.setenv("INGOT_DEBUG", value)
    model = parsed(BRANCHED)
    change = Unmet(before=False, after=False)
    result = change(model)
    assert result.model is model and change.called == 1
    # As onnx-ir chains passes.
    assert change(result).model is model and change.called == 2


def test_what_it_looks_for_is_refused_in_a_branch() -> None:
    with pytest.raises(ir.passes.PreconditionError) as refused:
        Unmet()(parsed(BRANCHED))
    sentence = "Unmet cannot run: Relu a is in a subgraph, where the pass does not look"
    assert str(refused.value) == sentence
    Unmet()(parsed(BRANCHED.replace("Relu", "Sigmoid")))
    with pytest.raises(ir.passes.PreconditionError, match="Sigmoid a is in a subgraph"):
        AnyNode()(parsed(BRANCHED.replace("Relu", "Sigmoid")))


def test_inputs_and_outputs_stay_unless_a_pass_says_so() -> None:
    with pytest.raises(ir.passes.PostconditionError) as noticed:
        AddOutput()(parsed(TEXT))
    assert str(noticed.value) == (
        "AddOutput went wrong: the graph had set() and now has {'output 1 x FLOAT [n]'}"
    )
    model = parsed(TEXT)
    assert MayAddOutput()(model).modified
    assert operators(model.graph) == {"Relu": 1}


class ReluToTanh(Unmet):
    """Takes each Relu for a Tanh behind a Neg, and gives what is left an attribute."""

    looks_for = ()
    keeps_interface = False

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in list(model.graph):
            if node.op_type != "Relu":
                node.attributes["noted"] = ir.AttrInt64("noted", 1)
                continue
            neg = ir.node("Neg", [node.inputs[0]])
            tanh = ir.node("Tanh", [neg.outputs[0]], outputs=[ir.Value(name="made")])
            model.graph.insert_before(node, [neg, tanh])
            ir.convenience.replace_all_uses_with(
                node.outputs[0], tanh.outputs[0], replace_graph_outputs=True
            )
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=True)


class AddConstant(Unmet):
    """Gives the graph a constant."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        value = ir.Value(name="one", const_value=ir.tensor([1.0], name="one"))
        model.graph.register_initializer(value)
        return ir.passes.PassResult(model, modified=True)


def test_what_each_pass_did_is_recorded() -> None:
    model = parsed(TEXT)
    applied = run(model, [Unmet(), ReluToTanh(), ReluToTanh(), AddConstant()])
    assert applied == (
        Applied("Unmet"),
        Applied("ReluToTanh", {"Relu": 1}, {"Neg": 1, "Tanh": 1}),
        Applied("ReluToTanh", attributes=2),
        Applied("AddConstant", initializers=1),
    )
    assert [each.summary() for each in applied] == [
        {"name": "Unmet"},
        {"name": "ReluToTanh", "removed": {"Relu": 1}, "added": {"Neg": 1, "Tanh": 1}},
        {"name": "ReluToTanh", "attributes": 2},
        {"name": "AddConstant", "initializers": 1},
    ]
    assert run(parsed(TEXT), [ReluToTanh()]) == applied[1:2]


class Lost(Unmet):
    """Looks for what the graph does not have."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        raise KeyError("past_sequence")


class Refusal(Unmet):
    """Says what the user is to do."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        raise IngotError("The graph is upside down; turn it.")


class Amiss(Unmet):
    """Fails at its conditions, which look for what the graph does not have."""

    def requires(self, model: ir.Model) -> None:
        raise KeyError("past_sequence")


@pytest.mark.parametrize("change", [Lost(), Amiss(), Unmet(before=False), Unmet(after=False)])
def test_a_graph_that_a_pass_does_not_expect_is_refused_in_a_sentence(change: Unmet) -> None:
    with pytest.raises(PassError) as refused:
        run(parsed(TEXT), [change])
    assert str(refused.value).startswith(type(change).__name__)
    assert "\n" not in str(refused.value)


def test_what_a_pass_could_not_find_is_said() -> None:
    with pytest.raises(PassError, match=r"^Lost cannot change this graph \(KeyError: 'past_seq"):
        run(parsed(TEXT), [Lost()])


def test_a_refusal_of_a_pass_comes_as_it_is() -> None:
    with pytest.raises(IngotError, match=r"^The graph is upside down; turn it\.$"):
        run(parsed(TEXT), [Refusal()])
