"""Lowering for ONNX Runtime: passes together, over layers that feed each other."""

# The paper's matrices keep their capital names.
# ruff: noqa: N806

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from convolution_graph import causal, kernel_and_bias
from one_node import session
from scan_graph import CHUNK, recurrence, scan_inputs
from text_graph import Arrays, operators, parsed

from ingot.export.passes.convolution import CausalConvToBlocked
from ingot.export.passes.scan import Mamba2ScanToLinearAttention

BOUND = 1e-5
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


def test_scans_of_one_mask_ask_for_one_token_once() -> None:
    model = layers("b", "t")
    Mamba2ScanToLinearAttention()(model)
    assert operators(model.graph)["If"] == LAYERS
    assert operators(model.graph)["Equal"] == 1


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
