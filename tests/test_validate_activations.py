"""Activations that are rounded: what kernels make of them, and whose are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
import torch
from conftest import MakeCheckpoint
from oracle import relative_rms

from ingot.export.codecs.blocks import Blocks, Size
from ingot.graphs.checkpoint import Checkpoint
from ingot.runtime.onnxruntime_session import open_session
from ingot.validate.truth import activations
from ingot.validate.truth.activations import (
    TO_BFLOAT16,
    RoundedActivations,
    rounded_activations,
)
from ingot.validate.truth.layerwise import Fed, Layerwise, Side
from ingot.validate.truth.recording import HIDDEN_STATES, ROUTER_LOGITS

Array = np.ndarray[Any, Any]


def kernel(x: Array, blocks: Blocks, rows: Array, level: int) -> Array:
    """``x @ rows.T`` by MatMulNBits at an accuracy level."""
    encoded = blocks.encode(rows)
    weights = [
        onnx.numpy_helper.from_array(encoded.data, "w"),
        onnx.numpy_helper.from_array(encoded.scales, "scales"),
    ]
    node = oh.make_node(
        "MatMulNBits",
        ["x", "w", "scales"],
        ["y"],
        domain="com.microsoft",
        N=rows.shape[0],
        K=rows.shape[1],
        bits=blocks.bits,
        block_size=blocks.size,
        accuracy_level=level,
    )
    ends = [oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    graph = oh.make_graph([node], "g", ends[:1], ends[1:], weights)
    opsets = [oh.make_opsetid("", 21), oh.make_opsetid("com.microsoft", 1)]
    model = oh.make_model(graph, opset_imports=opsets, ir_version=10)
    session = open_session(model.SerializeToString(), name="g")
    (result,) = session.run(["y"], {"x": x})
    return np.asarray(result)


@pytest.mark.parametrize("columns", [64, 96, 70])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounds_as_the_kernel_does(bits: int, size: Size, columns: int) -> None:
    random = np.random.default_rng(columns + size)
    rows = random.standard_normal((48, columns)).astype(np.float32)
    x = random.standard_normal((5, columns)).astype(np.float32)
    x[1] = 0.0
    x[2, 3] = 1e3
    blocks = Blocks(4 if bits == 4 else 8, size)
    decoded = blocks.decode(blocks.encode(rows), columns).astype(np.float64)
    fast, exact = (kernel(x, blocks, rows, level) for level in (4, 0))
    rounded = rounded_activations(torch.from_numpy(x), size).double().numpy() @ decoded.T
    assert relative_rms(x @ decoded.T, exact) < 1e-5
    error = relative_rms(x @ decoded.T, rounded)
    assert error > 1e-3
    # The same rounding on every processor we know; on another it may be others of the same size.
    assert relative_rms(rounded, fast) < 2 * error
    assert 0.5 * error < relative_rms(x @ decoded.T, fast) < 2 * error


def test_a_block_of_zeros_stays_and_no_number_moves_by_more_than_half_a_step() -> None:
    x = torch.randn(3, 2, 100, generator=torch.Generator().manual_seed(0)) ** 3
    x[1, 1, :32] = 0
    found = rounded_activations(x, 32)
    assert found.shape == x.shape and torch.equal(found[1, 1, :32], x[1, 1, :32])
    for begin in range(0, 100, 32):
        block, other = x[..., begin : begin + 32], found[..., begin : begin + 32]
        step = block.abs().amax(-1, keepdim=True) / 127
        assert ((block - other).abs() <= 0.501 * step).all()
    assert (found != x).any()


def states(graph: Layerwise, ids: Array, order: Any = None) -> dict[str, Array]:
    """Hidden states and router logits of one call."""

    def keep(_run: int, _number: int, name: str, array: Array) -> Array | None:
        return array if name.startswith((HIDDEN_STATES, ROUTER_LOGITS)) else None

    runs = [[Fed(ids, np.ones_like(ids))]]
    side = Side(runs, keep) if order is None else Side(runs, keep, order)
    return graph.run([side])[0][0][0]


@pytest.mark.parametrize("family", ["olmoe", "jetmoe", "granite", "mamba2"])
def test_a_layer_rounds_what_it_multiplies_by_matrices_in_blocks(
    family: str, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(family))
    graph = Layerwise(checkpoint, "generate", torch.float64)
    ids = np.random.default_rng(1).integers(0, 512, (2, 11))
    plain = states(graph, ids)
    every = dict.fromkeys(checkpoint.entries, 32)
    rounded = states(graph, ids, lambda: RoundedActivations(graph.storages(every)))
    errors = {name: relative_rms(plain[name], rounded[name]) for name in plain}
    last = [name for name in plain if name.startswith(HIDDEN_STATES)][-1]
    assert 1e-3 < errors[last] < 0.2
    # Of matrices none of which is in blocks nothing is rounded.
    same = states(graph, ids, lambda: RoundedActivations(graph.storages({})))
    assert all(np.array_equal(plain[name], same[name]) for name in plain)


def test_a_router_rounds_nothing(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    graph = Layerwise(checkpoint, "generate", torch.float64)
    ids = np.random.default_rng(1).integers(0, 512, (2, 11))
    router = "model.layers.0.mlp.gate.weight"
    plain = states(graph, ids)

    def error(in_blocks: set[str]) -> float:
        sizes = dict.fromkeys(in_blocks, 32)
        found = states(graph, ids, lambda: RoundedActivations(graph.storages(sizes)))
        return relative_rms(plain[f"{ROUTER_LOGITS}0"], found[f"{ROUTER_LOGITS}0"])

    # The matrix of the first router alone would have its input rounded, were it in blocks.
    assert error({router}) > 1e-3
    assert error({"model.layers.0.mlp.experts.0.up_proj.weight", "lm_head.weight"}) == 0


def test_of_bfloat16_each_number_is_rounded_by_itself() -> None:
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 37)))
    found = rounded_activations(x, TO_BFLOAT16)
    assert found.dtype == x.dtype
    fraction, exponent = np.frexp(x.numpy())
    # Eight bits, of two as near the even one.
    expected = np.ldexp(np.rint(fraction * 256), exponent - 8)
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_rounds_by_the_block_of_each_matrix(
    precision: torch.dtype, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny)
    graph = Layerwise(checkpoint, "generate", precision)
    sizes = {
        name: 128 if "q_proj" in name else 64 if "experts" in name else 32
        for name in checkpoint.entries
        if not name.endswith("gate.weight")
    }
    seen: list[int] = []

    def note(x: torch.Tensor, block: int) -> torch.Tensor:
        seen.append(block)
        return rounded_activations(x, block)

    monkeypatch.setattr(activations, "rounded_activations", note)
    ids = np.random.default_rng(1).integers(0, 512, (2, 11))
    states(graph, ids, lambda: RoundedActivations(graph.storages(sizes)))
    attention = [128, 32, 32, 32]
    assert seen[:5] == [*attention, 64] and {*seen} == {32, 64, 128}
    experts = [at for at, block in enumerate(seen) if block == 64]
    second = seen.index(128, 1)
    # Of every expert both products, and then those of the next layer.
    assert seen[4:second] == [64] * (second - 4) and second > 4 + 2
    assert seen[second : second + 5] == [*attention, 64] and experts
