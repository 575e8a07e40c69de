"""``--adapter`` from end to end: ingots of merged weights, and what they say of themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import CONFIG, IDS, WEIGHTS, change_config, logits, make_adapter, merged_model
from click.testing import CliRunner, Result
from conftest import MakeCheckpoint, MakeIngot
from oracle import relative_rms
from test_runtime_tokenizer import cut_and_padded

from ingot.export.cli import main
from ingot.export.ingot import Manifest
from ingot.graphs.hub import resolve_adapter
from ingot.plugins.errors import IngotError
from ingot.runtime.loading import load

pytestmark = pytest.mark.usefixtures("shared_traces")

PREFILL = 7
FAMILIES: dict[str, dict[str, Any]] = {
    "granite": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "olmoe": {
        "target_modules": ["v_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
    },
    "jetmoe": {
        "target_modules": ["kv_proj"],
        "target_parameters": ["input_linear.weight", "output_linear.weight"],
    },
    "mamba2": {"target_modules": ["in_proj"], "modules_to_save": ["norm_f"]},
}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


# A trace of each family takes seconds; its merged weights are compared in test_graphs_merge.py.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "olmoe"]


@pytest.mark.parametrize("target", ["ort", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["olmoe", *SLOW])
def test_an_ingot_computes_what_the_merged_model_does(
    family: str,
    target: str,
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    tmp_path: Path,
) -> None:
    base = make_checkpoint(family)
    adapter = make_adapter(base, tmp_path, **FAMILIES[family])
    session = load(make_ingot(base, target, adapter=str(adapter)))
    ids = IDS.numpy()
    session.reset(1, ids.shape[1])
    pieces = [slice(0, PREFILL), *(slice(at, at + 1) for at in range(PREFILL, ids.shape[1]))]
    found = [session.step(ids[:, piece], np.ones_like(ids[:, piece])) for piece in pieces]
    expected = logits(merged_model(base, adapter)).numpy()
    assert relative_rms(expected, np.concatenate(found, axis=1)) < 1e-5


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ``tiny``, with a tokenizer of its own; read only."""
    folder = tmp_path_factory.mktemp("adapters") / "tuned"
    make_adapter(tiny, folder, target_modules=["q_proj", "o_proj"])
    cut_and_padded(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("tools")
    return folder


@pytest.fixture(scope="module")
def ingot(tiny: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``ingot export`` makes it; read only."""
    out = tmp_path_factory.mktemp("exported") / "ingot"
    result = run("export", "--model", tiny, "--adapter", adapter, "--target", "ort", "--out", out)
    assert result.exit_code == 0, result.output
    assert "tuned" in result.output
    return out


def test_the_manifest_names_the_adapter(tiny_ort: Path, ingot: Path) -> None:
    made, plain = Manifest.read(ingot), Manifest.read(tiny_ort)
    assert made.verdict == "passed"
    named = made.source["adapter"]
    assert named["name"] == "tuned" and named["revision"] is None and len(named["sha256"]) == 64
    assert made.source["sha256"] != plain.source["sha256"]
    assert "adapter" not in plain.source
    shown = run("inspect", ingot)
    assert "tuned" in shown.output and shown.exit_code == 0


def test_the_tokenizer_of_the_adapter_goes_with_it(
    tiny: Path, ingot: Path, adapter: Path, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    assert (ingot / "tokenizer.json").is_file() and not (tiny / "tokenizer.json").exists()
    name = "chat_template.jinja"
    assert (ingot / name).read_text() == (adapter / name).read_text()
    # A template alone goes with the base's tokenizer, and a tokenizer with its own templates alone.
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    cut_and_padded(base)
    (base / "tokenizer_config.json").write_text('{"chat_template": "base"}')
    (base / "generation_config.json").write_text("{}")
    part = Path(shutil.copytree(adapter, tmp_path / "part"))
    (part / "tokenizer.json").unlink()
    made = make_ingot(base, "ort", adapter=str(part))
    assert (made / name).read_text() == (adapter / name).read_text()
    files = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", name}
    assert files <= {path.name for path in made.iterdir()}
    whole = make_ingot(base, "ort", adapter=str(adapter))
    assert files - {path.name for path in whole.iterdir()} == {"tokenizer_config.json"}


def test_is_validated_with_its_adapter_alone(
    tiny: Path, adapter: Path, ingot: Path, tmp_path: Path
) -> None:
    validate = ("validate", ingot, "--checkpoint", tiny, "--quick")
    assert run(*validate, "--adapter", adapter).exit_code == 0
    without = run(*validate)
    assert without.exit_code == 2 and "'tuned'" in without.output
    assert "give its folder with --adapter" in without.output
    other = change_config(Path(shutil.copytree(adapter, tmp_path / "other")), lora_alpha=9)
    another = run(*validate, "--adapter", other)
    assert another.exit_code == 2 and "made from another checkpoint" in another.output


def test_is_not_validated_with_an_adapter_it_was_not_made_of(
    tiny: Path, tiny_ort: Path, adapter: Path
) -> None:
    result = run("validate", tiny_ort, "--checkpoint", tiny, "--adapter", adapter, "--quick")
    assert result.exit_code == 2 and f"with the adapter {adapter}" in result.output


@pytest.mark.slow
def test_is_held_against_another_target_of_the_same_adapter(
    tiny: Path, adapter: Path, ingot: Path
) -> None:
    validate = ("validate", ingot, "--checkpoint", tiny, "--adapter", adapter, "--quick")
    result = run(*validate, "--against", "onnx")
    assert result.exit_code == 0, result.output


def test_nothing_is_made_where_an_adapter_is_forgotten(
    tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    both = Path(shutil.copytree(tiny, tmp_path / "both"))
    for name in (CONFIG, WEIGHTS):
        shutil.copy(adapter / name, both / name)
    result = run("export", "--model", both, "--out", tmp_path / "out")
    assert result.exit_code == 2 and f"--adapter {both}" in result.output
    alone = run("export", "--model", adapter, "--out", tmp_path / "out")
    assert alone.exit_code == 2 and f"--model {tiny} --adapter {adapter}" in alone.output
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_into_the_adapter(tiny: Path, adapter: Path) -> None:
    for out in (adapter / "ingot", adapter):
        export = ("export", "--model", tiny, "--adapter", adapter, "--out", out, "--overwrite")
        before = sorted(adapter.iterdir())
        assert run(*export).exit_code == 2 and sorted(adapter.iterdir()) == before


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "../x", "org/name\n", ""])
def test_an_adapter_is_a_folder_or_a_name_of_the_hub(name: str) -> None:
    with pytest.raises(IngotError, match="neither a folder nor org/name"):
        resolve_adapter(name)


@pytest.mark.slow
def test_a_bfloat16_graph_has_the_merged_weights_rounded_once(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    base = make_checkpoint("granite", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path, **FAMILIES["granite"])
    request: dict[str, Any] = {"precision": "bf16", "builder": "none", "adapter": str(adapter)}
    stored = load_file(make_ingot(base, "trt", **request) / "weights.safetensors")
    weight = merged_model(base, adapter).state_dict()["model.layers.1.mlp.up_proj.weight"]
    expected = weight.to(torch.bfloat16)
    assert any(torch.equal(each, expected.T) for each in stored.values())
    raw = json.loads((base / "config.json").read_text())
    assert raw["dtype"] == "bfloat16"
