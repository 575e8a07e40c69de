"""One value in place of another: uses, names and graph outputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from text_graph import interface, parsed, run

from ingot.export.passes.replace import take_place

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
small (float[n] x) => (float[n] middle, float[n] y) {
    middle = Abs (x)
    y = Add (middle, middle)
}
"""


def test_takes_every_use_and_the_name_of_an_output() -> None:
    model = parsed(TEXT)
    before = interface(model)
    old, add = model.graph
    new = ir.node("Relu", [model.graph.inputs[0]])
    model.graph.insert_before(old, new)
    take_place(old.outputs[0], new.outputs[0])
    model.graph.remove(old, safe=True)
    assert interface(model) == before
    assert list(add.inputs) == [new.outputs[0]] * 2
    assert model.graph.outputs[0] is new.outputs[0]
    x = np.array([-2, 3], dtype=np.float32)
    found = run(model, {"x": x})
    assert found["middle"].tolist() == [0, 3] and found["y"].tolist() == [0, 6]
