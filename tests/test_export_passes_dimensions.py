"""Dimensions get the names of the documented inputs; the numbers are as they were."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import Arrays, notices, notices_nothing_done, parsed, refuses, run

from ingot.export.passes.dimensions import NameDimensions

INPUTS: dict[str, tuple[int | str, ...]] = {
    "ids": ("batch", "sequence"),
    "past": ("batch", 2, "past_sequence"),
}
TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
traced (float[s27, s43] ids, float[s27, 2, s9] past) =>
    (float[s27, 2, "s43 + s9"] present, float["s27*s43"] flat)
<float[s27, 2, s43] twice, float[s27, 1, s43] row>
{
    one = Constant <value_ints: ints = [1]> ()
    row = Unsqueeze (ids, one)
    twice = Concat <axis = 1> (row, row)
    present = Concat <axis = 2> (past, twice)
    all = Constant <value_ints: ints = [-1]> ()
    flat = Reshape (ids, all)
}
"""


def traced() -> ir.Model:
    model = parsed(TEXT.replace('"s43 + s9"', "a").replace('"s27*s43"', "f"))
    present, flat = model.graph.outputs
    # As the tracer spells what it has worked out.
    present.shape, flat.shape = ir.Shape(["s27", 2, "s9 + s43"]), ir.Shape(["s27*s43"])
    return model


def shapes(model: ir.Model) -> dict[str | None, str]:
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return {value.name: str(value.shape) for value in values}


def test_symbols_become_names_everywhere() -> None:
    model = traced()
    assert NameDimensions(INPUTS)(model).modified
    assert shapes(model) == {
        "ids": "[batch,sequence]",
        "past": "[batch,2,past_sequence]",
        "one": "[1]",
        "row": "[batch,1,sequence]",
        "twice": "[batch,2,sequence]",
        "present": "[batch,2,total_sequence]",
        "all": "[1]",
        "flat": "[batch*sequence]",
    }


def test_the_numbers_stay() -> None:
    random = np.random.default_rng(0)
    feeds: Arrays = {
        "ids": random.normal(size=(3, 4)).astype(np.float32),
        "past": random.normal(size=(3, 2, 5)).astype(np.float32),
    }
    before = run(traced(), feeds)
    model = traced()
    NameDimensions(INPUTS)(model)
    after = run(model, feeds)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert np.array_equal(after["present"][:, 0, 5:], feeds["ids"])


def test_refuses_an_input_it_knows_nothing_of() -> None:
    why = "the value past is an input without documented dimensions"
    refuses(NameDimensions({"ids": INPUTS["ids"]}), traced(), why)


def test_refuses_an_input_of_another_rank() -> None:
    change = NameDimensions({**INPUTS, "past": ("batch", "past_sequence")})
    refuses(change, traced(), r"past is \[s27,2,s9\], and documented as")


def forget_a_symbol(model: ir.Model) -> None:
    model.graph[1].outputs[0].shape = ir.Shape(["batch", 1, "s43"])


def forget_an_input(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape(["batch", "s"])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (forget_a_symbol, r"the value row has the tracer's symbols in \[batch,1,s43\]"),
        (forget_an_input, r"the value ids is \[batch,s\] and not"),
    ],
)
def test_notices_its_own_mistakes(spoil: Callable[[ir.Model], None], why: str) -> None:
    notices(NameDimensions(INPUTS), traced(), spoil, why)


def test_notices_what_is_left() -> None:
    notices_nothing_done(NameDimensions(INPUTS), traced(), "the value ids is")
