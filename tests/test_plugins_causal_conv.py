"""CausalConv: the eager operator, its standard operators and its function body against a loop."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from activations import ACTIVATIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import one_node, session, weight
from torch._subclasses.fake_tensor import FakeTensorMode

from ingot.export.passes.match import match_causal_conv
from ingot.plugins import causal_conv as op

# x, state, weight and, or None, bias.
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]
Results = tuple[np.ndarray, np.ndarray]
# Channels, width, activation, whether with a bias. Each activation, W and odd sizes.
Kind = tuple[int, int, str, bool]
KINDS: tuple[Kind, ...] = (
    (16, 4, "silu", True),
    (5, 4, "silu", False),
    (7, 2, "gelu", True),
    (1, 3, "gelu_tanh", False),
    (24, 5, "relu", True),
    (3, 2, "identity", True),
)


def plain_loop(arrays: Arrays, activation: str) -> Results:
    """The formula, tap by tap, in float64 and without torch."""
    x, state, taps = (array.astype(np.float64) for array in arrays[:3])
    bias = np.zeros(1) if arrays[3] is None else arrays[3].astype(np.float64)
    batch, tokens, channels = x.shape
    width = taps.shape[2]
    window = [state[..., w] for w in range(width - 1)] + [x[:, t] for t in range(tokens)]
    y = np.zeros((batch, tokens, channels))
    for t in range(tokens):
        for w in range(width):
            y[:, t] += taps[:, 0, w] * window[t + w]
        y[:, t] += bias
    y = np.vectorize(ACTIVATIONS[activation], otypes=[np.float64])(y)
    return y, np.stack(window[tokens:], axis=-1)


def arguments(kind: Kind, batch: int, tokens: int, seed: int = 0) -> Arrays:
    channels, width, _, biased = kind
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    x, state = normal(batch, tokens, channels), normal(batch, channels, width - 1)
    # The weights are those of the graphs below, whatever is fed.
    random = np.random.default_rng(channels)
    return x, state, normal(channels, 1, width), normal(channels) if biased else None


def tensors(arrays: Arrays, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return tuple(None if a is None else torch.from_numpy(a).to(dtype) for a in arrays)


class EveryKind(torch.nn.Module):
    """The operator once for each of ``KINDS``, as the exporter meets it."""

    def forward(self, calls: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        """x, state, weight and, if any, bias of each."""
        results: list[torch.Tensor] = []
        for (x, state, taps, *bias), kind in zip(calls, KINDS, strict=True):
            results += op.causal_conv(x, state, taps, bias[0] if bias else None, kind[2])
        return results


@functools.cache
def translated() -> ir.Model:
    """``EveryKind`` in standard operators, with x, state, weight and bias of each as inputs."""
    calls = [tensors(arguments(kind, 2, 3)) for kind in KINDS]
    sample = [tuple(each for each in call if each is not None) for call in calls]
    auto = torch.export.Dim.AUTO
    sizes = [({0: auto, 1: auto}, {0: auto}, *[None] * (len(call) - 2)) for call in sample]
    program = torch.onnx.export(
        EveryKind().eval(),
        (sample,),
        dynamic_shapes=(sizes,),
        dynamo=True,
        opset_version=23,
        custom_translation_table={op.causal_conv.overload: op.translate},
        verbose=False,
    )
    assert program is not None
    return program.model


@functools.cache
def translated_session() -> onnxruntime.InferenceSession:
    return session(translated().clone())


def run_translated(every: list[Arrays]) -> list[Results]:
    ort = translated_session()
    names = [value.name for value in ort.get_inputs()]
    fed = [array for arrays in every for array in arrays if array is not None]
    found = ort.run(None, dict(zip(names, fed, strict=True)))
    return list(zip(found[::2], found[1::2], strict=True))


@functools.cache
def body(kind: Kind) -> onnxruntime.InferenceSession:
    """The operator's node beside its function body, the weights inside."""
    channels, width, activation, _ = kind
    *_, taps, bias = arguments(kind, 1, 1)
    # The node always has a bias.
    bias = bias if bias is not None else np.zeros(channels, np.float32)
    dtype = ir.DataType.FLOAT
    x = ir.val("x", dtype, ["b", "t", channels])
    state = ir.val("state", dtype, ["b", channels, width - 1])
    y = ir.val("y", dtype, ["b", "t", channels])
    new_state = ir.val("new_state", dtype, ["b", channels, width - 1])
    inputs = [x, state, weight("taps", taps), weight("bias", bias)]
    function = op.function_body(activation, channels, width)
    return session(one_node(function, inputs, [y, new_state], {"activation": activation}))


def assert_right(found: Results, arrays: Arrays, activation: str, name: str) -> None:
    y, new_state = plain_loop(arrays, activation)
    assert found[0].shape == y.shape and found[1].shape == new_state.shape, name
    np.testing.assert_allclose(found[0], y, rtol=0, atol=3e-6, err_msg=name)
    # It is a copy, bit by bit.
    assert np.array_equal(found[1], new_state.astype(np.float32)), name


# Fewer tokens than the W-1 columns of a state, as many, and more.
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (2, 2), (3, 3), (1, 4), (2, 17)])
def test_every_implementation_agrees_with_a_plain_loop(batch: int, tokens: int) -> None:
    every = [arguments(kind, batch, tokens, tokens) for kind in KINDS]
    graph = run_translated(every)
    for kind, arrays, standard in zip(KINDS, every, graph, strict=True):
        y, new_state = op.causal_conv(*tensors(arrays), kind[2])
        assert_right((y.numpy(), new_state.numpy()), arrays, kind[2], f"eager {kind}")
        assert_right(standard, arrays, kind[2], f"translated {kind}")
        fed = {"x": arrays[0], "state": arrays[1]}
        named = body(kind).run(None, fed)
        assert_right((named[0], named[1]), arrays, kind[2], f"body {kind}")


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 40),
    width=st.integers(2, 8),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    biased=st.booleans(),
    batch=st.integers(0, 3),
    tokens=st.integers(0, 12),
    seed=st.integers(0, 2**31),
)
def test_any_sizes_agree_with_a_plain_loop(
    channels: int, width: int, activation: str, biased: bool, batch: int, tokens: int, seed: int
) -> None:
    arrays = arguments((channels, width, activation, biased), batch, tokens, seed)
    y, new_state = op.causal_conv(*tensors(arrays), activation)
    assert_right((y.numpy(), new_state.numpy()), arrays, activation, "eager")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes_stay_what_they_are(dtype: torch.dtype, kind: Kind) -> None:
    given = tensors(arguments(kind, 2, 9), dtype)
    y, new_state = op.causal_conv(*given, kind[2])
    assert y.dtype == new_state.dtype == dtype
    x, state, taps, bias = (None if each is None else each.double().numpy() for each in given)
    assert x is not None and state is not None and taps is not None
    expected, expected_state = plain_loop((x, state, taps, bias), kind[2])
    # The sum is rounded to the dtype, and the activation after it.
    limit = 3 * torch.finfo(dtype).eps * np.abs(expected).max()
    assert np.abs(y.double().numpy() - expected).max() <= limit
    assert np.array_equal(new_state.double().numpy(), expected_state)


def test_the_state_carries_a_sequence_on() -> None:
    kind = KINDS[0]
    x, state, *rest = tensors(arguments(kind, 2, 11))
    y, new_state = op.causal_conv(x, state, *rest, kind[2])
    pieces = []
    for columns in (slice(0, 2), slice(2, 2), slice(2, 3), slice(3, 11)):
        piece, state = op.causal_conv(x[:, columns], state, *rest, kind[2])
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), y, rtol=0, atol=1e-6)
    assert torch.equal(state, new_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 6])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[-1]])
def test_passes_opcheck(kind: Kind, tokens: int, dtype: torch.dtype) -> None:
    torch.library.opcheck(
        op.causal_conv.custom_op, (*tensors(arguments(kind, 2, tokens), dtype), kind[2])
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 5), (1, 1), (2, 0), (0, 5)])
def test_the_fake_has_the_shapes_dtypes_and_layout(
    batch: int, tokens: int, dtype: torch.dtype
) -> None:
    given = tensors(arguments(KINDS[0], batch, tokens), dtype)
    # A view, as a slice of a projection is.
    given = (given[0].transpose(1, 2).contiguous().transpose(1, 2), *given[1:])
    with FakeTensorMode() as mode:
        fakes = op.causal_conv(*map(mode.from_tensor, given), "silu")
    for fake, real in zip(fakes, op.causal_conv(*given, "silu"), strict=True):
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        assert fake.is_contiguous() and real.is_contiguous()


def test_exports_to_standard_operators_that_the_lowerings_know() -> None:
    model = translated()
    assert {node.domain for node in model.graph} == {""} and not model.functions
    found = Counter(node.op_type for node in model.graph if node.op_type != "Constant")
    assert found == {
        "Transpose": 12,
        "Concat": 6,
        "Conv": 6,
        "Slice": 6,
        "Sigmoid": 2,
        "Mul": 2,
        "Gelu": 2,
        "Relu": 1,
    }
    matches = [match_causal_conv(node) for node in model.graph if node.op_type == "Conv"]
    assert all(matches)
    kinds = [[node.op_type for node in match.activation] for match in matches if match]
    assert kinds == [["Sigmoid", "Mul"], ["Sigmoid", "Mul"], ["Gelu"], ["Gelu"], ["Relu"], []]
