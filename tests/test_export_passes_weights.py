"""Weights leave the inputs and take their layout, unread; the numbers and the conditions."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from text_graph import Arrays, notices, notices_nothing_done, operators, parsed, refuses, run, the

from ingot.export.passes.weights import (
    FoldWeightTransposes,
    Weight,
    WeightsToInitializers,
    rearrange,
    scale,
)

# One weight a linear layer reads; one that another node reads as well; a stack of experts.
TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
traced (
    float[n, 4] x,
    float[5, 4] weight_own, float[5, 5] weight_shared, float[3, 5, 5] weight_stack
) => (float[n, 5] y) {
    turned = Transpose <perm = [1, 0]> (weight_own)
    h = MatMul (x, turned)
    turned_shared = Transpose <perm = [1, 0]> (weight_shared)
    again = MatMul (h, turned_shared)
    more = MatMul (again, weight_shared)
    stacked = MatMul (more, weight_stack)
    axis = Constant <value_ints: ints = [0]> ()
    y = ReduceSum <keepdims = 0> (stacked, axis)
}
"""
PREFIX = "weight_"


def stored() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"own": (5, 4), "shared": (5, 5), "stack": (3, 5, 5)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def reader(reads: list[tuple[str, int]]) -> Callable[[str, int], torch.Tensor]:
    weights = stored()

    def read(name: str, block: int) -> torch.Tensor:
        reads.append((name, block))
        return weights[name][block] if name == "stack" else weights[name]

    return read


def into_initializers(reads: list[tuple[str, int]] | None = None) -> WeightsToInitializers:
    return WeightsToInitializers(PREFIX, reader([] if reads is None else reads))


def taken() -> ir.Model:
    model = parsed(TEXT)
    into_initializers()(model)
    return model


X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def before() -> np.ndarray:
    """The result where the weights are still inputs."""
    arrays: Arrays = {f"{PREFIX}{name}": tensor.numpy() for name, tensor in stored().items()}
    return run(parsed(TEXT), {"x": X, **arrays})["y"]


def test_weights_become_initializers_that_are_read_late() -> None:
    reads: list[tuple[str, int]] = []
    model = parsed(TEXT)
    assert into_initializers(reads)(model).modified
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert set(model.graph.initializers) == {"own", "shared", "stack"}
    assert not reads
    values = [value.const_value for value in model.graph.initializers.values()]
    assert [value.blocks for value in values if isinstance(value, Weight)] == [1, 1, 3]
    assert np.array_equal(run(model, {"x": X})["y"], before())
    assert ("stack", 2) in reads


def test_reads_bfloat16_bit_by_bit() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    half (bfloat16[2] x, bfloat16[2] weight_w) => (bfloat16[2] y) { y = Add (x, weight_w) }
    """
    tensor = torch.tensor([0.1, -3e38], dtype=torch.bfloat16)
    model = parsed(text)
    WeightsToInitializers(PREFIX, lambda _name, _block: tensor)(model)
    value = model.graph.initializers["w"].const_value
    assert value is not None
    array = value.numpy()
    assert array.dtype == ml_dtypes.bfloat16
    assert array.astype(np.float32).tolist() == tensor.float().tolist()


def test_refuses_a_weight_that_nothing_reads_also_without_the_switch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("INGOT_DEBUG")
    text = TEXT.replace(
        "float[3, 5, 5] weight_stack", "float[3, 5, 5] weight_stack, float[2] weight_b"
    )
    with pytest.raises(AssertionError, match="the graph never uses the weight b"):
        into_initializers()(parsed(text))


def test_refuses_a_weight_of_unknown_size() -> None:
    text = TEXT.replace("float[5, 4] weight_own", "float[o, 4] weight_own")
    refuses(into_initializers(), parsed(text), r"weight_own is a weight of shape \[o,4\]")


def test_refuses_a_name_twice() -> None:
    model = parsed(TEXT)
    model.graph.register_initializer(ir.val("own", const_value=ir.tensor([1.0], name="own")))
    refuses(into_initializers(), model, "weight_own is a weight whose name an initializer has")


def forget_a_shape(model: ir.Model) -> None:
    model.graph.initializers["own"].shape = ir.Shape([4, 5])


def test_notices_inputs_that_are_left_and_shapes_that_differ() -> None:
    notices_nothing_done(into_initializers(), parsed(TEXT), "weight_own is still an input")
    why = r"own is \[4,5\] and stored in another shape"
    notices(into_initializers(), parsed(TEXT), forget_a_shape, why)


def test_linear_weights_are_stored_as_matmul_wants_them() -> None:
    reads: list[tuple[str, int]] = []
    model = parsed(TEXT)
    into_initializers(reads)(model)
    assert FoldWeightTransposes()(model).modified
    assert not reads
    # That of the shared weight stays.
    assert operators(model.graph)["Transpose"] == 1
    own, shared = (model.graph.initializers[name] for name in ("own", "shared"))
    assert own.shape == (4, 5) and own.const_value is not None
    array = own.const_value.numpy()
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, stored()["own"].numpy().T)
    assert shared.const_value is not None
    np.testing.assert_array_equal(shared.const_value.numpy(), stored()["shared"].numpy())
    np.testing.assert_allclose(run(model, {"x": X})["y"], before(), rtol=0, atol=1e-5)
    assert not FoldWeightTransposes()(model).modified


def test_refuses_a_transpose_that_turns_no_matrix() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    stack (float[3, 5, 4] weight_w) => (float[3, 4, 5] y) {
        y = Transpose <perm = [0, 2, 1]> (weight_w)
    }
    """
    model = parsed(text)
    WeightsToInitializers(PREFIX, lambda _name, _block: torch.zeros(5, 4))(model)
    refuses(FoldWeightTransposes(), model, r"Transpose y does not turn a matrix but \[3,5,4\] by")


def test_refuses_a_constant_that_is_no_weight() -> None:
    model = taken()
    own = model.graph.initializers["own"]
    own.const_value = ir.tensor(stored()["own"].numpy(), name="own")
    refuses(FoldWeightTransposes(), model, "own is transposed and no weight of the checkpoint")


def test_notices_transposes_that_are_left() -> None:
    notices_nothing_done(FoldWeightTransposes(), taken(), "Transpose turned turns a weight at each")


def test_rearranges_and_scales_block_by_block() -> None:
    model = taken()
    value = the(model, "ReduceSum").inputs[0]
    stack = model.graph.initializers["stack"]
    assert value is not None
    rearrange(stack, lambda read: lambda block: read(2 - block), (3, 5, 5))
    scale(stack, 0.5)
    expected = stored()["stack"].numpy()[::-1] * np.float32(0.5)
    assert stack.const_value is not None
    np.testing.assert_array_equal(stack.const_value.numpy(), expected)


def test_scales_half_precision_in_float32_and_rounds_once() -> None:
    array = np.array([1.1, -0.3, 7.7], dtype=np.float16)
    value = ir.val("w", ir.DataType.FLOAT16, [3])
    value.const_value = Weight("w", (3,), ir.DataType.FLOAT16, lambda _block: array)
    scale(value, 0.22)
    found = value.const_value.numpy()
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, (array.astype(np.float32) * np.float32(0.22)).astype("f2"))
