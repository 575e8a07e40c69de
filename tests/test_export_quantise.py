"""Weights in whole numbers, exported: what ONNX Runtime computes from them, and what is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
from conftest import MakeCheckpoint, MakeIngot
from oracle import KEPT, logits, of_transformers, relative_rms, rounded
from safetensors import safe_open
from traces import Traces

from ingot.export.api import export
from ingot.export.codecs.blocks import Bits, Blocks, Size
from ingot.export.codecs.coder import Nearest
from ingot.export.graph import Recipe
from ingot.export.ingot import GRAPH, WEIGHTS
from ingot.export.quantization import BITS, Quantization
from ingot.graphs.checkpoint import Checkpoint
from ingot.plugins.errors import IngotError

FAMILIES = ("granite", "jetmoe", "mamba2", "olmoe")
# Sizes that no block fills: of hidden states, of experts, of vocabularies.
ODD = {
    "granite": {"hidden_size": 72, "intermediate_size": 90, "vocab_size": 251},
    "olmoe": {"hidden_size": 72, "intermediate_size": 52, "vocab_size": 251},
    "jetmoe": {"hidden_size": 72, "intermediate_size": 50, "vocab_size": 251},
    "mamba2": {"hidden_size": 72, "num_heads": 9, "head_dim": 16, "n_groups": 1, "vocab_size": 251},
}


def blocks(weights: str, size: int, symmetric: bool) -> Blocks:
    return Blocks(cast(Bits, BITS[weights]), cast(Size, size), symmetric)


def operators(ingot: Path) -> set[str]:
    graph = onnx.load(str(ingot / GRAPH), load_external_data=False).graph
    return {node.op_type for node in graph.node}


# Half of the formats for each of the sizes; together all of them.
EXACT = {
    "tiny": [("int4", 32, True), ("int4", 64, False), ("int8", 128, True), ("int8", 32, False)],
    "odd": [("int4", 128, False), ("int4", 64, True), ("int8", 32, True), ("int8", 64, False)],
}


# Tracing each takes seconds, so half of them are slow.
QUICK = {"granite": "tiny", "jetmoe": "tiny", "mamba2": "odd", "olmoe": "odd"}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        pytest.param(family, sizes, marks=[pytest.mark.slow] * (QUICK[family] != sizes))
        for family in FAMILIES
        for sizes in EXACT
    ],
)
def test_exact_kernels_compute_with_the_rounded_weights(
    family: str, sizes: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint(family, **(ODD[family] if sizes == "odd" else {}))
    for weights, size, symmetric in EXACT[sizes]:
        asked = {"weights": weights, "block": size, "symmetric": symmetric, "accuracy": "exact"}
        ingot = make_ingot(checkpoint, "ort", **asked)
        expected = of_transformers(checkpoint, rounded(blocks(weights, size, symmetric)))
        assert relative_rms(expected, logits(ingot)) < 2e-6, asked
        assert not operators(ingot) & {"MoE", "MoeDispatch", "MoeLinear", "FusedMatMul"}


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_kernels_differ_by_their_rounding_alone(
    family: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint(family, **(ODD[family] if QUICK[family] == "odd" else {}))
    for weights, size, symmetric in (("int4", 32, False), ("int8", 128, True)):
        ingot = make_ingot(checkpoint, "ort", weights=weights, block=size, symmetric=symmetric)
        expected = of_transformers(checkpoint, rounded(blocks(weights, size, symmetric)))
        assert 1e-4 < relative_rms(expected, logits(ingot)) < 0.1, weights
        assert ("QMoE" in operators(ingot)) == (family in ("olmoe", "jetmoe"))


@pytest.mark.parametrize("activation", ["relu", pytest.param("gelu", marks=pytest.mark.slow)])
def test_experts_with_another_activation_are_stored_so_as_well(
    activation: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint("olmoe", hidden_act=activation, norm_topk_prob=True)
    ingot = make_ingot(checkpoint, "ort", weights="int4", accuracy="exact")
    expected = of_transformers(checkpoint, rounded(Blocks(4, 32)))
    assert relative_rms(expected, logits(ingot)) < 2e-6
    assert "QMoE" not in operators(ingot)


def test_the_kernel_takes_the_weights_of_chosen_experts_as_the_config_says(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    for normalised in (True, False):
        checkpoint = make_checkpoint("olmoe", norm_topk_prob=normalised)
        ingot = make_ingot(checkpoint, "ort", weights="int4", accuracy="exact")
        expected = of_transformers(checkpoint, rounded(Blocks(4, 32)))
        assert relative_rms(expected, logits(ingot)) < 2e-6
        assert "QMoE" in operators(ingot)


def test_a_table_of_two_readers_is_stored_once(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint("granite", tie_word_embeddings=True)
    ingot = make_ingot(checkpoint, "ort", weights="int4")
    with safe_open(ingot / WEIGHTS, "np") as file:
        names = list(file.keys())
        tables = [name for name in names if "embed" in name or "head" in name]
        assert tables == ["model.embed_tokens.weight", "model.embed_tokens.weight.scales"]
        # What belongs together lies together.
        offsets = [file.get_slice(name).get_dtype() for name in tables]
        assert offsets == ["U8", "F32"]
        kept = {name for name in names if file.get_slice(name).get_dtype() == "F32"}
    assert {name for name in kept if not name.endswith(".scales")} == {
        name for name in names if name.endswith(KEPT)
    }


def test_two_exports_are_equal_and_say_how_weights_are_stored(
    tiny: Path, make_ingot: MakeIngot
) -> None:
    asked = {"weights": "int4", "block": 64, "symmetric": False}
    one, other = (make_ingot(tiny, "ort", **asked) for _ in range(2))
    for name in (WEIGHTS, GRAPH, "ingot.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    said = json.loads((one / "ingot.json").read_text())
    assert said["weights"] == "int4"
    assert said["quantization"] == {
        "block": 64,
        "symmetric": False,
        "accuracy": "fast",
        "method": "nearest",
        "bits": {},
    }
    with safe_open(one / WEIGHTS, "np") as file:
        assert file.metadata() == {"format": "pt", "weights": "int4"}
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert said["weight_bytes"] == stored
    # Of a table one row is read of each of its tensors.
    table = ("", ".scales", ".zero_points")
    with safe_open(one / WEIGHTS, "np") as file:
        arrays = [file.get_tensor(f"model.embed_tokens.weight{end}") for end in table]
    assert said["graph"]["unread_bytes"] == sum(a.nbytes - a[0].nbytes for a in arrays)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"target": "onnx", "weights": "int4"}, "--weights int4 goes with the target ort"),
        ({"target": "trt-rtx", "weights": "int8"}, "--weights int8 goes with"),
        ({"block": 64}, "--block goes with --weights int8 or int4"),
        ({"weights": "bf16", "accuracy": "exact"}, "--accuracy goes with --weights int8 or int4"),
        ({"weights": "fp32", "symmetric": True}, "--symmetric goes with --weights int8 or int4"),
        ({"weights": "int4", "block": 48}, "48 is no size of a block; give one of: 32, 64, 128."),
        ({"weights": "int4", "accuracy": "exakt"}, "Did you mean exact?"),
    ],
)
def test_refuses_what_does_not_go_together(
    asked: dict[str, Any], message: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(IngotError, match=re.escape(message)):
        export(tiny, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_experts_in_two_sizes_of_blocks_are_taken_apart(tiny: Path, traces: Traces) -> None:
    recipe = Recipe("ort", "generate", "float32", (), "int4", Quantization())
    opened = recipe.open(Checkpoint.open(tiny))
    down = "model.layers.1.mlp.experts.down_proj"
    formats = Nearest(Blocks(4, 32), {down: Blocks(4, 64)})
    captured = recipe.graph(opened, capture=traces, coder=formats)
    nodes = list(captured.model.graph)
    # The other layer's are alike, and stay together.
    assert [node.op_type for node in nodes].count("QMoE") == 1
    sizes = {
        node.inputs[1].name: node.attributes["block_size"].as_int()
        for node in nodes
        if node.op_type == "MatMulNBits" and node.inputs[1] is not None
    }
    of_down = {size for name, size in sizes.items() if name and "layers.1.mlp" in name}
    assert of_down == {32, 64}
