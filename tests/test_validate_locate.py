"""Each small wrong in a copy of an ingot is found in its layer and at its node."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest import MakeCheckpoint, MakeIngot
from onnx import numpy_helper
from traces import Traces

from ingot.export.ingot import GRAPH, WEIGHTS
from ingot.export.request import EXTRA_OUTPUTS
from ingot.graphs.checkpoint import Checkpoint
from ingot.validate.locate.locate import locate
from ingot.validate.result import Location
from ingot.validate.truth.inputs import Inputs, make_inputs

Array = np.ndarray[Any, np.dtype[Any]]
Change = Callable[[Path], None]
TARGETS = ("onnx", "ort", "trt")
FAMILIES = ("granite", "mamba2", "olmoe")
# Family and half precision; each is a trace of its own, and so half of them are slow.
HALVES = [
    pytest.param(family, precision, marks=[pytest.mark.slow] * (precision != fast))
    for family, fast in (
        ("granite", "fp16"),
        ("jetmoe", "bf16"),
        ("mamba2", "fp16"),
        ("olmoe", "bf16"),
    )
    for precision in ("fp16", "bf16")
]
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


@pytest.fixture(scope="module")
def subjects(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> Subjects:
    return Subjects(make_checkpoint, make_ingot)


Find = Callable[..., Location | None]


@pytest.fixture
def find(subjects: Subjects, traces: Traces, tmp_path: Path) -> Find:
    """``find(family, target, change, ...)``: where a copy that is changed goes wrong."""

    def find_in_copy(
        family: str,
        target: str,
        change: Change,
        inputs: Inputs | None = None,
        calls: int | None = None,
        precision: str = "fp32",
    ) -> Location | None:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(subjects.ingot(family, target, precision), copy)
        change(copy)
        checkpoint = Checkpoint.open(subjects.checkpoint(family))
        return locate(copy, checkpoint, inputs or make_inputs(512), calls, capture=traces)

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
LOWERED = {("ort", "MoeDispatch"): "MoE", ("ort", "Concat"): "GroupQueryAttention"}


def check(found: Location | None, target: str, layer: int | None, operator: str) -> None:
    assert found is not None
    assert (found.layer, found.operator) == (layer, LOWERED.get((target, operator), operator))
    assert found.ratio > 100


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("change", "layer", "operator"),
    [
        pytest.param(swap_experts("olmoe"), 1, "MoeDispatch", id="two experts swapped"),
        pytest.param(graph(rescale_experts), 2, "MoeDispatch", id="top-k weights rescaled"),
        pytest.param(
            weight(f"{OLMOE}self_attn.q_norm.weight", np.ones_like),
            1,
            "RMSNormalization",
            id="query norm of ones",
        ),
        pytest.param(
            weight(f"{OLMOE}self_attn.k_norm.weight", np.ones_like),
            1,
            "RMSNormalization",
            id="key norm of ones",
        ),
        pytest.param(
            weight(f"{OLMOE}self_attn.o_proj.weight", transposed), 1, "MatMul", id="o_proj turned"
        ),
        pytest.param(
            weight(f"{OLMOE}self_attn.q_proj.weight", transposed), 1, "MatMul", id="q_proj turned"
        ),
        pytest.param(weight(f"{OLMOE}self_attn.v_proj.weight", with_nan), 1, "MatMul", id="NaN"),
        pytest.param(graph(scale_frequencies), None, "Mul", id="rope by 1.01"),
        pytest.param(
            weight("lm_head.weight", lambda a: a * np.float32(1.001)), None, "MatMul", id="logits"
        ),
        # The first value that both graphs have behind the gap.
        pytest.param(graph(skip_query_norm), 1, "Reshape", id="query norm dropped"),
        # The next layer reads it, so it is missed itself.
        pytest.param(graph(drop_residual), 1, "Add", id="residual dropped"),
        pytest.param(graph(shift_mask), None, "Unsqueeze", id="mask off by one"),
    ],
)
def test_finds_what_is_wrong_in_olmoe(
    find: Find, target: str, change: Change, layer: int | None, operator: str
) -> None:
    check(find("olmoe", target, change), target, layer, operator)


@pytest.mark.parametrize("target", ["onnx", "trt"])
def test_finds_what_only_decode_shows(find: Find, target: str) -> None:
    found = find("olmoe", target, graph(cache_in_wrong_order))
    check(found, target, 1, "Concat")
    assert found is not None and found.value == "present.1.key"


@pytest.mark.parametrize(
    ("change", "needed"), [(cache_in_wrong_order, 2), (shift_mask, 1)], ids=["decode", "prefill"]
)
def test_needs_no_call_behind_the_first_that_fails(
    find: Find, change: Callable[[onnx.GraphProto], None], needed: int
) -> None:
    found = find("olmoe", "onnx", graph(change), calls=needed)
    assert found is not None and found == find("olmoe", "onnx", graph(change))
    # A call more would have shown it.
    assert needed == 1 or find("olmoe", "onnx", graph(change), calls=needed - 1) is None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("change", "lowered"),
    [
        pytest.param(weight(f"{MAMBA2}D", np.zeros_like), "Mul", id="D dropped"),
        pytest.param(weight(f"{MAMBA2}dt_bias", np.zeros_like), "Add", id="dt_bias dropped"),
    ],
)
def test_finds_what_is_wrong_in_mamba2(
    find: Find, target: str, change: Change, lowered: str
) -> None:
    operator = lowered if target == "ort" else "Mamba2Scan"
    check(find("mamba2", target, change), target, 1, operator)


@pytest.mark.parametrize("target", TARGETS)
def test_finds_a_state_that_is_rounded(find: Find, target: str) -> None:
    found = find("mamba2", target, graph(round_state))
    check(found, target, 1, "Cast")
    assert found is not None and found.value == "present_states.1.ssm"


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_finds_a_residual_multiplier_that_is_dropped(find: Find, target: str) -> None:
    change = weight(f"{GRANITE}mlp.down_proj.weight", lambda a: a / np.float32(0.22))
    check(find("granite", target, change), target, 1, "MatMul")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_finds_nothing_where_nothing_is_wrong(find: Find, family: str, target: str) -> None:
    assert find(family, target, lambda _folder: None) is None


@pytest.mark.parametrize(
    ("family", "task", "extra"),
    [
        ("olmoe", "features", ("router_logits", "hidden_states")),
        # Its hidden states are scaled where they are outputs, and the scale is folded otherwise.
        ("granite", "generate", ("hidden_states",)),
    ],
)
def test_captures_the_same_graph_afresh(
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    family: str,
    task: str,
    extra: tuple[str, ...],
) -> None:
    """With the task and the further outputs of the ingot, on which the names depend."""
    folder = make_checkpoint(family)
    ingot = make_ingot(folder, "ort", task=task, extra_outputs=extra)
    assert locate(ingot, Checkpoint.open(folder), make_inputs(512)) is None


@pytest.mark.parametrize("target", TARGETS)
def test_padding_may_hold_anything(find: Find, target: str) -> None:
    inputs = make_inputs(512)
    padding = inputs.attention_mask == 0
    inputs.input_ids[padding] = 511
    inputs.input_ids[~padding] %= 511

    def change_token(array: Array) -> Array:
        array[511] += 1
        return array

    assert find("olmoe", target, weight("model.embed_tokens.weight", change_token), inputs) is None


def test_names_a_node_that_differs_without_an_effect(find: Find) -> None:
    def change(graph: onnx.GraphProto) -> None:
        (flag,) = (a for a in nodes(graph, "Softmax")[1].attribute if a.name == "axis")
        assert flag.i == -1
        flag.i = 4

    found = find("olmoe", "trt", graph(change))
    assert found is not None
    assert (found.layer, found.operator, found.ratio) == (1, "Softmax", 0.0)


def test_names_a_node_with_another_constant_without_an_effect(find: Find) -> None:
    def change(graph: onnx.GraphProto) -> None:
        last = np.iinfo(np.int64).max
        for tensor in graph.initializer:
            if tensor.raw_data == np.int64(last).tobytes():
                tensor.raw_data = np.int64(last // 2).tobytes()

    found = find("granite", "onnx", graph(change))
    assert found is not None
    assert (found.layer, found.operator, found.ratio) == (0, "Slice", 0.0)


def test_names_an_output_that_is_missing(find: Find) -> None:
    def change(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if "present.2.value" in node.output)
        node.output[list(node.output).index("present.2.value")] = "elsewhere"
        for other in graph.node:
            for index, name in enumerate(other.input):
                if name == "present.2.value":
                    other.input[index] = "elsewhere"

    found = find("olmoe", "onnx", graph(change))
    assert found is not None
    assert (found.layer, found.value, found.ratio) == (2, "present.2.value", math.inf)


# By family: a weight, and the layer and operator that read it.
DAMAGED: dict[str, list[tuple[str, int | None, str]]] = {
    "granite": [
        (f"{GRANITE}mlp.down_proj.weight", 1, "MatMul"),
        ("model.norm.weight", None, "RMSNormalization"),
    ],
    "jetmoe": [
        (f"{JETMOE}self_attention.experts.router.layer.weight", 1, "Gemm"),
        (f"{JETMOE}mlp.input_linear.weight", 1, "MoeDispatch"),
    ],
    "mamba2": [
        (f"{MAMBA2}in_proj.weight", 1, "MatMul"),
        (f"{MAMBA2}conv1d.weight", 1, "CausalConv"),
        # It stays float32.
        (f"{MAMBA2}D", 1, "Mamba2Scan"),
    ],
    "olmoe": [
        ("model.embed_tokens.weight", None, "Gather"),
        (f"{OLMOE}self_attn.o_proj.weight", 1, "MatMul"),
        (f"{OLMOE}mlp.gate.weight", 1, "Gemm"),
        (f"{OLMOE}mlp.experts.down_proj", 1, "MoeDispatch"),
        ("lm_head.weight", None, "MatMul"),
    ],
}


@pytest.mark.parametrize(("family", "precision"), HALVES)
def test_finds_a_weight_in_half_precision(find: Find, family: str, precision: str) -> None:
    assert find(family, "trt", lambda _folder: None, precision=precision) is None
    for name, layer, operator in DAMAGED[family]:
        change = weight(name, lambda a: (a.astype(np.float32) * np.float32(1.01)).astype(a.dtype))
        check(find(family, "trt", change, precision=precision), "trt", layer, operator)


def test_finds_a_state_that_is_rounded_to_another_half_precision(find: Find) -> None:
    found = find("mamba2", "trt", graph(round_state), precision="fp16")
    check(found, "trt", 1, "Cast")


def test_names_a_cast_that_only_rounds(find: Find) -> None:
    """To the graph's own precision: it changes nothing where all is computed in float32."""
    rounded = partial(round_state, to=onnx.TensorProto.FLOAT16)
    found = find("mamba2", "trt", graph(rounded), precision="fp16")
    assert found is not None
    assert (found.value, found.operator, found.ratio) == ("present_states.1.ssm", "Cast", 0.0)


def test_finds_a_bfloat16_value_in_a_float32_graph(find: Find) -> None:
    """ONNX Runtime hands out no such array, since numpy has no such dtype."""

    def change(graph: onnx.GraphProto) -> None:
        norm = reader(graph, f"{OLMOE}self_attn.q_norm.weight")
        reshape = reader(graph, norm.output[0])
        narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
        back = onnx.helper.make_node("Cast", [reshape.output[0]], ["back"], to=wide)
        for node in graph.node:
            if reshape.output[0] in node.input:
                node.input[list(node.input).index(reshape.output[0])] = "back"
        reshape.input[0] = "narrow"
        at = list(graph.node).index(reshape)
        graph.node.insert(at + 1, back)
        cast = onnx.helper.make_node("Cast", [norm.output[0]], ["narrow"], to=narrow)
        graph.node.insert(at, cast)

    check(find("olmoe", "onnx", graph(change)), "onnx", 1, "Reshape")


Harmless = Callable[[onnx.GraphProto], None]


def numbered(graph: onnx.GraphProto) -> list[str]:
    """The values whose names say nothing, in the order of computation."""
    outputs = {value.name for value in graph.output}
    made = [name for node in graph.node for name in node.output if name]
    return [n for n in made if n not in outputs and n.partition(".")[0] not in EXTRA_OUTPUTS]


def rename(graph: onnx.GraphProto, names: dict[str, str], begin: int = 0) -> None:
    """Other names for values, where nodes from one on read them, branches included."""
    for node in graph.node[begin:]:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        for attribute in node.attribute:
            rename(attribute.g, names)


def insert(graph: onnx.GraphProto, value: str, *operators: str, **attributes: Any) -> None:
    """Nodes of one input behind a value; what read it reads the last. Their names have a blank."""
    (at,) = (index for index, node in enumerate(graph.node) if value in node.output)
    made = [f"{value} {number}" for number in range(len(operators))]
    rename(graph, {value: made[-1]}, at + 1)
    for operator, source, name in zip(operators, [value, *made], made, strict=False):
        at += 1
        node = onnx.helper.make_node(operator, [source], [name], **attributes)
        graph.node.insert(at, node)


def renumbered(change: Harmless) -> Harmless:
    """A change, after which values are named as the exporter names them: in their order.

    So a value more takes the name of the one that was at its place.
    """

    def apply(graph: onnx.GraphProto) -> None:
        before = numbered(graph)
        change(graph)
        counted = [*before, *(f"last_{number}" for number in range(999))]
        names = dict(zip(numbered(graph), counted, strict=False))
        assert sum(old != new for old, new in names.items()) > len(before) / 2
        rename(graph, names)
        for node in graph.node:
            for index, name in enumerate(node.output):
                node.output[index] = names.get(name, name)

    return apply


def identity_first(graph: onnx.GraphProto) -> None:
    insert(graph, graph.node[0].output[0], "Identity")


def doubled_negations(graph: onnx.GraphProto) -> None:
    for norm in nodes(graph, "RMSNormalization"):
        insert(graph, norm.output[0], "Neg", "Neg")


def casts(graph: onnx.GraphProto) -> None:
    """To what the value is, behind every product but that of the head, which is an output."""
    weight = next(t for t in graph.initializer if "layers.1" in t.name and "norm" in t.name)
    for product in nodes(graph, "MatMul")[:-1]:
        insert(graph, product.output[0], "Cast", to=weight.data_type)


def weights_by_another_name(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            other = f"{tensor.name} "
            rename(graph, {tensor.name: other})
            graph.node.insert(0, onnx.helper.make_node("Identity", [tensor.name], [other]))


def all_of_them(graph: onnx.GraphProto) -> None:
    for change in (casts, doubled_negations, identity_first, weights_by_another_name):
        change(graph)


def no_guard(graph: onnx.GraphProto) -> None:
    """Without the first node that keeps a buffer from being used again, which none is here."""
    guard = nodes(graph, "Where")[-3]
    assert guard.input[1] == nodes(graph, "MoE")[0].output[0]
    bypass(graph, guard, guard.input[1])


def another_operator(family: str, graph: onnx.GraphProto) -> None:
    """Another function of one value in layer 1."""
    right, wrong = ("Sigmoid", "Tanh") if family == "mamba2" else ("Neg", "Abs")
    layer = LAYER[family].removesuffix("mixer.")
    norm = next(n for n in nodes(graph, "RMSNormalization") if n.input[1].startswith(layer))
    behind = graph.node[list(graph.node).index(norm) :]
    # The names of what was inserted have a blank.
    node = next(n for n in behind if n.op_type == right and " " not in n.output[0])
    node.op_type, node.doc_string = wrong, "wrong"


@pytest.fixture
def find_renumbered(find: Find) -> Find:
    """``find(family, target, harmless, ...)``: the place in an ingot whose values are renumbered.

    Beside the harmless change it has another operator in layer 1, and its value is what is found.
    """

    def find_in_renumbered(
        family: str, target: str, harmless: Harmless, precision: str = "fp32"
    ) -> None:
        wrong = onnx.NodeProto()

        def damage(graph: onnx.GraphProto) -> None:
            harmless(graph)
            another_operator(family, graph)

        def change(graph: onnx.GraphProto) -> None:
            renumbered(damage)(graph)
            (node,) = (node for node in graph.node if node.doc_string == "wrong")
            wrong.CopyFrom(node)

        found = find(family, target, graph(change), precision=precision)
        assert found is not None and found.ratio > 100
        assert (found.layer, found.operator, found.value) == (1, wrong.op_type, wrong.output[0])

    return find_in_renumbered


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_the_node_however_the_values_are_numbered(
    find_renumbered: Find, family: str, target: str
) -> None:
    find_renumbered(family, target, all_of_them)


@pytest.mark.parametrize(
    "harmless", [identity_first, doubled_negations, casts, weights_by_another_name]
)
def test_names_the_node_whatever_else_the_graph_has(
    find_renumbered: Find, harmless: Harmless
) -> None:
    find_renumbered("granite", "onnx", harmless)


def test_names_the_node_where_the_graph_has_one_less(find_renumbered: Find) -> None:
    find_renumbered("olmoe", "ort", no_guard)


def test_names_the_node_of_a_renumbered_graph_in_float16(find_renumbered: Find) -> None:
    find_renumbered("mamba2", "trt", all_of_them, precision="fp16")


@pytest.mark.parametrize("target", TARGETS)
def test_finds_nothing_where_nodes_change_no_number(find: Find, target: str) -> None:
    assert find("olmoe", target, graph(renumbered(doubled_negations))) is None


def test_finds_a_wrong_node_more(find: Find) -> None:
    """Not where it stands, which no other graph has, but in what reads it first."""

    def change(graph: onnx.GraphProto) -> None:
        product = reader(graph, "model.layers.0.self_attn.k_proj.weight")
        (heads,) = (node for node in graph.node if product.output[0] in node.input)
        insert(graph, heads.output[0], "Neg")

    found = find("granite", "onnx", graph(change))
    check(found, "onnx", 0, "Slice")
