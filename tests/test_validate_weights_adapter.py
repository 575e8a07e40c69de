"""What an adapter makes of weights, worked out for a validation, against PEFT's own merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import WEIGHTS, change_config, change_tensors, make_adapter, merged_model
from conftest import MakeCheckpoint, MakeIngot
from safetensors.torch import load_file, save_file
from test_graphs_merge import CASES, EXPERTS, TIED, expert_by_expert, fused

from ingot.export.ingot import Manifest
from ingot.export.progress import Stages
from ingot.graphs import adapter_weights
from ingot.graphs.adapter import AdapterConfig
from ingot.graphs.adapter_weights import MergedCheckpoint
from ingot.graphs.merge import open_checkpoint
from ingot.validate.identity.subject import Subject
from ingot.validate.identity.weights import check_weights
from ingot.validate.identity.weights_checkpoint import Tensors
from ingot.validate.identity.weights_files import Reader
from ingot.validate.result import Check

Weights = dict[str, torch.Tensor]


def bounds(base: Path, adapter: Path, names: list[str]) -> dict[str, tuple[Any, Any]]:
    """The least and the most that every element of some weights may be."""
    tensors = Tensors(base, adapter, names)
    result = {}
    with Reader() as reader:
        source = tensors.source(reader)
        for name in names:
            made = tensors.make(name)
            assert made is not None, name
            columns = made.matrices[2]
            rows = [source.rows(made, p, 0, p.rows, columns) for p in made.parts]
            low, high = (np.concatenate([row[n] for row in rows]) for n in (0, 1))
            result[name] = low.reshape(made.shape), high.reshape(made.shape)
    return result


def check_bounds(base: Path, adapter: Path, oracle: Any) -> None:
    """PEFT's merged weights lie within the bounds, and these are as near as float32 allows."""
    expected: Weights = oracle.state_dict()
    tied = bool(oracle.config.tie_word_embeddings)
    names = [name for name in expected if not (tied and name == "lm_head.weight")]
    names = [name for name in names if "rotary" not in name]
    changed = 0
    for name, (low, high) in bounds(base, adapter, names).items():
        right = expected[name].numpy()
        assert right.shape == low.shape and ((low <= right) & (right <= high)).all(), name
        width = np.abs(high.astype(np.float64) - low).max()
        assert width <= 1e-5 * np.abs(right).max(), name
        changed += width > 0
    assert changed or not any(".lora_" in name for name in load_file(adapter / WEIGHTS))


# One of each kind; the others are slow.
FAST = ("granite patterns", "granite dora", "granite embedding", "olmoe experts")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in CASES],
)
def test_holds_what_peft_makes_of_every_weight(
    case: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    family, fields, config = CASES[case]
    base = make_checkpoint(family, **fields)
    adapter = make_adapter(base, tmp_path, **config)
    check_bounds(base, adapter, merged_model(base, adapter))


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c == "both" else pytest.mark.slow) for c in TIED]
)
def test_holds_what_the_adapted_model_of_a_tied_one_computes_with(
    case: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint("granite")
    adapter = make_adapter(base, tmp_path, **TIED[case])
    # Untied, as the merge has it; what that gives is held against PEFT's adapted model elsewhere.
    merged = open_checkpoint(base, adapter)
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
    for name, (low, high) in bounds(base, adapter, names).items():
        right = merged.read(name).float().numpy()
        assert ((low <= right) & (right <= high)).all(), name


@pytest.mark.parametrize(
    ("adapter_of", "stored"),
    [
        ("parameters", "experts"),
        ("experts", "parameters"),
        pytest.param("parameters", "parameters", marks=pytest.mark.slow),
        pytest.param("experts", "experts", marks=pytest.mark.slow),
    ],
)
def test_holds_experts_of_either_spelling(
    adapter_of: str, stored: str, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    base = fused(tiny, tmp_path / "base") if stored == "parameters" else tiny
    if adapter_of == "parameters":
        adapter = make_adapter(base, tmp_path / "adapter", **EXPERTS)
    else:
        adapter = expert_by_expert(tmp_path / "adapter")
    check_bounds(base, adapter, merged_model(base, adapter))


def test_holds_whole_experts_of_another_spelling(tiny: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}
    adapter = make_adapter(tiny, tmp_path / "adapter", **config)
    (tmp_path / "base").mkdir()
    oracle = merged_model(tiny, adapter)
    check_bounds(tiny, adapter, oracle)
    check_bounds(fused(tiny, tmp_path / "base"), adapter, oracle)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_holds_a_vocabulary_that_was_resized(
    fields: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint("granite", **fields)
    adapter = make_adapter(base, tmp_path, rows=519, target_modules=["q_proj"])
    check_bounds(base, adapter, merged_model(base, adapter, rows=519))


def test_holds_an_adapter_of_a_checkpoint_of_mamba_ssm(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint("mamba2")
    config: dict[str, Any] = {"target_modules": ["in_proj"], "modules_to_save": ["embeddings"]}
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    tensors = load_file(base / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    mixer = {"layer": "Mamba2", "d_state": 16, "headdim": 16, "ngroups": 2, "chunk_size": 8}
    fields = {"d_model": 64, "n_layer": 2, "vocab_size": 512, "ssm_cfg": mixer}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    check_bounds(tmp_path, adapter, merged_model(base, adapter))
    names = ["backbone.embeddings.weight", "lm_head.weight"]
    stored = Tensors(tmp_path, adapter, names).stored
    # The head is what the embedding was, and the checkpoint's own name for that is not left over.
    assert stored["backbone.embedding.weight"].name.startswith("base_model.model.backbone.")
    assert stored["lm_head.weight"].name == "backbone.embedding.weight"


# Through an export

EXPORTED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    name: CASES[name]
    for name in (
        "granite tied token rows",
        "granite untied by whole modules",
        "granite tied whole modules",
        "granite biases of B",
        "granite dora",
        "olmoe experts",
        "olmoe whole experts",
        "jetmoe experts",
        "mamba2 whole modules",
    )
} | {f"tied {name}": ("granite", {}, config) for name, config in TIED.items()}


def checked(ingot: Path, base: Path, adapter: Path | None) -> Check:
    opened = open_checkpoint(base, adapter)
    return check_weights(Subject(ingot, Manifest.read(ingot), opened, Stages()))


@pytest.fixture(scope="module")
def made(
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, Path]:
    base, adapter = make_checkpoint("granite"), tmp_path_factory.mktemp("made") / "adapter"
    make_adapter(base, adapter, target_modules=["q_proj", "down_proj"])
    return make_ingot(base, "ort", adapter=str(adapter)), base, adapter


@pytest.fixture
def exported(made: tuple[Path, Path, Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """An ingot, its checkpoint and a copy of its adapter, to be changed."""
    ingot, base, adapter = made
    return ingot, base, Path(shutil.copytree(adapter, tmp_path / "adapter"))


def test_passes_an_ingot_with_an_adapter_in_it_and_fails_it_without(
    exported: tuple[Path, Path, Path],
) -> None:
    ingot, base, adapter = exported
    check = checked(ingot, base, adapter)
    assert check == Check("weights", 20)
    problems = checked(ingot, base, None).problems
    assert len(problems) == 4 and "layers.0.self_attn.q_proj.weight" in problems[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda adapter: change_config(adapter, lora_alpha=8.001),
        lambda adapter: change_config(adapter, use_rslora=True),
        lambda adapter: change_config(adapter, alpha_pattern={"layers.1.mlp.down_proj": 9}),
        lambda adapter: change_tensors(
            adapter, lambda t: {name: each * (1 + 1e-5) for name, each in t.items()}
        ),
        lambda adapter: change_tensors(
            adapter, lambda t: {n.replace("layers.1.mlp", "layers.9.mlp"): e for n, e in t.items()}
        ),
    ],
    ids=["alpha", "rslora", "one alpha", "tensors", "another layer"],
)
def test_names_what_another_adapter_would_make(
    change: Any, exported: tuple[Path, Path, Path]
) -> None:
    ingot, base, adapter = exported
    opened = open_checkpoint(base, adapter)
    # Read again by the comparison, and not by what was opened.
    change(adapter)
    check = check_weights(Subject(ingot, Manifest.read(ingot), opened, Stages()))
    assert check.problems and check.location is not None


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "ort", "trt"])
@pytest.mark.parametrize("case", EXPORTED)
def test_passes_the_export_of_every_kind_of_adapter(
    case: str, target: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    family, fields, config = EXPORTED[case]
    base = make_checkpoint(family, **fields)
    adapter = make_adapter(base, tmp_path, **config)
    half = {"precision": "fp16", "builder": "none"} if target == "trt" else {}
    check = checked(make_ingot(base, target, adapter=str(adapter), **half), base, adapter)
    assert (check.problems, check.left_out) == ((), "")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scaling", "product", "rows", "saved"])
def test_names_a_fault_of_the_merge(
    kind: str,
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_checkpoint("granite")
    config = CASES["granite tied token rows"][2]
    adapter = make_adapter(base, tmp_path, **config)
    with monkeypatch.context() as patch:
        if kind == "scaling":
            right = AdapterConfig.scalings
            patch.setattr(
                AdapterConfig,
                "scalings",
                lambda *a: {name: (rank, s * 1.001) for name, (rank, s) in right(*a).items()},
            )
        elif kind == "product":
            patch.setattr(adapter_weights.LowRank, "apply", lambda _, matrix, *a: matrix)
        elif kind == "rows":
            patch.setattr(adapter_weights.TokenRows, "apply", lambda _, matrix, *a: matrix)
        else:
            patch.setattr(MergedCheckpoint, "read", lambda self, name: self.base.read(name))
        ingot = make_ingot(base, "ort", adapter=str(adapter))
        assert checked(ingot, base, adapter).problems
