"""What is taken out of a traced graph: what onnxscript's own optimizer takes out, in less time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from conftest import MakeCheckpoint, MakeIngot
from onnxscript import optimizer

from ingot.export import simplify as simplified
from ingot.export.capture import capture


def bytes_of(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


@pytest.fixture(
    scope="module",
    params=[("jetmoe", "fp32"), ("granite", "fp32"), ("clipped", "fp16")],
    ids=lambda param: param[0],
)
def traced(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> ir.Model:
    """A graph as the tracer leaves it."""
    kind, precision = request.param
    found: list[ir.Model] = []

    def kept(model: ir.Model) -> None:
        found.append(model.clone())
        simplified.simplify(model)

    checkpoint: Path = (
        make_checkpoint("olmoe", clip_qkv=1e6) if kind == "clipped" else make_checkpoint(kind)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ingot.export.capture.simplify", kept)
        target = "onnx" if precision == "fp32" else "trt"
        make_ingot(checkpoint, target, capture=capture, precision=precision, builder="none")
    (model,) = found
    return model


def test_gives_what_the_whole_optimizer_gives(traced: ir.Model) -> None:
    ours, theirs = traced.clone(), traced.clone()
    simplified.simplify(ours)
    optimizer.optimize(theirs, onnx_shape_inference=False)
    assert len(ours.graph) < len(traced.graph)
    assert bytes_of(ours) == bytes_of(theirs)


@pytest.mark.parametrize("rule", simplified.RULES, ids=lambda rule: str(rule.name))
def test_no_rule_looks_through_the_whole_graph(rule: Any) -> None:
    """As those with several outputs do, at every node."""
    assert rule._matcher.pattern.has_single_output_node
