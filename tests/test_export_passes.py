"""Each pass on its own: what it changes in the graph, and that the numbers stay."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MakeCheckpoint

from ingot.export.capture import Captured, capture
from ingot.export.passes.attention import AttentionToGroupQueryAttention
from ingot.export.passes.moe import MoeDispatchToMoE
from ingot.export.passes.tied import TiedHeadToFusedMatMul
from ingot.export.write_weights import weights_of, write_weights
from ingot.graphs.checkpoint import Checkpoint, block_reader
from ingot.graphs.family import family_of
from ingot.runtime.onnxruntime_session import open_session

Change = Callable[[ir.Model], object]


@functools.cache
def _captured_once(folder: Path) -> Captured:
    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint)
    model = family.build(checkpoint.config, "generate")
    parts = family.weight_map(model, checkpoint, "generate")
    return capture(model, block_reader(checkpoint, parts, model))


def captured(folder: Path) -> Captured:
    """A copy of the canonical graph; tracing it anew for each test would take seconds."""
    once = _captured_once(folder)
    return replace(once, model=once.model.clone())


def run(found: Captured, folder: Path) -> list[np.ndarray]:
    """All outputs of one prefill, three rows with different padding."""
    folder.mkdir()
    write_weights(found.model, folder, "weights.safetensors", lambda _bytes: None)
    ir.save(found.model, folder / "model.onnx")
    session = open_session(folder / "model.onnx")
    random = np.random.default_rng(5)
    ids = random.integers(0, 512, (3, 11))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    mask[2, :8] = 0
    feeds = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(-1) - 1, 0),
    }
    for state in found.states:
        sizes = [3, state.input_shape[1], 0, state.input_shape[3]]
        feeds[state.input] = np.zeros(sizes, dtype=np.float32)
    outputs = session.run(None, feeds)
    real = mask != 0
    return [
        array[real] if array.ndim == 3 else array.swapaxes(1, 2)[real]
        for array in map(np.asarray, outputs)
    ]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def assert_same_numbers(folder: Path, change: Change, tmp_path: Path) -> tuple[ir.Model, ir.Model]:
    before, after = captured(folder), captured(folder)
    change(after.model)
    expected, found = run(before, tmp_path / "before"), run(after, tmp_path / "after")
    assert len(expected) == len(found)
    for want, array in zip(expected, found, strict=True):
        assert want.std() > 0.1
        np.testing.assert_allclose(array, want, rtol=0, atol=1e-5)
    assert [v.name for v in before.model.graph.outputs] == [
        v.name for v in after.model.graph.outputs
    ]
    return before.model, after.model


def test_moe_dispatch_becomes_moe(tiny: Path, tmp_path: Path) -> None:
    before, after = assert_same_numbers(tiny, MoeDispatchToMoE(), tmp_path)
    assert operators(before)["MoeDispatch"] == 2
    assert operators(after)["MoE"] == 2
    assert operators(after)["MoeDispatch"] == 0
    assert not after.functions


def test_moe_dispatch_with_another_activation_stays(
    make_checkpoint: MakeCheckpoint,
) -> None:
    model = captured(make_checkpoint(hidden_act="relu")).model
    result = MoeDispatchToMoE()(model)
    assert not result.modified
    assert operators(model)["MoeDispatch"] == 2
    assert model.functions


def test_attention_becomes_group_query_attention(tiny: Path, tmp_path: Path) -> None:
    before, after = assert_same_numbers(tiny, AttentionToGroupQueryAttention(), tmp_path)
    assert operators(before)["Attention"] == 2
    assert operators(after)["GroupQueryAttention"] == 2
    assert operators(after)["Attention"] == 0
    # Only the kernel reads a cache, whose buffer may have spare room.
    for value in after.graph.inputs:
        if (value.name or "").startswith("past_key_values"):
            assert [use.node.op_type for use in value.uses()] == ["GroupQueryAttention"]


def test_attention_with_a_head_size_the_kernel_refuses_stays(
    make_checkpoint: MakeCheckpoint,
) -> None:
    model = captured(make_checkpoint(hidden_size=48)).model
    assert not AttentionToGroupQueryAttention()(model).modified
    assert operators(model)["Attention"] == 2


def test_tied_head_needs_no_transpose(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tie_word_embeddings=True)
    before, after = assert_same_numbers(folder, TiedHeadToFusedMatMul(), tmp_path)
    assert operators(after)["FusedMatMul"] == 1
    assert operators(after)["Transpose"] == operators(before)["Transpose"] - 1


def test_untied_head_is_left_alone(tiny: Path) -> None:
    assert not TiedHeadToFusedMatMul()(captured(tiny).model).modified


def test_linear_weights_are_stored_as_matmul_wants_them(tiny: Path) -> None:
    model = captured(tiny).model
    for node in model.graph:
        if node.op_type == "Transpose" and node.inputs[0] is not None:
            assert not node.inputs[0].is_initializer()
    stored = {value.name: value.const_value for value in weights_of(model)}
    original = Checkpoint.open(tiny).read("model.layers.0.self_attn.k_proj.weight")
    found = stored["model.layers.0.self_attn.k_proj.weight"]
    assert found is not None
    np.testing.assert_array_equal(found.numpy(), original.numpy().T)


@pytest.fixture(scope="module")
def canonical(tiny: Path) -> ir.Model:
    return captured(tiny).model


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
        **{f"past_key_values.{i}.{kind}": past for i in range(2) for kind in ("key", "value")},
    }
    assert outputs == {
        "logits": ["batch", "sequence", 512],
        **{f"present.{i}.{kind}": total for i in range(2) for kind in ("key", "value")},
    }


def test_no_size_is_read_from_a_cache(canonical: ir.Model) -> None:
    shapes = [node for node in canonical.graph if node.op_type == "Shape"]
    assert shapes
    for node in shapes:
        assert node.inputs[0] is not None
        assert node.inputs[0].name in ("input_ids", "attention_mask")


def test_the_graph_carries_no_trace_of_this_machine(canonical: ir.Model) -> None:
    text = ir.serde.serialize_model(canonical.clone()).SerializeToString()
    assert str(Path(__file__).parent.parent).encode() not in text
    assert b"site-packages" not in text


def test_the_model_passes_the_onnx_checker(tiny_onnx: Path) -> None:
    import onnx

    from ingot.plugins.moe_dispatch import moe_dispatch

    moe_dispatch.register_schema()
    onnx.checker.check_model(str(tiny_onnx / "model.onnx"), full_check=True)
