"""``ingot validate``: its verdicts and statuses, what it prints, writes and refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import MakeCheckpoint, MakeIngot
from damage import copied, one_percent, with_engine, with_weight
from test_runtime_tokenizer import cut_and_padded

from ingot.export.ingot import GRAPH, WEIGHTS, Manifest
from ingot.graphs.family import find_family
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.plugins.errors import IngotError
from ingot.validate.api import validate
from ingot.validate.baseline import Spread, save_baseline
from ingot.validate.cli import validate_command
from ingot.validate.result import Report, TensorResult
from ingot.validate.truth.inputs import QUICK, STANDARD, THOROUGH, Plan

# How many words of `cut_and_padded` a text has: more than one window of a perplexity.
WORDS = 300
REPORTS = {"report.json", "junit.xml", "summary.md", "report.html"}
NORM = "layers.1.post_attention_layernorm.weight"
EAGER_STAGES = ["run eager float64", "run eager float32"]


pytestmark = pytest.mark.usefixtures("shared_traces")


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny`` with a tokenizer."""
    folder = tmp_path_factory.mktemp("words") / "checkpoint"
    shutil.copytree(tiny, folder)
    cut_and_padded(folder)
    return folder


@pytest.fixture(scope="module")
def ingot(checkpoint: Path, make_ingot: MakeIngot) -> Path:
    return make_ingot(checkpoint, "onnx")


@pytest.fixture(scope="module")
def swapped(ingot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ingot with two experts swapped, and a manifest that says nothing of it."""

    def swap(stack: np.ndarray) -> None:
        stack[[0, 1]] = stack[[1, 0]]

    folder = tmp_path_factory.mktemp("swapped")
    names = _stacks(ingot)
    assert len(names) == 2
    first = with_weight(ingot, folder / "first", names[0], swap)
    return with_weight(first, folder / "ingot", names[1], swap)


def _stacks(ingot: Path) -> list[str]:
    data = (ingot / WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return [name for name in header if ".0.mlp.experts." in name]


def _validate(ingot: Path, checkpoint: Path, *arguments: str | Path) -> Result:
    command = [ingot, "--checkpoint", checkpoint, *arguments]
    result = CliRunner().invoke(validate_command, list(map(str, command)))
    escaped = result.exception is not None and not isinstance(result.exception, SystemExit)
    assert not escaped, f"a user would see a stack trace: {result.exception!r}"
    return result


def _quick(ingot: Path, checkpoint: Path, *arguments: str | Path) -> Result:
    return _validate(ingot, checkpoint, "--quick", *arguments)


def _passed(result: Result, against: str = "eager PyTorch in float64") -> None:
    assert result.exit_code == 0, result.output
    first = result.stdout.splitlines()[0]
    assert re.fullmatch(rf"PASSED: olmoe, onnx, float32, against {re.escape(against)}.*\.", first)
    assert "FAILED" not in result.stdout


def _failed(result: Result) -> None:
    assert result.exit_code == 1, result.output
    first = result.stdout.splitlines()[0]
    assert re.fullmatch(r"FAILED: olmoe, onnx, float32, against .*: \d+ problems\.", first)
    assert re.search(r"^FAILED logits at .* calls, .*: the error ", result.stdout, re.MULTILINE)


def _refused(result: Result, named: str) -> None:
    """One ``error:`` line that names the thing, and nothing else but the progress."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ") and lines[0].endswith(".")
    assert named in lines[0]


def _strict(text: str) -> dict[str, Any]:
    """The report, of JSON without the constants that JSON has not."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


def _stages(result: Result) -> list[str]:
    return [line.removesuffix(" ...") for line in result.stderr.splitlines()]


# --- the verdict, its status and what is printed


def test_validates_again_and_passes(ingot: Path, checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ingot.validate", str(ingot), "--checkpoint", str(checkpoint)]
    command.append("--quick")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first == (
        "PASSED: olmoe, onnx, float32, against eager PyTorch in float64, beside eager PyTorch in "
        "float32."
    )
    assert re.fullmatch(
        r"Worst of \d+ tensors; a floor is eager PyTorch's own error", rest[0].strip()
    )
    # One row a kind: error, score, limit, stage and tensor.
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in rest if "│" in line]
    # A long name goes on in the next line.
    rows = [row for row in rows if row[0]]
    assert [row[0] for row in rows] == ["logits", "key", "value", "router", "hidden"]
    for _, error, score, limit, stage, tensor in rows:
        assert 0 < float(error) < 1e-5 and 0 < float(score) < float(limit) == 8
        assert stage and tensor
    figures = [line.partition(":")[0] for line in rest if ": " in line]
    assert figures == [
        "Routing, free",
        "Routing, replayed",
        "Routing, forced",
        "Growth of the error over decode, in floors",
        "KL divergence of truth from target, nats",
        "Top-1 agreement",
        "Weights",
        "Graph",
        "Contract",
        "Fed",
        "Experts",
        "Shapes of use",
        "Left out",
        "Not asked",
    ]
    assert re.search(r"^Weights: \d+ tensors are the checkpoint's$", done.stdout, re.MULTILINE)
    # Progress is no part of the result.
    assert "run the graph with its routers ..." in done.stderr.splitlines()
    assert "..." not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_fails_an_ingot_with_two_experts_swapped(swapped: Path, checkpoint: Path) -> None:
    result = _quick(swapped, checkpoint)
    _failed(result)
    (begins,) = re.findall(r"^It begins at: (.*)$", result.stdout, re.MULTILINE)
    assert re.fullmatch(r"layer 0, MoeDispatch output .*x floor", begins)
    # A line a kind and cause, not one a call.
    failed = re.findall(r"^FAILED (.*)$", result.stdout, re.MULTILINE)
    assert 3 < len(failed) <= 10
    calls = r"logits at \d+ of \d+ calls, worst at [^:]*: the error "
    assert sum(bool(re.match(calls, line)) for line in failed) == 1


def test_refuses_an_ingot_that_is_not_the_one_that_was_made(
    ingot: Path, checkpoint: Path, tmp_path: Path
) -> None:
    broken = with_weight(ingot, tmp_path / "ingot", NORM, one_percent, known=False)
    _refused(_quick(broken, checkpoint), f"{WEIGHTS} is not the file that was validated")


def _report(problem: str = "", reason: str | None = None) -> Report:
    tensor = TensorResult("prefill", "logits", "logits", None, 1e-7, 1e-7, 1.0, 8.0, problem)
    return Report("out", "olmoe", "trt", "float32", "eager", 0, (tensor,), reason=reason)


@pytest.mark.parametrize(
    ("report", "status", "first"),
    [
        (_report(), 0, "PASSED: olmoe, trt, float32, against eager."),
        (_report("it is [red]bad[/]"), 1, "FAILED: olmoe, trt, float32, against eager: 1 problem."),
        (_report(reason="no [GPU]"), 0, "SKIPPED: olmoe, trt, float32, against eager: no [GPU]."),
    ],
    ids=["passed", "failed", "skipped"],
)
def test_the_status_is_the_verdict(
    ingot: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    report: Report,
    status: int,
    first: str,
) -> None:
    monkeypatch.setattr("ingot.validate.run.examine", lambda *_arguments, **_options: report)
    result = _validate(ingot, checkpoint)
    assert result.exit_code == status
    assert result.stdout.splitlines()[0].startswith(first)
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED ")]
    # What looks like markup is printed as it is.
    assert failed == (["FAILED prefill, logits: it is [red]bad[/]"] if status == 1 else [])
    assert _validate(ingot, checkpoint, "--json").exit_code == status


def test_says_that_an_engine_did_not_run(
    ingot: Path,
    checkpoint: Path,
    make_ingot: MakeIngot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ingot.validate.run.has_gpu", lambda: False)
    graph = make_ingot(checkpoint, "trt", builder="none", precision="fp32")
    result = _quick(with_engine(graph, tmp_path / "ingot"), checkpoint)
    assert result.exit_code == 0
    assert re.match(r"SKIPPED: olmoe, trt, .*did not run, for want of a GPU", result.stdout)
    assert "FAILED" not in result.stdout and result.stderr.count("error") == 0
    # Without an engine the graph is all there is, and it was run.
    assert _quick(graph, checkpoint).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "plan", "seed"),
    [
        ([], STANDARD, 0),
        (["--quick"], QUICK, 0),
        (["--thorough", "--seed", "5"], THOROUGH, 5),
        (["--length", "300"], replace(STANDARD, length=300), 0),
    ],
    ids=["standard", "quick", "thorough", "length"],
)
def test_options_choose_the_plan(
    ingot: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    plan: Plan,
    seed: int,
) -> None:
    asked: dict[str, Any] = {}

    def examine(*_arguments: Any, **options: Any) -> Report:
        asked.update(options)
        return _report()

    monkeypatch.setattr("ingot.validate.run.examine", examine)
    assert _validate(ingot, checkpoint, *arguments).exit_code == 0
    assert (asked["plan"], asked["seed"]) == (plan, seed)


def test_prints_json_and_nothing_else(
    ingot: Path, swapped: Path, checkpoint: Path, tmp_path: Path
) -> None:
    # Another target is exported on the way, which has a table to show.
    good = _quick(ingot, checkpoint, "--json", "--seed", "3", "--against", "trt")
    report = _strict(good.stdout)
    assert (good.exit_code, report["verdict"], report["failures"]) == (0, "passed", [])
    decode = {t["stage"] for t in report["tensors"] if t["stage"].startswith("decode")}
    assert len({stage.partition(",")[0] for stage in decode}) == 8
    assert (report["seed"], report["schema_version"]) == (3, 1)
    assert "olmoe on TensorRT" in good.stderr
    other = "validate against the trt ingot of the same checkpoint"
    assert set(_stages(good)) >= {"capture graph again", other}

    bad = _quick(swapped, checkpoint, "--json")
    report = _strict(bad.stdout)
    assert (bad.exit_code, report["verdict"]) == (1, "failed")
    assert report["failures"] and report["location"]["operator"] == "MoeDispatch"
    assert "FAILED" not in bad.stderr


def _reported(result: Result, out: Path) -> None:
    """Four files, each of which says what the status does."""
    assert {path.name for path in out.iterdir()} == REPORTS
    status = result.exit_code
    assert _strict((out / "report.json").read_text())["verdict"] == ("passed", "failed")[status]
    suite = ElementTree.parse(out / "junit.xml").getroot()[0]
    assert (suite.get("failures") == "0") == (status == 0)
    for name in ("summary.md", "report.html"):
        text = (out / name).read_text()
        assert (("PASSED" in text), ("FAILED" in text)) == (status == 0, status == 1)


def test_writes_four_files_of_a_report(ingot: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = _quick(ingot, checkpoint, "--report", tmp_path / "new" / "out")
    _passed(result)
    _reported(result, tmp_path / "new" / "out")
    assert _stages(result)[-1] == f"the report was written to {tmp_path / 'new' / 'out'}"


def test_what_cannot_be_written_or_read_is_refused_before_any_work(
    ingot: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingot.validate.run.examine", _forbid)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "junit.xml").mkdir(parents=True)
    (tmp_path / "link").symlink_to(ingot)
    for option, path, said in (
        ("--report", tmp_path / "file" / "out", "file is a file"),
        ("--report", tmp_path / "folder", "junit.xml: it is a folder"),
        ("--report", ingot / "report", "lie in one another"),
        ("--report", tmp_path / "link" / "report", "lie in one another"),
        ("--report", checkpoint, "lie in one another"),
        ("--save-baseline", ingot / WEIGHTS, "lie in one another"),
        ("--save-baseline", tmp_path / "file" / "baseline.json", "file is a file"),
        ("--gate", tmp_path / "absent.json", "there is no baseline"),
        ("--gate", tmp_path / "file", "is damaged: it is not valid JSON"),
    ):
        _refused(_quick(ingot, checkpoint, option, path), said)


@pytest.mark.parametrize(
    ("absent", "left"), [("matplotlib", REPORTS), ("jinja2", REPORTS - {"report.html"})]
)
def test_a_missing_package_costs_what_it_draws(
    ingot: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    absent: str,
    left: set[str],
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == absent]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "ingot.validate.report.html", raising=False)
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.setattr("ingot.validate.run.examine", lambda *_arguments, **_options: _report())
    result = _validate(ingot, checkpoint, "--report", tmp_path / "report")
    assert result.exit_code == 0
    assert len(re.findall(rf"^note: .*{absent} cannot be imported", result.stderr, re.M)) == 1
    assert {path.name for path in (tmp_path / "report").iterdir()} == left
    if "report.html" in left:
        page = (tmp_path / "report" / "report.html").read_text()
        assert "The page has no plots" in page and "<svg" not in page and "PASSED" in page


@pytest.mark.parametrize("most", ["-1", "nan", "inf"])
def test_refuses_a_limit_that_no_divergence_is_held_to(
    ingot: Path, checkpoint: Path, most: str
) -> None:
    said = f"--max-kl is {float(most)}; it must be a number of nats of at least 0, such as 0.3"
    _refused(_validate(ingot, checkpoint, "--max-kl", most), said)


@pytest.mark.parametrize("length", ["0", "1", "-3", "513"])
def test_refuses_a_length_that_the_model_does_not_take(
    ingot: Path, checkpoint: Path, length: str
) -> None:
    said = f"--length is {length}; it must be 2 to 512, the longest that the model is meant for"
    _refused(_validate(ingot, checkpoint, "--length", length), said)


# --- baselines


@pytest.mark.slow
def test_gates_on_a_baseline(
    ingot: Path,
    swapped: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Other processors are measured in processes of their own, by a slow test.
    monkeypatch.setattr("ingot.validate.spread.elsewhere", lambda *_arguments: None)
    kept = tmp_path / "new" / "baseline.json"
    made = _quick(ingot, checkpoint, "--save-baseline", kept)
    _passed(made)
    assert _stages(made)[-1] == f"{kept} was written"
    good = _quick(ingot, checkpoint, "--gate", kept, "--json")
    assert (good.exit_code, _strict(good.stdout)["gate"]["worse"]) == (0, [])

    bad = _quick(swapped, checkpoint, "--gate", kept)
    _failed(bad)
    worse = re.findall(r"^WORSE (.*)$", bad.stdout, re.MULTILINE)
    assert worse[0].startswith("the validation itself failed: prefill, logits: ")
    assert re.match(r"logits at \d+ of \d+ calls, worst at .*: score ", worse[1])

    _refused(_quick(ingot, checkpoint, "--gate", kept, "--seed", "1"), "is of something else: seed")
    _refused(_validate(ingot, checkpoint, "--gate", kept), "it fed quick and this is standard")

    edited = tmp_path / "edited.json"
    edited.write_text(re.sub(r'"score": 1\.', '"score": 9.', kept.read_text()))
    _refused(_quick(ingot, checkpoint, "--gate", edited), "it was edited or cut")

    # As if this had been twice as good last time.
    report = validate(ingot, checkpoint, plan="quick")
    halved = (replace(each, error=each.error and each.error / 2) for each in report.tensors)
    save_baseline(replace(report, tensors=tuple(halved)), kept, Spread())
    worse_only = _quick(ingot, checkpoint, "--gate", kept)
    assert worse_only.exit_code == 1, worse_only.output
    assert re.match(rf"WORSE: .*: \d+ figures? (is|are) worse than in {kept}\.", worse_only.stdout)
    assert re.search(r"^WORSE logits at .*: score .*, was ", worse_only.stdout, re.MULTILINE)
    assert "FAILED" not in worse_only.stdout
    # Neither this run nor a report of it becomes what the next one is held against.
    before = kept.read_bytes()
    out = tmp_path / "report"
    options: list[str | Path] = ["--json", "--report", out, "--save-baseline", kept]
    as_json = _quick(ingot, checkpoint, "--gate", kept, *options)
    assert (as_json.exit_code, kept.read_bytes()) == (1, before)
    worse = re.findall(r"^WORSE (prefill, logits: score .*)$", as_json.stderr, re.MULTILINE)
    assert len(worse) == 1
    data = _strict(as_json.stdout)
    assert data == _strict((out / "report.json").read_text())
    assert (data["verdict"], data["failures"]) == ("failed", [])
    assert data["gate"]["baseline"] == str(kept) and data["gate"]["worse"][0] == worse[0]
    suite = ElementTree.parse(out / "junit.xml").getroot()[0]
    assert suite.get("failures") == str(len(data["gate"]["worse"]))
    for name in ("summary.md", "report.html"):
        text = (out / name).read_text()
        assert "WORSE: olmoe" in text and re.search("WORSE logits at .*: score", text), name
        assert "PASSED" not in text


def test_what_failed_becomes_no_baseline(swapped: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    kept = tmp_path / "baseline.json"
    result = _quick(swapped, checkpoint, "--save-baseline", kept, "--report", out)
    _failed(result)
    assert f"{kept} was not written: what failed is no baseline" in result.stderr
    assert not kept.exists()
    _reported(result, out)


# --- perplexity


def _perplexity(result: Result) -> tuple[float, ...]:
    """Of the ingot and of the truth, their ratio, and its interval."""
    figure = r"([\d.]+)"
    (found,) = re.findall(
        rf"^Perplexity: {figure}, of the truth {figure}, ratio {figure} "
        rf"\(95 % interval {figure} to {figure}\)$",
        result.stdout,
        re.MULTILINE,
    )
    return tuple(map(float, found))


def test_measures_perplexity_over_tokens_and_over_text(
    ingot: Path, checkpoint: Path, tmp_path: Path
) -> None:
    ids = np.random.default_rng(0).integers(0, 512, WORDS)
    np.save(tmp_path / "ids.npy", ids)
    # The saved tokenizer cuts a text after five words, and line ends are spaces to it.
    (tmp_path / "text").write_text("\n".join(f"w{number}" for number in ids))
    by_tokens = _quick(ingot, checkpoint, "--tokens", tmp_path / "ids.npy")
    _passed(by_tokens)
    target, truth, ratio, low, high = _perplexity(by_tokens)
    # A random model knows nothing of random tokens.
    assert target == truth > 256
    assert low <= ratio <= high and abs(ratio - 1) < 1e-4
    assert {"perplexity of the truth", "perplexity of the target"} <= set(_stages(by_tokens))
    by_text = _quick(ingot, checkpoint, "--text", tmp_path / "text")
    _passed(by_text)
    assert _perplexity(by_text) == _perplexity(by_tokens)
    np.save(tmp_path / "five.npy", ids[:5])
    assert _perplexity(_quick(ingot, checkpoint, "--tokens", tmp_path / "five.npy"))[0] != target
    assert "Perplexity" not in _quick(ingot, checkpoint).stdout


BAD_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no file": ("--tokens", lambda path: None, "give a .npy file of token ids"),
    "no .npy": ("--tokens", lambda path: path.write_text("1 2 3"), "is no whole .npy file"),
    "floats": ("--tokens", lambda path: _save(path, [1.0, 2.0]), "holds float64 of shape [2]"),
    "rows": ("--tokens", lambda path: _save(path, [[1, 2]]), "of shape [1, 2]"),
    "beyond": ("--tokens", lambda path: _save(path, [1, 512]), "token id 512, outside of the"),
    "one": ("--tokens", lambda path: _save(path, [1]), "a sequence of 1 token ids"),
    "no text": ("--text", lambda path: None, "give a text file"),
    "Latin-1": ("--text", lambda path: path.write_bytes(b"w1 \xe4"), "is not UTF-8 text"),
    "one word": ("--text", lambda path: path.write_text("w1"), "a sequence of 1 token ids"),
}


def _save(path: Path, values: list[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, np.array(values))


@pytest.mark.parametrize("bad", BAD_FILES)
def test_refuses_a_file_that_is_no_text(
    ingot: Path, checkpoint: Path, tmp_path: Path, bad: str
) -> None:
    option, make, named = BAD_FILES[bad]
    make(tmp_path / "file")
    _refused(_quick(ingot, checkpoint, option, tmp_path / "file"), named)


def test_refuses_text_without_a_tokenizer_that_belongs_to_the_model(
    ingot: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("w1 w600 w2")
    other = copied(ingot, tmp_path / "ingot")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w600"] = 600
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    named = f"token id 600 of {tmp_path / 'text'}, outside of the vocabulary of 512"
    _refused(_quick(other, checkpoint, "--text", tmp_path / "text"), named)
    (other / "tokenizer.json").write_text("{")
    _refused(_quick(other, checkpoint, "--text", tmp_path / "text"), "is no tokenizer")
    (other / "tokenizer.json").unlink()
    _refused(_quick(other, checkpoint, "--text", tmp_path / "text"), "--tokens FILE.npy")


def test_refuses_two_texts(ingot: Path, checkpoint: Path, tmp_path: Path) -> None:
    texts: list[str | Path] = ["--tokens", tmp_path / "ids.npy", "--text", tmp_path / "text"]
    _refused(_quick(ingot, checkpoint, *texts), "--tokens and --text were both given")


@pytest.mark.parametrize(
    ("family", "task"),
    [("jetmoe", "classify"), pytest.param("olmoe", "features", marks=pytest.mark.slow)],
)
def test_refuses_a_text_for_what_predicts_none(
    make_ingot: MakeIngot, tmp_path: Path, family: str, task: str
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    found = find_family(family)
    config = {**preset_config(found, "tiny"), "num_hidden_layers": 1}
    write_checkpoint(folder, found, config, task="generate" if task == "features" else task)
    out = make_ingot(folder, "onnx", task=task)
    _save(tmp_path / "ids.npy", [1, 2, 3])
    _refused(_quick(out, folder, "--tokens", tmp_path / "ids.npy"), "predicts no tokens")
    # Without one there is nothing against it.
    result = _quick(out, folder, "--json")
    assert result.exit_code == 0, result.output
    assert _strict(result.stdout)["distribution"] is None


# --- what cannot be compared


def test_answers_a_validation_that_cannot_run_with_one_line(
    ingot: Path, checkpoint: Path, tmp_path: Path
) -> None:
    _refused(_validate(checkpoint, checkpoint), "is not an ingot")
    _refused(_validate(ingot, tmp_path), "has no config.json")
    _refused(_validate(ingot, tmp_path / "absent"), "is not a folder")


def _files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_refuses_another_checkpoint_and_writes_nothing(
    ingot: Path,
    checkpoint: Path,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INGOT_CACHE", str(tmp_path / "cache"))
    other = make_checkpoint(rms_norm_eps=1e-6)
    before = _files(ingot)
    report, baseline = tmp_path / "report", tmp_path / "baseline.json"
    result = _quick(ingot, other, "--report", report, "--save-baseline", baseline)
    _refused(result, f"{ingot} was made from another checkpoint than {other}")
    assert (Manifest.read(ingot).source["sha256"])[:12] in result.stderr
    assert list(tmp_path.iterdir()) == [] and _files(ingot) == before


@pytest.mark.slow
def test_says_how_bfloat16_is_compared(
    checkpoint: Path, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    other = make_ingot(checkpoint, "trt", precision="bf16", builder="none")
    result = _quick(other, checkpoint, "--report", tmp_path / "report")
    # As an export says it: status and words.
    assert result.exit_code == 0
    said = "this ingot is bfloat16, an engine needs a GPU, and ONNX Runtime's CPU provider"
    against = "eager PyTorch in float64, beside eager PyTorch in float32"
    assert re.match(rf"SKIPPED: olmoe, trt, bfloat16, against {against}, .*: {said}", result.stdout)
    assert re.search("^Not asked: whatever is computed in bfloat16$", result.stdout, re.MULTILINE)
    assert "its graph was compared in float32 over its own weights" in result.stdout
    data = _strict((tmp_path / "report" / "report.json").read_text())
    assert (data["verdict"], data["failures"]) == ("skipped", [])
    assert {tensor["stage"].partition(", ")[2] for tensor in data["tensors"]} == {"in float32"}
    assert max(tensor["score"] for tensor in data["tensors"]) < 4
    suite = ElementTree.parse(tmp_path / "report" / "junit.xml").getroot()[0]
    assert (suite.get("failures"), suite.get("skipped")) == ("0", suite.get("tests"))
    assert "SKIPPED" in (tmp_path / "report" / "summary.md").read_text()
    # It says nothing of the ingot, so it is no baseline and meets none; and damage is damage.
    baseline = tmp_path / "baseline.json"
    _refused(_quick(other, checkpoint, "--save-baseline", baseline), "there is nothing to gate")
    (other / GRAPH).write_bytes(b"")
    _refused(_quick(other, checkpoint), f"{GRAPH} is not the file that was validated")


# --- another ingot


@pytest.mark.parametrize("target", ["onnx", "ort", "trt", "trt-rtx"])
def test_compares_with_another_target(ingot: Path, checkpoint: Path, target: str) -> None:
    result = _quick(ingot, checkpoint, "--against", target)
    _passed(result, f"the {target} ingot of the same checkpoint, in what eager PyTorch's own")
    assert f"run the {target} ingot of the same checkpoint" in _stages(result)


def test_compares_with_another_folder(ingot: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = copied(ingot, tmp_path / "other")
    before = _files(other)
    _passed(_quick(ingot, checkpoint, "--against", other), f"the ingot {other}, in what")
    assert _files(other) == before


def test_fails_a_damaged_ingot_against_a_right_one(
    ingot: Path, swapped: Path, checkpoint: Path
) -> None:
    _failed(_quick(swapped, checkpoint, "--against", ingot))
    # Neither knows which of the two is right.
    other = _quick(ingot, checkpoint, "--against", swapped)
    _failed(other)
    assert "It begins at:" not in other.stdout, "nothing is wrong with the ingot itself"


def of_features(ingot: Path, out: Path) -> Path:
    """A copy that says it is of another task, of which all logits are asked for."""
    raw = json.loads((ingot / "ingot.json").read_text())
    inputs = [each for each in raw["inputs"] if each["name"] != "logits_to_keep"]
    main, *others = raw["outputs"]
    main["shape"][1] = "sequence"
    return copied(ingot, out, task="features", inputs=inputs, outputs=[main, *others])


ANOTHER = {"checkpoint": "x", "revision": None, "sha256": "0" * 64}
OTHERS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "nothing": (lambda ingot, out: out, "is not an ingot"),
    "a name": (lambda ingot, out: Path("tensorrt"), "'tensorrt' is not an ingot"),
    "a precision": (
        lambda ingot, out: copied(ingot, out, precision="float16"),
        "is generate float16 and this ingot generate float32",
    ),
    "a task": (
        lambda ingot, out: of_features(ingot, out),
        "is features float32 and this ingot generate float32",
    ),
    "a checkpoint": (
        lambda ingot, out: copied(ingot, out, source=ANOTHER),
        "was not made from ",
    ),
    "damage": (
        lambda ingot, out: with_weight(ingot, out, NORM, one_percent, known=False),
        f"{WEIGHTS} is not the file that was validated",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_refuses_another_ingot_that_cannot_be_held_against_it(
    ingot: Path, checkpoint: Path, tmp_path: Path, other: str
) -> None:
    make, named = OTHERS[other]
    _refused(_quick(ingot, checkpoint, "--against", make(ingot, tmp_path / "other")), named)


def test_removes_the_ingot_it_compared_with(
    ingot: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[bool] = []

    def look(name: str) -> Callable[..., Any]:
        def fail(*_arguments: Any, **_options: Any) -> NoReturn:
            (folder,) = tmp_path.glob("ingot-against-*")
            seen.append((folder / "onnx" / GRAPH).is_file())
            raise IngotError(f"{name} failed.")

        return fail

    _passed(_quick(ingot, checkpoint, "--against", "onnx"), "the onnx ingot")
    assert list(tmp_path.iterdir()) == []
    # Before the ingot is whole, and after.
    for name in ("ingot.export.build.file_infos", "ingot.validate.run.examine"):
        with monkeypatch.context() as patch:
            patch.setattr(name, look(name))
            _refused(_quick(ingot, checkpoint, "--against", "onnx"), f"{name} failed")
        assert list(tmp_path.iterdir()) == []
    assert seen == [False, True]


# --- the cache


def _forbid(*_arguments: Any, **_options: Any) -> NoReturn:
    raise AssertionError("eager PyTorch was run")


def test_keeps_what_eager_computes(
    ingot: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("INGOT_CACHE", str(cache))
    first = _quick(ingot, checkpoint, "--json")
    assert [stage for stage in _stages(first) if "eager float" in stage] == EAGER_STAGES
    # The truth of each run, and eager in the ingot's precision.
    assert len(list(cache.glob("*.safetensors"))) >= 2
    with monkeypatch.context() as patch:
        patch.setattr("ingot.validate.truth.reference.EagerSession", _forbid)
        patch.setattr("ingot.validate.truth.reference.Layerwise", _forbid)
        again = _quick(ingot, checkpoint, "--json")
    assert _stages(again) == [stage for stage in _stages(first) if stage not in EAGER_STAGES]
    one, other = _strict(first.stdout), _strict(again.stdout)
    assert one.pop("date") <= other.pop("date")
    assert one.pop("seconds") > 0 < other.pop("seconds")
    assert one == other
    # Other tokens are another truth.
    assert "run eager float64" in _stages(_quick(ingot, checkpoint, "--seed", "1"))


def test_keeps_nothing_where_it_is_off(
    ingot: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INGOT_CACHE", "off")
    for _ in range(2):
        result = _quick(ingot, checkpoint)
        assert [stage for stage in _stages(result) if "eager float" in stage] == EAGER_STAGES
    assert list(tmp_path.iterdir()) == []


def test_these_tests_use_a_cache_of_their_own() -> None:
    assert Path(os.environ["INGOT_CACHE"]).name.startswith("ingot-tests-cache-")
    code = "from ingot.validate.truth.cache import default_cache as cache; print(cache().folder)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == os.environ["INGOT_CACHE"]
