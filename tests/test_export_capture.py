"""The canonical graph: its interface, and what no graph of ours may hold."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from ingot.export.ingot import GRAPH
from ingot.plugins.moe_dispatch import moe_dispatch


@pytest.fixture(scope="module")
def canonical(tiny_onnx: Path) -> ir.Model:
    return ir.load(tiny_onnx / GRAPH)


def test_inputs_and_outputs_have_their_documented_names_and_shapes(canonical: ir.Model) -> None:
    def shape(value: ir.Value) -> list[int | str]:
        assert value.shape is not None
        return [d if isinstance(d, int) else str(d) for d in value.shape]

    inputs = {value.name: shape(value) for value in canonical.graph.inputs}
    outputs = {value.name: shape(value) for value in canonical.graph.outputs}
    past, total = (["batch", 2, f"{which}_sequence", 16] for which in ("past", "total"))
    assert inputs == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total_sequence"],
        "position_ids": ["batch", "sequence"],
        "logits_to_keep": [1],
        **{f"past_key_values.{i}.{kind}": past for i in range(2) for kind in ("key", "value")},
    }
    assert outputs == {
        "logits": ["batch", "kept_sequence", 512],
        **{f"present.{i}.{kind}": total for i in range(2) for kind in ("key", "value")},
    }


def test_no_size_is_read_from_a_cache(canonical: ir.Model) -> None:
    shapes = [node for node in canonical.graph if node.op_type == "Shape"]
    assert shapes
    for node in shapes:
        read = node.inputs[0]
        assert read is not None
        if read.name not in ("input_ids", "attention_mask"):
            # Of hidden states, which have the sizes of the token ids; a cache may have spare room.
            assert not read.is_graph_input() and read.shape is not None
            assert {str(d) for d in read.shape if not isinstance(d, int)} <= {"batch", "sequence"}


def test_the_graph_carries_no_trace_of_this_machine(tiny_onnx: Path) -> None:
    text = (tiny_onnx / GRAPH).read_bytes()
    assert str(Path(__file__).parent.parent).encode() not in text
    assert b"site-packages" not in text


def test_the_model_passes_the_onnx_checker(tiny_onnx: Path) -> None:
    moe_dispatch.register_schema()
    onnx.checker.check_model(str(tiny_onnx / GRAPH), full_check=True)
