"""The wheel: what it holds, and that its commands work where nothing else of Ingot is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("export", "graphs", "plugins", "runtime", "validate")


def _run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, run without the caller's Python path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that nothing is written into the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skipped = shutil.ignore_patterns(".*", "__pycache__", "out", "dist", "build")
    shutil.copytree(ROOT, source, ignore=skipped, symlinks=True)
    arguments = ["--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    _run(sys.executable, "-m", "build", *arguments, cwd=folder)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a new environment that holds the wheel, click and rich, and nothing heavier."""
    folder = tmp_path_factory.mktemp("installed")
    _run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    install: list[str | Path] = [python, "-m", "pip", "install", "--quiet"]
    _run(*install, "--no-deps", wheel, cwd=folder)
    _run(*install, "click", "rich", cwd=folder)
    return folder / "venv" / "bin"


def test_packs_exactly_one_package_and_every_source_of_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.partition("/")[0] for name in names}
    metadata = {folder for folder in folders if folder.endswith(".dist-info")}
    assert folders - metadata == {"ingot"}
    assert len(metadata) == 1
    sources = {
        f"ingot/{file.relative_to(ROOT).as_posix()}"
        for part in PARTS
        for file in (ROOT / part).rglob("*.py")
    }
    assert sources <= set(names)
    assert not [name for name in names if name.endswith((".pyc", ".pyo"))]


def test_declares_both_commands(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry,) = (n for n in archive.namelist() if n.endswith("dist-info/entry_points.txt"))
    text = archive.read(entry).decode()
    assert "export = ingot.export.cli:export_command" in text
    assert "ingot = ingot.export.cli:main" in text


def test_answers_from_an_environment_of_its_own(installed: Path, tmp_path: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version in _run(installed / "ingot", "--version", cwd=tmp_path)
    assert "--target" in _run(installed / "export", "--help", cwd=tmp_path)
    assert "--target" in _run(installed / "ingot", "export", "--help", cwd=tmp_path)
    assert "--checkpoint" in _run(installed / "ingot", "validate", "--help", cwd=tmp_path)


def test_imports_its_own_files_and_not_the_repository(installed: Path, tmp_path: Path) -> None:
    code = "import ingot.export.cli; print(ingot.export.cli.__file__)"
    found = Path(_run(installed / "python", "-c", code, cwd=tmp_path).strip())
    assert installed.parent in found.parents


def test_lists_its_commands_without_the_heavy_packages(installed: Path, tmp_path: Path) -> None:
    text = _run(installed / "ingot", "--help", cwd=tmp_path)
    for command in ("export", "generate", "validate"):
        assert command in text
