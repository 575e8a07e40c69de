"""Opening an ingot: the function that a program begins with stays what it is."""

from __future__ import annotations

import importlib
import math
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import pytest

import ingot.runtime
from ingot.export.ingot import GRAPH, Manifest, ManifestError
from ingot.runtime.loading import load
from ingot.runtime.session import SessionError


def test_no_module_of_the_runtime_hides_it() -> None:
    # A submodule, once imported, is an attribute of its package.
    for module in pkgutil.iter_modules(ingot.runtime.__path__, "ingot.runtime."):
        if module.name.rpartition(".")[2] != "triton_model":
            importlib.import_module(module.name)
    assert ingot.runtime.load is load


@pytest.mark.parametrize("threads", [1.0, "2", None, True, math.nan, 10**5000, [1]], ids=type)
def test_refuses_a_number_of_threads_that_is_none(tiny_ort: Path, threads: Any) -> None:
    with pytest.raises(SessionError, match=r"threads is .*; it must be 0 to 1024"):
        load(tiny_ort, threads=threads)


def test_runs_no_graph_but_the_one_it_hashed(
    tiny_ort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_ort, tmp_path / "ingot")
    check = Manifest.check_files

    def check_and_change(self: Manifest, folder: Path, **options: Any) -> None:
        check(self, folder, **options)
        graph = (folder / GRAPH).read_bytes()
        assert b"Gather" in graph
        (folder / GRAPH).write_bytes(graph.replace(b"Gather", b"Concat"))

    monkeypatch.setattr(Manifest, "check_files", check_and_change)
    with pytest.raises(ManifestError, match=r"model.onnx was changed while the ingot was opened"):
        load(folder)
    monkeypatch.undo()
    with pytest.raises(ManifestError, match="is not the file that was validated"):
        load(folder)
