"""Weights in panels, exported: what Ingot's own kernels compute from them, and what is said."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from oracle import logits, of_transformers, relative_rms, rounded
from packed_cases import CASES
from packers import numbers
from safetensors import safe_open

from ingot.export import kernels
from ingot.export.api import export
from ingot.export.codecs.blocks import Bits, Blocks, Size
from ingot.export.codecs.coder import Nearest
from ingot.export.codecs.given import Given
from ingot.export.graph import Recipe
from ingot.export.ingot import GRAPH, WEIGHTS, Manifest
from ingot.export.quantization import BITS, Quantization
from ingot.export.request import ExportError
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.coded import Coded
from ingot.plugins.cpu import operators, panels
from ingot.plugins.cpu.panels import TO_BFLOAT16, TO_INT8, Format, rounding
from ingot.plugins.errors import IngotError

pytestmark = pytest.mark.usefixtures("cpu_library")

FAMILIES = ("granite", "jetmoe", "mamba2", "olmoe")
# Sizes that neither panels nor blocks nor pairs of columns fill.
ODD = {
    "granite": {"hidden_size": 72, "intermediate_size": 91, "vocab_size": 251},
    "olmoe": {"hidden_size": 72, "intermediate_size": 52, "vocab_size": 251},
    "jetmoe": {"hidden_size": 72, "intermediate_size": 49, "vocab_size": 251},
    "mamba2": {"hidden_size": 72, "num_heads": 9, "head_dim": 16, "n_groups": 1, "vocab_size": 251},
}
# Half of the formats for each of the sizes; together all of them.
EXACT = {
    "tiny": [("int4", 32, True), ("int4", 64, False), ("int8", 128, True), ("int8", 32, False)],
    "odd": [("int4", 128, False), ("int4", 32, True), ("int8", 32, True), ("int8", 64, False)],
}
QUICK = {"granite": "odd", "jetmoe": "odd", "mamba2": "tiny", "olmoe": "tiny"}
# Tracing each takes seconds, so half of them are slow.
SUBJECTS = [
    pytest.param(family, sizes, marks=[pytest.mark.slow] * (QUICK[family] != sizes))
    for family in FAMILIES
    for sizes in EXACT
]

Stored = Callable[[torch.Tensor], torch.Tensor]


def form(weights: str, size: int, symmetric: bool) -> Blocks:
    return Blocks(cast(Bits, BITS[weights]), cast(Size, size), symmetric, "float16")


def asked(weights: str, size: int, symmetric: bool, accuracy: str) -> dict[str, Any]:
    """Fields of an export in whole numbers."""
    return {
        "kernels": "ingot",
        "weights": weights,
        "block": size,
        "symmetric": symmetric,
        "accuracy": accuracy,
    }


def nodes(ingot: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(str(ingot / GRAPH), load_external_data=False).graph.node)


def check_all_in_panels(ingot: Path) -> None:
    """No product of a matrix is left to another's kernel, but for the routers'."""
    for node in nodes(ingot):
        routes = any("router_logits" in name for name in node.output)
        assert routes or node.op_type not in ("Gemm", "FusedMatMul", "Gather"), node.name
        assert node.domain != "ingot" or not node.op_type.startswith("Moe")
    with safe_open(ingot / WEIGHTS, "np") as file:
        for name in file.keys():  # noqa: SIM118
            plain = "gate.weight" in name or "router.layer" in name or "conv1d" in name
            matrix = len(file.get_slice(name).get_shape()) > 1 and not plain
            assert (file.get_slice(name).get_dtype() == "U8") == matrix, name


@pytest.mark.parametrize(("family", "sizes"), SUBJECTS)
def test_exact_kernels_compute_with_the_stored_weights(
    family: str, sizes: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint(family, **(ODD[family] if sizes == "odd" else {}))
    for each in EXACT[sizes]:
        ingot = make_ingot(checkpoint, "ort", **asked(*each, "exact"))
        expected = of_transformers(checkpoint, rounded(form(*each)))
        assert relative_rms(expected, logits(ingot)) < 2e-6, each
        check_all_in_panels(ingot)
    for weights, stored in (("fp32", None), ("bf16", lambda matrix: matrix.bfloat16().float())):
        ingot = make_ingot(checkpoint, "ort", kernels="ingot", weights=weights)
        expected = of_transformers(checkpoint, cast("Stored | None", stored))
        assert relative_rms(expected, logits(ingot)) < 2e-6, weights
        check_all_in_panels(ingot)


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_kernels_differ_by_their_rounding_alone(
    family: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint(family, **(ODD[family] if QUICK[family] == "odd" else {}))
    for each in (("int4", 32, False), ("int8", 128, True)):
        ingot = make_ingot(checkpoint, "ort", **asked(*each, "fast"))
        expected = of_transformers(checkpoint, rounded(form(*each)))
        assert 1e-4 < relative_rms(expected, logits(ingot)) < 0.1, each


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_kernels_of_bfloat16_round_activations_to_it_and_no_more(
    family: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    changes = ODD[family] if QUICK[family] == "odd" else {}
    checkpoint = make_checkpoint(family, dtype=torch.bfloat16, **changes)
    ingot = make_ingot(checkpoint, "ort", kernels="ingot", weights="checkpoint", accuracy="fast")
    found = logits(ingot)
    whole, narrow = of_transformers(checkpoint), of_transformers(checkpoint, narrow=True)
    rounding = relative_rms(whole, narrow)
    assert 1e-3 < rounding < 0.05
    # Some numbers are so near to a tie that they are rounded another way.
    assert relative_rms(narrow, found) < rounding / 3
    manifest = Manifest.read(ingot)
    assert manifest.activations == "bfloat16" and manifest.quantization is None
    said = [a.i for n in nodes(ingot) for a in n.attribute if a.name == "round_activations"]
    assert said and set(said) == {TO_BFLOAT16}


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"weights": "fp32"}, "--accuracy goes with --weights int8 or int4, and by --kernels"),
        ({"weights": "bf16", "kernels": "ort"}, "--accuracy goes with --weights int8 or int4"),
        ({"weights": "checkpoint"}, "this export has neither"),
    ],
)
def test_refuses_an_accuracy_of_what_is_not_rounded(
    request_: dict[str, Any], why: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint("granite")
    with pytest.raises(ExportError, match=why):
        make_ingot(checkpoint, "ort", **{"kernels": "ingot", "accuracy": "fast", **request_})


def test_one_attribute_says_what_products_round_to() -> None:
    """With whole numbers beside them, floats are multiplied by what is not rounded."""
    narrow, whole = Format("bfloat16"), Format("int8", 32)
    assert rounding(True, narrow) == rounding(True, narrow, Format("float32")) == TO_BFLOAT16
    assert rounding(True, whole) == rounding(True, whole, narrow) == TO_INT8
    assert rounding(True, Format("float32")) == rounding(False, whole, narrow) == panels.EXACT


@pytest.mark.parametrize("activation", ["relu", pytest.param("gelu", marks=pytest.mark.slow)])
def test_experts_have_the_activation_and_the_weights_of_the_config(
    activation: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint("olmoe", hidden_act=activation, norm_topk_prob=True)
    ingot = make_ingot(checkpoint, "ort", **asked("int4", 32, True, "exact"))
    expected = of_transformers(checkpoint, rounded(form("int4", 32, True)))
    assert relative_rms(expected, logits(ingot)) < 2e-6


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_in_bfloat16_is_stored_without_loss_and_a_tied_table_once(
    tied: bool, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint("granite", dtype=torch.bfloat16, tie_word_embeddings=tied)
    ingot = make_ingot(checkpoint, "ort", kernels="ingot", weights="checkpoint")
    assert relative_rms(of_transformers(checkpoint), logits(ingot)) < 2e-6
    with safe_open(ingot / WEIGHTS, "np") as file:
        names = list(file.keys())
        shape = file.get_slice("model.embed_tokens.weight").get_shape()
    assert shape == [512 // 16, 64 * 16 * 2]
    assert ("lm_head.weight" in names) != tied
    assert {each.op_type for each in nodes(ingot)} >= {"Linear", "Embedding"}


def test_float16_is_stored_as_float32(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint("olmoe", dtype=torch.float16)
    ingot = make_ingot(checkpoint, "ort", kernels="ingot", weights="checkpoint")
    assert relative_rms(of_transformers(checkpoint), logits(ingot)) < 2e-6
    stored = {
        each.s for node in nodes(ingot) for each in node.attribute if each.name.endswith("numbers")
    }
    assert stored == {b"float32"}


@pytest.mark.parametrize("way", ["gptq", pytest.param("awq", marks=pytest.mark.slow)])
def test_a_checkpoints_own_numbers_are_stored_and_computed_with(
    way: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("olmoe", num_hidden_layers=1)
    quantised = CASES[way](checkpoint, tmp_path)
    request = {"kernels": "ingot", "weights": "checkpoint", "accuracy": "exact"}
    ingot = make_ingot(quantised.packed, "ort", **request)
    manifest = Manifest.read(ingot)
    assert manifest.quantization is not None
    assert (manifest.quantization.method, manifest.quantization.scales) == ("given", "float16")
    assert relative_rms(of_transformers(quantised.plain), logits(ingot)) < 4e-6


def test_refuses_scales_that_panels_do_not_have() -> None:
    matrix = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    of = numbers(matrix, 1, bits=4, group=32)
    scales = torch.from_numpy(of.scales.astype(np.float32)) * (1 + 2**-20)
    coded = Coded(torch.from_numpy(of.codes), scales, None, 4, 32)
    blocks = Blocks(4, 32, True, "float16")
    given = Given(lambda _name: blocks, lambda _name, _expert: [coded])
    with pytest.raises(ExportError, match=r"float16 does not hold.*give --kernels ort"):
        given.encode("w", 0, coded.weights().numpy())


def test_each_weight_has_a_format_of_its_own(tiny: Path, make_checkpoint: MakeCheckpoint) -> None:
    """The two stacks of experts too, which one kernel reads."""
    how = Quantization(scales="float16")
    recipe = Recipe("ort", "generate", "float32", (), "int4", how, "ingot")
    opened = recipe.open(Checkpoint.open(tiny))
    experts = "model.layers.1.mlp.experts"
    others = {f"{experts}.down_proj": Blocks(8, 64, True, "float16"), "lm_head.weight": None}
    captured = recipe.graph(opened, coder=Nearest(Blocks(4, 32, True, "float16"), others))
    found = {
        value.name: {name: each.value for name, each in node.attributes.items()}
        for node in captured.model.graph
        for value in node.inputs
        if node.domain == "ingot.cpu" and value is not None and value.is_initializer()
    }
    both = found[f"{experts}.down_proj"]
    assert (both["gate_up_numbers"], both["gate_up_block"]) == ("int4", 32)
    assert (both["down_numbers"], both["down_block"]) == ("int8", 64)
    assert found["lm_head.weight"]["numbers"] == "float32"


def test_two_exports_are_equal_and_say_whose_kernels_run_them(
    tiny: Path, make_ingot: MakeIngot
) -> None:
    one, other = (make_ingot(tiny, "ort", **asked("int4", 64, False, "fast")) for _ in range(2))
    for name in (WEIGHTS, GRAPH, "ingot.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    said = json.loads((one / "ingot.json").read_text())
    assert said["kernels"] == "ingot"
    assert said["quantization"]["scales"] == "float16"
    library = (one / operators.LIBRARY).read_bytes()
    assert library == operators.INSTALLED.read_bytes()
    assert said["files"][operators.LIBRARY]["sha256"] == hashlib.sha256(library).hexdigest()
    with safe_open(one / WEIGHTS, "np") as file:
        stored = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        table = file.get_tensor("model.embed_tokens.weight")
    assert said["weight_bytes"] == sum(array.nbytes for array in stored)
    # Of a table a token reads the panel that its row is in.
    assert said["graph"]["unread_bytes"] == table.nbytes - table[0].nbytes


def test_panels_begin_where_a_line_of_a_cache_does(tiny: Path, make_ingot: MakeIngot) -> None:
    ingot = make_ingot(tiny, "ort", **asked("int4", 32, True, "fast"))
    model = onnx.load(str(ingot / GRAPH), load_external_data=False)
    places = {
        tensor.name: {each.key: each.value for each in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.UINT8
    }
    assert places and all(int(place["offset"]) % 64 == 0 for place in places.values())


def test_auto_takes_what_is_fastest_of_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert kernels.chosen("auto", "ort", "int4") == kernels.FASTEST["int4"][0]
    assert kernels.chosen("auto", "ort", "fp16") == "ort"
    monkeypatch.setattr(kernels, "INSTALLED", tmp_path / "none.so")
    assert kernels.chosen("auto", "ort", "int4") == "ort"
    assert kernels.chosen(None, "ort", None) == "ort"


def test_kernels_of_ones_own_store_what_the_checkpoint_has_by_default(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("mamba2", dtype=torch.bfloat16, num_hidden_layers=1)
    result = export(checkpoint, tmp_path / "out", kernels="auto", validate=False)
    assert (result.manifest.kernels, result.manifest.weights) == ("ingot", "checkpoint")


@pytest.mark.parametrize("family", ["jetmoe", pytest.param("mamba2", marks=pytest.mark.slow)])
def test_portable_leaves_standard_operators_alone(
    family: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint(family, dtype=torch.bfloat16)
    ingot = make_ingot(checkpoint, "ort", kernels="portable", weights="checkpoint")
    model = onnx.load(str(ingot / GRAPH), load_external_data=False)
    bodies = {(each.domain, each.name) for each in model.functions}
    for node in model.graph.node:
        assert not node.domain or (node.domain, node.op_type) in bodies, node.op_type
    assert Manifest.read(ingot).kernels == "portable"
    assert relative_rms(of_transformers(checkpoint), logits(ingot)) < 2e-6


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"target": "onnx", "kernels": "ingot"}, "--kernels ingot goes with the target ort"),
        ({"target": "trt-rtx", "kernels": "portable"}, "--kernels portable goes with"),
        ({"target": "onnx", "kernels": "auto"}, "--kernels auto goes with the target ort"),
        ({"kernels": "ingot", "weights": "fp16"}, "none for --weights fp16; give bf16"),
        ({"kernels": "portable", "weights": "int4"}, "give --weights bf16 or fp16, or --kernels"),
        ({"kernels": "ingt"}, "Did you mean ingot?"),
    ],
)
def test_refuses_what_does_not_go_together(
    request_: dict[str, Any], message: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(IngotError, match=re.escape(message)):
        export(tiny, tmp_path / "out", **request_)
    assert not (tmp_path / "out").exists()


def test_refuses_kernels_that_were_not_built(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "INSTALLED", tmp_path / "libingot_ort.so")
    with pytest.raises(IngotError, match="build it with `make cpu`, or give --kernels ort"):
        export(tiny, tmp_path / "out", kernels="ingot")
    assert not (tmp_path / "out").exists()
