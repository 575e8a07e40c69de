"""TensorRT plugins: Python, C++ and a real builder against the operators' declarations."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from ingot.plugins import library, torch_kernels
from ingot.plugins.errors import IngotError
from ingot.plugins.kernels.link import SOURCES, run_compiler
from ingot.plugins.library import Library, LibraryError
from ingot.plugins.operator import Operator, OperatorError
from ingot.plugins.registry import OPERATORS
from ingot.plugins.tensorrt import build, rtx
from ingot.plugins.tensorrt.python_plugins import (
    NAMESPACE,
    PLUGIN_VERSION,
    Node,
    creator,
    register,
)

ATTRIBUTES: dict[str, dict[str, Any]] = {
    "MoeDispatch": {"top_k": 2, "normalize": 1, "activation": "gelu_tanh"},
    "MoeLinear": {},
    "Mamba2Scan": {"chunk_size": 64, "dt_min": 0.25, "dt_max": math.inf},
    "CausalConv": {"activation": "identity"},
}

# Every dimension another, so that no shape is right by chance.
SIZES = {
    "MoeDispatch": {"N": 5, "H": 16, "E": 7, "I": 24},
    "MoeLinear": {"N": 5, "K": 3, "Kin": 16, "E": 7, "O": 24},
    "Mamba2Scan": {"B": 2, "T": 5, "Hm": 6, "Pm": 8, "G": 3, "Ns": 16},
    "CausalConv": {"B": 2, "T": 5, "C": 16, "W": 4},
}
DYNAMIC = {"N", "B", "T"}

ONNX_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "int64": onnx.TensorProto.INT64,
}

# An operator, and which of its first input's forms.
FORMS = [
    (name, form)
    for name, operator in OPERATORS.items()
    for form in range(len(operator.inputs[0].shapes))
]
DTYPES = ("float32", "float16", "bfloat16")


def dims(operator: Operator, form: int) -> list[tuple[str, ...]]:
    """Names of the dimensions of each input and output."""
    return [each.shapes[min(form, len(each.shapes) - 1)] for each in operator.tensors]


def sized(operator: Operator, form: int, **changed: int) -> list[list[int]]:
    """The shape of each input and output."""
    sizes = {**SIZES[operator.name], **changed}
    derived = {"1": 1, "2I": 2 * sizes.get("I", 0), "W-1": sizes.get("W", 0) - 1}
    return [[{**sizes, **derived}[dim] for dim in each] for each in dims(operator, form)]


# Shapes.


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_output_shapes_are_those_of_the_letters(name: str, form: int) -> None:
    operator = OPERATORS[name]
    shapes = sized(operator, form)
    by_name = dict(zip((each.name for each in operator.inputs), shapes, strict=False))
    outputs = [
        [by_name[tensor][axis] for tensor, axis in operator.references(each)]
        for each in operator.outputs
    ]
    assert outputs == shapes[len(operator.inputs) :]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_tensors_that_disagree_are_refused(name: str, form: int) -> None:
    operator = OPERATORS[name]
    shapes = sized(operator, form)[: len(operator.inputs)]
    assert operator.bind(shapes).items() >= SIZES[name].items()
    for tensor in range(len(shapes)):
        for axis, dim in enumerate(dims(operator, form)[tensor]):
            alone = sum(each.count(dim) for each in dims(operator, form)[: len(shapes)]) == 1
            if alone and dim not in ("1", "2I", "W-1", "W", "I"):
                continue
            wrong = [list(each) for each in shapes]
            wrong[tensor][axis] += 1
            with pytest.raises(OperatorError, match=rf"{name} got \d+ for dimension"):
                operator.bind(wrong)
        with pytest.raises(OperatorError, match="of rank 9; it is"):
            operator.bind([*shapes[:tensor], [1] * 9, *shapes[tensor + 1 :]])


def test_limits_that_disagree_give_the_larger() -> None:
    operator = OPERATORS["MoeDispatch"]
    shapes = sized(operator, 0)[:4]
    shapes[1][0] = 100
    assert operator.bound(shapes)["N"] == 100


# Calls of the kernels.

STUB = r"""
#include <cstring>
#include "ingot_kernels.h"
#pragma GCC visibility push(default)
extern "C" {
unsigned char seen[256];
void *seen_workspace, *seen_stream;
size_t seen_bytes;
int prepared;
}
#pragma GCC visibility pop
template <typename P> ingot_status keep(const P *p, void *workspace, size_t bytes, void *stream) {
    static_assert(sizeof(P) <= sizeof seen);
    std::memcpy(seen, p, sizeof *p);
    seen_workspace = workspace;
    seen_bytes = bytes;
    seen_stream = stream;
    return INGOT_OK;
}
template <typename P> ingot_status size(const P *p, size_t *bytes) {
    *bytes = 1000 + p->tokens;
    return p->tokens > 2000 ? INGOT_BAD_ARGUMENT : INGOT_OK;
}
int ingot_kernels_version(void) { return INGOT_KERNELS_VERSION; }
const char *ingot_last_error(void) { return "too many tokens: split them."; }
ingot_status ingot_prepare(void) { return ++prepared, INGOT_OK; }
ingot_status ingot_use_driver(const char *) { return INGOT_OK; }
ingot_status ingot_tune(const ingot_tuning *) { return INGOT_OK; }
#define CALL(name)                                                                              \
    ingot_status name##_workspace(const name##_params *p, size_t *b) { return size(p, b); }     \
    ingot_status name(const name##_params *p, void *w, size_t b, void *s) {                     \
        return keep(p, w, b, s);                                                                \
    }
CALL(ingot_moe_dispatch)
CALL(ingot_moe_linear)
CALL(ingot_mamba2_scan)
ingot_status ingot_causal_conv(const ingot_causal_conv_params *p, void *s) {
    return keep(p, nullptr, 0, s);
}
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel library that notes what it is called with."""
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.cpp").write_text(STUB)
    out = folder / "libingot_kernels.so"
    run_compiler(folder / "stub.cpp", f"-I{SOURCES}", out=out)
    return out


def seen(stub: Path, operator: Operator, *, forget: bool = False) -> dict[str, Any]:
    """The members of the last call."""
    memory = (ctypes.c_char * 256).in_dll(ctypes.CDLL(str(stub)), "seen")
    structure = operator.structure.from_buffer_copy(memory)
    if forget:
        ctypes.memset(memory, 0, 256)
    return {member: getattr(structure, member) for member, *_ in structure._fields_}


def seen_bytes(stub: Path) -> int:
    """Of the workspace of the last call."""
    return ctypes.c_size_t.in_dll(ctypes.CDLL(str(stub)), "seen_bytes").value


def repeated(operator: Operator, form: int) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Shapes and addresses of calls that follow each other: what changes, and what stays."""
    letter = next(iter(SIZES[operator.name]))
    for size, first in ((3, 4096), (3, 8192), (9, 8192)):
        shapes = sized(operator, form, **{letter: size})[: len(operator.inputs)]
        yield shapes, [first + 16 * i for i in range(len(operator.tensors))]


def call_from_torch(stub: Path, name: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What ``plugins.torch_kernels`` calls for the same node; its outputs."""
    outputs = torch_kernels.call(
        OPERATORS[name], Library(stub), *tensors, *ATTRIBUTES[name].values()
    )
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_python_calls_the_kernels_as_torch_does(
    name: str, form: int, dtype: str, stub: Path
) -> None:
    operator = OPERATORS[name]
    shapes = sized(operator, form)[: len(operator.inputs)]
    tensors = [
        torch.zeros(shape, dtype=getattr(torch, dtype if each.dtype == "T" else each.dtype))
        for each, shape in zip(operator.inputs, shapes, strict=True)
    ]
    outputs = call_from_torch(stub, name, tensors)
    by_torch = seen(stub, operator)
    node = Node(operator, ATTRIBUTES[name], library.VERSION)
    addresses = [each.data_ptr() for each in (*tensors, *outputs)]
    node.run(stub, dtype, shapes, addresses, 4096, 77)
    assert seen(stub, operator) == by_torch
    handle = ctypes.CDLL(str(stub))
    assert ctypes.c_void_p.in_dll(handle, "seen_stream").value == 77
    takes_workspace = operator.workspace
    workspace = ctypes.c_void_p.in_dll(handle, "seen_workspace").value
    assert workspace == (4096 if takes_workspace else None)
    expected = 1000 + (SIZES[name].get("N") or SIZES[name]["T"]) if takes_workspace else 0
    assert seen_bytes(stub) == expected
    assert node.workspace_bytes(stub, dtype, shapes) == expected


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_later_call_has_its_own_shapes_and_addresses(name: str, form: int, stub: Path) -> None:
    operator = OPERATORS[name]
    node = Node(operator, ATTRIBUTES[name], library.VERSION)
    for shapes, addresses in repeated(operator, form):
        node.run(stub, "bfloat16", shapes, addresses, 4096, 77)
        found = seen(stub, operator, forget=True)
        fresh = Node(operator, ATTRIBUTES[name], library.VERSION)
        fresh.run(stub, "bfloat16", shapes, addresses, 4096, 77)
        assert found == seen(stub, operator)
        assert [found[each.name.lower()] for each in operator.tensors] == addresses


def test_without_kernels_building_works_and_running_does_not(stub: Path, tmp_path: Path) -> None:
    operator = OPERATORS["MoeLinear"]
    *shapes, _ = sized(operator, 0)
    nowhere = tmp_path / "libingot_kernels.so"
    node = Node(operator, {}, 0)
    assert node.workspace_bytes(nowhere, "float32", shapes) == 0
    with pytest.raises(LibraryError, match="make plugins"):
        node.run(nowhere, "float32", shapes, [0] * 4, 0, 0)
    # Nor where there are kernels: its engine reserved no workspace.
    with pytest.raises(OperatorError, match=r"built for other GPU kernels \(none\)"):
        node.run(stub, "float32", shapes, [0] * 4, 0, 0)


def test_sizes_past_int32_are_refused() -> None:
    with pytest.raises(OperatorError, match="2147483648 for N"):
        OPERATORS["MoeLinear"].parameters("float32", {**SIZES["MoeLinear"], "N": 2**31}, 2, {})


# A real builder.


@cache
def logger(trt: Any) -> Any:
    """The one logger: TensorRT keeps the first, and crashes where that has been deleted."""
    # Errors that a test provokes would otherwise fill its output.
    return trt.Logger(trt.Logger.INTERNAL_ERROR)


class Network:
    """One node, parsed from ONNX by TensorRT-RTX."""

    def __init__(
        self,
        trt: Any,
        name: str,
        shapes: Sequence[Sequence[int | str]],
        types: Sequence[str],
        attributes: Mapping[str, Any],
    ) -> None:
        operator = OPERATORS[name]
        node = helper.make_node(
            name,
            [each.name for each in operator.inputs],
            [each.name for each in operator.outputs],
            domain="ingot",
            plugin_namespace=NAMESPACE,
            plugin_version=PLUGIN_VERSION,
            **attributes,
        )
        infos = [
            helper.make_tensor_value_info(each.name, ONNX_TYPES[dtype], shape)
            for each, dtype, shape in zip(operator.tensors, types, shapes, strict=True)
        ]
        count = len(operator.inputs)
        graph = helper.make_graph([node], "one_node", infos[:count], infos[count:])
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ingot", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        self.trt, self.operator = trt, operator
        self.builder = trt.Builder(logger(trt))
        self.network = self.builder.create_network(0)
        parser = trt.OnnxParser(self.network, self.builder.logger)
        self.parsed = parser.parse(model.SerializeToString())

    def outputs(self) -> list[tuple[list[int], Any]]:
        tensors = map(self.network.get_output, range(self.network.num_outputs))
        return [(list(each.shape), each.dtype) for each in tensors]

    def engine(self, *profile: Sequence[Sequence[int]]) -> Any:
        """The serialised engine for shapes between the first and the last, or None."""
        config = self.builder.create_builder_config()
        if profile:
            ranges = self.builder.create_optimization_profile()
            for tensor, *shapes in zip(self.operator.inputs, *profile, strict=True):
                ranges.set_shape(tensor.name, *shapes)
            config.add_optimization_profile(ranges)
        return self.builder.build_serialized_network(self.network, config)


@pytest.fixture(scope="module")
def trt() -> Any:
    module = pytest.importorskip("tensorrt_rtx")
    rtx.ensure_parser_can_load_plugins()
    register(module)
    register(module)
    return module


def types_of(operator: Operator, dtype: str) -> list[str]:
    return [dtype if each.dtype == "T" else each.dtype for each in operator.tensors]


def dynamic(operator: Operator, form: int) -> list[list[int | str]]:
    shapes = zip(dims(operator, form), sized(operator, form), strict=True)
    return [
        [dim if dim in DYNAMIC else size for dim, size in zip(*each, strict=True)]
        for each in shapes
    ]


def profile(operator: Operator, form: int) -> list[list[list[int]]]:
    return [
        sized(operator, form, **dict.fromkeys(DYNAMIC & SIZES[operator.name].keys(), size))[
            : len(operator.inputs)
        ]
        for size in (1, 4, 32)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_rtx_builds_an_engine_of_the_plugin_alone(
    trt: Any, name: str, form: int, dtype: str
) -> None:
    operator = OPERATORS[name]
    types = types_of(operator, dtype)
    made = Network(trt, name, dynamic(operator, form), types, ATTRIBUTES[name])
    assert made.parsed
    layers = [made.network.get_layer(i) for i in range(made.network.num_layers)]
    assert [layer.type for layer in layers] == [trt.LayerType.PLUGIN_V3]
    count = len(operator.inputs)
    assert made.outputs() == [
        ([-1 if isinstance(dim, str) else dim for dim in shape], getattr(trt, each))
        for shape, each in zip(dynamic(operator, form)[count:], types[count:], strict=True)
    ]
    engine = made.engine(*profile(operator, form))
    assert engine is not None
    assert name.encode() in bytes(engine)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_rtx_infers_the_shape_of_the_letters(trt: Any, name: str, form: int) -> None:
    operator = OPERATORS[name]
    shapes = sized(operator, form)
    made = Network(trt, name, shapes, types_of(operator, "float32"), ATTRIBUTES[name])
    assert [shape for shape, _ in made.outputs()] == shapes[len(operator.inputs) :]


@pytest.mark.parametrize("name", OPERATORS)
def test_rtx_refuses_any_other_dtype(trt: Any, name: str) -> None:
    operator = OPERATORS[name]
    for position in range(1, len(operator.inputs)):
        types = types_of(operator, "float16")
        types[position] = "float32" if operator.inputs[position].dtype == "T" else "float16"
        made = Network(trt, name, sized(operator, 0), types, ATTRIBUTES[name])
        assert not made.parsed or made.engine() is None


def test_rtx_refuses_a_dtype_that_no_kernel_has(trt: Any) -> None:
    operator = OPERATORS["CausalConv"]
    types = ["int64"] * len(operator.tensors)
    made = Network(trt, "CausalConv", sized(operator, 0), types, ATTRIBUTES["CausalConv"])
    assert not made.parsed or made.engine() is None


def test_rtx_refuses_a_wrong_rank(trt: Any, capfd: pytest.CaptureFixture[str]) -> None:
    operator = OPERATORS["MoeDispatch"]
    shapes = sized(operator, 0)
    shapes[0].append(1)
    types = types_of(operator, "float32")
    assert not Network(trt, "MoeDispatch", shapes, types, ATTRIBUTES["MoeDispatch"]).parsed
    assert "MoeDispatch got x of rank 3; it is [N, H]." in capfd.readouterr().err


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"top_k": 2, "normalize": 1, "activation": "tanh"}, "no activation 'tanh'; use one of"),
        ({"top_k": 2, "normalize": 1}, "MoeDispatch lacks activation"),
    ],
)
def test_rtx_refuses_wrong_attributes(
    trt: Any,
    attributes: Mapping[str, Any],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    operator = OPERATORS["MoeDispatch"]
    types = types_of(operator, "float32")
    assert not Network(trt, "MoeDispatch", sized(operator, 0), types, attributes).parsed
    assert message in capfd.readouterr().err


class Described:
    """A tensor as TensorRT describes one to a plugin; the rest is not for it to read."""

    def __init__(self, dtype: Any, tensor_format: Any, shape: Sequence[int] = ()) -> None:
        self.desc = self
        self.type, self.format = dtype, tensor_format
        self.dims = self.max = shape


@pytest.mark.parametrize("name", OPERATORS)
def test_only_these_formats_and_types_combine(trt: Any, name: str) -> None:
    operator = OPERATORS[name]
    instance = creator(trt, operator).create_plugin(
        "", fields_of(trt, name), trt.TensorRTPhase.BUILD
    )
    all_types = list(trt.DataType.__members__.values())
    linear, other = trt.TensorFormat.LINEAR, trt.TensorFormat.HWC8
    for dtype in DTYPES:
        types = [getattr(trt, each) for each in types_of(operator, dtype)]
        for position in range(len(types)):
            before = [Described(each, linear) for each in types[:position]]
            accepted = {
                (found, form)
                for found in all_types
                for form in (linear, other)
                if instance.supports_format_combination(
                    position, [*before, Described(found, form)], len(operator.inputs)
                )
            }
            expected = {types[position]} if position else {getattr(trt, each) for each in DTYPES}
            assert accepted == {(each, linear) for each in expected}


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_the_class_for_rtx_hands_its_calls_on(trt: Any, name: str, form: int, stub: Path) -> None:
    operator = OPERATORS[name]
    shapes, addresses = next(repeated(operator, form))
    node = Node(operator, ATTRIBUTES[name], library.VERSION)
    node.run(stub, "float16", shapes, addresses, 4096, 77)
    expected = seen(stub, operator, forget=True)
    made = creator(trt, operator, stub).create_plugin(
        "", fields_of(trt, name), trt.TensorRTPhase.RUNTIME
    )
    types = [getattr(trt, each) for each in types_of(operator, "float16")]
    inputs = [
        Described(each, trt.TensorFormat.LINEAR, shape)
        for each, shape in zip(types, shapes, strict=False)
    ]
    prepared = ctypes.c_int.in_dll(ctypes.CDLL(str(stub)), "prepared")
    before = prepared.value
    attached = made.attach_to_context(None)
    assert prepared.value == before + 1
    count = len(inputs)
    attached.enqueue(inputs, [], addresses[:count], addresses[count:], 4096, 77)
    assert seen(stub, operator) == expected
    assert made.get_workspace_size(inputs, []) == node.workspace_bytes(stub, "float16", shapes)
    assert made.get_output_data_types(types[:count]) == types[count:]


# More tokens than the stub takes.
TOO_MANY = 2001


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_profile_that_the_kernels_refuse_is_no_configuration(
    trt: Any, name: str, form: int, stub: Path
) -> None:
    operator = OPERATORS[name]
    made = creator(trt, operator, stub).create_plugin(
        "", fields_of(trt, name), trt.TensorRTPhase.BUILD
    )
    dynamic_dims = dict.fromkeys(DYNAMIC & SIZES[name].keys(), TOO_MANY)
    types = [getattr(trt, each) for each in types_of(operator, "float16")]
    inputs = [
        Described(each, trt.TensorFormat.LINEAR, shape)
        for each, shape in zip(types, sized(operator, form, **dynamic_dims), strict=False)
    ][: len(operator.inputs)]
    if operator.workspace:
        with pytest.raises(LibraryError, match=r"too many tokens: split them\."):
            made.configure_plugin(inputs, [])
    else:
        made.configure_plugin(inputs, [])


def build_by_most(kernels: str, most: str) -> str:
    """Whether TensorRT-RTX builds for so many tokens; in a process of its own, for its registry."""
    trt = importlib.import_module("tensorrt_rtx")
    rtx.ensure_parser_can_load_plugins()
    register(trt, Path(kernels))
    operator = OPERATORS["MoeDispatch"]
    types = types_of(operator, "bfloat16")
    network = Network(trt, operator.name, dynamic(operator, 0), types, ATTRIBUTES[operator.name])
    shapes = [sized(operator, 0, N=size)[:4] for size in (1, 4, int(most))]
    return "built" if network.engine(*shapes) is not None else "refused"


@pytest.mark.parametrize(("most", "expected"), [(2000, "built"), (TOO_MANY, "refused")])
def test_rtx_builds_no_engine_for_a_profile_that_the_kernels_refuse(
    trt: Any, stub: Path, most: int, expected: str
) -> None:
    done = alone("build_by_most", stub, str(most))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == expected
    assert ("too many tokens: split them." in done.stderr) == (expected == "refused")


def alone(function: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A function of this file in a process of its own, which prints its result."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    program = (
        f"import sys; sys.path[:0] = {folders}; import test_plugins_tensorrt as t; "
        f"print(t.{function}(*sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )


# TensorRT keeps only the address of a field's data.
KEPT: list[np.ndarray] = []


def fields_of(trt: Any, name: str) -> Any:
    """A node's fields as the parser gives them, strings with a zero byte at their end."""
    fields = []
    for field in OPERATORS[name].attributes:
        value = ATTRIBUTES[name][field.name]
        if isinstance(value, str):
            data, kind = np.frombuffer(value.encode() + b"\0", np.int8), trt.PluginFieldType.CHAR
        else:
            data = np.array([value], field.type.tensorrt)
            kind = getattr(trt.PluginFieldType, field.type.tensorrt.upper())
        KEPT.append(data)
        fields.append(trt.PluginField(field.name, data, kind))
    return trt.PluginFieldCollection(fields)


@pytest.mark.parametrize("name", OPERATORS)
def test_fields_survive_an_engine(trt: Any, name: str, stub: Path, tmp_path: Path) -> None:
    operator = OPERATORS[name]
    for path, kernels in ((stub, library.VERSION), (tmp_path / "none.so", 0)):
        made = creator(trt, operator, path).create_plugin(
            "", fields_of(trt, name), trt.TensorRTPhase.BUILD
        )
        written = made.clone().get_fields_to_serialize()
        gc.collect()
        # The runtime may have kernels where the builder had none; what counts is the builder.
        read = creator(trt, operator, stub).create_plugin("", written, trt.TensorRTPhase.RUNTIME)
        assert read.node.values == ATTRIBUTES[name]
        assert (made.node.kernels, read.node.kernels) == (kernels, kernels)
        again = read.get_fields_to_serialize()
        assert [(each.name, each.type, each.data.tobytes()) for each in written] == [
            (each.name, each.type, each.data.tobytes()) for each in again
        ]


# The C++ plugins.

# Calls of a C++ plugin that TensorRT's Python module does not offer.
HARNESS = r"""
#include <NvInfer.h>
#include <cstring>
#define API extern "C" __attribute__((visibility("default")))
using namespace nvinfer1;
extern "C" IPluginCreatorInterface *const *getCreators(int32_t &count);

API IPluginV3 *create(const char *name, const PluginFieldCollection *fields) {
    int32_t count = 0;
    IPluginCreatorInterface *const *creators = getCreators(count);
    for (int32_t i = 0; i < count; ++i) {
        auto *creator = static_cast<IPluginCreatorV3One *>(creators[i]);
        if (!std::strcmp(creator->getPluginName(), name))
            return creator->createPlugin("", fields, TensorRTPhase::kRUNTIME);
    }
    return nullptr;
}
template <typename T> T *part(IPluginV3 *plugin, PluginCapabilityType type) {
    return static_cast<T *>(plugin->getCapabilityInterface(type));
}
API void destroy(IPluginV3 *plugin) { delete plugin; }
API const PluginFieldCollection *serialize(IPluginV3 *plugin) {
    auto *runtime = part<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    return runtime->getFieldsToSerialize();
}
API int32_t supports(IPluginV3 *plugin, int32_t position, const PluginTensorDesc *tensors,
                     int32_t inputs, int32_t outputs) {
    DynamicPluginTensorDesc all[16]{};
    for (int32_t i = 0; i <= position; ++i) all[i].desc = tensors[i];
    auto *build = part<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    return build->supportsFormatCombination(position, all, inputs, outputs);
}
API size_t workspace(IPluginV3 *plugin, const PluginTensorDesc *inputs, int32_t count) {
    DynamicPluginTensorDesc all[16]{};
    for (int32_t i = 0; i < count; ++i) {
        all[i].desc = inputs[i];
        all[i].max = inputs[i].dims;
    }
    auto *build = part<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    return build->getWorkspaceSize(all, count, nullptr, 0);
}
API int32_t configure(IPluginV3 *plugin, const PluginTensorDesc *inputs, int32_t count) {
    DynamicPluginTensorDesc all[16]{};
    for (int32_t i = 0; i < count; ++i) {
        all[i].desc = inputs[i];
        all[i].max = inputs[i].dims;
    }
    auto *build = part<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    return build->configurePlugin(all, count, nullptr, 0);
}
API IPluginV3 *attach(IPluginV3 *plugin) {
    auto *runtime = part<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    return runtime->attachToContext(nullptr);
}
API int32_t enqueue(IPluginV3 *plugin, const PluginTensorDesc *inputs, const void *const *in,
                    void *const *out, void *workspace, cudaStream_t stream) {
    auto *runtime = part<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    return runtime->enqueue(inputs, nullptr, in, out, workspace, stream);
}
"""


class Dims(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int32), ("d", ctypes.c_int64 * 8))


class TensorDesc(ctypes.Structure):
    _fields_ = (
        ("dims", Dims),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class CField(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


class CFields(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int32), ("fields", ctypes.POINTER(CField)))


# TensorRT's numbers of element types and of field types.
C_TYPES = {"float32": 0, "float16": 1, "bfloat16": 7, "int64": 8}
C_KINDS = {"int32": (5, ctypes.c_int32), "float32": (1, ctypes.c_float)}
CHAR = 6


class Cpp:
    """A C++ plugin of a node, called through the harness."""

    def __init__(self, harness: Path, name: str, kernels: int | None = None) -> None:
        self.operator = OPERATORS[name]
        self.library = ctypes.CDLL(str(harness))
        for call in ("create", "attach", "serialize", "workspace"):
            getattr(self.library, call).restype = ctypes.c_void_p
        values: list[tuple[str, Any, int, int]] = []
        for field in self.operator.attributes:
            value = ATTRIBUTES[name][field.name]
            if isinstance(value, str):
                text = ctypes.create_string_buffer(value.encode())
                values.append((field.name, text, CHAR, len(value) + 1))
            else:
                number, kind = C_KINDS[field.type.tensorrt]
                values.append((field.name, kind(value), number, 1))
        if kernels is not None:
            values.append(("kernels", ctypes.c_int32(kernels), C_KINDS["int32"][0], 1))
        fields = (CField * len(values))(
            *(
                CField(key.encode(), ctypes.cast(ctypes.pointer(data), ctypes.c_void_p), *rest)
                for key, data, *rest in values
            )
        )
        self.handle = ctypes.c_void_p(
            self.library.create(name.encode(), ctypes.byref(CFields(len(values), fields)))
        )
        assert self.handle.value
        self.attached = ctypes.c_void_p(self.library.attach(self.handle))
        assert self.attached.value

    def __enter__(self) -> Cpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.destroy(self.attached)
        self.library.destroy(self.handle)

    def serialized(self) -> dict[str, tuple[int, bytes]]:
        fields = CFields.from_address(self.library.serialize(self.handle))
        sizes = {5: 4, 1: 4, CHAR: 1}
        return {
            each.name.decode(): (
                each.type,
                ctypes.string_at(each.data, sizes[each.type] * each.length),
            )
            for each in fields.fields[: fields.count]
        }

    def supports(self, position: int, types: Sequence[int], tensor_format: int) -> bool:
        tensors = (TensorDesc * 16)(*(TensorDesc(Dims(), each, 0) for each in types))
        tensors[position].format = tensor_format
        count = len(self.operator.inputs), len(self.operator.outputs)
        return bool(self.library.supports(self.handle, position, tensors, *count))

    def descs(self, dtype: str, shapes: Sequence[Sequence[int]]) -> Any:
        types = types_of(self.operator, dtype)
        return (TensorDesc * 16)(
            *(
                TensorDesc(Dims(len(shape), (ctypes.c_int64 * 8)(*shape)), C_TYPES[each])
                for each, shape in zip(types, shapes, strict=False)
            )
        )

    def workspace_bytes(self, dtype: str, shapes: Sequence[Sequence[int]]) -> int:
        descs = self.descs(dtype, shapes)
        return int(self.library.workspace(self.handle, descs, len(shapes)) or 0)

    def configure(self, dtype: str, shapes: Sequence[Sequence[int]]) -> int:
        descs = self.descs(dtype, shapes)
        return int(self.library.configure(self.handle, descs, len(shapes)))

    def enqueue(self, dtype: str, shapes: Sequence[Sequence[int]], addresses: Sequence[int]) -> int:
        count = len(self.operator.inputs)
        inputs = (ctypes.c_void_p * count)(*addresses[:count])
        outputs = (ctypes.c_void_p * 4)(*addresses[count:])
        descs = self.descs(dtype, shapes)
        pointers = ctypes.c_void_p(4096), ctypes.c_void_p(77)
        return int(self.library.enqueue(self.attached, descs, inputs, outputs, *pointers))


@pytest.fixture(scope="module")
def cpp_library(stub: Path) -> Path:
    """``libingot_trt.so`` over the kernels that note their calls."""
    tensorrt = build.find_headers()
    if tensorrt is None:
        pytest.skip(build.NO_TENSORRT)
    headers = build.find_cuda_headers(tensorrt)
    if headers is None:
        pytest.skip(build.NO_CUDA)
    out = stub.with_name("libingot_trt.so")
    beside = [f"-L{stub.parent}", "-lingot_kernels", "-Wl,-rpath,$ORIGIN"]
    build.build(out, tensorrt, headers, beside)
    return out


@pytest.fixture(scope="module")
def harness(cpp_library: Path) -> Path:
    folder = cpp_library.parent
    (folder / "harness.cpp").write_text(HARNESS)
    tensorrt = build.find_headers()
    assert tensorrt is not None
    headers = build.find_cuda_headers(tensorrt)
    assert headers is not None
    out = folder / "libharness.so"
    run_compiler(
        folder / "harness.cpp",
        *("-isystem", tensorrt, "-isystem", headers),
        *(f"-L{folder}", "-lingot_trt", "-Wl,-rpath,$ORIGIN"),
        out=out,
    )
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_cpp_calls_the_kernels_as_python_does(
    name: str, form: int, dtype: str, stub: Path, harness: Path
) -> None:
    operator = OPERATORS[name]
    with Cpp(harness, name) as cpp:
        for shapes, addresses in repeated(operator, form):
            node = Node(operator, ATTRIBUTES[name], library.VERSION)
            node.run(stub, dtype, shapes, addresses, 4096, 77)
            by_python = seen(stub, operator, forget=True)
            bytes_by_python = seen_bytes(stub)
            assert cpp.enqueue(dtype, shapes, addresses) == 0
            assert seen(stub, operator) == by_python
            assert seen_bytes(stub) == bytes_by_python
            assert cpp.workspace_bytes(dtype, shapes) == node.workspace_bytes(stub, dtype, shapes)


def test_cpp_refuses_what_python_does(harness: Path, capfd: pytest.CaptureFixture[str]) -> None:
    operator = OPERATORS["CausalConv"]
    shapes = sized(operator, 0)[: len(operator.inputs)]
    addresses = [4096] * len(operator.tensors)
    for tensor, axis in ((0, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 0)):
        wrong = [list(each) for each in shapes]
        wrong[tensor][axis] += 1
        with pytest.raises(OperatorError):
            operator.bind(wrong)
        with Cpp(harness, "CausalConv") as cpp:
            assert cpp.enqueue("float32", wrong, addresses) == -1
        assert "by its other inputs that is" in capfd.readouterr().err
    with Cpp(harness, "CausalConv", kernels=0) as cpp:
        assert cpp.enqueue("float32", shapes, addresses) == -1
    assert "build it again" in capfd.readouterr().err


@pytest.mark.parametrize("name", OPERATORS)
def test_cpp_refuses_the_same_profiles(
    name: str, harness: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    operator = OPERATORS[name]
    takes_workspace = operator.workspace
    with Cpp(harness, name) as cpp:
        for size in (2000, TOO_MANY):
            dynamic_dims = dict.fromkeys(DYNAMIC & SIZES[name].keys(), size)
            shapes = sized(operator, 0, **dynamic_dims)[: len(operator.inputs)]
            refused = takes_workspace and size == TOO_MANY
            assert cpp.configure("float16", shapes) == (-1 if refused else 0)
            assert capfd.readouterr().err == ("too many tokens: split them.\n" if refused else "")


@pytest.mark.parametrize("name", OPERATORS)
def test_cpp_combines_the_same_types(name: str, harness: Path) -> None:
    operator = OPERATORS[name]
    with Cpp(harness, name) as cpp:
        for dtype in DTYPES:
            types = [C_TYPES[each] for each in types_of(operator, dtype)]
            for position in range(len(types)):
                accepted = {
                    (found, form)
                    for found in range(12)
                    for form in (0, 2)
                    if cpp.supports(position, [*types[:position], found], form)
                }
                expected = {types[position]} if position else {C_TYPES[each] for each in DTYPES}
                assert accepted == {(each, 0) for each in expected}


@pytest.mark.parametrize("name", OPERATORS)
def test_cpp_and_python_write_the_same_engine(
    trt: Any, name: str, stub: Path, harness: Path
) -> None:
    made = creator(trt, OPERATORS[name], stub).create_plugin(
        "", fields_of(trt, name), trt.TensorRTPhase.BUILD
    )
    ours = {
        each.name: (int(each.type), each.data.tobytes()) for each in made.get_fields_to_serialize()
    }
    with Cpp(harness, name) as cpp:
        assert cpp.serialized() == ours


def rtx_with_cpp(cpp_library: str) -> str:
    """What TensorRT-RTX finds in the C++ library; in a process of its own, for its registry."""
    trt = importlib.import_module("tensorrt_rtx")
    rtx.ensure_parser_can_load_plugins()
    registry = trt.get_plugin_registry()
    loaded = registry.load_library(cpp_library)
    found: dict[str, Any] = {"loaded": loaded is not None}
    for name, operator in OPERATORS.items():
        made = registry.get_creator(name, PLUGIN_VERSION, NAMESPACE)
        python = creator(trt, operator)
        both = [
            [each.name, each.plugin_version, each.plugin_namespace]
            + [[field.name, str(field.type)] for field in each.field_names]
            for each in (made, python)
        ]
        outputs, built = [], []
        for form in range(len(operator.inputs[0].shapes)):
            types = types_of(operator, "bfloat16")
            network = Network(trt, name, dynamic(operator, form), types, ATTRIBUTES[name])
            built.append(network.engine(*profile(operator, form)) is not None)
            static = Network(trt, name, sized(operator, form), types, ATTRIBUTES[name])
            outputs.append([shape for shape, _ in static.outputs()])
        found[name] = {"creators": both, "outputs": outputs, "built": built}
    return json.dumps(found)


def test_rtx_finds_the_same_plugins_in_the_cpp_library(trt: Any, cpp_library: Path) -> None:
    done = alone("rtx_with_cpp", cpp_library)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loaded"]
    for name, operator in OPERATORS.items():
        by_cpp, by_python = found[name]["creators"]
        assert by_cpp == by_python
        kinds = {"int32": "INT32", "float32": "FLOAT32", "char": "CHAR"}
        assert by_cpp == [name, PLUGIN_VERSION, NAMESPACE] + [
            [field.name, f"PluginFieldType.{kinds[field.type.tensorrt]}"]
            for field in operator.attributes
        ]
        forms = range(len(operator.inputs[0].shapes))
        assert found[name]["outputs"] == [
            sized(operator, form)[len(operator.inputs) :] for form in forms
        ]
        assert all(found[name]["built"])


# Building.


def test_a_build_without_headers_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    assert build.find_headers() is None
    done = CliRunner().invoke(build.main, ["--out", str(tmp_path / "libingot_trt.so")])
    assert done.exit_code == 0
    assert done.output == build.NO_TENSORRT + "\n"

    headers = tmp_path / "include"
    headers.mkdir()
    (headers / "NvInfer.h").touch()
    assert build.find_headers() == headers
    monkeypatch.setattr(build, "find_cuda_headers", lambda _: None)
    done = CliRunner().invoke(build.main, ["--out", str(tmp_path / "libingot_trt.so")])
    assert (done.exit_code, done.output) == (0, build.NO_CUDA + "\n")


def test_a_build_without_kernels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    with pytest.raises(IngotError, match=r"plugins\.kernels\.build"):
        build.kernels_inside()


def test_cuda_headers_are_found_in_cuda_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "include"
    folder.mkdir()
    (folder / "cuda_runtime_api.h").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_cuda_headers(tmp_path) == folder


# TensorRT-RTX's library.


def test_the_parser_gets_the_name_it_looks_for(tmp_path: Path) -> None:
    rtx.ensure_parser_can_load_plugins(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / rtx.LIBRARY).write_text("library")
    for _ in range(2):
        rtx.ensure_parser_can_load_plugins(tmp_path)
        assert (tmp_path / rtx.LINK).read_text() == "library"
    assert (tmp_path / rtx.LINK).readlink() == Path(rtx.LIBRARY)


def test_a_folder_that_takes_no_link_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / rtx.LIBRARY).touch()
    monkeypatch.setattr(Path, "symlink_to", refuse)
    command = f"ln -sf libtensorrt_rtx.so.1 {tmp_path / 'libtensorrt_rtx.so'}"
    with pytest.raises(IngotError, match=re.escape(command)):
        rtx.ensure_parser_can_load_plugins(tmp_path)
