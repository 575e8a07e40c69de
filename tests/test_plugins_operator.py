"""What follows from the declaration of an operator, and what declarations promise each other."""

from __future__ import annotations

import ast
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ingot.plugins import check
from ingot.plugins.operator import AttributeValue, Operator, OperatorError, size_of
from ingot.plugins.registry import OPERATORS

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "tokens": 3,
    "hidden": 8,
    "intermediate": 16,
    "experts": 4,
    "top_k": 2,
    "in_features": 8,
    "out_features": 24,
    "per_choice": 1,
    "batch": 2,
    "heads": 4,
    "head_size": 8,
    "groups": 2,
    "states": 16,
    "channels": 24,
    "width": 4,
}
ATTRIBUTES: dict[str, AttributeValue] = {
    "top_k": 2,
    "normalize": True,
    "activation": "silu",
    "chunk_size": 2,
    "dt_min": 0.0,
    "dt_max": 1.0,
}


def test_every_operator_of_the_folder_is_registered_under_its_file() -> None:
    # A Triton repository carries the files of the operators by their names.
    declared = {
        path.stem
        for path in (ROOT / "plugins").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "Operator"
    }
    assert declared == {operator.snake for operator in OPERATORS.values()}


def test_declarations_are_read_without_pytorch_and_onnx() -> None:
    program = """
import json, sys
import ingot.plugins.library, ingot.plugins.registry
for operator in ingot.plugins.registry.OPERATORS.values():
    operator.structure(dtype=0)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"torch", "onnx", "onnx_ir", "onnxscript", "numpy", "triton"}
    assert heavy.isdisjoint(json.loads(done.stdout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda each: each.name)
def test_a_fake_call_gives_what_the_reference_does(operator: Operator, dtype: torch.dtype) -> None:
    tensors = check.inputs(operator, "cpu", dtype, SIZES)
    if dtype == torch.float64:
        # The reference of a model in float64, whose float32 inputs are float64 as well.
        tensors = tuple(t.double() if t.is_floating_point() else t for t in tensors)
    attributes = [ATTRIBUTES[each.name] for each in operator.attributes]
    real = operator(*tensors, *attributes)
    with FakeTensorMode() as mode:
        fake = operator(*map(mode.from_tensor, tensors), *attributes)
    reals, fakes = ((real,), (fake,)) if isinstance(real, torch.Tensor) else (real, fake)
    for want, got in zip(reals, fakes, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda each: each.name)
def test_inputs_of_a_check_have_the_declared_shapes(operator: Operator) -> None:
    tensors = check.inputs(operator, "cpu", torch.bfloat16, SIZES)
    letters = operator.bind([tensor.shape for tensor in tensors])
    for member, letter in operator.sizes.items():
        assert letters[letter] == SIZES[member]
    for declared, tensor in zip(operator.inputs, tensors, strict=True):
        expected = "bfloat16" if declared.dtype == "T" else declared.dtype
        assert str(tensor.dtype) == f"torch.{expected}"
        assert torch.equal(tensor, tensor.nan_to_num())


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda each: each.name)
def test_a_call_is_filled_to_the_last_member(operator: Operator) -> None:
    """Each member another number, all of them found again where the declaration says."""
    sizes = {letter: 3 + number for number, letter in enumerate(operator.sizes.values())}
    attributes = {each.name: 100 + number for number, each in enumerate(operator.attributes)}
    first = operator.inputs[0]
    parameters = operator.parameters("float16", sizes, first.ranks[-1], attributes)
    operator.point(parameters, [16 * (1 + number) for number in range(len(operator.tensors))])
    found = {name: getattr(parameters, name) for name, *_ in operator.structure._fields_}
    assert found.pop("dtype") == 1
    for number, tensor in enumerate(operator.tensors):
        assert found.pop(tensor.name.lower()) == 16 * (1 + number)
    for member, source in operator.members.items():
        expected = {**sizes, **attributes, "form": len(first.shapes) - 1}[source]
        assert found.pop(member) == expected
    assert not found


def test_an_input_that_may_be_left_out_binds_nothing() -> None:
    operator = OPERATORS["CausalConv"]
    shapes = [[2, 5, 16], [2, 16, 3], [16, 1, 4], None]
    assert operator.bind(shapes).items() >= {"B": 2, "T": 5, "C": 16, "W": 4}.items()
    parameters = operator.parameters("float32", {"B": 2, "T": 5, "C": 16, "W": 4}, 3, ATTRIBUTES)
    operator.point(parameters, [16, 32, 48, None, 64, 80])
    assert parameters.bias is None


def test_sizes_follow_from_letters() -> None:
    sizes = {"I": 12, "W": 4}
    assert [size_of(dim, sizes) for dim in ("I", "2I", "W-1", "1")] == [12, 24, 3, 1]


def test_a_tensor_of_two_forms_names_both_when_it_has_neither() -> None:
    with pytest.raises(
        OperatorError, match=r"MoeLinear got x of rank 4; it is .* or \[N, K, Kin\]"
    ):
        OPERATORS["MoeLinear"].check_ranks([4, 2, 3])


def test_kinds_of_attributes_have_their_types() -> None:
    types = dict(each[:2] for each in OPERATORS["Mamba2Scan"].structure._fields_)
    assert types["dt_min"] is ctypes.c_float and types["heads"] is ctypes.c_int32
    assert types["a"] is ctypes.c_void_p
