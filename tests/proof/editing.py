"""Changes of an ONNX graph: nodes behind a value, wired so that what read it reads the new one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ingot.validate.truth.probes_quantised import PREFIX

Array = np.ndarray[Any, np.dtype[Any]]
Edit = Callable[["Editor"], None]
# From the name of a value to that of another, whose nodes it makes.
Make = Callable[["Editor", str], str]
# From the rank of what it decides over to the name of a boolean that broadcasts to it.
Condition = Callable[["Editor", int], str]


class Editor:
    """One model, and the place in it where nodes are made.

    Attributes:
        model: changed in place; its weights stay in their file.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._at = 0
        self._made = 0

    @property
    def graph(self) -> onnx.GraphProto:
        """The main graph."""
        return self.model.graph

    def nodes(self, *operators: str) -> list[onnx.NodeProto]:
        """The nodes of some operators in the main graph, in the order of computation.

        Without those that a validation puts beside others to read what they choose.
        """
        found = [node for node in self.graph.node if node.op_type in operators]
        return [node for node in found if not _is_probe(node)]

    def anywhere(self, *operators: str) -> list[onnx.NodeProto]:
        """The same in branches too."""
        found = [node for node in _nested(self.graph.node) if node.op_type in operators]
        return [node for node in found if not _is_probe(node)]

    def alike(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """A node, and what stands beside it to read what it chooses: the same kernel runs both."""
        read = set(filter(None, node.input))
        return [
            node,
            *(
                each
                for each in self.graph.node
                if _is_probe(each) and each.op_type == node.op_type and read & set(each.input)
            ),
        ]

    def body(self, function: str, *operators: str) -> list[onnx.NodeProto]:
        """The nodes of some operators in a function body, nested graphs included."""
        (found,) = (each for each in self.model.functions if each.name == function)
        return [node for node in _nested(found.node) if node.op_type in operators]

    def maker(self, value: str) -> onnx.NodeProto:
        """The node of the main graph that makes a value."""
        node: onnx.NodeProto
        (node,) = (node for node in self.graph.node if value in node.output)
        return node

    def reader(self, ending: str) -> onnx.NodeProto:
        """The first node of the main graph with an input that ends so, such as a weight."""
        found: onnx.NodeProto = next(
            node for node in self.graph.node if any(name.endswith(ending) for name in node.input)
        )
        return found

    def made_of(self, ending: str) -> str:
        """The value that is made of a weight, by the end of the weight's name."""
        return str(self.reader(ending).output[0])

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """An initializer."""
        self._made += 1
        name = f"planted_constant_{self._made}"
        array = np.asarray(value, dtype=dtype)
        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def __call__(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A node at the place where nodes are made; its first output."""
        self._made += 1
        name = output or f"planted_{self._made}"
        node = helper.make_node(operator, list(inputs), [name], **attributes)
        self.graph.node.insert(self._at, node)
        self._at += 1
        return name

    def change(self, value: str, make: Make, where: Condition | None = None, rank: int = 3) -> None:
        """What read a value, or the graph's output of that name, is another one.

        Args:
            value: of a node, or an input of the graph.
            make: the other one.
            where: this boolean holds; everywhere by default.
            rank: of the value.
        """
        right = f"{value} as it was"
        made = [at for at, node in enumerate(self.graph.node) if value in node.output]
        if made:
            node = self.graph.node[made[0]]
            node.output[list(node.output).index(value)] = right
            self._at = made[0] + 1
            self._finish(value, right, make, where, rank)
            return
        self._at = 0
        wrong = f"{value} as it is read"
        for node in list(_nested(self.graph.node)):
            for index, name in enumerate(node.input):
                if name == value:
                    node.input[index] = wrong
        self._finish(wrong, value, make, where, rank)

    def _finish(
        self, name: str, right: str, make: Make, where: Condition | None, rank: int
    ) -> None:
        wrong = make(self, right)
        if where is None:
            self("Identity", wrong, output=name)
        else:
            self("Where", where(self, rank), wrong, right, output=name)

    def input_of(self, node: onnx.NodeProto, index: int, make: Make) -> None:
        """One input of one node of the main graph is another value."""
        self._at = list(self.graph.node).index(node)
        node.input[index] = make(self, node.input[index])


def _is_probe(node: onnx.NodeProto) -> bool:
    return any(output.startswith(PREFIX) for output in node.output)


def _nested(nodes: Any) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nested(attribute.g.node)


def attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    """Set an attribute that a node may have already."""
    kept = [each for each in node.attribute if each.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def value_of(node: onnx.NodeProto, name: str) -> Any:
    """An attribute that a node has."""
    (found,) = (each for each in node.attribute if each.name == name)
    return helper.get_attribute_value(found)


def scaled(factor: float, dtype: Any = np.float32) -> Make:
    """Times a factor."""
    return lambda edit, value: edit(
        "Mul", value, edit("CastLike", edit.constant(factor, dtype), value)
    )


def rounded(to: int, back: int = onnx.TensorProto.FLOAT) -> Make:
    """Through another type."""
    return lambda edit, value: edit("Cast", edit("Cast", value, to=to), to=back)


def plus(number: int) -> Make:
    """Plus a whole number."""
    return lambda edit, value: edit("Add", value, edit.constant(number))


def rolled(axis: int) -> Make:
    """Every place has what the one before it has, and the first the last's."""

    def make(edit: Editor, value: str) -> str:
        axes, last, zero = (edit.constant([n]) for n in (axis, -1, 0))
        end = edit.constant([np.iinfo(np.int64).max])
        moved = edit("Slice", value, last, end, axes)
        return edit("Concat", moved, edit("Slice", value, zero, last, axes), axis=axis)

    return make


def reversed_along(axis: int) -> Make:
    """The other way round."""

    def make(edit: Editor, value: str) -> str:
        last, end, axes, step = (edit.constant([n]) for n in (-1, np.iinfo(np.int64).min, axis, -1))
        return edit("Slice", value, last, end, axes, step)

    return make
