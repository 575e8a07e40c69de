"""The lowering of Mamba2's scan and convolution: what changes in the graph, and its numbers."""

# The paper's matrices keep their capital names.
# ruff: noqa: N806

from __future__ import annotations

import functools
import math
import platform
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import one_node, session, weight

from ingot.export.passes.convolution import CausalConvToBlocked
from ingot.export.passes.scan import Mamba2ScanToLinearAttention
from ingot.plugins import mamba2_scan

Arrays = dict[str, np.ndarray]
Results = tuple[np.ndarray, np.ndarray]
Sizes = tuple[int, int, int, int]

FLOAT = ir.DataType.FLOAT
CHUNK = 8
NO_LIMITS = (0.0, math.inf)
PER_TOKEN = ("x", "dt", "B", "C", "mask")
BOUND = 1e-5


def scan_shapes(sizes: Sizes) -> dict[str, list[int | str]]:
    """Every input of the operator, for Hm, Pm, G and Ns."""
    heads, head_size, groups, states = sizes
    return {
        "x": ["b", "t", heads, head_size],
        "dt": ["b", "t", heads],
        "A": [heads],
        "B": ["b", "t", groups, states],
        "C": ["b", "t", groups, states],
        "D": [heads],
        "dt_bias": [heads],
        "past_states.0.ssm": ["b", heads, head_size, states],
        "mask": ["b", "t"],
    }


def scan_model(
    sizes: Sizes,
    limits: tuple[float, float] = NO_LIMITS,
    constants: Arrays | None = None,
    unknown: tuple[str, ...] = (),
) -> ir.Model:
    """One scan and its function body; ``constants`` are weights, ``unknown`` inputs of any size."""
    shapes = scan_shapes(sizes)
    inputs = [
        weight(name, constants[name])
        if constants and name in constants
        else ir.val(name, FLOAT, ["u", *shape[1:-1], "n"] if name in unknown else shape)
        for name, shape in shapes.items()
    ]
    outputs = [
        ir.val("y", FLOAT, shapes["x"]),
        ir.val("present_states.0.ssm", FLOAT, shapes["past_states.0.ssm"]),
    ]
    attributes = {"chunk_size": CHUNK, "dt_min": limits[0], "dt_max": limits[1]}
    return one_node(mamba2_scan.function_body(), inputs, outputs, attributes)


@functools.cache
def lowered(sizes: Sizes, limits: tuple[float, float]) -> onnxruntime.InferenceSession:
    return session(scan_model(sizes, limits), Mamba2ScanToLinearAttention())


def run(arrays: Arrays, limits: tuple[float, float] = NO_LIMITS) -> Results:
    sizes = (*arrays["x"].shape[2:], *arrays["B"].shape[2:])
    y, new_state = lowered(sizes, limits).run(None, arrays)
    return np.asarray(y), np.asarray(new_state)


def recurrence(arrays: Arrays, limits: tuple[float, float] = NO_LIMITS) -> Results:
    """The scan, token by token, in float64."""
    x, dt, A, B, C, D, dt_bias, S, mask = (a.astype(np.float64) for a in arrays.values())
    step = mask[..., None] * np.clip(np.logaddexp(0, dt + dt_bias), *limits)
    heads_of_group = x.shape[2] // B.shape[2]
    B, C = (np.repeat(array, heads_of_group, axis=2) for array in (B, C))
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        read = (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        S = np.exp(step[:, t] * A)[..., None, None] * S + read
        y[:, t] = (S * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t]
    return y, S


def scan_inputs(
    sizes: Sizes, batch: int, tokens: int, *, padding: str = "none", seed: int = 0
) -> Arrays:
    random = np.random.default_rng(seed)
    named = {"b": batch, "t": tokens}
    arrays = {
        name: random.normal(size=[named[d] if isinstance(d, str) else d for d in shape])
        for name, shape in scan_shapes(sizes).items()
    }
    # Most steps between 0.01 and 1: a memory of a few tokens and of many.
    arrays["A"] = -random.uniform(0.1, 4, size=sizes[0])
    arrays["dt_bias"] = random.uniform(-4, 0, size=sizes[0])
    mask = np.ones((batch, tokens))
    if padding == "left":
        for row in range(batch):
            mask[row, : (row + 1) * tokens // (batch + 1)] = 0
    elif padding == "holes":
        mask = (random.uniform(size=mask.shape) < 0.6).astype(np.float64)
    arrays["mask"] = mask
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def cut(arrays: Arrays, start: int, end: int, state: np.ndarray) -> Arrays:
    """The tokens from ``start`` to ``end``, after ``state``."""
    pieces = {name: a[:, start:end] if name in PER_TOKEN else a for name, a in arrays.items()}
    return {**pieces, "past_states.0.ssm": state}


def assert_near(found: Results, expected: Results, bound: float = BOUND) -> None:
    """Each result within ``bound`` times its own largest magnitude."""
    for ours, plain in zip(found, expected, strict=True):
        assert ours.shape == plain.shape
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, plain, rtol=0, atol=bound * np.abs(plain).max())


@settings(max_examples=150, deadline=None)
@given(
    heads_and_groups=st.sampled_from([(1, 1), (4, 1), (4, 4), (6, 2), (6, 3)]),
    # ONNX Runtime has another kernel for sizes that fill its vectors, such as the last two.
    head_and_state_size=st.sampled_from([(1, 1), (3, 5), (5, 3), (16, 32), (32, 16)]),
    tokens=st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]),
    batch=st.integers(1, 3),
    limits=st.sampled_from([NO_LIMITS, (0.05, math.inf), (0.0, 0.3), (0.05, 0.3)]),
    padding=st.sampled_from(["none", "left", "holes"]),
    seed=st.integers(0, 2**31),
)
def test_the_lowered_scan_agrees_with_the_recurrence(
    heads_and_groups: tuple[int, int],
    head_and_state_size: tuple[int, int],
    tokens: int,
    batch: int,
    limits: tuple[float, float],
    padding: str,
    seed: int,
) -> None:
    (heads, groups), (head_size, states) = heads_and_groups, head_and_state_size
    sizes = (heads, head_size, groups, states)
    arrays = scan_inputs(sizes, batch, tokens, padding=padding, seed=seed)
    assert_near(run(arrays, limits), recurrence(arrays, limits))


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("sizes", [(4, 3, 2, 5), (4, 32, 1, 32)])
def test_a_lowered_scan_split_anywhere_equals_the_whole(sizes: Sizes, padding: str) -> None:
    tokens = CHUNK + 3
    arrays = scan_inputs(sizes, 2, tokens, padding=padding, seed=1)
    expected = run(arrays)
    first = arrays["past_states.0.ssm"]
    for at in range(1, tokens):
        before, middle = run(cut(arrays, 0, at, first))
        after, last = run(cut(arrays, at, tokens, middle))
        assert_near((np.concatenate([before, after], axis=1), last), expected, 2e-6)
    steps, state = [], first
    for t in range(tokens):
        y, state = run(cut(arrays, t, t + 1, state))
        steps.append(y)
    assert_near((np.concatenate(steps, axis=1), state), expected, 2e-6)


@pytest.mark.parametrize("sizes", [(4, 3, 2, 5), (4, 32, 1, 32)])
@pytest.mark.parametrize("tokens", [1, CHUNK + 1])
def test_padding_keeps_the_state_to_the_bit(sizes: Sizes, tokens: int) -> None:
    arrays = scan_inputs(sizes, 3, tokens, seed=2)
    # Rows 0 and 2 are padding from end to end.
    arrays["mask"][[0, 2]] = 0
    state = arrays["past_states.0.ssm"]
    _, new_state = run(arrays)
    assert np.array_equal(new_state[[0, 2]], state[[0, 2]])
    assert not np.array_equal(new_state[1], state[1])


@pytest.mark.parametrize("sizes", [(4, 3, 2, 5), (4, 32, 1, 32)])
@pytest.mark.parametrize("tokens", [1, CHUNK + 1])
def test_what_padding_holds_reaches_no_token(sizes: Sizes, tokens: int) -> None:
    arrays = scan_inputs(sizes, 3, tokens, padding="left", seed=3)
    arrays["mask"][0, -1] = 0
    is_token = arrays["mask"] == 1
    assert 0 < is_token.sum() < is_token.size
    y, new_state = run(arrays)
    for name in ("x", "dt", "B", "C"):
        # Finite, though nearly every product with it is infinite in float32.
        arrays[name][~is_token] = 3e38
    found_y, found_state = run(arrays)
    assert np.array_equal(found_y[is_token], y[is_token])
    assert np.array_equal(found_state, new_state)


@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("decay", [-16.0, -90.0, -1e4, -1e30])
def test_extreme_steps_give_finite_right_numbers(tokens: int, decay: float) -> None:
    arrays = scan_inputs((4, 32, 2, 16), 2, tokens, seed=4)
    arrays["A"][:] = decay
    arrays["dt"][:, ::3] = 80.0
    arrays["dt"][:, 1::3] = -100.0
    found, expected = run(arrays), recurrence(arrays)
    assert all(np.isfinite(array).all() for array in found)
    # Between the vast steps the numbers are small; each token is held to its own scale.
    for t in range(tokens):
        assert_near((found[0][:, t], found[1]), (expected[0][:, t], expected[1]))


def operators(graph: ir.Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph)


def interface(model: ir.Model) -> list[tuple[str | None, str, str]]:
    values = (*model.graph.inputs, *model.graph.outputs)
    return [(value.name, str(value.shape), str(value.dtype)) for value in values]


def test_a_scan_becomes_two_forms_of_the_kernel() -> None:
    model = scan_model((6, 3, 2, 5))
    before = interface(model)
    assert Mamba2ScanToLinearAttention()(model).modified
    # The two results go on to the graph's outputs through an Identity each.
    expected = "Shape Equal Unsqueeze Add Softplus Mul Mul Unsqueeze Mul Reshape If"
    expected += " Unsqueeze Mul Add Identity Identity"
    assert operators(model.graph) == Counter(expected.split())
    branch = next(node for node in model.graph if node.op_type == "If").attributes
    one, many = (branch[name].as_graph() for name in ("then_branch", "else_branch"))
    assert operators(one)["LinearAttention"] == operators(many)["LinearAttention"] == 1
    assert operators(one)["Transpose"] == 0
    assert operators(many)["Transpose"] == 2
    assert not model.functions
    assert interface(model) == before
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (NO_LIMITS, []),
        ((0.25, math.inf), [[0.25, None]]),
        ((0.0, 0.5), [[None, 0.5]]),
        ((0.25, 0.5), [[0.25, 0.5]]),
    ],
)
def test_only_limits_that_a_step_can_reach_are_kept(
    limits: tuple[float, float], expected: list[list[float | None]]
) -> None:
    model = scan_model((2, 3, 1, 5), limits)
    Mamba2ScanToLinearAttention()(model)
    clips = [node for node in model.graph if node.op_type == "Clip"]
    assert [[number(value) for value in node.inputs[1:]] for node in clips] == expected


def number(value: ir.Value | None) -> float | None:
    if value is None:
        return None
    assert value.const_value is not None
    return float(value.const_value.numpy())


def test_scans_of_one_mask_ask_for_one_token_once() -> None:
    model = layers("b", "t")
    Mamba2ScanToLinearAttention()(model)
    assert operators(model.graph)["If"] == LAYERS
    assert operators(model.graph)["Equal"] == 1


def test_a_scan_of_unknown_sizes_keeps_its_node_and_body() -> None:
    model = scan_model((4, 3, 2, 5), unknown=("x",))
    assert not Mamba2ScanToLinearAttention()(model).modified
    assert operators(model.graph)["Mamba2Scan"] == 1
    assert model.functions


def test_a_scan_in_another_type_keeps_its_node() -> None:
    model = scan_model((4, 3, 2, 5))
    for node in model.graph:
        if node.op_type == "Mamba2Scan":
            for value in node.inputs:
                assert value is not None
                value.type = ir.TensorType(ir.DataType.FLOAT16)
    assert not Mamba2ScanToLinearAttention()(model).modified


SILU = "sigmoid = Sigmoid (convolved) activated = Mul (convolved, sigmoid)"
ACTIVATIONS = {
    "silu": SILU,
    "gelu": "activated = Gelu (convolved)",
    "gelu_tanh": 'activated = Gelu <approximate = "tanh"> (convolved)',
    "relu": "activated = Relu (convolved)",
}
# Channels of the convolution where no test asks for others.
C = 6


def convolution_text(
    channels: int = C, width: int = 4, activation: str = "silu", bias: bool = True
) -> str:
    """A causal convolution as ``graphs.mamba2`` captures to, its weights still inputs."""
    return f"""
    <ir_version: 10, opset_import: ["" : 23]>
    one_convolution (
        float[b, t, {channels}] x,
        float[b, {channels}, {width - 1}] past,
        float[{channels}, 1, {width}] kernel
        {f", float[{channels}] bias" if bias else ""}
    ) => (float[b, t, {channels}] y, float[b, {channels}, {width - 1}] present) {{
        start = Constant <value = int64[1] {{{1 - width}}}> ()
        end = Constant <value = int64[1] {{9223372036854775807}}> ()
        axis = Constant <value = int64[1] {{2}}> ()
        step = Constant <value = int64[1] {{1}}> ()
        columns = Transpose <perm = [0, 2, 1]> (x)
        window = Concat <axis = -1> (past, columns)
        convolved = Conv <group = {channels}, pads = [0, 0], strides = [1], dilations = [1]>
            (window, kernel {", bias" if bias else ""})
        {ACTIVATIONS[activation]}
        y = Transpose <perm = [0, 2, 1]> (activated)
        present = Slice (window, start, end, axis, step)
    }}
    """


def parsed(text: str, weights: Arrays) -> ir.Model:
    """The model of a text, with some of its inputs made weights, and every shape inferred."""
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = ir.serde.deserialize_model(proto)
    for value in list(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(weights[value.name], name=value.name)
            model.graph.register_initializer(value)
    return model


def kernel_and_bias(channels: int = C, width: int = 4, bias: bool = True) -> Arrays:
    random = np.random.default_rng(width)
    arrays = {"kernel": random.normal(size=(channels, 1, width))}
    if bias:
        arrays["bias"] = random.normal(size=channels)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def activate(name: str, v: np.ndarray) -> np.ndarray:
    """Each activation in float64."""
    gate: np.ndarray
    if name == "silu":
        gate = 1 / (1 + np.exp(-v))
    elif name == "gelu":
        gate = np.reshape([(1 + math.erf(n / math.sqrt(2))) / 2 for n in v.flat], v.shape)
    elif name == "gelu_tanh":
        gate = (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2
    else:
        gate = np.heaviside(v, 0)
    result: np.ndarray = v * gate
    return result


def causal(x: np.ndarray, past: np.ndarray, weights: Arrays, activation: str) -> Results:
    """The convolution, tap by tap, in float64, and the new state."""
    kernel = weights["kernel"].astype(np.float64)
    window = np.concatenate([past.swapaxes(1, 2), x], axis=1)
    taps = range(kernel.shape[2])
    y = sum(window[:, w : w + x.shape[1]] * kernel[:, 0, w] for w in taps)
    y = y + weights.get("bias", np.zeros(1))
    return activate(activation, y), window[:, x.shape[1] :].swapaxes(1, 2)


@functools.cache
def rewritten(
    channels: int, width: int, activation: str, bias: bool
) -> onnxruntime.InferenceSession:
    text = convolution_text(channels, width, activation, bias)
    return session(parsed(text, kernel_and_bias(channels, width, bias)), CausalConvToBlocked())


@settings(max_examples=100, deadline=None)
@given(
    # Blocks of channels are 8 or 16 wide.
    channels=st.sampled_from([1, 6, 16, 24, 40]),
    width=st.sampled_from([2, 4]),
    tokens=st.sampled_from([1, 2, 3, 4, 11]),
    batch=st.integers(1, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_rewritten_convolution_agrees_with_its_definition(
    channels: int, width: int, tokens: int, batch: int, activation: str, bias: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    x = random.normal(size=(batch, tokens, channels)).astype(np.float32)
    past = random.normal(size=(batch, channels, width - 1)).astype(np.float32)
    run = rewritten(channels, width, activation, bias).run
    y, present = (np.asarray(found) for found in run(None, {"x": x, "past": past}))
    weights = kernel_and_bias(channels, width, bias)
    expected_y, expected_present = causal(x, past, weights, activation)
    np.testing.assert_allclose(y, expected_y, rtol=0, atol=BOUND * np.abs(expected_y).max() + 1e-6)
    assert np.array_equal(present, expected_present)

    # The state carries over: call by call, one token each.
    steps = []
    for t in range(tokens):
        step, past = run(None, {"x": x[:, t : t + 1], "past": past})
        steps.append(step)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), y, rtol=0, atol=1e-5)
    assert np.array_equal(past, present)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_convolution_moves_to_an_image(activation: str) -> None:
    model = parsed(convolution_text(activation=activation), kernel_and_bias())
    before = interface(model)
    assert CausalConvToBlocked()(model).modified
    assert interface(model) == before
    found = operators(model.graph)
    assert found["Concat"] == found["Slice"] == found["Conv"] == found["Squeeze"] == 1
    # Of the past, of the new state, and the two around the convolution, which become part of it.
    assert found["Transpose"] == 4
    # Of the image, and of the kernel, once, at load.
    assert found["Unsqueeze"] == 2
    (conv,) = (node for node in model.graph if node.op_type == "Conv")
    assert [use.node.op_type for use in conv.outputs[0].uses()] == ["Transpose"]
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="blocked layouts are asked for on x86")
def test_onnx_runtime_runs_it_in_blocks_without_transposing(tmp_path: Path) -> None:
    model = parsed(convolution_text(24), kernel_and_bias(24))
    CausalConvToBlocked()(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    found = Counter((node.domain, node.op_type) for node in nodes)
    assert found["com.microsoft.nchwc", "Conv"] == 1
    # Of the past and of the new state, both small.
    assert found["", "Transpose"] == 2
    assert found["com.microsoft", "QuickGelu"] == 1


LEFT_ALONE = {
    "padded": ("pads = [0, 0]", "pads = [3, 0]"),
    "strided": ("strides = [1]", "strides = [2]"),
    "dilated": ("dilations = [1]", "dilations = [2]"),
    "padded by name": ("pads = [0, 0]", 'auto_pad = "SAME_LOWER"'),
    "not depthwise": ("group = 6", "group = 1"),
    "new columns first": ("(past, columns)", "(columns, past)"),
    "no transpose in": ("columns = Transpose <perm = [0, 2, 1]> (x)", "columns = Identity (x)"),
    "another transpose in": ("columns = Transpose <perm = [0, 2, 1]>", "columns = Transpose"),
    "another transpose out": ("y = Transpose <perm = [0, 2, 1]>", "y = Transpose"),
    "no transpose out": ("y = Transpose <perm = [0, 2, 1]> (activated)", "y = Relu (activated)"),
    "another part of the window as state": ("int64[1] {-3}", "int64[1] {-4}"),
    "the state along another axis": ("(window, start, end, axis", "(window, start, end, step"),
    "a state up to some column": ("int64[1] {9223372036854775807}", "int64[1] {7}"),
    "every second column as state": ("axis, step)", "axis, axis)"),
    "the window read elsewhere": ("y = Tr", "more = Relu (window) y = Tr"),
    "the columns read elsewhere": ("y = Tr", "more = Relu (columns) y = Tr"),
    "the convolution read elsewhere": ("y = Tr", "more = Relu (convolved) y = Tr"),
    "the sigmoid read elsewhere": ("y = Tr", "more = Relu (sigmoid) y = Tr"),
    "the activation read elsewhere": ("y = Tr", "more = Relu (activated) y = Tr"),
    "a state from elsewhere": ("present = Slice (window,", "present = Slice (past,"),
    "the window as an output": ("present)", "present, float[b, 6, s] window)"),
    "the convolution as an output": ("present)", "present, float[b, 6, t] convolved)"),
    "the activation as an output": ("present)", "present, float[b, 6, t] activated)"),
    "scaled channels": (SILU, "activated = Mul (convolved, bias)"),
}


@pytest.mark.parametrize("change", LEFT_ALONE)
def test_any_other_convolution_is_left_alone(change: str) -> None:
    old, new = LEFT_ALONE[change]
    text = convolution_text()
    assert old in text
    model = parsed(text.replace(old, new, 1), kernel_and_bias())
    before = wiring(model)
    assert not CausalConvToBlocked()(model).modified
    assert wiring(model) == before


def wiring(model: ir.Model) -> list[list[str | None]]:
    nodes = [(node.op_type, *node.inputs, *node.outputs) for node in model.graph]
    return [[v.name if isinstance(v, ir.Value) else v for v in node] for node in nodes]


LAYERS = 4
SIZES = (4, 16, 2, 32)
HEADS, HEAD_SIZE, GROUPS, STATES = SIZES
WIDTH, INNER, GROUP = 4, HEADS * HEAD_SIZE, GROUPS * STATES
CHANNELS = INNER + 2 * GROUP
LIMITS = (0.01, 2.0)


def layer_weights(layer: int) -> Arrays:
    random = np.random.default_rng(100 + layer)
    scan = scan_inputs(SIZES, 1, 1, seed=layer)
    return {
        **kernel_and_bias(CHANNELS, WIDTH),
        **{name: scan[name] for name in ("A", "D", "dt_bias")},
        "mix": 0.03 * random.normal(size=(INNER, CHANNELS + HEADS)).astype(np.float32),
    }


def layers(batch: int | str, tokens: int | str) -> ir.Model:
    """Convolution, scan and a dense layer, four times; static sizes let memory be planned ahead."""
    ends = [f"float[{batch}, {tokens}, {CHANNELS}] h0", f"float[{batch}, {tokens}, {HEADS}] dt0"]
    inputs, outputs = [*ends, f"float[{batch}, {tokens}] mask"], []
    known, body, weights = [], [], Arrays()
    for n in range(LAYERS):
        conv = f"float[{batch}, {CHANNELS}, {WIDTH - 1}]"
        ssm = f"float[{batch}, {HEADS}, {HEAD_SIZE}, {STATES}]"
        inputs += [f"{conv} past_conv{n}", f"{ssm} past_ssm{n}"]
        outputs += [f"{conv} conv{n}", f"{ssm} ssm{n}"]
        known.append(f"float[{batch}, {tokens}, {HEADS}, {HEAD_SIZE}] y{n}")
        for name, array in layer_weights(n).items():
            weights[f"{name}{n}"] = array
            inputs.append(f"float{list(array.shape)} {name}{n}")
        body.append(f"""
            masked{n} = Mul (h{n}, column)
            columns{n} = Transpose <perm = [0, 2, 1]> (masked{n})
            window{n} = Concat <axis = -1> (past_conv{n}, columns{n})
            convolved{n} = Conv <group = {CHANNELS}> (window{n}, kernel{n}, bias{n})
            sigmoid{n} = Sigmoid (convolved{n})
            activated{n} = Mul (convolved{n}, sigmoid{n})
            rows{n} = Transpose <perm = [0, 2, 1]> (activated{n})
            conv{n} = Slice (window{n}, start, end, axis)
            x{n}, B{n}, C{n} = Split <axis = 2> (rows{n}, parts)
            x_heads{n} = Reshape (x{n}, x_shape)
            B_groups{n} = Reshape (B{n}, B_shape)
            C_groups{n} = Reshape (C{n}, B_shape)
            y{n}, ssm{n} = ingot.Mamba2Scan
                <chunk_size = {CHUNK}, dt_min = {LIMITS[0]}, dt_max = {LIMITS[1]}> (
                x_heads{n}, dt{n}, A{n}, B_groups{n}, C_groups{n}, D{n}, dt_bias{n}, past_ssm{n},
                mask
            )
            flat{n} = Reshape (y{n}, flat_shape)
            mixed{n} = MatMul (flat{n}, mix{n})
            bounded{n} = Tanh (mixed{n})
            h{n + 1}, dt{n + 1} = Split <axis = 2> (bounded{n}, mixed_parts)
        """)
    outputs.append(f"float[{batch}, {tokens}, {CHANNELS}] h{LAYERS}")
    vectors = {
        "start": [1 - WIDTH],
        "end": [np.iinfo(np.int64).max],
        "axis": [2],
        "parts": [INNER, GROUP, GROUP],
        "x_shape": [0, 0, HEADS, HEAD_SIZE],
        "B_shape": [0, 0, GROUPS, STATES],
        "flat_shape": [0, 0, INNER],
        "mixed_parts": [CHANNELS, HEADS],
    }
    constants = "".join(
        f"{name} = Constant <value_ints: ints = {values}> ()\n" for name, values in vectors.items()
    )
    return parsed(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "ingot" : 1]>
        layers ({", ".join(inputs)}) => ({", ".join(outputs)}) <{", ".join(known)}> {{
            {constants}
            column = Unsqueeze (mask, axis)
            {"".join(body)}
        }}
        """,
        weights,
    )


def plain_layers(feeds: Arrays) -> list[np.ndarray]:
    """Every new state, and the last layer's result, in float64."""
    h, dt, mask = (feeds[name].astype(np.float64) for name in ("h0", "dt0", "mask"))
    batch, tokens = mask.shape
    results = []
    for n in range(LAYERS):
        weights = layer_weights(n)
        rows, conv = causal(h * mask[..., None], feeds[f"past_conv{n}"], weights, "silu")
        x, B, C = np.split(rows, [INNER, INNER + GROUP], axis=2)
        arrays = {
            "x": x.reshape(batch, tokens, HEADS, HEAD_SIZE),
            "dt": dt,
            "A": weights["A"],
            "B": B.reshape(batch, tokens, GROUPS, STATES),
            "C": C.reshape(batch, tokens, GROUPS, STATES),
            "D": weights["D"],
            "dt_bias": weights["dt_bias"],
            "state": feeds[f"past_ssm{n}"],
            "mask": mask,
        }
        y, ssm = recurrence(arrays, LIMITS)
        results += [conv, ssm]
        mixed = np.tanh(y.reshape(batch, tokens, INNER) @ weights["mix"].astype(np.float64))
        h, dt = np.split(mixed, [CHANNELS], axis=2)
    return [*results, h]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("tokens", [1, CHUNK + 1])
def test_layers_are_right_and_repeat_to_the_bit(tokens: int, static: bool) -> None:
    batch = 2
    model = layers(batch, tokens) if static else layers("b", "t")
    runner = session(model, Mamba2ScanToLinearAttention(), CausalConvToBlocked())
    left = operators(model.graph)
    assert left["Mamba2Scan"] == 0 and left["Squeeze"] == LAYERS
    random = np.random.default_rng(6)
    named = {"b": batch, "t": tokens}
    feeds = {
        value.name: random.normal(
            size=[named[d] if isinstance(d, str) else d for d in value.shape]
        ).astype(np.float32)
        for value in runner.get_inputs()
    }
    feeds["mask"] = np.ones((batch, tokens), dtype=np.float32)
    feeds["mask"][1, : tokens // 2] = 0
    first = [np.asarray(array) for array in runner.run(None, feeds)]
    for found, expected in zip(first, plain_layers(feeds), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND * np.abs(expected).max())
    for _ in range(50):
        again = runner.run(None, feeds)
        assert all(np.array_equal(a, b) for a, b in zip(again, first, strict=True))
