"""The logits of the last tokens alone are others than the last of all."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ingot.runtime.ort import OrtSession
from proof.editing import Edit, Editor, Make, scaled
from proof.fault import Fault, Where, in_layer
from proof.faults.sessions import SESSION, after
from proof.planting import in_graph, in_kernel, in_session

KIND = "last logits"
COUNT = "logits_to_keep"
# Behind the layers; where the file is wrong, the comparison of graphs has the node.
FILE, KERNEL = Where(None, ("Slice", "Neg", "MatMul", "FusedMatMul")), in_layer(None)


def cut(edit: Editor) -> onnx.NodeProto:
    """The Slice by what is asked for."""
    (turned,) = (node for node in edit.nodes("Neg") if COUNT in node.input)
    found: onnx.NodeProto
    (found,) = (node for node in edit.nodes("Slice") if node.input[1] == turned.output[0])
    return found


def asked(edit: Editor, rank: int) -> str:
    """A ``Condition``: the last logits alone are asked for."""
    del rank
    return edit("Greater", COUNT, edit.constant([0]))


def places(begin: Make, end: Make) -> Edit:
    """The columns from and up to which the hidden states are kept, made of the number asked for."""

    def apply(edit: Editor) -> None:
        node = cut(edit)
        for index, make, of_all in ((1, begin, 0), (2, end, np.iinfo(np.int64).max)):
            edit.input_of(node, index, _where_asked(make, of_all))

    return apply


def _where_asked(make: Make, of_all: int) -> Make:
    def made(edit: Editor, _value: str) -> str:
        return edit("Where", asked(edit, 1), make(edit, COUNT), edit.constant([of_all]))

    return made


def first(edit: Editor, _count: str) -> str:
    """From the first column on."""
    return edit.constant([0])


def count(edit: Editor, value: str) -> str:
    """Up to as many columns as are asked for."""
    return edit("Identity", value)


def from_end(more: int) -> Make:
    """So many columns more before the end."""
    return lambda edit, value: edit("Neg", edit("Add", value, edit.constant([more])))


def to_end(left: int) -> Make:
    """Up to so many columns before the end; 0 is the end."""
    return lambda edit, _value: edit.constant([-left if left else np.iinfo(np.int64).max])


def ignored(edit: Editor) -> None:
    """All are given, whatever is asked for."""
    edit.input_of(cut(edit), 1, lambda edit, value: edit("Mul", value, edit.constant([0])))


def smaller(edit: Editor) -> None:
    """What the head is given is half of itself where the last logits alone are asked for."""
    edit.change(cut(edit).output[0], scaled(0.5), asked)


def nearly(edit: Editor) -> None:
    """The same, by a ten thousandth."""
    edit.change(cut(edit).output[0], scaled(1.0001), asked)


def one_by_default(edit: Editor) -> None:
    """Who does not ask gets the last logits alone."""
    (default,) = (each for each in edit.graph.initializer if each.name == COUNT)
    default.CopyFrom(numpy_helper.from_array(np.array([1]), COUNT))


def no_input(edit: Editor) -> None:
    """Nobody can ask."""
    (value,) = (each for each in edit.graph.input if each.name == COUNT)
    edit.graph.input.remove(value)


def first_of_session(patch: pytest.MonkeyPatch) -> None:
    """The session hands out the first of all logits in place of the last."""
    right = OrtSession.step

    def step(self: OrtSession, input_ids: Any, attention_mask: Any, kept: int = 0) -> Any:
        return right(self, input_ids, attention_mask)[:, : kept or None]

    patch.setattr(OrtSession, "step", step)


def one_more(patch: pytest.MonkeyPatch) -> None:
    """The session hands out one token more than was asked for."""
    right = OrtSession.step

    def step(self: OrtSession, input_ids: Any, attention_mask: Any, kept: int = 0) -> Any:
        return right(self, input_ids, attention_mask, kept + 1 if kept else 0)

    patch.setattr(OrtSession, "step", step)


def late(session: OrtSession, seen: int, output: Any) -> Any:
    """What is handed out after a past is of the token before, where it is not all."""
    tokens = session._tokens.seen - seen
    return np.roll(output, 1, axis=1) if seen and 1 < output.shape[1] < tokens else output


SHIFTED = places(from_end(1), to_end(1))
FIRST = places(first, count)
LONGER = places(from_end(1), to_end(0))

FAULTS: list[Fault] = [
    in_kernel("the first", "granite ort", KIND, FIRST, KERNEL),
    in_kernel("the first", "mamba2 onnx", KIND, FIRST, KERNEL),
    in_graph("the first", "olmoe ort", KIND, FIRST, FILE, ("numbers",)),
    in_kernel("one too early", "olmoe ort", KIND, SHIFTED, KERNEL),
    in_kernel("one too early", "granite int4 zeros ort", KIND, SHIFTED, KERNEL),
    in_graph("one too early", "jetmoe onnx", KIND, SHIFTED, FILE, ("numbers",)),
    in_kernel("one more", "jetmoe ort", KIND, LONGER, KERNEL),
    in_graph("one more", "mamba2 ort", KIND, LONGER, FILE, ("numbers",)),
    in_kernel("all, whatever is asked for", "granite onnx", KIND, ignored, KERNEL),
    in_graph("all, whatever is asked for", "olmoe onnx", KIND, ignored, FILE, ("numbers",)),
    in_kernel("halved", "olmoe onnx", KIND, smaller, KERNEL),
    in_kernel("a ten thousandth larger", "jetmoe onnx", KIND, nearly, KERNEL),
    in_graph("a ten thousandth larger", "granite ort", KIND, nearly, Where(None), ("numbers",)),
    in_graph("one by default", "granite onnx", KIND, one_by_default),
    in_graph("nobody can ask", "olmoe ort", KIND, no_input, None, ("contract",)),
    in_session("the first", "granite ort", first_of_session, SESSION, KIND),
    in_session("one more", "olmoe onnx", one_more, SESSION, KIND),
    in_session("of the token before", "jetmoe onnx", after(late), SESSION, KIND),
]
