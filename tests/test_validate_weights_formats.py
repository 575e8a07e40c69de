"""Weights of ingots in whole numbers against the checkpoint: their format and their numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from proof import stored
from proof.editing import Editor
from proof.fault import Change
from traces import Traces

from ingot.export.ingot import GRAPH, Manifest
from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.plugins.cpu.library import CpuLibrary
from ingot.validate.api import validate
from ingot.validate.identity.contract import check_contract
from ingot.validate.identity.subject import Subject
from ingot.validate.identity.weights import check_weights
from ingot.validate.result import Check

# No block fills a row, nor an expert's rows.
UNEVEN = {"hidden_size": 72, "intermediate_size": 50, "vocab_size": 251}


def subject(ingot: Path, checkpoint: Path, traces: Traces | None = None) -> Subject:
    opened = Checkpoint.open(checkpoint)
    return Subject(ingot, Manifest.read(ingot), opened, Stages(), traces)


def checked(ingot: Path, checkpoint: Path) -> Check:
    return check_weights(subject(ingot, checkpoint))


@pytest.fixture(scope="module")
def uneven(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("olmoe", **UNEVEN)


@pytest.fixture(scope="module")
def experts(uneven: Path, make_ingot: MakeIngot) -> Path:
    """An OLMoE in int4 with zero points, filled up to whole blocks; read only."""
    return make_ingot(uneven, "ort", weights="int4", symmetric=False, accuracy="exact")


def test_passes_every_format(uneven: Path, experts: Path, make_ingot: MakeIngot) -> None:
    for request in (
        {"weights": "int4", "block": 128},
        {"weights": "int4", "block": 64, "symmetric": False},
        {"weights": "int8", "block": 32},
        {"weights": "int8", "block": 64, "symmetric": False, "accuracy": "exact"},
    ):
        check = checked(make_ingot(uneven, "ort", **request), uneven)
        assert check.compared > 20
        assert (check.problems, check.location, check.left_out) == ((), None, ""), request
    assert checked(experts, uneven).problems == ()


def router_in_blocks(ingot: Path) -> None:
    """The router's product takes the numbers of the head, whose rows are as long."""

    def edit(editor: Editor) -> None:
        router, head = editor.reader("layers.1.mlp.gate.weight"), editor.reader("lm_head.weight")
        router.op_type, router.domain = head.op_type, head.domain
        router.input[1:] = head.input[1:]
        router.attribute.extend(head.attribute)

    stored.graph(edit)(ingot)


def filled(numbers: np.ndarray, scales: np.ndarray) -> None:
    """The rows of an expert that no row of the checkpoint is in."""
    numbers[2, 100:], scales[2, 100:] = 0x11, 0.5


GATE_UP = "layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            stored.field("quantization", "block", to=64),
            "it is stored as int4 in blocks of 32 with zero points and should be int4 in blocks of "
            "64 with zero points",
        ),
        (
            stored.field("quantization", "symmetric", to=True),
            "with zero points and should be int4 in blocks of 32",
        ),
        (
            stored.field("quantization", "bits", to={"model.layers.1.self_attn.q_proj.weight": 8}),
            "model.layers.1.self_attn.q_proj.weight: it is stored as int4 in blocks of 32 with "
            "zero points and should be int8",
        ),
        (
            stored.field("quantization", "bits", to={"model.layers.1.self_attn.q_proj.weight": 32}),
            "and should be F32",
        ),
        (router_in_blocks, "model.layers.1.mlp.gate.weight: nothing reads it"),
        (
            stored.weights((GATE_UP, f"{GATE_UP}.scales"), filled),
            "the rows that it is filled up with are not zero",
        ),
        (
            stored.weight(f"{GATE_UP}.scales", lambda array: array[[0, 1, 2, 4, 3, 5, 6, 7]]),
            "model.layers.1.mlp.experts.3.gate_proj.weight: ",
        ),
    ],
    ids=lambda each: each[:40] if isinstance(each, str) else "",
)
def test_names_what_is_not_as_it_should_be(
    change: Change, said: str, experts: Path, uneven: Path, tmp_path: Path
) -> None:
    wrong = Path(shutil.copytree(experts, tmp_path / "wrong"))
    change(wrong)
    problems = checked(wrong, uneven).problems
    assert any(said in problem for problem in problems), problems[:4]


def test_names_a_matrix_that_is_left_in_float32(
    uneven: Path, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    plain = make_ingot(uneven, "ort", weights="checkpoint")
    wrong = Path(shutil.copytree(plain, tmp_path / "wrong"))
    chosen = {"block": 32, "symmetric": True, "accuracy": "exact", "method": "nearest", "bits": {}}

    def claims(held: dict[str, Any]) -> None:
        held |= {"weights": "int4", "quantization": chosen}

    stored.manifest(claims)(wrong)
    problems = checked(wrong, uneven).problems
    assert all(
        each.endswith("it is stored as F32 and should be int4 in blocks of 32")
        for each in problems[:14]
    )
    assert not any("gate.weight" in each or "norm" in each for each in problems)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            stored.field("quantization", "accuracy", to="fast"),
            "quantization.accuracy of ingot.json is fast, and 11 of 11 products in whole numbers "
            "are not so; MatMulNBits linear_2, the first, does not round its activations",
        ),
        (stored.field("parameters", to=lambda count: count + 1), "parameters of ingot.json is "),
        (stored.field("weight_bytes", to=lambda count: count - 1), "weight_bytes of ingot.json is"),
    ],
)
def test_the_contract_counts_and_says_how_products_are_computed(
    change: Callable[[Path], None],
    said: str,
    experts: Path,
    uneven: Path,
    tmp_path: Path,
    traces: Traces,
) -> None:
    assert check_contract(subject(experts, uneven, traces)).problems == ()
    wrong = Path(shutil.copytree(experts, tmp_path / "wrong"))
    change(wrong)
    problems = check_contract(subject(wrong, uneven, traces)).problems
    assert any(said in problem for problem in problems), problems


@pytest.fixture(scope="module")
def mixed(
    trained: Callable[[str], Path], trained_text: str, make_ingot: MakeIngot, tmp_path_factory: Any
) -> Path:
    """A trained Mamba2 with the bits and the blocks that a budget chose; read only."""
    text = tmp_path_factory.mktemp("text") / "a.txt"
    text.write_text(trained_text)
    return make_ingot(trained("mamba2"), "ort", weights="int4", bits=4.98, calibration=text)


def test_a_budget_chooses_blocks_and_every_weight_has_its_own(
    mixed: Path, trained: Callable[[str], Path], traces: Traces
) -> None:
    manifest = Manifest.read(mixed)
    said = manifest.quantization
    assert said is not None and said.block == 128 and {32, 64} & set(said.blocks.values())
    assert set(said.blocks) <= set(said.calibration["effects"])
    graph = onnx.load(str(mixed / "model.onnx"), load_external_data=False).graph
    sizes = {
        node.input[1]: {each.name: each.i for each in node.attribute}["block_size"]
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }
    assert sizes == {name: said.blocks.get(name, 128) for name in sizes} and len(sizes) == 5
    assert checked(mixed, trained("mamba2")).problems == ()
    assert check_contract(subject(mixed, trained("mamba2"), traces)).problems == ()


@pytest.mark.slow
def test_an_ingot_of_mixed_blocks_passes(mixed: Path, trained: Callable[[str], Path]) -> None:
    report = validate(mixed, trained("mamba2"))
    assert report.verdict == "passed"
    assert report.activations is not None and len(report.activations.blocks) > 1


def test_names_a_weight_in_other_blocks_than_its_own(
    mixed: Path, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    said = Manifest.read(mixed).quantization
    assert said is not None
    name, own = next((name, size) for name, size in said.blocks.items() if "embed" not in name)
    usual = next(name for name in said.calibration["effects"] if name not in said.blocks)
    for number, (blocks, found, size, wanted) in enumerate(
        [
            ({k: v for k, v in said.blocks.items() if k != name}, name, own, 128),
            ({**said.blocks, name: 96 - own}, name, own, 96 - own),
            ({**said.blocks, usual: 64}, usual, 128, 64),
        ]
    ):
        wrong = Path(shutil.copytree(mixed, tmp_path / str(number)))
        stored.field("quantization", "blocks", to=blocks)(wrong)
        problems = checked(wrong, trained("mamba2")).problems
        assert len(problems) == 1 and f"{found}: it is stored as int" in problems[0], problems
        assert f"in blocks of {size} and should be int" in problems[0]
        assert f"in blocks of {wanted}" in problems[0]


def round_nothing(ingot: Path) -> None:
    model = onnx.load(str(ingot / GRAPH), load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "MoeDispatch")
    next(each for each in node.attribute if each.name == "round_activations").i = 0
    (ingot / GRAPH).write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            stored.manifest(lambda held: held.pop("activations")),
            "activations of ingot.json is absent, and 7 of 7 products in floats are not so",
        ),
        (round_nothing, "1 of 7 products in floats are not so; MoeDispatch"),
    ],
)
def test_the_contract_says_what_floats_are_multiplied_by(
    change: Callable[[Path], None],
    said: str,
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    cpu_library: CpuLibrary,
    tmp_path: Path,
    traces: Traces,
) -> None:
    checkpoint = make_checkpoint("olmoe", dtype=torch.bfloat16)
    asked = {"kernels": "ingot", "weights": "checkpoint", "accuracy": "fast"}
    right = make_ingot(checkpoint, "ort", **asked)
    assert check_contract(subject(right, checkpoint, traces)).problems == ()
    wrong = Path(shutil.copytree(right, tmp_path / "wrong"))
    change(wrong)
    problems = check_contract(subject(wrong, checkpoint, traces)).problems
    assert any(said in each for each in problems), problems
