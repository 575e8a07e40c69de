"""Layers that are traced once per kind make the graph that a trace of the whole model makes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import onnx_ir as ir
import pytest
import torch
import toy_hybrid

from ingot.export import capture as capturing
from ingot.export.capture import Captured, capture
from ingot.export.passes.weights import Weight
from ingot.export.stamp import DOMAIN, stamped
from ingot.graphs.checkpoint import stack_height
from ingot.graphs.family import find_family
from ingot.graphs.layers import Model
from ingot.graphs.preset import preset_config

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("olmoe", "jetmoe", "mamba2")]


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with toy_hybrid.registered():
        yield


def built(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Model:
    family = find_family(name)
    return family.build({**preset_config(family, "tiny"), **changes}, "generate", dtype)


def traced(model: Model, **options: Any) -> Captured:
    shapes = {name: (each.shape, each.dtype) for name, each in model.named_parameters()}

    def read(name: str, block: int) -> torch.Tensor:
        shape, dtype = shapes[name]
        random = torch.Generator().manual_seed(zlib.crc32(f"{name} {block}".encode()))
        of_block = shape[1:] if stack_height(tuple(shape)) > 1 else shape
        return torch.randn(of_block, generator=random).to(dtype)

    return capture(model, read, **options)


def whole(model: Model, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Captured:
    """By a trace of all layers."""
    with monkeypatch.context() as patched:
        patched.setattr(capturing, "stamped", lambda _: nullcontext([]))
        return traced(model, **options)


def computed(found: Captured) -> dict[str, Any]:
    """What each output is, as an expression of the inputs: nodes by what they read and say."""
    made: dict[ir.Value, int] = {}
    numbers: dict[Any, int] = {}

    def number(of: Any) -> int:
        return numbers.setdefault(of, len(numbers))

    def of(value: ir.Value | None) -> Any:
        if value is None or value in made:
            return made.get(value) if value is not None else None
        constant = value.const_value
        if constant is None:
            return value.name
        # Constants have names of their own in every trace.
        name = value.name if isinstance(constant, Weight) else ""
        return name, str(constant.dtype), str(constant.shape), constant.tobytes()

    sizes = _sizes(found.model)
    for node in found.model.graph:
        if node.outputs[0] in sizes:
            made[node.outputs[0]] = number(sizes[node.outputs[0]])
            continue
        said = tuple(sorted((name, repr(each.value)) for name, each in node.attributes.items()))
        this = (node.domain, node.op_type, tuple(map(of, node.inputs)), said)
        for place, value in enumerate(node.outputs):
            made[value] = number((this, place))
    by_number = {each: key for key, each in numbers.items()}

    def written(each: Any) -> Any:
        """Without the numbers, which follow the order of the nodes."""
        if isinstance(each, int) and not isinstance(each, bool) and each in by_number:
            key = by_number[each]
            if each not in known:
                known[each] = hash(
                    key
                    if isinstance(key, str)
                    else (*key[0][:2], tuple(map(written, key[0][2])), key[0][3], key[1])
                )
            return known[each]
        return each

    known: dict[int, int] = {}
    return {
        value.name or "": (written(made[value]), str(value.shape), value.dtype)
        for value in found.model.graph.outputs
    }


def _sizes(model: ir.Model) -> dict[ir.Value, str]:
    """Values that are one size, by its name, whichever tensor it is read from."""
    found: dict[ir.Value, str] = {}
    for node in model.graph:
        read, made = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type == "Shape" and read is not None and read.shape is not None:
            start, end = (node.attributes.get_int(name, -1) for name in ("start", "end"))
            if start == end - 1:
                found[made] = str(read.shape[start])
        elif node.op_type in ("Squeeze", "Unsqueeze", "Reshape") and read in found:
            found[made] = found[read]
    return found


@pytest.mark.parametrize("name", ["granite", "toy_hybrid", *SLOW])
def test_is_the_graph_of_a_whole_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"extra_outputs": ("hidden_states",)}
    found = traced(built(name), **options)
    expected = whole(built(name), monkeypatch, **options)
    assert computed(found) == computed(expected)
    assert found.states == expected.states
    assert DOMAIN not in found.model.opset_imports
    assert not [node for node in found.model.graph if node.domain == DOMAIN]


def test_caches_of_a_call_that_stands_alone_are_no_routers_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = find_family("jetmoe")
    model = family.build(preset_config(family, "tiny"), "classify", torch.float32)
    asked = {"extra_outputs": ("router_logits",)}
    found, expected = traced(model, **asked), whole(model, monkeypatch, **asked)
    names = [value.name for value in expected.model.graph.outputs]
    assert [value.name for value in found.model.graph.outputs] == names and len(names) == 5
    assert computed(found) == computed(expected)


def test_one_kind_is_one_function_of_whatever_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another precision, with biases."""
    options = {"precision": torch.bfloat16}
    biases = {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3}
    found = traced(built("granite", torch.bfloat16, **biases), **options)
    expected = whole(built("granite", torch.bfloat16, **biases), monkeypatch, **options)
    assert computed(found) == computed(expected)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return computed(traced(built("granite", num_hidden_layers=3)))


def _multiplier(model: Model) -> None:
    layer: Any = model.decoder.layers[1]
    layer.residual_multiplier = 0.5


def _epsilon(model: Model) -> None:
    layer: Any = model.decoder.layers[1]
    layer.input_layernorm.eps = 1e-3


def _activation(model: Model) -> None:
    mlp: Any = model.decoder.layers[1].mlp
    mlp.act = torch.nn.functional.relu


def _width(model: Model) -> None:
    mlp: Any = model.decoder.layers[1].mlp
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight = torch.nn.Parameter(layer.weight.new_empty(64, layer.weight.shape[1]))
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.new_empty(64, 64))


@pytest.mark.parametrize("change", [_multiplier, _epsilon, _activation, _width])
def test_layers_that_differ_in_anything_are_of_two_kinds(
    plain: dict[str, Any], change: Callable[[Model], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built("granite", num_hidden_layers=3)
    change(model)
    with stamped(model) as kinds:
        assert len(kinds) == 2
    found = computed(traced(model))
    assert found != plain
    assert found == computed(whole(model, monkeypatch))


def test_layers_of_a_model_are_their_own_again() -> None:
    model = built("granite")
    with stamped(model) as kinds:
        assert len(kinds) == 1
        assert all("forward" in vars(layer) for layer in model.decoder.layers)
    assert not any("forward" in vars(layer) for layer in model.decoder.layers)


def test_without_two_of_a_kind_nothing_is_called() -> None:
    with stamped(built("granite", num_hidden_layers=1)) as kinds:
        assert not kinds
