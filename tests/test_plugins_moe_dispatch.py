"""MoeDispatch: the eager reference, the function body and the lowered graph against a loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from one_node import one_node, session, weight

from ingot.export.passes.moe import MoeDispatchToMoE
from ingot.plugins import moe_dispatch as op
from ingot.plugins.activations import ACTIVATIONS
from ingot.plugins.experts import route

FLOAT = ir.DataType.FLOAT


def plain_loop(
    x: np.ndarray,
    router_logits: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    top_k: int,
    normalize: bool,
    activation: str,
) -> np.ndarray:
    """The formula, token by token and expert by expert, in float64 and without torch."""
    acts: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "silu": lambda v: v / (1 + np.exp(-v)),
        "gelu": lambda v: v * 0.5 * (1 + np.vectorize(math.erf)(v / math.sqrt(2))),
        "gelu_tanh": lambda v: (
            0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
        ),
        "relu": lambda v: np.maximum(v, 0),
        "identity": lambda v: v,
    }
    act = acts[activation]
    y = np.zeros(x.shape)
    for n in range(len(x)):
        scores = router_logits[n].astype(np.float64)
        p = np.exp(scores - scores.max())
        p /= p.sum()
        # Python's sort is stable: among equal logits the lower expert id comes first.
        chosen = sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]
        total = sum(p[e] for e in chosen) if normalize else 1.0
        for e in chosen:
            gate, up = np.split(gate_up[e].astype(np.float64) @ x[n], 2)
            y[n] += p[e] / total * (down[e].astype(np.float64) @ (act(gate) * up))
    return y


def arguments(
    tokens: int, hidden: int, experts: int, inner: int, seed: int, ties: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(tokens, hidden))
    logits = 2 * random.normal(size=(tokens, experts))
    if ties == "some":
        logits = np.round(logits)
    elif ties == "all":
        logits = np.zeros_like(logits)
    elif ties == "one expert":
        logits[:, experts // 2] += 50
    gate_up = random.normal(size=(experts, 2 * inner, hidden)) / math.sqrt(hidden)
    down = random.normal(size=(experts, hidden, inner)) / math.sqrt(inner)
    return tuple(a.astype(np.float32) for a in (x, logits, gate_up, down))  # type: ignore[return-value]


def built(arrays: tuple[np.ndarray, ...], top_k: int, normalize: bool, activation: str) -> ir.Model:
    """The operator as a model; the experts are its weights, the rest its inputs."""
    op.moe_dispatch.register_schema()
    _, _, gate_up, down = arrays
    inputs = [
        ir.val("x", FLOAT, ["n", "h"]),
        ir.val("router_logits", FLOAT, ["n", "e"]),
        weight("gate_up", gate_up),
        weight("down", down),
    ]
    return one_node(
        op.function_body(activation),
        inputs,
        [ir.val("y", FLOAT, ["n", "h"])],
        {"top_k": top_k, "normalize": int(normalize), "activation": activation},
        # The lowering reads it.
        unused=[ir.val("attention_mask", ir.DataType.INT64, ["b", "s"])],
    )


def run(ort: onnxruntime.InferenceSession, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    x, router_logits, _, _ = arrays
    mask = np.ones((1, 3), dtype=np.int64)
    feeds = {"x": x, "router_logits": router_logits, "attention_mask": mask}
    result: np.ndarray = ort.run(None, feeds)[0]
    return result


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 2, 7, 33]),
    # With one hidden unit, `down` would not count as a stack of experts.
    hidden=st.sampled_from([2, 8, 20]),
    experts=st.sampled_from([1, 2, 5, 16]),
    every_expert=st.booleans(),
    inner=st.sampled_from([1, 6, 16]),
    normalize=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    ties=st.sampled_from(["none", "some", "all", "one expert"]),
    seed=st.integers(0, 2**31),
)
@example(
    tokens=0,
    hidden=8,
    experts=5,
    every_expert=False,
    inner=6,
    normalize=True,
    activation="silu",
    ties="none",
    seed=0,
)
def test_every_implementation_agrees_with_a_plain_loop(
    tokens: int,
    hidden: int,
    experts: int,
    every_expert: bool,
    inner: int,
    normalize: bool,
    activation: str,
    ties: str,
    seed: int,
) -> None:
    top_k = experts if every_expert else max(1, experts // 3)
    arrays = arguments(tokens, hidden, experts, inner, seed, ties)
    expected = plain_loop(*arrays, top_k, normalize, activation)
    bound = 2e-5 * max(1.0, float(np.abs(expected).max(initial=0)))
    tensors = [torch.from_numpy(array) for array in arrays]
    eager = op.moe_dispatch(*tensors, top_k, normalize, activation).numpy()
    results = {
        "eager": eager,
        "body": run(session(built(arrays, top_k, normalize, activation)), arrays),
    }
    if activation == "silu":
        model = built(arrays, top_k, normalize, activation)
        results["lowered"] = run(session(model, MoeDispatchToMoE()), arrays)
        assert [n.op_type for n in model.graph if n.domain] == ["MoE"]
    for name, found in results.items():
        assert found.shape == expected.shape, name
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_accumulate_in_float32_or_wider(dtype: torch.dtype) -> None:
    arrays = arguments(9, 16, 6, 8, seed=1, ties="none")
    x, logits, gate_up, down = (torch.from_numpy(a) for a in arrays)
    x, gate_up, down = (t.to(dtype) for t in (x, gate_up, down))
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    found = op.moe_dispatch(x, logits, gate_up, down, 2, True, "silu")
    assert found.dtype == dtype
    exact = tuple(t.double().numpy() for t in (x, logits, gate_up, down))
    expected = plain_loop(exact[0], exact[1], exact[2], exact[3], 2, True, "silu")
    # Only the last rounding is in the input's dtype.
    limit = max(2 * torch.finfo(dtype).eps * np.abs(expected).max(), 1e-12)
    assert np.abs(found.double().numpy() - expected).max() <= limit


def test_ties_go_to_the_lower_expert() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    ids, weights = route(logits, 2, normalize=True)
    assert ids.tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(weights, torch.full((2, 2), 0.5))


@pytest.mark.parametrize("tokens", [1, 6])
def test_passes_opcheck(tokens: int) -> None:
    arrays = arguments(tokens, 8, 4, 4, seed=2, ties="none")
    sample: tuple[Any, ...] = (*(torch.from_numpy(a) for a in arrays), 2, True, "silu")
    torch.library.opcheck(op.moe_dispatch.custom_op, sample)


def test_the_function_body_computes_only_the_experts_hit() -> None:
    arrays = arguments(3, 8, 16, 4, seed=3, ties="one expert")
    _, _, gate_up, down = arrays
    # An expert nobody chose may hold anything, even NaN, without reaching the result.
    for expert in set(range(16)) - {8}:
        gate_up[expert] = np.nan
        down[expert] = np.nan
    found = run(session(built(arrays, 1, False, "silu")), arrays)
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 0.01


def nodes(graph: Any) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph or function, with those of the graphs inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_size_in_the_function_body_follows_from_shapes(activation: str) -> None:
    # TensorRT cannot build the sizes that these give.
    sized_by_data = {"NonZero", "Unique", "Compress", "NonMaxSuppression"}
    assert not sized_by_data & {node.op_type for node in nodes(op.function_body(activation))}


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    # Fewer choices than experts; as many; tiles of every height, of which some are cut short.
    [(1, 16, 3), (5, 16, 3), (4, 8, 2), (5, 8, 2), (17, 8, 2), (60, 2, 1), (60, 2, 2), (150, 8, 2)],
)
@pytest.mark.parametrize("ties", ["none", "all", "one expert"])
def test_the_function_body_serves_any_spread_of_choices(
    tokens: int, experts: int, top_k: int, ties: str
) -> None:
    arrays = arguments(tokens, 8, experts, 6, seed=5, ties=ties)
    expected = plain_loop(*arrays, top_k, True, "silu")
    found = run(session(built(arrays, top_k, True, "silu")), arrays)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_function_body_accumulates_half_precision_in_float32(dtype: torch.dtype) -> None:
    _, logits, *others = arrays = arguments(9, 512, 6, 64, seed=6, ties="none")
    half = ir.DataType.FLOAT16 if dtype == torch.float16 else ir.DataType.BFLOAT16
    x, gate_up, down = (array.astype(half.numpy()) for array in (arrays[0], *others))
    # Sessions neither take nor give bfloat16 arrays, so x is a constant and y is cast.
    inputs = [
        weight("x", x),
        ir.val("router_logits", FLOAT, ["n", "e"]),
        weight("gate_up", gate_up),
        weight("down", down),
    ]
    attributes: dict[str, int | float | str] = {"top_k": 2, "normalize": 1, "activation": "silu"}
    model = one_node(op.function_body("silu"), inputs, [ir.val("y", half, ["n", "h"])], attributes)
    y = ir.val("y_wide", FLOAT, ["n", "h"])
    graph = model.graph
    graph.append(ir.node("Cast", [graph.outputs[0]], attributes={"to": int(FLOAT)}, outputs=[y]))
    graph.outputs[0] = y

    [found] = session(model).run(None, {"router_logits": logits})
    exact = [array.astype(np.float64) for array in (x, gate_up, down)]
    expected = plain_loop(exact[0], logits, exact[1], exact[2], 2, True, "silu")
    assert np.abs(found - expected).max() <= torch.finfo(dtype).eps * np.abs(expected).max()
    # The result was rounded to the input's dtype.
    np.testing.assert_array_equal(found, found.astype(half.numpy()).astype(np.float32))


@pytest.mark.parametrize("ties", ["some", "one expert"])
def test_the_function_body_has_no_racing_scatter_and_repeats_to_the_bit(ties: str) -> None:
    for node in nodes(op.function_body("silu")):
        if node.op_type.startswith("Scatter"):
            assert not [a for a in node.attribute if a.name == "reduction"]
    arrays = arguments(200, 16, 4, 8, seed=4, ties=ties)
    ort = session(built(arrays, 2, False, "silu"))
    first = run(ort, arrays)
    assert all(np.array_equal(first, run(ort, arrays)) for _ in range(100))


def test_one_session_serves_every_number_of_tokens() -> None:
    arrays = arguments(1, 8, 5, 6, seed=7, ties="none")
    ort = session(built(arrays, 2, True, "silu"))
    for tokens in (4, 0, 1, 0, 50, 3):
        x, logits, _, _ = arguments(tokens, 8, 5, 6, seed=tokens, ties="none")
        expected = plain_loop(x, logits, arrays[2], arrays[3], 2, True, "silu")
        found = run(ort, (x, logits, arrays[2], arrays[3]))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
