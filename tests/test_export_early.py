"""Refusals of the command lines that are told before PyTorch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ingot.export.api import export
from ingot.export.early import find_source
from ingot.export.request import ExportError, ExportRequest
from ingot.graphs import names

# One that an earlier version made.
INGOT = Path(__file__).parent / "data" / "schema1" / "granite-ort"
# Runs commands one after the other in a new process, and says of each whether torch is imported.
COMMANDS = """
import json, sys
from click.testing import CliRunner
from ingot.export.cli import main
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, arguments)
    said = result.output if result.exception is None else f"{result.output} {result.exception!r}"
    print(json.dumps([result.exit_code, said, "torch" in sys.modules]))
"""


def run_commands(*commands: list[str], **environment: str) -> list[tuple[int, str, bool]]:
    """Exit status, output, and whether torch is imported by then, of each."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "1000", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """``folder(name, config, *files)``: a checkpoint folder of empty files."""

    def make(name: str, config: str | None, *files: str) -> str:
        made = tmp_path / name
        made.mkdir()
        if config is not None:
            (made / "config.json").write_text(config)
        for file in files:
            (made / file).write_bytes(b"")
        return str(made)

    return make


def test_mistakes_are_told_before_torch_is_imported(
    tmp_path: Path, tiny: Path, folder: Callable[..., str]
) -> None:
    """Each with the words that its sentence has."""
    out = str(tmp_path / "out")
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    olmoe = '{"model_type": "olmoe"}'
    weights = "model.safetensors"
    ssm = json.dumps({"d_model": 8, "n_layer": 1, "ssm_cfg": {"layer": "Mamba1"}})
    ia3 = folder("ia3", None)
    (Path(ia3) / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    exports = {
        "did you mean olmoe": ["olmo"],
        "did you mean jetmoe": ["Jet-MoE"],
        "did you mean org/model.v1?": ["https://huggingface.co/org/model.v1/tree/main"],
        "the hub name of a llama checkpoint": ["llama"],
        "did you mean qwen3_moe? qwen2_moe is not there: it has a shared": ["qwen2_moe"],
        "did you mean granite": ["granit", "--preset", "tiny"],
        "--model olmoe --preset tiny": ["olmoe-tiny"],
        "--model mamba2 --preset full": ["mamba2:full"],
        "neither a folder": ["./no/such/folder"],
        "org/name": [""],
        "could not be reached": ["org/name"],
        "folder allenai/OLMoE-1B-7B-0924, and": ["olmoe"],
        "give the folder that holds it": [str(tiny / "model.safetensors")],
        "is no revision": ["org/name", "--revision", "../../x"],
        "'org/name\\n' is neither": ["org/name\n"],
        "goes with a family name": [str(tiny), "--preset", "tiny"],
        "goes with a TensorRT target": [str(tiny), "--precision", "bf16"],
        "--opt-seq 9 is more": [str(tiny), "--target", "trt", "--max-seq", "8", "--opt-seq", "9"],
        "--builder tensorrt is of a": ["olmoe", "--preset", "tiny", "--builder", "tensorrt"],
        "--embed-plugins is of a": ["olmoe", "--preset", "tiny", "--embed-plugins"],
        "--max-seq is of a": [str(tiny), "--max-seq", "8"],
        "--max-seq is 9999999999": [str(tiny), "--target", "trt", "--max-seq", "9999999999"],
        "and a preset is made here": ["olmoe", "--preset", "tiny", "--revision", "main"],
        "the one revision that lies": [str(tiny), "--revision", "main"],
        "--context is 0; it must": ["olmoe", "--preset", "tiny", "--context", "0"],
        "--seed is -1; it must": ["olmoe", "--preset", "tiny", "--seed", "-1"],
        "--seed is 4294967296; it": ["olmoe", "--preset", "tiny", "--seed", str(2**32)],
        "'orrt' is not one of": [str(tiny), "--target", "orrt"],
        "is a file": [str(tiny), "--out", str(tmp_path / "file" / "out")],
        "exists; give --overwrite": [str(tiny), "--out", str(tiny)],
        "has no config.json": [folder("empty", None, weights)],
        "not valid JSON": [folder("json", "{", weights)],
        "must hold a JSON object": [folder("list", "[]", weights)],
        "no model_type": [folder("none", "{}", weights)],
        "nearest is bamba": [folder("moe", '{"model_type": "zamba2"}', weights)],
        "has neither": [folder("bare", olmoe)],
        "pickle weights only": [folder("pickle", olmoe, "pytorch_model.bin", "training_args.bin")],
        "layer 'Mamba1'": [folder("mamba1", ssm, weights)],
        "neither a folder nor org/name": [str(tiny), "--adapter", "lora"],
        "it has no adapter_config.json": [str(tiny), "--adapter", str(tiny)],
        "only LORA": ["olmoe", "--adapter", ia3],
        "beside the model": [folder("both", olmoe, weights, "adapter_model.safetensors")],
        "and no model": [folder("adapter", None, "adapter_model.safetensors")],
    }
    lora = folder("lora", None)
    (Path(lora) / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    compared = [str(INGOT), "--checkpoint", str(tiny)]
    validations = {
        "is not an ingot": [str(tiny), "--checkpoint", str(tiny)],
        "gone' is not a folder": [str(INGOT), "--checkpoint", str(tmp_path / "gone")],
        "name of a family and not of one checkpoint": [str(INGOT), "--checkpoint", "olmoe"],
        "no folder org/adapter": [*compared, "--adapter", "org/adapter"],
        "no adapter_model.safetensors": [*compared, "--adapter", lora],
        "--seed is -1": [*compared, "--seed", "-1"],
        "there is no baseline": [*compared, "--gate", str(tmp_path / "gone.json")],
        "is damaged": [*compared, "--gate", str(tmp_path / "file")],
        "file is a file": [*compared, "--save-baseline", str(tmp_path / "file" / "x.json")],
        "is a link to nothing": [*compared, "--report", str(tmp_path / "loop" / "x")],
        "lie in one another": [*compared, "--save-baseline", str(tiny / "x.json")],
        "no whole .npy file": [*compared, "--tokens", str(tmp_path / "file")],
        "give a text file": [*compared, "--text", str(tmp_path / "gone")],
        "were both given": [*compared, "--text", "a", "--tokens", "b"],
        "did you mean onnx?": [str(INGOT), "--checkpoint", str(tiny), "--against", "onxx"],
    }
    commands = [
        # Of two options --out, the last counts.
        *(["export", "--out", out, "--model", *words] for words in exports.values()),
        *(["validate", *words] for words in validations.values()),
    ]
    told = run_commands(*commands)
    for words, (status, said, torch) in zip([*exports, *validations], told, strict=True):
        assert (status, torch) == (2, False), said
        assert words in said
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "orrt"}, "'orrt' is no target; .* Did you mean ort?"),
        ({"task": "generation"}, "Did you mean generate?"),
        ({"preset": "tini"}, "Did you mean tiny?"),
        ({"precision": "int4"}, "'int4' is no precision; give one of: fp32, fp16, bf16.$"),
        ({"extra_outputs": ["router_logit"]}, "Did you mean router_logits?"),
    ],
)
def test_names_the_option_that_was_meant(
    tmp_path: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ExportError, match=said):
        export("olmoe", tmp_path / "out", **options)  # type: ignore[arg-type]


def test_knows_a_family_that_is_registered_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `tests/make_ingots.py` has one."""
    monkeypatch.setattr(names, "FAMILIES", (*names.FAMILIES, "newer"))
    assert find_source(ExportRequest("newer", "ort", tmp_path / "out", preset="tiny")) is None
