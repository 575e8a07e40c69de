"""MoeDispatch: the eager reference, the function body and ONNX Runtime's kernel against a loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from plugins import moe_dispatch as op


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


def body_session(top_k: int, normalize: bool, activation: str) -> onnxruntime.InferenceSession:
    op.register_schema()
    names = ("x", "router_logits", "gate_up", "down")
    node = helper.make_node(
        op.NAME,
        names,
        ["y"],
        domain=op.DOMAIN,
        top_k=top_k,
        normalize=int(normalize),
        activation=activation,
    )
    shapes = (["n", "h"], ["n", "e"], ["e", "i2", "h"], ["e", "h", "i"])
    graph = helper.make_graph(
        [node],
        "one_node",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in zip(names, shapes, strict=True)
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "h"])],
    )
    model = helper.make_model(
        graph,
        functions=[op.function_body(activation)],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid(op.DOMAIN, 1)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return _session(model)


def kernel_session(top_k: int, normalize: bool) -> onnxruntime.InferenceSession:
    """``com.microsoft.MoE`` with the attributes the lowering gives it, experts reversed."""
    node = helper.make_node(
        "MoE",
        ["x", "router_logits", "gate_up", "", "down"],
        ["y"],
        domain="com.microsoft",
        k=top_k,
        normalize_routing_weights=int(normalize),
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in ("x", "router_logits", "gate_up", "down")
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return _session(helper.make_model(graph, opset_imports=imports, ir_version=10))


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(session: onnxruntime.InferenceSession, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    names = ("x", "router_logits", "gate_up", "down")
    result: np.ndarray = session.run(None, dict(zip(names, arrays, strict=True)))[0]
    return result


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 2, 7, 33]),
    hidden=st.sampled_from([1, 8, 20]),
    experts=st.sampled_from([1, 2, 5, 16]),
    every_expert=st.booleans(),
    inner=st.sampled_from([1, 6, 16]),
    normalize=st.booleans(),
    activation=st.sampled_from(sorted(op.ACTIVATIONS)),
    ties=st.sampled_from(["none", "some", "all", "one expert"]),
    seed=st.integers(0, 2**31),
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
    body = run(body_session(top_k, normalize, activation), arrays)
    results = {"eager": eager, "body": body}
    if activation == "silu":
        x, logits, gate_up, down = arrays
        halves = gate_up.reshape(experts, 2, inner, hidden)
        interleaved = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(gate_up.shape)
        reverse = tuple(
            np.ascontiguousarray(a) for a in (logits[:, ::-1], interleaved[::-1], down[::-1])
        )
        results["kernel"] = run(kernel_session(top_k, normalize), (x, *reverse))
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
    ids, weights = op.route(logits, 2, normalize=True)
    assert ids.tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(weights, torch.full((2, 2), 0.5))


@pytest.mark.parametrize("tokens", [1, 6])
def test_passes_opcheck(tokens: int) -> None:
    arrays = arguments(tokens, 8, 4, 4, seed=2, ties="none")
    sample: tuple[Any, ...] = (*(torch.from_numpy(a) for a in arrays), 2, True, "silu")
    torch.library.opcheck(op.moe_dispatch, sample)


def test_the_function_body_computes_only_the_experts_hit() -> None:
    arrays = arguments(3, 8, 16, 4, seed=3, ties="one expert")
    x, logits, gate_up, down = arrays
    # An expert nobody chose may hold anything, even NaN, without reaching the result.
    for expert in set(range(16)) - {8}:
        gate_up[expert] = np.nan
        down[expert] = np.nan
    found = run(body_session(1, False, "silu"), (x, logits, gate_up, down))
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 0.01


def test_the_function_body_has_no_racing_scatter_and_repeats_to_the_bit() -> None:
    def nodes(graph: Any) -> Any:
        for node in graph.node:
            yield node
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    yield from nodes(attribute.g)

    for node in nodes(op.function_body("silu")):
        if node.op_type.startswith("Scatter"):
            assert not [a for a in node.attribute if a.name == "reduction"]
    arrays = arguments(200, 16, 4, 8, seed=4, ties="some")
    session = body_session(2, False, "silu")
    first = run(session, arrays)
    assert all(np.array_equal(first, run(session, arrays)) for _ in range(100))
