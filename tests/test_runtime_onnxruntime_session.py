"""The one way to a session of ONNX Runtime: its options, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ingot.runtime.onnxruntime_session import open_session, ort_value
from ingot.runtime.session import SessionError

X = np.array([1.0, 2.0, 3.0], dtype=np.float32)


def sum_with(weight: onnx.TensorProto, operator: str = "Add", domain: str = "") -> bytes:
    """``y = x + weight``, as the bytes of a graph."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy")
    node = helper.make_node(operator, ["x", "w"], ["y"], domain=domain)
    graph = helper.make_graph([node], "sum", [x], [y], [weight])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("elsewhere", 1)]
    bytes_: bytes = helper.make_model(
        graph, opset_imports=opsets, ir_version=10
    ).SerializeToString()
    return bytes_


def stored() -> onnx.TensorProto:
    return helper.make_tensor("w", TensorProto.FLOAT, [3], X)


def external(file: str) -> onnx.TensorProto:
    """A weight of the graph whose bytes lie in a file."""
    weight = onnx.TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL
    )
    weight.external_data.add(key="location", value=file)
    return weight


def test_runs_the_bytes_of_a_graph_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "sum.onnx").write_bytes(sum_with(stored()))
    for graph in (sum_with(stored()), tmp_path / "sum.onnx"):
        (y,) = open_session(graph).run(None, {"x": X})
        np.testing.assert_array_equal(y, 2 * X)


def test_finds_the_weights_of_bytes_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes((10 * X).tobytes())
    graph = sum_with(external("weights.bin"))
    (y,) = open_session(graph, weights_folder=tmp_path).run(None, {"x": X})
    np.testing.assert_array_equal(y, 11 * X)


def test_takes_weights_from_memory_in_place_of_a_file() -> None:
    weights = {"w": ort_value(100 * X)}
    session = open_session(sum_with(external("missing.bin")), weights=weights)
    (y,) = session.run(None, {"x": X})
    np.testing.assert_array_equal(y, 101 * X)


def test_hands_threads_on() -> None:
    options = open_session(sum_with(stored()), threads=2, spinning=False).get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_copies_no_array_but_one_that_is_not_contiguous() -> None:
    array = np.zeros((2, 3), dtype=np.float32)
    bound, copied = ort_value(array), ort_value(array.T)
    array[0, 0] = 7
    assert bound.numpy()[0, 0] == 7 and copied.numpy()[0, 0] == 0


def test_refuses_a_provider_that_is_not_there() -> None:
    with pytest.raises(SessionError, match=r"has no NoExecutionProvider here, but .*CPUExec"):
        open_session(sum_with(stored()), provider="NoExecutionProvider")


def test_refuses_a_graph_it_cannot_load(tmp_path: Path) -> None:
    unknown = sum_with(stored(), "Plus", "elsewhere")
    with pytest.raises(SessionError, match=r"ONNX Runtime 1\.\S+ cannot load the graph: .*Plus"):
        open_session(unknown)
    with pytest.raises(SessionError, match=r"cannot load the good one: .*Plus"):
        open_session(unknown, name="the good one")
    with pytest.raises(SessionError, match=r"cannot load \S+/none\.onnx: "):
        open_session(tmp_path / "none.onnx")


def test_refuses_a_library_without_operators(tmp_path: Path) -> None:
    (tmp_path / "libnone.so").write_bytes(b"")
    with pytest.raises(SessionError, match=r"cannot load the graph: .*libnone\.so"):
        open_session(sum_with(stored()), libraries=[tmp_path / "libnone.so"])
