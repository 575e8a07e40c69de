"""Copies of ingots with a small wrong in them, and the place where it is found."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from conftest import MakeCheckpoint, MakeIngot
from onnx import numpy_helper
from traces import Traces

from ingot.export.graph import Capture
from ingot.export.ingot import GRAPH, WEIGHTS, Manifest
from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.validate.identity.checks import Subject
from ingot.validate.locate.calls import Fed
from ingot.validate.locate.find import runs_of
from ingot.validate.locate.locate import locate
from ingot.validate.result import Location
from ingot.validate.truth.inputs import Inputs, make_inputs
from ingot.validate.truth.runs import recorded_run

Array = np.ndarray[Any, np.dtype[Any]]
Change = Callable[[Path], None]
TARGETS = ("onnx", "ort", "trt")
FAMILIES = ("granite", "mamba2", "olmoe")
# By safetensors' name.
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# The parameters of the middle one of three layers.
LAYER = {
    "granite": "model.layers.1.",
    "jetmoe": "model.layers.1.",
    "mamba2": "backbone.layers.1.mixer.",
    "olmoe": "model.layers.1.",
}


class Subjects:
    """By family: a checkpoint of three layers and its ingots, made when first asked for."""

    def __init__(self, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> None:
        self._make_checkpoint, self._make_ingot = make_checkpoint, make_ingot
        self._checkpoints: dict[str, Path] = {}
        self._ingots: dict[tuple[str, str, str], Path] = {}

    def checkpoint(self, family: str) -> Path:
        if family not in self._checkpoints:
            self._checkpoints[family] = self._make_checkpoint(family, num_hidden_layers=3)
        return self._checkpoints[family]

    def ingot(self, family: str, target: str, precision: str) -> Path:
        key = family, target, precision
        if key not in self._ingots:
            self._ingots[key] = self._make_ingot(
                self.checkpoint(family),
                target,
                precision=precision,
                builder="none",
            )
        return self._ingots[key]


Find = Callable[..., Location | None]


def subject(folder: Path, checkpoint: Checkpoint, capture: Capture | None = None) -> Subject:
    """An ingot, as a validation takes it apart."""
    return Subject(folder, Manifest.read(folder), checkpoint, Stages(), capture)


def main_calls(inputs: Inputs | None = None) -> list[Fed]:
    """The prefill and the decode steps of a validation."""
    main = recorded_run("main", inputs or make_inputs(512), 0)
    return list(runs_of([main])[0].calls)


def finder(subjects: Subjects, traces: Traces, folder: Path) -> Find:
    """``find(family, target, change, ...)``: where a copy that is changed goes wrong."""

    def find_in_copy(
        family: str,
        target: str,
        change: Change,
        inputs: Inputs | None = None,
        calls: int | None = None,
        precision: str = "fp32",
    ) -> Location | None:
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(subjects.ingot(family, target, precision), copy)
        change(copy)
        checkpoint = Checkpoint.open(subjects.checkpoint(family))
        return locate(subject(copy, checkpoint, traces), main_calls(inputs)[:calls])

    return find_in_copy


def weight(name: str, change: Callable[[Array], Array]) -> Change:
    """A weight of the file changed in place; its shape is as the graph has it."""

    def apply(folder: Path) -> None:
        path = folder / WEIGHTS
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(size))[name]
        begin = 8 + size + entry["data_offsets"][0]
        array = np.memmap(path, DTYPES[entry["dtype"]], "r+", begin, tuple(entry["shape"]))
        before = np.array(array)
        array[...] = change(before.copy())
        array.flush()
        assert not np.array_equal(array, before)

    return apply


def graph(change: Callable[[onnx.GraphProto], None]) -> Change:
    """The graph file changed."""

    def apply(folder: Path) -> None:
        model = onnx.load(str(folder / GRAPH), load_external_data=False)
        change(model.graph)
        (folder / GRAPH).write_bytes(model.SerializeToString())

    return apply


def both(*changes: Change) -> Change:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def nodes(graph: onnx.GraphProto, operator: str) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == operator]


def reader(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    """The only node that reads a value."""
    (found,) = (index for index, node in enumerate(graph.node) if name in node.input)
    node: onnx.NodeProto = graph.node[found]
    return node


def bypass(graph: onnx.GraphProto, node: onnx.NodeProto, source: str) -> None:
    """Drop a node; what read it reads ``source``."""
    for other in graph.node:
        for index, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[index] = source
    graph.node.remove(node)


def swapped(array: Array) -> Array:
    array[[2, 5]] = array[[5, 2]]
    return array


def transposed(array: Array) -> Array:
    return array.T


def with_nan(array: Array) -> Array:
    array[3, 4] = math.nan
    return array


def swap_experts(family: str) -> Change:
    names = [f"{LAYER[family]}mlp.experts.{which}_proj" for which in ("gate_up", "down")]
    return both(*(weight(name, swapped) for name in names))


def scale_frequencies(graph: onnx.GraphProto) -> None:
    """By 1 %: the only float constant that is a vector."""
    (tensor,) = (
        tensor
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.raw_data and len(tensor.dims) == 1
    )
    array = numpy_helper.to_array(tensor) * np.float32(1.01)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def shift_mask(graph: onnx.GraphProto) -> None:
    """Every key is as visible as the one before it."""
    last = np.array([-1], dtype=np.int64)
    graph.initializer.append(numpy_helper.from_array(last, "minus_one"))
    graph.initializer.append(numpy_helper.from_array(np.array([0], dtype=np.int64), "begin"))
    graph.initializer.append(numpy_helper.from_array(np.array([1], dtype=np.int64), "columns"))
    reads = [n for n in graph.node if "attention_mask" in n.input and n.op_type == "Unsqueeze"]
    assert reads
    for node in reads:
        node.input[0] = "shifted"
    most = ["attention_mask", "begin", "minus_one", "columns"]
    first = ["attention_mask", "begin", "columns", "columns"]
    for index, made in enumerate(
        (
            onnx.helper.make_node("Slice", most, ["most"]),
            onnx.helper.make_node("Slice", first, ["first"]),
            onnx.helper.make_node("Concat", ["first", "most"], ["shifted"], axis=1),
        )
    ):
        graph.node.insert(index, made)


def skip_query_norm(graph: onnx.GraphProto) -> None:
    node = reader(graph, f"{LAYER['olmoe']}self_attn.q_norm.weight")
    bypass(graph, node, node.input[0])


def drop_residual(graph: onnx.GraphProto) -> None:
    """The sum behind layer 1: layer 2 reads the layer's input instead."""
    read = reader(graph, "model.layers.2.input_layernorm.weight").input[0]
    (node,) = (node for node in graph.node if read in node.output)
    bypass(graph, node, node.input[0])


def cache_in_wrong_order(graph: onnx.GraphProto) -> None:
    """New tokens before the past, which the first call cannot show."""
    (node,) = (node for node in graph.node if "present.1.key" in node.output)
    node.input[0], node.input[1] = node.input[1], node.input[0]


def round_state(graph: onnx.GraphProto, to: int = onnx.TensorProto.BFLOAT16) -> None:
    """The scan's new state in half precision."""
    (scan,) = (node for node in graph.node if "present_states.1.ssm" in node.output)
    scan.output[1] = "wide_state"
    float32 = onnx.TensorProto.FLOAT
    at = list(graph.node).index(scan) + 1
    cast = onnx.helper.make_node("Cast", ["narrow_state"], ["present_states.1.ssm"], to=float32)
    graph.node.insert(at, cast)
    cast = onnx.helper.make_node("Cast", ["wide_state"], ["narrow_state"], to=to)
    graph.node.insert(at, cast)


def rescale_experts(graph: onnx.GraphProto) -> None:
    """Top-k weights that sum to 1 in layer 2, where they should not."""
    node = [*nodes(graph, "MoeDispatch"), *nodes(graph, "MoE")][2]
    (flag,) = (a for a in node.attribute if a.name.startswith("normalize"))
    assert flag.i == 0
    flag.i = 1


GRANITE, JETMOE, MAMBA2, OLMOE = LAYER.values()
# What a user reads where a target has an operator of its own.
LOWERED = {
    ("ort", "MoeDispatch"): "MoE",
    ("ort", "Concat"): "GroupQueryAttention",
    # Heads are not made before they are rotated.
    ("ort", "Reshape"): "RotaryEmbedding",
}


def check(found: Location | None, target: str, layer: int | None, operator: str) -> None:
    assert found is not None
    assert (found.layer, found.operator) == (layer, LOWERED.get((target, operator), operator))
    assert found.ratio > 100
