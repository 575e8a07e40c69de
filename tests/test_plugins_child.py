"""A child answers, or its parent hears in some words why it does not."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ingot.plugins.child import ChildError, ask


def worker(folder: Path, body: str) -> Path:
    path = folder / "some_worker.py"
    path.write_text(f"import os, sys, time\ndef answer(request):\n    {body}\n")
    return path


def answer(folder: Path, body: str, request: Any = None, **limits: int) -> Any:
    return ask(worker(folder, body), request, **{"seconds": 5, "megabytes": 256, **limits})


@pytest.mark.parametrize(
    "value", [None, [1, 2.5, True], {"a": "\u6f22\ud800\x00"}, "x" * 3_000_000]
)
def test_answers(tmp_path: Path, value: Any) -> None:
    assert answer(tmp_path, "return request", value) == value


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('why. not.')", r"why\. not"),
        ("raise KeyError()", "KeyError"),
        ("raise ValueError('a\\n\\x1b[2J' * 9999)", r"a \[2Ja \[2J.* \[\.\.\.\]"),
        ("raise SystemExit('gone')", "gone"),
        ("return {1}", "status 1"),
        ("return 'x' * (300 << 20)", "takes more than 256 MB of memory"),
        ("os.abort()", r"ends its process \(status -6\)"),
        ("os._exit(3)", r"ends its process \(status 3\)"),
        ("os.write(os.open(request, os.O_CREAT | os.O_WRONLY), b'x')", "File too large|status -25"),
    ],
)
def test_says_why_there_is_no_answer(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(ChildError, match=f"^.*({said}).*$") as error:
        answer(tmp_path, body, str(tmp_path / "written"))
    assert len(str(error.value)) < 300


def test_takes_no_longer_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChildError, match="takes more than 1 seconds"):
        answer(tmp_path, "\n    while True: pass", seconds=1)
    # One that waits takes no processor time.
    monkeypatch.setattr("ingot.plugins.child.WALL_SECONDS", 1)
    with pytest.raises(ChildError, match="takes more than 1 seconds"):
        answer(tmp_path, "time.sleep(60)", seconds=0)


def test_inherits_nothing_but_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_SECRET", "s3cret")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    # As Triton's Python backend, whose own program is no interpreter.
    monkeypatch.setattr(sys, "executable", "/opt/tritonserver/triton_python_backend_stub")
    monkeypatch.setenv("PATH", f"{Path(os.__file__).parents[2] / 'bin'}:{os.environ['PATH']}")
    environment, path = answer(tmp_path, "return [dict(os.environ), sys.path]")
    assert "INGOT_SECRET" not in environment and environment["TZ"] == "Asia/Tokyo"
    # A file beside the worker or the child is no module of its imports.
    assert str(tmp_path) not in path
    assert str(Path(ask.__code__.co_filename).parent) not in path


def test_refuses_a_request_that_is_no_json(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for request in ({1}, deep, 10**5000):
        with pytest.raises((TypeError, ValueError, RecursionError)):
            answer(tmp_path, "return 1", request)
