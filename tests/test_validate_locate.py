"""Each small wrong in a copy of an ingot is found in its layer and at its node."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import MakeCheckpoint, MakeIngot
from located import (
    FAMILIES,
    GRANITE,
    MAMBA2,
    OLMOE,
    TARGETS,
    Array,
    Change,
    Find,
    Subjects,
    cache_in_wrong_order,
    check,
    drop_residual,
    finder,
    graph,
    main_calls,
    nodes,
    rescale_experts,
    round_state,
    scale_frequencies,
    shift_mask,
    skip_query_norm,
    subject,
    swap_experts,
    transposed,
    weight,
    with_nan,
)
from traces import Traces

from ingot.graphs.checkpoint import Checkpoint
from ingot.validate.locate.locate import locate
from ingot.validate.truth.inputs import make_inputs


@pytest.fixture(scope="module")
def subjects(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> Subjects:
    return Subjects(make_checkpoint, make_ingot)


@pytest.fixture
def find(subjects: Subjects, traces: Traces, tmp_path: Path) -> Find:
    """``find(family, target, change, ...)``: see ``located.finder``."""
    return finder(subjects, traces, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("change", "layer", "operator"),
    [
        pytest.param(swap_experts("olmoe"), 1, "MoeDispatch", id="two experts swapped"),
        pytest.param(graph(rescale_experts), 2, "MoeDispatch", id="top-k weights rescaled"),
        pytest.param(
            weight(f"{OLMOE}self_attn.q_norm.weight", np.ones_like),
            1,
            "RMSNormalization",
            id="query norm of ones",
        ),
        pytest.param(
            weight(f"{OLMOE}self_attn.k_norm.weight", np.ones_like),
            1,
            "RMSNormalization",
            id="key norm of ones",
        ),
        pytest.param(
            weight(f"{OLMOE}self_attn.o_proj.weight", transposed), 1, "MatMul", id="o_proj turned"
        ),
        pytest.param(
            weight(f"{OLMOE}self_attn.q_proj.weight", transposed), 1, "MatMul", id="q_proj turned"
        ),
        pytest.param(weight(f"{OLMOE}self_attn.v_proj.weight", with_nan), 1, "MatMul", id="NaN"),
        pytest.param(graph(scale_frequencies), None, "Mul", id="rope by 1.01"),
        pytest.param(
            weight("lm_head.weight", lambda a: a * np.float32(1.001)), None, "MatMul", id="logits"
        ),
        # The first value that both graphs have behind the gap.
        pytest.param(graph(skip_query_norm), 1, "Reshape", id="query norm dropped"),
        # The next layer reads it, so it is missed itself.
        pytest.param(graph(drop_residual), 1, "Add", id="residual dropped"),
        pytest.param(graph(shift_mask), None, "Slice", id="mask off by one"),
    ],
)
def test_finds_what_is_wrong_in_olmoe(
    find: Find, target: str, change: Change, layer: int | None, operator: str
) -> None:
    check(find("olmoe", target, change), target, layer, operator)


@pytest.mark.parametrize("target", ["onnx", "trt"])
def test_finds_what_only_decode_shows(find: Find, target: str) -> None:
    found = find("olmoe", target, graph(cache_in_wrong_order))
    check(found, target, 1, "Concat")
    assert found is not None and found.value == "present.1.key"


@pytest.mark.parametrize(
    ("change", "needed"), [(cache_in_wrong_order, 2), (shift_mask, 1)], ids=["decode", "prefill"]
)
def test_needs_no_call_behind_the_first_that_fails(
    find: Find, change: Callable[[onnx.GraphProto], None], needed: int
) -> None:
    found = find("olmoe", "onnx", graph(change), calls=needed)
    assert found is not None and found == find("olmoe", "onnx", graph(change))
    # A call more would have shown it.
    assert needed == 1 or find("olmoe", "onnx", graph(change), calls=needed - 1) is None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("change", "lowered"),
    [
        pytest.param(
            weight(f"{MAMBA2}D", np.zeros_like), "Mul", id="D dropped", marks=pytest.mark.slow
        ),
        pytest.param(weight(f"{MAMBA2}dt_bias", np.zeros_like), "Add", id="dt_bias dropped"),
    ],
)
def test_finds_what_is_wrong_in_mamba2(
    find: Find, target: str, change: Change, lowered: str
) -> None:
    operator = lowered if target == "ort" else "Mamba2Scan"
    check(find("mamba2", target, change), target, 1, operator)


@pytest.mark.parametrize("target", TARGETS)
def test_finds_a_state_that_is_rounded(find: Find, target: str) -> None:
    found = find("mamba2", target, graph(round_state))
    check(found, target, 1, "Cast")
    assert found is not None and found.value == "present_states.1.ssm"


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_finds_a_residual_multiplier_that_is_dropped(find: Find, target: str) -> None:
    change = weight(f"{GRANITE}mlp.down_proj.weight", lambda a: a / np.float32(0.22))
    check(find("granite", target, change), target, 1, "MatMul")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_finds_nothing_where_nothing_is_wrong(find: Find, family: str, target: str) -> None:
    assert find(family, target, lambda _folder: None) is None


@pytest.mark.parametrize(
    ("family", "task", "extra"),
    [
        pytest.param(
            "olmoe", "features", ("router_logits", "hidden_states"), marks=pytest.mark.slow
        ),
        # Its hidden states are scaled where they are outputs, and the scale is folded otherwise.
        pytest.param("granite", "generate", ("hidden_states",), marks=pytest.mark.slow),
    ],
)
def test_captures_the_same_graph_afresh(
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    family: str,
    task: str,
    extra: tuple[str, ...],
) -> None:
    """With the task and the further outputs of the ingot, on which the names depend."""
    folder = make_checkpoint(family)
    ingot = make_ingot(folder, "ort", task=task, extra_outputs=extra)
    assert locate(subject(ingot, Checkpoint.open(folder)), main_calls()) is None


@pytest.mark.parametrize("target", TARGETS)
def test_padding_may_hold_anything(find: Find, target: str) -> None:
    inputs = make_inputs(512)
    padding = inputs.attention_mask == 0
    inputs.input_ids[padding] = 511
    inputs.input_ids[~padding] %= 511

    def change_token(array: Array) -> Array:
        array[511] += 1
        return array

    assert find("olmoe", target, weight("model.embed_tokens.weight", change_token), inputs) is None


def test_names_a_node_that_differs_without_an_effect(find: Find) -> None:
    def change(graph: onnx.GraphProto) -> None:
        (flag,) = (a for a in nodes(graph, "Softmax")[1].attribute if a.name == "axis")
        assert flag.i == -1
        flag.i = 4

    found = find("olmoe", "trt", graph(change))
    assert found is not None
    assert (found.layer, found.operator, found.ratio) == (1, "Softmax", 0.0)


def test_names_a_node_with_another_constant_without_an_effect(find: Find) -> None:
    def change(graph: onnx.GraphProto) -> None:
        last = np.iinfo(np.int64).max
        for tensor in graph.initializer:
            if tensor.raw_data == np.int64(last).tobytes():
                tensor.raw_data = np.int64(last // 2).tobytes()

    found = find("granite", "onnx", graph(change))
    assert found is not None
    assert (found.layer, found.operator, found.ratio) == (0, "Slice", 0.0)


def test_names_an_output_that_is_missing(find: Find) -> None:
    def change(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if "present.2.value" in node.output)
        node.output[list(node.output).index("present.2.value")] = "elsewhere"
        for other in graph.node:
            for index, name in enumerate(other.input):
                if name == "present.2.value":
                    other.input[index] = "elsewhere"

    found = find("olmoe", "onnx", graph(change))
    assert found is not None
    assert (found.layer, found.value, found.ratio) == (2, "present.2.value", math.inf)
