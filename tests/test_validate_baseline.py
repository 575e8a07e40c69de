"""The baseline file: what it keeps, and that a damaged or edited one is refused in a sentence."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_validate_gate import SPREAD
from test_validate_report import covered_report, failing_report, make_report, with_tensor

from ingot.validate.baseline import GateError, Spread, read_baseline, save_baseline
from ingot.validate.result import Report


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A baseline of the passing report."""
    result = tmp_path / "new" / "baseline.json"
    save_baseline(make_report(), result, SPREAD)
    return result


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (failing_report(), "a report that failed is no baseline: prefill"),
        (make_report(tensors=()), "nothing was compared"),
        (with_tensor(make_report(), 0, error=math.nan), "prefill, logits: an error of nan"),
    ],
)
def test_not_every_report_is_a_baseline(tmp_path: Path, found: Report, said: str) -> None:
    with pytest.raises(GateError, match=said):
        save_baseline(found, tmp_path / "baseline.json", SPREAD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spread", [-0.1, 3.1, math.nan, math.inf])
def test_a_spread_is_a_number(tmp_path: Path, spread: float) -> None:
    with pytest.raises(GateError, match="two validations of this ingot differ by"):
        save_baseline(make_report(), tmp_path / "baseline.json", Spread({"logits": spread}))


def test_no_baseline_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"^there is no baseline [^\n]*\.$"):
        read_baseline(tmp_path / "none.json")
    with pytest.raises(GateError, match=r"^cannot read the baseline [^\n]*: Is a directory\.$"):
        read_baseline(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null", b"{}"]
)
def test_a_file_that_is_no_baseline_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "baseline.json"
    path.write_bytes(content)
    with pytest.raises(GateError, match=r"^the baseline [^\n]* is damaged: [^\n]*\.$"):
        read_baseline(path)


def drop(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for name in names[:-1]:
            data = data[name]
        del data[names[-1]]

    return change


def put(value: Any, *names: str | int) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for name in names[:-1]:
            data = data[name]
        data[names[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *[
            (drop(name), f"lacks '{name}'")
            for name in ("tensors", "spread", "routing", "identity", "covered", "sha256")
        ],
        (drop("environment"), "lacks 'environment'"),
        (drop("distribution"), "lacks 'distribution'"),
        (drop("distribution", "kl_p99"), "lacks 'kl_p99'"),
        (drop("identity", "seed"), "lacks 'seed'"),
        (drop("tensors", "prefill", "logits", "score"), "lacks 'score'"),
        (put({}, "tensors"), "it holds no tensors"),
        (put({"prefill": {}}, "tensors"), "it holds no tensors"),
        (put([], "tensors"), "'tensors' is not an object"),
        (put([], "tensors", "prefill"), "'prefill' is not an object"),
        (put(1, "tensors", "prefill", "logits"), "'prefill, logits' is not an object"),
        (put("1", "tensors", "prefill", "logits", "score"), "'1' of 'prefill, logits' is not a"),
        (put(True, "tensors", "prefill", "logits", "error"), "True of 'prefill, logits'"),
        (put(math.nan, "tensors", "prefill", "logits", "error"), "nan of 'prefill, logits' is out"),
        (put(math.inf, "spread", "run", "kl"), "inf of 'kl' is out of range"),
        (put(-1.0, "spread", "run", "kl"), "-1.0 of 'kl' is out of range"),
        # Values that no validation gives, whatever digest is put beside them.
        (put(3.5, "spread", "run", "kl"), "3.5 of 'kl' is out of range"),
        (put(1000.0, "spread", "tensor", "key"), "1000.0 of 'key' is out of range"),
        (put(65.0, "tensors", "prefill", "logits", "score"), "65.0 of 'prefill, logits' is out"),
        (put(-1.0, "tensors", "prefill", "logits", "error"), "-1.0 of 'prefill, logits' is out"),
        (put(1.5, "routing", "free", 0), "1.5 of 'free' is out of range"),
        (put(1.5, "distribution", "top1"), "1.5 of 'top1' is out of range"),
        (put(-1, "covered", "counts", "calls"), "-1 of 'calls' is out of range"),
        (put("all", "covered", "parts"), "'parts' is not a list of texts"),
        (put(1.0, "routing", "free"), "'routing' is not a list for each mode"),
        (put([None], "routing", "free"), "None of 'free' is not a number"),
        (put(10**400, "spread", "run", "kl"), "000 of 'kl' is out of range"),
        (put("x" * 10**6, "spread", "run", "kl"), "x' of 'kl' is not a number"),
        (put([1] * 10**5, "tensors", "y" * 10**5), "y' is not an object"),
    ],
)
def test_a_damaged_baseline_is_one_sentence(
    path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(GateError, match=r"^the baseline [^\n]* is damaged: [^\n]*\.$") as found:
        read_baseline(path)
    assert said in str(found.value) and len(str(found.value)) < 600


def test_a_write_that_breaks_off_leaves_the_old_baseline(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def breaks(_self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", breaks)
    with pytest.raises(Exception, match="No space left on device"):
        save_baseline(make_report(seconds=1.0), path, Spread())
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["baseline.json"]


@pytest.mark.parametrize(
    "change",
    [
        put(8.0, "tensors", "prefill", "logits", "score"),
        put(1e-3, "tensors", "decode 3", "present.0.key", "error"),
        put(0.5, "spread", "run", "key"),
        put("9.9", "environment", "torch"),
        drop("tensors", "decode 8"),
        drop("tensors", "prefill", "present.1.key"),
        drop("routing", "free"),
        put(["all of it"], "covered", "parts"),
    ],
)
def test_an_edited_baseline_is_refused(
    path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(GateError, match=r"digest is of another content, so it was edited or cut"):
        read_baseline(path)


def test_the_digest_does_not_depend_on_how_the_file_is_laid_out(path: Path) -> None:
    before = read_baseline(path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(data.items()))))
    assert read_baseline(path) == before


def test_keeps_what_was_covered(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    save_baseline(covered_report(), path, SPREAD)
    found = read_baseline(path).covered
    assert found.counts == {"calls": 45, "positions": 51, "ids": 94, "chunks": 3}
    assert found.sets["paddings"] == ("left", "right")
    assert found.parts == ("decode of one sequence",)
    assert found.experts == {"layer 0": 4}
    assert found.checks == {"weights": 29}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GateError, match="it is no file"):
        read_baseline(tmp_path / "pipe")
