"""Weights in blocks as an ingot's graph has them: decoded as ONNX Runtime's kernels decode them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from ingot.runtime.onnxruntime_session import open_session
from ingot.validate.identity.weights_blocks import (
    blocked,
    is_side,
    stored_rows,
    uses_of,
)
from ingot.validate.identity.weights_files import Reader, read_header
from ingot.validate.identity.weights_graph import Graph, Layout, LayoutError

MICROSOFT = "com.microsoft"
RNG = np.random.default_rng(5)
Tensors = dict[str, np.ndarray]


def in_blocks(rows: int, columns: int, bits: int, size: int, zero_points: bool) -> Tensors:
    """Random bytes: every one of them is some number."""
    blocks = -(-columns // size)
    tensors = {
        "w": RNG.integers(0, 256, (rows, blocks, size * bits // 8), np.uint8),
        "w.scales": RNG.normal(0, 0.1, (rows, blocks)).astype(np.float32),
    }
    if zero_points:
        zeros = RNG.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8)
        tensors["w.zero_points"] = zeros
    return tensors


def written(
    folder: Path, nodes: list[onnx.NodeProto], tensors: Tensors, inputs: dict[str, int]
) -> Path:
    """A graph with its tensors in a safetensors file beside it, as an ingot has them."""
    save_file(tensors, folder / "weights.safetensors")
    header = read_header(folder / "weights.safetensors")
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(name, dtype, None) for name, dtype in inputs.items()],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=10,
    )
    for name, array in tensors.items():
        tensor = model.graph.initializer.add(
            name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape
        )
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", "weights.safetensors"),
            ("offset", header[name].begin),
            ("length", array.nbytes),
        ):
            tensor.external_data.add(key=key, value=str(value))
    shape = onnx.numpy_helper.from_array(np.array([tensors["w"].shape[0], -1]), "flat")
    model.graph.initializer.append(shape)
    onnx.save(model, folder / "model.onnx")
    return folder


def computed(folder: Path, **feeds: np.ndarray) -> np.ndarray:
    return np.asarray(open_session(folder / "model.onnx").run(None, feeds)[0])


def decoded(folder: Path, step: int = 1) -> np.ndarray:
    weight = blocked(Graph.read(folder, "model.onnx"), "w")
    assert weight is not None and weight.matrices == 1
    with Reader() as reader:
        piece = weight.piece(reader, 0, 0, -(-weight.rows // step), step)
    return piece.decoded()[:, : weight.columns]


def product(tensors: Tensors, columns: int, bits: int, size: int) -> onnx.NodeProto:
    fields: dict[str, Any] = {"K": columns, "N": len(tensors["w"]), "bits": bits}
    fields["block_size"] = size
    return helper.make_node("MatMulNBits", ["x", *tensors], ["y"], domain=MICROSOFT, **fields)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_matrix_is_what_its_product_with_one_is(
    bits: int, size: int, zero_points: bool, tmp_path: Path
) -> None:
    # Three blocks of a row, so that its last zero point has half a byte, and the last not full.
    columns = 2 * size + 20
    tensors = in_blocks(7, columns, bits, size, zero_points)
    nodes = [product(tensors, columns, bits, size)]
    folder = written(tmp_path, nodes, tensors, {"x": TensorProto.FLOAT})
    right = computed(folder, x=np.eye(columns, dtype=np.float32)).T
    np.testing.assert_allclose(decoded(folder), right, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(decoded(folder, step=2), decoded(folder)[::2])


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_is_the_rows_that_are_looked_up(
    bits: int, zero_points: bool, tmp_path: Path
) -> None:
    tensors = in_blocks(11, 96, bits, 32, zero_points)
    nodes = [
        helper.make_node("Reshape", ["w", "flat"], ["table"]),
        helper.make_node(
            "GatherBlockQuantized",
            ["table", "ids", *[name for name in tensors if name != "w"]],
            ["y"],
            domain=MICROSOFT,
            bits=bits,
            block_size=32,
            gather_axis=0,
            quantize_axis=1,
        ),
    ]
    folder = written(tmp_path, nodes, tensors, {"ids": TensorProto.INT64})
    np.testing.assert_array_equal(decoded(folder), computed(folder, ids=np.arange(11)))
    graph = Graph.read(folder, "model.onnx")
    assert uses_of(graph, "w") and is_side(graph, "w.scales") and not is_side(graph, "w")
    assert not uses_of(graph, "w.scales")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"K": 100}, r"are not 100 columns of 4 bits in blocks of 32"),
        ({"K": 64}, r"are not 64 columns"),
        ({"block_size": 64}, r"in blocks of 64"),
        ({"bits": 8}, r"are not 96 columns of 8 bits"),
        ({"bits": 2}, r"it is read by MatMulNBits with numbers of 2 bits in blocks of 32"),
    ],
)
def test_refuses_tensors_that_do_not_fit_their_reader(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    tensors = in_blocks(7, 96, 4, 32, True)
    node = product(tensors, 96, 4, 32)
    for name, value in change.items():
        (held,) = (each for each in node.attribute if each.name == name)
        held.i = value
    folder = written(tmp_path, [node], tensors, {"x": TensorProto.FLOAT})
    with pytest.raises(LayoutError, match=said):
        decoded(folder)


def test_refuses_two_readers_that_take_a_table_for_two_things(tmp_path: Path) -> None:
    tensors = in_blocks(32, 32, 8, 32, False)
    nodes = [product(tensors, 30, 8, 32), product(tensors, 31, 8, 32)]
    nodes[1].output[0] = "z"
    folder = written(tmp_path, nodes, tensors, {"x": TensorProto.FLOAT})
    with pytest.raises(LayoutError, match="another number of columns"):
        decoded(folder)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_rows_are_found_wherever_a_layout_has_them(interleaved: bool, backwards: bool) -> None:
    experts, height = 3, 8
    rows = np.arange(experts * height).reshape(experts, height)
    stored = rows[::-1] if backwards else rows
    if interleaved:
        stored = stored.reshape(experts, 2, height // 2).swapaxes(1, 2).reshape(experts, height)
    layout = Layout(interleaved=interleaved, backwards=backwards)
    for expert in range(experts):
        for row in range(height):
            for count in range(1, height - row + 1):
                found = np.full(count, -1)
                for each in stored_rows(layout, experts, height, expert, row, count):
                    places = each.first + each.step * np.arange(each.height)
                    found[each.begin : each.begin + each.height] = stored[each.matrix, places]
                np.testing.assert_array_equal(found, rows[expert, row : row + count])
