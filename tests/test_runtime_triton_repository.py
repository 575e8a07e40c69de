"""A repository as a folder: whole or not at all, and with all the code that it needs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_imports import imported
from triton_ingots import parsed

from ingot.export.ingot import LIBRARY, MANIFEST, Manifest, file_infos
from ingot.plugins.errors import IngotError
from ingot.runtime import operators, triton_repository
from ingot.runtime.triton_lint import lint
from ingot.runtime.triton_plan import Settings, TritonError
from ingot.runtime.triton_repository import CARRIED, CARRIED_FOR_ENGINES, write_repository

ROOT = Path(__file__).resolve().parent.parent

# Minutes of exports; `make test-slow` runs them, and so does CI.
pytestmark = pytest.mark.slow


def test_keeps_one_copy_of_the_ingot_and_opens_it_from_both_models(repository: Path) -> None:
    assert len(list(repository.rglob("weights.safetensors"))) == 1
    settings = parsed(repository / "m_generate" / "config.pbtxt").parameters
    place = repository / "m_generate" / settings["ingot"].string_value
    assert Manifest.read(place).verdict == "skipped"
    assert place.resolve() == (repository / "m" / "1").resolve()


def test_replaces_only_a_repository_and_only_when_told(tiny_ort: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    write_repository(tiny_ort, out, Settings(name="first"))
    with pytest.raises(TritonError, match="exists; give --overwrite"):
        write_repository(tiny_ort, out, Settings(name="second"))
    assert (out / "first").is_dir()
    write_repository(tiny_ort, out, Settings(name="second"), overwrite=True)
    assert (out / "second").is_dir() and not (out / "first").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("keep")
    with pytest.raises(TritonError, match="was not made by ingot triton"):
        write_repository(tiny_ort, tmp_path / "mine", Settings(), overwrite=True)
    assert (tmp_path / "mine" / "note").read_text() == "keep"


def test_never_replaces_what_holds_the_ingot(tiny_ort: Path, tmp_path: Path) -> None:
    repository = tmp_path / "r"
    write_repository(tiny_ort, repository, Settings(name="m"))
    for out in (repository, repository / "m", repository / "m" / "1" / "inside"):
        with pytest.raises(TritonError, match="lie in one another"):
            write_repository(repository / "m" / "1", out, Settings(), overwrite=True)
    assert lint(repository) == []


def test_leaves_the_old_repository_where_a_new_one_fails(
    tiny_ort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r"
    write_repository(tiny_ort, out, Settings(name="first"))

    def broken(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(triton_repository, "write_record", broken)
    with pytest.raises(OSError, match="no space"):
        write_repository(tiny_ort, out, Settings(name="second"), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    assert lint(out) == []


ISOLATED = """
import importlib.util, json, sys, types

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "click", "rich", "jinja2", "safetensors"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Absent())
fake = sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
fake.Logger = types.SimpleNamespace(log_info=print)
spec = importlib.util.spec_from_file_location("model", sys.argv[1] + "/1/model.py")
model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)
made = model.TritonPythonModel()
made.initialize({
    "model_config": sys.argv[2], "model_repository": sys.argv[1], "model_name": "m_generate"
})
made.finalize()
print(json.dumps([
    m.__file__ for name, m in sys.modules.items()
    if name.partition(".")[0] == "ingot"
]))
"""


def opened_by_itself(home: Path) -> set[Path]:
    """The files of ours that a Python model has imported when it is ready, with nothing else."""
    config = parsed(home / "config.pbtxt")
    parameters = {k: {"string_value": v.string_value} for k, v in config.parameters.items()}
    text = json.dumps({"parameters": parameters})
    command = [sys.executable, "-I", "-c", ISOLATED, str(home), text]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return {Path(file) for file in json.loads(done.stdout.splitlines()[-1])}


def test_carries_all_the_code_it_needs(copied: Path) -> None:
    home = copied / "m_generate"
    assert opened_by_itself(home) == {home / "1" / file for file in CARRIED}


def test_serves_the_library_of_whoever_makes_it(
    own_kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the ingot is its maker's, and is the same or nothing is written."""
    out = tmp_path / "r"
    write_repository(own_kernels, out, Settings(name="m"))
    written = out / "m_generate" / "ingot" / LIBRARY
    assert written.read_bytes() == (own_kernels / LIBRARY).read_bytes()
    assert list(out.rglob(LIBRARY)) == [written]
    config = parsed(out / "m_generate" / "config.pbtxt").parameters
    assert (out / "m_generate" / config["operators"].string_value) == written
    assert LIBRARY in (out / "README.md").read_text()
    # Here there is none, or another one.
    monkeypatch.setattr(operators, "INSTALLED", tmp_path / "none.so")
    for content in (None, b"another"):
        if content is not None:
            (tmp_path / "none.so").write_bytes(content)
        with pytest.raises(
            IngotError, match=r"give --operators .*, install .*, or export it again"
        ):
            write_repository(own_kernels, tmp_path / "s", Settings(name="m"))
    named = own_kernels / LIBRARY
    write_repository(own_kernels, tmp_path / "s", Settings(name="m"), operators=named)
    assert lint(tmp_path / "s") == []


def test_opens_ingots_own_kernels_with_what_it_carries(own_kernels: Path, tmp_path: Path) -> None:
    write_repository(own_kernels, tmp_path / "r", Settings(name="m", streams=2, threads=1))
    assert opened_by_itself(tmp_path / "r" / "m_generate") == {
        tmp_path / "r" / "m_generate" / "1" / file for file in CARRIED
    }


def test_an_engines_code_needs_no_pytorch(tmp_path: Path) -> None:
    for file in CARRIED + CARRIED_FOR_ENGINES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, tmp_path / file)
    code = ISOLATED.partition("fake = ")[0] + (
        "sys.path.insert(0, sys.argv[1])\n"
        "import ingot.runtime.trt, ingot.plugins.tensorrt.python_plugins\n"
        "assert ingot.__file__.startswith(sys.argv[1])\n"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


# In the eager definition of an operator alone, which needs PyTorch.
NOT_REACHED = "ingot.plugins.experts"


def test_carries_everything_that_an_engines_session_imports() -> None:
    carried = set(CARRIED + CARRIED_FOR_ENGINES)
    # A package file imports what it gives when that is first used, and nothing here uses it.
    for file in (file for file in carried if not file.endswith("__init__.py")):
        for name in imported((ROOT / file).read_text(encoding="utf-8")):
            parts = name.split(".")
            if parts[0] != "ingot" or name.startswith(NOT_REACHED):
                continue
            # The longest part of the dotted name that is a module.
            modules = ["/".join(parts[: n + 1]) for n in range(len(parts))]
            known = [m for m in modules if (ROOT / f"{m}.py").is_file()]
            known += [f"{m}/__init__" for m in modules if (ROOT / m / "__init__.py").is_file()]
            assert {f"{module}.py" for module in known} <= carried, f"{file} imports {name}"


def test_writes_the_same_repository_twice(repository: Path, tiny_ort: Path, tmp_path: Path) -> None:
    write_repository(tiny_ort, tmp_path / "r", Settings(name="m", streams=2, threads=1))
    assert file_infos(tmp_path / "r", {}) == file_infos(repository, {})
    assert (tmp_path / "r" / "m" / "1" / MANIFEST).read_bytes() == (
        tiny_ort / MANIFEST
    ).read_bytes()
