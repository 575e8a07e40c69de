"""MoeLinear: the eager reference, the function body and the lowered graph against a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_linear_graph import FLOAT, INT64, arguments, built, plain_loop
from one_node import one_node, session, weight

from ingot.export.passes.moe_linear import MoeLinearToMatMuls
from ingot.plugins import moe_linear as op
from ingot.plugins.experts import choose_experts, translate_choose_experts

Run = Callable[[np.ndarray, np.ndarray], np.ndarray]


def implementations(x: np.ndarray, weights: np.ndarray) -> dict[str, Run]:
    """Everything that computes the operator, as functions of x and ids."""

    def eager(x: np.ndarray, expert_ids: np.ndarray) -> np.ndarray:
        found: torch.Tensor = op.moe_linear(*map(torch.from_numpy, (x, expert_ids, weights)))
        return found.numpy()

    def opened(*passes: ir.passes.PassBase) -> Run:
        ort = session(built(x, weight("w", weights)), *passes)
        return lambda x, ids: np.asarray(ort.run(None, {"x": x, "expert_ids": ids})[0])

    return {"eager": eager, "body": opened(), "lowered": opened(MoeLinearToMatMuls())}


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 2, 7, 33]),
    top_k=st.sampled_from([1, 2, 3, 16]),
    experts=st.sampled_from([1, 2, 5, 16]),
    size=st.sampled_from([1, 8, 20]),
    out=st.sampled_from([2, 6, 16]),
    row_per_choice=st.booleans(),
    ids=st.sampled_from(["distinct", "any", "one expert"]),
    seed=st.integers(0, 2**31),
)
def test_every_implementation_agrees_with_a_plain_loop(
    tokens: int,
    top_k: int,
    experts: int,
    size: int,
    out: int,
    row_per_choice: bool,
    ids: str,
    seed: int,
) -> None:
    x, expert_ids, weights = arguments(
        tokens, top_k, experts, size, out, row_per_choice=row_per_choice, ids=ids, seed=seed
    )
    expected = plain_loop(x, expert_ids, weights)
    bound = 1e-5 * max(1.0, float(np.abs(expected).max(initial=0)))
    for name, run in implementations(x, weights).items():
        found = run(x, expert_ids)
        assert found.shape == expected.shape, name
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("row_per_choice", [False, True])
def test_one_session_serves_every_number_of_tokens(row_per_choice: bool) -> None:
    make = partial(arguments, row_per_choice=row_per_choice, ids="any", seed=3)
    x, _, weights = make(1, 2, 5, 8, 6)
    runs = implementations(x, weights)
    for tokens in (4, 0, 1, 0, 50, 3):
        x, expert_ids, _ = make(tokens, 2, 5, 8, 6)
        expected = plain_loop(x, expert_ids, weights)
        for name, run in runs.items():
            np.testing.assert_allclose(run(x, expert_ids), expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("row_per_choice", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_accumulate_in_float32_or_wider(
    dtype: torch.dtype, row_per_choice: bool
) -> None:
    arrays = arguments(9, 2, 4, 512, 6, row_per_choice=row_per_choice, ids="any", seed=1)
    x, expert_ids, weights = map(torch.from_numpy, arrays)
    x, weights = x.to(dtype), weights.to(dtype)
    found = op.moe_linear(x, expert_ids, weights)
    assert found.dtype == dtype
    expected = plain_loop(x.double().numpy(), arrays[1], weights.double().numpy())
    # Only the last rounding is in the input's dtype.
    limit = max(torch.finfo(dtype).eps * np.abs(expected).max(), 1e-12)
    assert np.abs(found.double().numpy() - expected).max() <= limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("row_per_choice", [False, True])
def test_half_precision_keeps_its_body_which_accumulates_in_float32(
    dtype: torch.dtype, row_per_choice: bool
) -> None:
    arrays = arguments(9, 2, 4, 512, 6, row_per_choice=row_per_choice, ids="any", seed=1)
    half = ir.DataType.FLOAT16 if dtype == torch.float16 else ir.DataType.BFLOAT16
    x, weights = (arrays[i].astype(half.numpy()) for i in (0, 2))
    # Sessions neither take nor give bfloat16 arrays, so x is a constant and y is cast.
    ids_input = ir.val("expert_ids", INT64, ["n", "k"])
    inputs = [weight("x", x), ids_input, weight("w", weights)]
    model = one_node(op.function_body(), inputs, [ir.val("y", half, ["n", "k", "out"])])
    y = ir.val("y_wide", FLOAT, ["n", "k", "out"])
    graph = model.graph
    graph.append(ir.node("Cast", [graph.outputs[0]], attributes={"to": int(FLOAT)}, outputs=[y]))
    graph.outputs[0] = y

    assert not MoeLinearToMatMuls()(model).modified
    [found] = session(model).run(None, {"expert_ids": arrays[1]})
    expected = plain_loop(x, arrays[1], weights)
    limit = torch.finfo(dtype).eps * np.abs(expected).max()
    assert np.abs(found - expected).max() <= limit
    # The result was rounded to the input's dtype.
    np.testing.assert_array_equal(found, found.astype(half.numpy()).astype(np.float32))


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("row_per_choice", [False, True])
def test_passes_opcheck(tokens: int, row_per_choice: bool) -> None:
    arrays = arguments(tokens, 2, 4, 8, 6, row_per_choice=row_per_choice, ids="any", seed=2)
    torch.library.opcheck(op.moe_linear.custom_op, tuple(map(torch.from_numpy, arrays)))
    torch.library.opcheck(choose_experts, (torch.randn(tokens, 4), 2))


@pytest.mark.parametrize("row_per_choice", [False, True])
def test_only_the_chosen_experts_are_computed(row_per_choice: bool) -> None:
    x, expert_ids, weights = arguments(
        3, 2, 16, 8, 6, row_per_choice=row_per_choice, ids="one expert", seed=3
    )
    expert_ids[1, 1] = 11
    # An expert nobody chose may hold anything, even NaN, without reaching the result.
    for expert in set(range(16)) - {8, 11}:
        weights[expert] = np.nan
    for name, run in implementations(x, weights).items():
        found = run(x, expert_ids)
        assert np.isfinite(found).all(), name
        assert np.abs(found).min(axis=-1).max() > 0.01, name


def test_every_size_in_the_function_body_follows_from_shapes() -> None:
    function = ir.serde.deserialize_function(op.function_body())
    found = {node.op_type for node in ir.traversal.RecursiveGraphIterator(function.graph)}
    # TensorRT cannot build the sizes that these give.
    assert not found & {"NonZero", "Unique", "Compress", "NonMaxSuppression"}
    assert "Loop" in found and "MatMul" in found


@pytest.mark.parametrize("row_per_choice", [False, True])
@pytest.mark.parametrize("ids", ["any", "distinct", "one expert"])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    # Fewer choices than experts; as many; tiles of every height, of which some are cut short.
    [(1, 16, 3), (5, 16, 3), (4, 8, 2), (5, 8, 2), (17, 8, 2), (60, 2, 1), (1, 2, 16), (150, 8, 2)],
)
def test_the_function_body_serves_any_spread_of_choices(
    tokens: int, experts: int, top_k: int, ids: str, row_per_choice: bool
) -> None:
    x, expert_ids, weights = arguments(
        tokens, top_k, experts, 8, 6, row_per_choice=row_per_choice, ids=ids, seed=10
    )
    ort = session(built(x, weight("w", weights)))
    [found] = ort.run(None, {"x": x, "expert_ids": expert_ids})
    expected = plain_loop(x, expert_ids, weights)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ids", ["any", "one expert"])
@pytest.mark.parametrize("row_per_choice", [False, True])
def test_repeats_to_the_bit_without_a_racing_scatter(row_per_choice: bool, ids: str) -> None:
    x, expert_ids, weights = arguments(
        200, 2, 4, 16, 8, row_per_choice=row_per_choice, ids=ids, seed=4
    )
    models = [built(x, weight("w", weights)) for _ in range(2)]
    MoeLinearToMatMuls()(models[1])
    for model in models:
        graphs = [model.graph, *(function.graph for function in model.functions.values())]
        for node in (n for graph in graphs for n in ir.traversal.RecursiveGraphIterator(graph)):
            assert not node.op_type.startswith("Scatter") or "reduction" not in node.attributes
    for name, run in implementations(x, weights).items():
        first = run(x, expert_ids)
        assert all(np.array_equal(first, run(x, expert_ids)) for _ in range(100)), name


class Routed(torch.nn.Module):
    """Both operators in a module, as the exporter meets them."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(
        self, x: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = choose_experts(logits, self.top_k)
        return ids, op.moe_linear(x, ids, weights)


def stable_choice(logits: np.ndarray, top_k: int) -> list[list[int]]:
    # Python's sort is stable: among equal logits the lower expert id comes first.
    return [sorted(range(len(row)), key=lambda e: -row[e])[:top_k] for row in logits.tolist()]


def test_choose_experts_gives_ties_to_the_lower_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    assert choose_experts(logits, 2).tolist() == [[1, 2], [0, 1]]
    assert choose_experts(logits[:0], 2).shape == (0, 2)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 32)])
def test_exports_to_one_node_and_topk_with_the_same_ties(experts: int, top_k: int) -> None:
    module = Routed(top_k).eval()
    sample = (torch.randn(5, 4), torch.randn(5, experts), torch.randn(experts, 3, 4))
    tokens = {0: torch.export.Dim.AUTO}
    program = torch.onnx.export(
        module,
        sample,
        dynamic_shapes=(tokens, tokens, None),
        dynamo=True,
        opset_version=23,
        custom_translation_table={
            op.moe_linear.overload: op.moe_linear.translate,
            torch.ops.ingot.choose_experts.default: translate_choose_experts,
        },
        verbose=False,
    )
    assert program is not None
    model = program.model
    operators = [node.op_type for node in model.graph if node.op_type != "Constant"]
    assert operators == ["TopK", "MoeLinear"]
    function = ir.serde.deserialize_function(op.function_body())
    model.functions[function.identifier()] = function
    ort = session(model)
    names = [value.name for value in ort.get_inputs()]
    random = np.random.default_rng(9)
    for count in (0, 1, 300):
        x = random.normal(size=(count, 4)).astype(np.float32)
        for logits in (random.normal(size=(count, experts)).round(), np.zeros((count, experts))):
            arrays = (x, logits.astype(np.float32), sample[2].numpy())
            ids, y = ort.run(None, dict(zip(names, arrays, strict=True)))
            eager_ids, eager_y = module(*map(torch.from_numpy, arrays))
            assert ids.tolist() == eager_ids.tolist() == stable_choice(logits, top_k)
            np.testing.assert_allclose(y, eager_y.numpy(), atol=1e-5)
