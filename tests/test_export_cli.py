"""The command lines: what is refused in one line, what is left behind, and what repeats."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from ingot.export.cli import export_command, main
from ingot.export.ingot import GRAPH, MANIFEST, WEIGHTS, Manifest
from ingot.graphs.names import FAMILIES
from ingot.plugins.errors import IngotError
from ingot.runtime.loading import load
from ingot.runtime.session import SessionError
from ingot.validate.judge.limits import LIMITS

ROOT = Path(__file__).resolve().parent.parent
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """The command installs a handler of SIGTERM, which must not outlive the test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "exports").mkdir()
    return tmp_path / "exports" / "out"


def _module(
    *arguments: str | Path, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``python -m ...`` as a user runs it."""
    command = [sys.executable, "-m", *map(str, arguments)]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)


def _export(*arguments: str | Path) -> Result:
    """The same command in this process, which has the exporter loaded already."""
    return CliRunner().invoke(export_command, [str(argument) for argument in arguments])


def _refused(stderr: str, named: str) -> None:
    """One ``error:`` line that names the thing, and nothing else but the progress."""
    lines = [line for line in stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    assert named in lines[0]


def _edit_weights(folder: Path, edit: Callable[[Tensors], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


LOST = "model.layers.1.mlp.experts.3.up_proj.weight"
EXTRA = "model.layers.0.self_attn.sinks"
WRONG = "model.layers.0.self_attn.k_norm.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "one missing": (
        lambda f: _edit_weights(f, lambda w: w.pop(LOST)),
        f"{LOST} [32, 64] is missing",
    ),
    "one extra": (lambda f: _edit_weights(f, lambda w: w.update({EXTRA: torch.ones(4)})), EXTRA),
    "one wrong shape": (
        lambda f: _edit_weights(f, lambda w: w.update({WRONG: torch.ones(33)})),
        f"{WRONG} has shape [33]; config.json makes it [32]",
    ),
    "truncated": (_truncate, "model.safetensors is not a whole safetensors file"),
    "another family": (lambda f: _edit_config(f, model_type="phimoe"), "model_type is 'phimoe'"),
    "a NaN": (
        lambda f: _edit_weights(f, lambda w: w["lm_head.weight"][3].fill_(torch.nan)),
        "lm_head.weight holds a nan at index [3, 0]",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_refuses_a_bad_checkpoint_and_leaves_nothing(copy: Path, out: Path, bad: str) -> None:
    damage, named = BAD[bad]
    damage(copy)
    result = _export("--model", copy, "--target", "onnx", "--out", out)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit), "anything else would print a stack trace"
    _refused(result.stderr, named)
    assert result.stdout == ""
    assert list(out.parent.iterdir()) == []


def test_refuses_a_bad_checkpoint_as_a_module(copy: Path, out: Path) -> None:
    damage, named = BAD["truncated"]
    damage(copy)
    done = _module("ingot.export", "--model", copy, "--out", out, cwd=copy.parent)
    assert done.returncode == 2
    _refused(done.stderr, named)
    assert "Traceback" not in done.stdout + done.stderr
    assert list(out.parent.iterdir()) == []


def test_refuses_a_taken_destination_before_any_work(tiny_onnx: Path, tmp_path: Path) -> None:
    taken = Path(shutil.copytree(tiny_onnx, tmp_path / "taken"))
    before = {path: path.stat().st_mtime_ns for path in taken.rglob("*")}
    # The checkpoint does not exist, so looking at it at all would give another message.
    result = _export("--model", tmp_path / "absent", "--out", taken)
    assert result.exit_code == 2
    _refused(result.stderr, f"{taken} exists; give --overwrite")
    assert {path: path.stat().st_mtime_ns for path in taken.rglob("*")} == before


def test_never_overwrites_what_is_not_an_ingot(tiny: Path) -> None:
    result = _export("--model", tiny, "--out", tiny, "--overwrite")
    assert result.exit_code == 2
    _refused(result.stderr, "exists and is not an ingot, so it is left alone")
    assert (tiny / "model.safetensors").is_file()


def test_never_replaces_the_checkpoint_that_it_reads(copy: Path, tmp_path: Path) -> None:
    # As a folder that an export and its checkpoint were both put into.
    (copy / MANIFEST).write_text("{}")
    (tmp_path / "link").symlink_to(copy.name)
    for model, out in ((copy, tmp_path / "link"), (tmp_path / "link", copy), (copy, copy / "out")):
        result = _export("--model", model, "--out", out, "--overwrite")
        assert result.exit_code == 2
        _refused(result.stderr, f"{out} and {model} lie in one another")
    assert (copy / "model.safetensors").is_file() and not (copy / "out").exists()


def test_refuses_a_destination_below_a_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = _export("--model", tiny, "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2
    _refused(result.stderr, f"{tmp_path / 'file'} is a file")


def test_refuses_a_preset_for_a_folder(tiny: Path, out: Path) -> None:
    result = _export("--model", tiny, "--preset", "tiny", "--out", out)
    assert result.exit_code == 2
    _refused(result.stderr, f"--preset goes with a family name ({', '.join(FAMILIES)})")
    assert list(out.parent.iterdir()) == []


def test_refuses_what_is_neither_a_folder_nor_a_name(out: Path) -> None:
    for model in ("phimoe", "./absent", "org/name/more"):
        result = _export("--model", model, "--out", out)
        assert result.exit_code == 2
        _refused(result.stderr, f"{model!r} is neither a folder")
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "offered"),
    [
        ("--task", "translate", "'generate', 'features', 'classify'"),
        ("--target", "coreml", "'onnx', 'ort'"),
        ("--preset", "huge", "'tiny', 'small', 'full'"),
        ("--output", "attentions", "'router_logits', 'hidden_states'"),
    ],
)
def test_offers_the_choices_for_an_unknown_one(
    tiny: Path, out: Path, option: str, value: str, offered: str
) -> None:
    result = _export("--model", tiny, "--out", out, option, value)
    assert result.exit_code == 2
    assert f"'{value}' is not one of {offered}" in result.stderr
    assert list(out.parent.iterdir()) == []


HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy", "rich"}


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], ["classify", "export", "generate", "validate"]),
        (["export", "--help"], ["--target", "--overwrite", "Exit status", *FAMILIES]),
        (["generate", "--help"], ["--prompt-ids", "--temperature"]),
        (["classify", "--help"], ["--prompt-ids", "--task classify"]),
        (["validate", "--help"], ["--checkpoint", "Exit status"]),
        (["--version"], ["0."]),
    ],
    ids=str,
)
def test_helps_without_loading_anything_heavy(
    tmp_path: Path, arguments: list[str], shown: list[str]
) -> None:
    code = "from ingot.export.cli import main; main(prog_name='ingot')"
    command = [sys.executable, "-X", "importtime", "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in shown)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in imported, "the list of imports was not read"
    assert {name.partition(".")[0] for name in imported}.isdisjoint(HEAVY)


def test_helps_as_a_module(tmp_path: Path) -> None:
    for module in ("export", "runtime", "validate"):
        for name, folder in ((module, ROOT), (f"ingot.{module}", tmp_path)):
            done = _module(name, "--help", cwd=folder)
            assert done.returncode == 0
            assert f"Usage: python -m {name} " in done.stdout


def test_knows_no_other_command() -> None:
    result = CliRunner().invoke(main, ["import"])
    assert result.exit_code == 2
    assert "No such command 'import'" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["validate/__init__.py", "runtime.py"])
def test_works_beside_packages_of_its_folders_names(
    tiny: Path, out: Path, tmp_path: Path, name: str
) -> None:
    # configobj ships a `validate`, and many an application has a `runtime`.
    other = tmp_path / "other" / name
    other.parent.mkdir(parents=True)
    other.write_text("raise AssertionError('this is not ours')")
    path = os.pathsep.join(filter(None, [f"{tmp_path}/other", os.environ.get("PYTHONPATH")]))
    done = _module("ingot.export", "--model", tiny, "--out", out, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_repeats_an_export_to_the_last_byte(copy: Path, out: Path) -> None:
    # Of another process with another hash seed, so that no order of a set can decide anything.
    first = _module(
        "ingot.export",
        "--model",
        copy,
        "--target",
        "ort",
        "--out",
        out,
        cwd=copy.parent,
        PYTHONHASHSEED="1",
    )
    assert first.returncode == 0, first.stderr
    assert "passed" in first.stdout and "Traceback" not in first.stderr
    kept = Path(shutil.copytree(out, out.parent / "kept"))
    second = _export("--model", copy, "--target", "ort", "--out", out, "--overwrite", "--preview")
    assert second.exit_code == 0, second.output
    names = {path.relative_to(kept) for path in kept.rglob("*") if path.is_file()}
    assert names >= {Path(GRAPH), Path(WEIGHTS), Path(MANIFEST), Path("report/report.json")}
    assert names == {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    for name in sorted(names):
        assert (out / name).read_bytes() == (kept / name).read_bytes(), name
    assert Manifest.read(out).verdict == "passed"
    (preview,) = re.findall(r"generated ids: ([\d ]+)\n", second.stdout)
    assert len(preview.split()) == 16
    assert f"more: ingot generate {out} --prompt-ids " in second.stdout


def test_keeps_an_ingot_that_fails_and_says_so(
    tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No graph meets a limit of nothing: the one way to a failure without a wrong exporter.
    monkeypatch.setitem(LIMITS, "logits", replace(LIMITS["logits"], score=0.0))
    result = _export("--model", tiny, "--target", "onnx", "--out", out, "--preview")
    assert result.exit_code == 1, result.output
    assert re.search(r"verdict +│ failed", result.stdout)
    assert "generated ids" not in result.stdout
    assert Manifest.read(out).verdict == "failed"
    report = json.loads((out / "report" / "report.json").read_text())
    assert report["failures"][0].startswith("prefill, logits: the error ")
    with pytest.raises(SessionError, match="failed its validation"):
        load(out)


def test_every_option_of_an_export_reaches_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each as it was given, also one that is added later: no option may be dropped."""
    given: dict[str, Any] = {}

    def export(model: str, out: Path, **options: Any) -> None:
        given.update(options, model=model, out=out)
        raise IngotError("far enough")

    monkeypatch.setattr("ingot.export.api.export", export)
    words, expected = [], {}
    for option in export_command.params:
        assert isinstance(option, click.Option)
        name = str(option.name)
        if name == "debug":
            continue
        value: Any = "5"
        if isinstance(option.type, click.Choice):
            value = str(option.type.choices[-1])
        elif option.is_flag:
            value = True
        elif option.name == "out":
            value = str(tmp_path / "out")
        words += [option.opts[0]] if option.is_flag else [option.opts[0], value]
        expected[name] = option.type_cast_value(
            click.Context(export_command), (value,) if option.multiple else value
        )
    _refused(CliRunner().invoke(export_command, words).stderr, "far enough")
    expected["validate"] = not expected.pop("no_validate")
    # Both are what the command does with the result.
    del expected["preview"], expected["strict"], given["stages"]
    assert given == expected
