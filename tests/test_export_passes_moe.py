"""MoeDispatch becomes ONNX Runtime's MoE: the graph, its numbers and its conditions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import (
    Arrays,
    interface,
    notices,
    notices_nothing_done,
    operators,
    parsed,
    refuses,
    run,
    the,
    wiring,
)

from ingot.export.passes.functions import AttachFunctionBodies
from ingot.export.passes.moe import MoeDispatchToMoE
from ingot.export.passes.weights import Weight

# Experts, H, and I that is not H.
E, H, I = 4, 6, 5  # noqa: E741


def two_layers(activation: str = "silu", dtype: str = "float") -> str:
    """Two layers of experts, the second with its weights normalised."""
    kind = f'top_k = 2, activation = "{activation}"'
    stacks = ", ".join(
        f"{dtype}[{E}, {2 * I}, {H}] gate_up{n}, {dtype}[{E}, {H}, {I}] down{n}" for n in (0, 1)
    )
    return f"""
    <ir_version: 10, opset_import: ["" : 23, "ingot" : 1]>
    two_layers (
        int64[b, s] attention_mask, {dtype}[n, {H}] x,
        float[n, {E}] logits0, float[n, {E}] logits1, {stacks}
    ) => ({dtype}[n, {H}] y)
    <{dtype}[n, {H}] middle, {dtype}[n, {H}] mixed>
    {{
        middle = ingot.MoeDispatch <normalize = 0, {kind}> (x, logits0, gate_up0, down0)
        mixed = ingot.MoeDispatch <normalize = 1, {kind}> (middle, logits1, gate_up1, down1)
        y = Add (middle, mixed)
    }}
    """


def weights(dtype: type[np.floating] = np.float32) -> Arrays:
    random = np.random.default_rng(0)
    shapes = {"gate_up": (E, 2 * I, H), "down": (E, H, I)}
    return {
        f"{name}{n}": random.normal(size=shape, scale=0.6).astype(dtype)
        for n in (0, 1)
        for name, shape in shapes.items()
    }


def feeds() -> Arrays:
    random = np.random.default_rng(1)
    # Whole numbers, so that logits tie.
    logits = {f"logits{n}": random.integers(-2, 3, (9, E)).astype(np.float32) for n in (0, 1)}
    x = random.normal(size=(9, H)).astype(np.float32)
    return {"attention_mask": np.ones((1, 9), dtype=np.int64), "x": x, **logits}


def built(activation: str = "silu") -> ir.Model:
    model = parsed(two_layers(activation), weights())
    AttachFunctionBodies()(model)
    return model


def test_moe_dispatch_becomes_moe() -> None:
    model = built()
    before, expected = interface(model), run(model, feeds())
    assert MoeDispatchToMoE()(model).modified
    assert interface(model) == before
    left = operators(model.graph)
    assert left["MoE"] == left["Where"] == 2
    assert left["MoeDispatch"] == 0
    # One condition serves all.
    assert left["GreaterOrEqual"] == 1
    assert not model.functions
    found = run(model, feeds())
    assert expected["y"].std() > 0.1
    np.testing.assert_allclose(found["y"], expected["y"], rtol=0, atol=1e-5)


def test_moe_dispatch_with_another_activation_stays() -> None:
    model = built("relu")
    before = wiring(model)
    assert not MoeDispatchToMoE()(model).modified
    assert wiring(model) == before
    assert operators(model.graph)["MoeDispatch"] == 2
    assert model.functions


def test_experts_are_reversed_and_interleaved_and_read_one_at_a_time() -> None:
    model = parsed(two_layers(), weights())
    reads: list[tuple[str, int]] = []
    for name, array in weights().items():

        def read(block: int, name: str = name, array: np.ndarray = array) -> np.ndarray:
            reads.append((name, block))
            return array[block : block + 1]

        value = model.graph.initializers[name]
        value.const_value = Weight(name, array.shape, ir.DataType.FLOAT, read)
    MoeDispatchToMoE()(model)
    assert not reads
    gate_up, down = (model.graph.initializers[name].const_value for name in ("gate_up1", "down1"))
    assert isinstance(gate_up, Weight) and isinstance(down, Weight)
    stored = weights()
    for expert in range(E):
        source = stored["gate_up1"][E - 1 - expert]
        rows = [row for pair in zip(source[:I], source[I:], strict=True) for row in pair]
        np.testing.assert_array_equal(gate_up.read_block(expert).reshape(2 * I, H), rows)
        turned = stored["down1"][E - 1 - expert]
        np.testing.assert_array_equal(down.read_block(expert).reshape(H, I), turned)
        assert reads == [("gate_up1", E - 1 - expert), ("down1", E - 1 - expert)]
        reads.clear()


def use_a_weight_twice(model: ir.Model) -> None:
    model.graph.append(ir.node("Relu", [model.graph.initializers["down1"]]))


def read_a_weight(model: ir.Model) -> None:
    model.graph.initializers["down0"].const_value = ir.tensor(weights()["down0"], name="down0")


def swap_the_stacks(model: ir.Model) -> None:
    node = model.graph[0]
    gate_up, down = node.inputs[2:]
    node.replace_input_with(2, down)
    node.replace_input_with(3, gate_up)


def no_mask(model: ir.Model) -> None:
    model.graph.inputs[0].name = "mask"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (use_a_weight_twice, "the value down1 is no weight of the checkpoint with one use"),
        (read_a_weight, "the value down0 is no weight of the checkpoint with one use"),
        (swap_the_stacks, r"MoeDispatch middle has no stacks \[E, 2I, H\] and \[E, H, I\]"),
        (no_mask, "MoeDispatch middle needs the graph input attention_mask"),
    ],
)
def test_refuses_what_it_cannot_swap(spoil: Callable[[ir.Model], None], why: str) -> None:
    model = parsed(two_layers(), weights())
    spoil(model)
    refuses(MoeDispatchToMoE(), model, why)


def test_refuses_half_precision() -> None:
    model = parsed(two_layers(dtype="float16"), weights(np.float16))
    refuses(MoeDispatchToMoE(), model, "MoeDispatch middle is not float32")


def test_notices_what_is_left() -> None:
    notices_nothing_done(MoeDispatchToMoE(), built(), "MoeDispatch middle was not swapped")


def without_the_guard(model: ir.Model) -> None:
    keep, moe = the(model, "Where"), the(model, "MoE")
    ir.convenience.replace_all_uses_with(keep.outputs[0], moe.outputs[0])


def with_the_wrong_input(model: ir.Model) -> None:
    the(model, "Where").replace_input_with(2, the(model, "MoE").inputs[1])


def with_a_constant_condition(model: ir.Model) -> None:
    bound = ir.val("always", const_value=ir.tensor(True, name="always"))
    model.graph.register_initializer(bound)
    the(model, "Where").replace_input_with(0, bound)


def in_the_operators_order(model: ir.Model) -> None:
    moe, reverse = the(model, "MoE"), the(model, "Slice")
    moe.replace_input_with(1, reverse.inputs[0])


def with_other_shapes(model: ir.Model) -> None:
    model.graph.initializers["gate_up0"].shape = ir.Shape([E, I, H])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (without_the_guard, "MoE .* may write over its input: no Where alone reads both"),
        (with_the_wrong_input, "MoE .* may write over its input: no Where alone reads both"),
        (with_a_constant_condition, "MoE .* has a Where that an optimizer can fold"),
        (in_the_operators_order, "MoE .* takes the router's logits in the operator's order"),
        (with_other_shapes, "MoE .* has no stacks"),
    ],
)
def test_notices_its_own_mistakes(spoil: Callable[[ir.Model], None], why: str) -> None:
    notices(MoeDispatchToMoE(), built(), spoil, why)
