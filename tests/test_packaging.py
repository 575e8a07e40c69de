"""What is installed: one import name, and commands that work beside other packages' names."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import ingot

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("export", "graphs", "plugins", "runtime", "validate")
# Files of the parts that only tests and benchmarks use.
LEFT_OUT = {
    f"ingot/plugins/kernels/{name}" for name in ("fake_driver.cpp", "interpret.py", "record.py")
} | {
    f"ingot/{file.relative_to(ROOT).as_posix()}"
    for folder in ("fuzz", "tests")
    for file in (ROOT / "runtime" / "embed" / folder).rglob("*")
    if file.is_file()
}
LEFT_OUT |= {
    f"ingot/plugins/cpu/{name}" for name in ("check/check.cpp", "fetch_debian.sh", "need.sh")
}
KERNELS, CANDIDATES = "lib/libingot_kernels.so", "lib/tune/libingot_kernels.so"
# All that a command needs to answer `--help`.
LIGHT = ("click", "rich", "pygments", "markdown_it", "mdurl")


def _run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, run without the caller's Python path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, with stand-ins for compiled kernels; read only."""
    folder = tmp_path_factory.mktemp("checkout") / "ingot"
    skipped = shutil.ignore_patterns(
        ".git", ".venv", ".tools", ".*_cache", "__pycache__", "out", "build", "lib"
    )
    shutil.copytree(ROOT, folder, ignore=skipped, symlinks=True)
    for library in (KERNELS, CANDIDATES):
        (folder / "plugins" / library).parent.mkdir(parents=True, exist_ok=True)
        (folder / "plugins" / library).touch()
    return folder


def _build(kind: str, checkout: Path, out: Path) -> Path:
    """The ``wheel`` or ``sdist`` of a checkout."""
    _run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", out, cwd=checkout)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


def _environment(folder: Path, packages: Path, *wheels: Path) -> Path:
    """``bin`` of a new environment that finds what lies in ``packages`` and holds the wheels."""
    _run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    place = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    # The folder itself: what its own .pth files name, such as this repository, is not found.
    (place / "packages.pth").write_text(f"{packages}\n")
    for each in wheels:
        _install(folder / "venv" / "bin", each)
    return folder / "venv" / "bin"


def _install(environment: Path, *what: str | Path) -> None:
    pip = ("-m", "pip", "--python", environment / "python", "install", "--quiet", "--no-index")
    _run(sys.executable, *pip, "--no-deps", "--no-build-isolation", *what, cwd=environment)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a new environment that holds the wheel, click and rich, and nothing heavier."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "packages").mkdir()
    for name in LIGHT:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        (folder / "packages" / name).symlink_to(Path(spec.origin).parent)
    return _environment(folder, folder / "packages", wheel)


def _files(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_packs_exactly_one_package_and_every_file_of_it(wheel: Path) -> None:
    names = _files(wheel)
    folders = {name.partition("/")[0] for name in names}
    metadata = {folder for folder in folders if folder.endswith(".dist-info")}
    assert folders - metadata == {"ingot"}
    assert len(metadata) == 1
    files = {
        f"ingot/{file.relative_to(ROOT).as_posix()}"
        for part in PARTS
        for file in (ROOT / part).rglob("*")
        if file.is_file() and not {"__pycache__", "lib"} & set(file.parts)
    }
    files |= {f"ingot/{file.name}" for file in (ROOT / "ingot").iterdir() if file.is_file()}
    assert files >= LEFT_OUT | {"ingot/py.typed", "ingot/runtime/templates/model.py.jinja"}
    packed = {name for name in names if name.startswith("ingot/") and not name.endswith(".so")}
    assert packed == files - LEFT_OUT


def test_packs_the_kernels_and_no_candidates(wheel: Path) -> None:
    libraries = {name for name in _files(wheel) if name.endswith(".so")}
    assert libraries == {f"ingot/plugins/{KERNELS}"}


def _unpacked(checkout: Path, folder: Path) -> Path:
    """A new source distribution, unpacked."""
    archive = _build("sdist", checkout, folder / "sdist")
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    (copy,) = (folder / "unpacked").iterdir()
    return copy


def test_packs_the_same_from_a_source_distribution(
    wheel: Path, checkout: Path, tmp_path: Path
) -> None:
    # Which has no links, and whose order of files is another.
    copy = _unpacked(checkout, tmp_path)
    assert not [path for path in copy.rglob("*") if path.is_symlink()]
    # Megabytes that nobody installs anything from.
    assert (copy / "tests" / "data" / "released").is_dir()
    assert not (copy / "tests" / "data" / "trained").exists()
    names = _files(_build("wheel", copy, tmp_path / "wheel"))
    assert names == {name for name in _files(wheel) if not name.endswith(".so")}


@pytest.mark.parametrize("lost", ["left out", "as text"])
def test_an_editable_install_makes_the_links_that_a_copy_lost(
    lost: str, checkout: Path, tmp_path: Path
) -> None:
    copy = _unpacked(checkout, tmp_path)
    links = [path for path in checkout.rglob("*") if path.is_symlink()]
    assert len(links) == 1 + len(PARTS)
    if lost == "as text":
        # As git writes it where it makes no links, and as some programs unpack a zip file.
        (copy / ".editable").mkdir()
        for link in links:
            (copy / link.relative_to(checkout)).write_text(str(link.readlink()))
    commands = _environment(tmp_path, Path(sysconfig.get_path("purelib")))
    _install(commands, "--editable", copy)
    made = {path: path.readlink() for path in copy.rglob("*") if path.is_symlink()}
    assert made == {copy / link.relative_to(checkout): link.readlink() for link in links}
    code = "import ingot.export.cli as found; print(found.__file__)"
    found = Path(_run(commands / "python", "-c", code, cwd=tmp_path).strip())
    assert found == copy / ".editable" / "ingot" / "export" / "cli.py"
    assert ingot.__version__ in _run(commands / "ingot", "--version", cwd=tmp_path)


def test_names_itself_its_licence_and_its_version(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Name"] == project["name"] == "ingot-export"
    assert metadata["Version"] == ingot.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    licence = archive.read(name.replace("METADATA", "licenses/LICENSE")).decode()
    assert "Apache License\n" in licence and "END OF TERMS AND CONDITIONS" in licence


def test_declares_both_commands(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry,) = (n for n in archive.namelist() if n.endswith("dist-info/entry_points.txt"))
    text = archive.read(entry).decode()
    assert "export = ingot.export.__main__:export_command" in text
    assert "ingot = ingot.__main__:main" in text


def test_answers_from_an_environment_of_its_own(installed: Path, tmp_path: Path) -> None:
    assert ingot.__version__ in _run(installed / "ingot", "--version", cwd=tmp_path)
    assert "--target" in _run(installed / "export", "--help", cwd=tmp_path)
    assert "--target" in _run(installed / "ingot", "export", "--help", cwd=tmp_path)
    assert "--checkpoint" in _run(installed / "ingot", "validate", "--help", cwd=tmp_path)
    for module in ("ingot", "ingot.export", "ingot.runtime", "ingot.validate"):
        text = _run(installed / "python", "-m", module, "--help", cwd=tmp_path)
        assert text.startswith(f"Usage: python -m {module} ")


def test_imports_its_own_files_and_not_the_repository(installed: Path, tmp_path: Path) -> None:
    code = "import ingot.export.cli; print(ingot.export.cli.__file__)"
    found = Path(_run(installed / "python", "-c", code, cwd=tmp_path).strip())
    assert installed.parent in found.parents


def test_lists_its_commands_without_the_heavy_packages(installed: Path, tmp_path: Path) -> None:
    text = _run(installed / "ingot", "--help", cwd=tmp_path)
    for command in ("export", "generate", "validate"):
        assert command in text


def _configobj(folder: Path) -> Path:
    """A wheel with the top-level names of configobj, ``validate`` among them."""
    made, metadata = folder / "configobj-5.0.9-py3-none-any.whl", "configobj-5.0.9.dist-info"
    files = {
        "configobj/__init__.py": "",
        "validate/__init__.py": "MINE = 'configobj'\n",
        f"{metadata}/METADATA": "Metadata-Version: 2.1\nName: configobj\nVersion: 5.0.9\n",
        f"{metadata}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{metadata}/RECORD": "",
    }
    with zipfile.ZipFile(made, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return made


@pytest.fixture
def application(tmp_path: Path) -> Path:
    """A program's folder, with a ``runtime`` and an ``export`` of its own."""
    folder = tmp_path / "application"
    (folder / "runtime").mkdir(parents=True)
    (folder / "runtime" / "__init__.py").write_text("MINE = 'runtime'\n")
    (folder / "export.py").write_text("MINE = 'export'\n")
    (folder / "program.py").write_text(
        "import sys, export, runtime, validate, ingot\n"
        "assert (export.MINE, runtime.MINE, validate.MINE) == ('export', 'runtime', 'configobj')\n"
        "print(*(step[0] for step in ingot.generate(sys.argv[1], [[1, 2]], max_new_tokens=4)))\n"
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("order", ["ingot configobj", "configobj ingot", "configobj editable"])
def test_works_beside_packages_of_the_same_names(
    order: str, wheel: Path, checkout: Path, tiny: Path, application: Path, tmp_path: Path
) -> None:
    ways: dict[str, tuple[str | Path, ...]] = {
        "ingot": (wheel,),
        "configobj": (_configobj(tmp_path),),
        "editable": ("--editable", checkout),
    }
    commands = _environment(tmp_path, Path(sysconfig.get_path("purelib")))
    for word in order.split():
        _install(commands, *ways[word])

    def ran(command: str, *arguments: str | Path) -> str:
        return _run(commands / command, *arguments, cwd=application)

    find = "from importlib.util import find_spec; print(*map(find_spec, sys.argv[1:]))"
    names = ("graphs", "plugins", "tests", "benchmarks")
    assert ran("python", "-c", f"import sys; {find}", *names).split() == ["None"] * len(names)
    assert "validate" in ran("ingot", "--help")
    assert "passed" in ran("ingot", "export", "--model", tiny, "--out", "out")
    generate = ("generate", "out", "--prompt-ids", "1,2", "--max-new-tokens", "4")
    generated = ran("ingot", *generate).split()
    assert len(generated) == 4
    assert ran("python", "-m", "ingot", *generate).split() == generated
    assert ran("python", "program.py", "out").split() == generated
    ran("ingot", "triton", "out", "--out", "repository")
    ran("ingot", "triton", "--check", "repository")


def test_packs_the_templates_of_triton_repositories_into_the_wheel(wheel: Path) -> None:
    templates = {path.name for path in (ROOT / "runtime" / "templates").iterdir()}
    assert len(templates) == 7
    packed = {f"ingot/runtime/templates/{name}" for name in templates}
    assert packed <= set(zipfile.ZipFile(wheel).namelist())


USER = """\
import ingot
from ingot.validate import validate

result = ingot.export.export("CHECKPOINT", "OUT", target="trt", precision="fp16")
assert result.manifest.verdict != "unknown"
ingot.export.export("CHECKPOINT", "OUT", target="cuda")
report = validate("OUT", "CHECKPOINT", plan="quick")
assert report.verdict != "failed"
session: ingot.Session = ingot.load("OUT")
sampling = ingot.Sampling(temperature=0.5)
tokens: list[list[int | None]] = list(ingot.generate(session, [[1, 2]], sampling=sampling))
text: str = ingot.generate("OUT", [[1, 2]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["wheel", "editable"])
def test_a_user_finds_its_types(way: str, wheel: Path, checkout: Path, tmp_path: Path) -> None:
    commands = _environment(tmp_path, Path(sysconfig.get_path("purelib")))
    _install(commands, *((wheel,) if way == "wheel" else ("--editable", checkout)))
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "program.py").write_text(USER)
    options = ("--strict", "--no-error-summary", "--python-executable", commands / "python")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "program.py"],
        cwd=tmp_path / "user",
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        capture_output=True,
        text=True,
    )
    errors = re.findall(r"^program\.py:(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.MULTILINE)
    # A verdict that there is none, a target, and what `generate` gives.
    expected = [("5", "comparison-overlap"), ("6", "arg-type"), ("12", "assignment")]
    assert errors == expected, done.stdout + done.stderr
