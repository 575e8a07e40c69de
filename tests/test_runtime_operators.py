"""Which library of Ingot's own kernels is loaded: never one for lying in a folder."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import MakeIngot

from ingot.export.ingot import LIBRARY, MANIFEST, Manifest, ManifestError
from ingot.plugins.cpu.operators import INSTALLED, OperatorsError
from ingot.plugins.whole import sha256
from ingot.runtime import operators
from ingot.runtime.cli import main
from ingot.runtime.generate import generate
from ingot.runtime.loading import load
from ingot.runtime.operators import libraries
from ingot.runtime.session import SessionError


@pytest.fixture
def elsewhere(own_kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, on a machine whose Ingot has no such library."""
    monkeypatch.setattr(operators, "INSTALLED", tmp_path / "none" / LIBRARY)
    return Path(shutil.copytree(own_kernels, tmp_path / "ingot"))


@pytest.fixture
def another(own_kernels: Path, tmp_path: Path) -> Path:
    """The library with one bit changed."""
    content = bytearray((own_kernels / LIBRARY).read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "another.so"
    path.write_bytes(content)
    return path


def listed(ingot: Path) -> None:
    """Let the manifest say what the library in the folder is by now."""
    raw = json.loads((ingot / MANIFEST).read_text())
    path = ingot / LIBRARY
    raw["files"][LIBRARY] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (ingot / MANIFEST).write_text(json.dumps(raw))


def tokens(ingot: Path, **options: Any) -> list[list[int | None]]:
    return [list(step) for step in generate(load(ingot, **options), [[5, 6]], max_new_tokens=4)]


def refused(ingot: Path, **options: Any) -> str:
    """The sentence by which an ingot is not opened; it says what there is to choose."""
    with pytest.raises(OperatorsError) as error:
        load(ingot, **options)
    sentence = str(error.value)
    check_sentence(sentence, ingot)
    return sentence


def check_sentence(sentence: str, ingot: Path) -> None:
    assert sentence.isprintable() and sentence.endswith(".") and sentence.count(". ") == 0
    assert f"give --operators {ingot / LIBRARY} if you would run a program of" in sentence
    assert "install the Ingot that it was made with and `make cpu` there" in sentence
    assert "or export it again with --kernels ort" in sentence


def test_takes_that_of_the_installation(own_kernels: Path) -> None:
    manifest = Manifest.read(own_kernels)
    assert libraries(own_kernels, manifest) == (INSTALLED,)
    assert len(tokens(own_kernels)) == 4


def test_an_ingot_on_other_kernels_needs_none(tiny_ort: Path, another: Path) -> None:
    assert libraries(tiny_ort, Manifest.read(tiny_ort), another) == ()
    assert tokens(tiny_ort, operators=another) == tokens(tiny_ort)


@pytest.mark.parametrize("verify", [True, False])
def test_one_that_is_missing_is_not_made_up_for_by_the_folders(
    elsewhere: Path, tmp_path: Path, verify: bool
) -> None:
    sentence = refused(elsewhere, verify=verify)
    assert f"{tmp_path / 'none' / LIBRARY} is missing" in sentence


@pytest.mark.parametrize("verify", [True, False])
def test_refuses_another_version_installed(
    elsewhere: Path, another: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    monkeypatch.setattr(operators, "INSTALLED", another)
    assert f"another library of kernels than {another}" in refused(elsewhere, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_takes_one_that_is_named_where_it_is_the_same(
    own_kernels: Path, elsewhere: Path, another: Path, tmp_path: Path, verify: bool
) -> None:
    expected = tokens(own_kernels, operators=INSTALLED)
    copy = shutil.copyfile(own_kernels / LIBRARY, tmp_path / "same.so")
    for named in (elsewhere / LIBRARY, str(elsewhere / LIBRARY), copy):
        assert tokens(elsewhere, operators=named, verify=verify) == expected
    # In the place of the installed one, which would do.
    sentence = refused(own_kernels, operators=another, verify=verify)
    assert f"another library of kernels than {another}" in sentence
    for missing in (tmp_path / "gone.so", tmp_path):
        assert f"{missing} is missing" in refused(elsewhere, operators=missing)


def test_a_name_without_a_folder_is_of_the_folder_one_is_in(
    elsewhere: Path, another: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system would look for it among its own libraries."""
    monkeypatch.chdir(elsewhere)
    assert libraries(elsewhere, Manifest.read(elsewhere), Path(LIBRARY)) == (elsewhere / LIBRARY,)
    assert len(tokens(elsewhere, operators=LIBRARY)) == 4
    monkeypatch.chdir(tmp_path)
    assert "is missing" in refused(elsewhere, operators=LIBRARY)


def test_says_that_one_cannot_be_read(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot be read (File name too long)" in refused(elsewhere, operators="x" * 5000)

    def unreadable(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(operators, "sha256", unreadable)
    sentence = refused(elsewhere, operators=elsewhere / LIBRARY)
    assert f"{elsewhere / LIBRARY} cannot be read (Permission denied)" in sentence


def test_a_program_in_the_folder_runs_for_those_who_name_it_alone(
    own_kernels: Path, tmp_path: Path
) -> None:
    """Its maker lists it, so nothing of the folder is found to be changed."""
    ingot = Path(shutil.copytree(own_kernels, tmp_path / "ingot"))
    mark, source = tmp_path / "ran", tmp_path / "program.c"
    source.write_text(
        "#include <stdio.h>\n"
        f'__attribute__((constructor)) static void run(void) {{ fclose(fopen("{mark}", "w")); }}\n'
    )
    command = ["g++", "-shared", "-fPIC", "-x", "c++", str(source), "-o", str(ingot / LIBRARY)]
    subprocess.run(command, check=True, timeout=60)
    with pytest.raises(ManifestError, match="is not the file that was validated"):
        load(ingot)
    # Of an equal size the hash alone would tell, and nobody compares those of the folder.
    listed(ingot)
    for verify in (True, False):
        for allow_failed in (True, False):
            options = {"verify": verify, "allow_failed": allow_failed}
            assert "another library of kernels than" in refused(ingot, **options)
            assert "another library" in refused(ingot, operators=INSTALLED, **options)
    assert not mark.exists()
    with pytest.raises(SessionError, match="cannot load"):
        load(ingot, operators=ingot / LIBRARY)
    assert mark.exists()


def test_an_ingot_that_failed_says_so_first(elsewhere: Path) -> None:
    raw = json.loads((elsewhere / MANIFEST).read_text())
    raw["validation"]["verdict"] = "failed"
    (elsewhere / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(SessionError, match="failed its validation"):
        load(elsewhere)
    assert "is missing" in refused(elsewhere, allow_failed=True)
    assert len(tokens(elsewhere, allow_failed=True, operators=elsewhere / LIBRARY)) == 4


def test_forks_run_on_the_same(own_kernels: Path) -> None:
    session = load(own_kernels, operators=own_kernels / LIBRARY)
    steps = list(generate(session.fork(), [[5, 6]], max_new_tokens=4))
    del session
    assert [list(step) for step in steps] == tokens(own_kernels)


@pytest.mark.parametrize("command", ["generate", "classify", "bench"])
def test_commands_take_one_by_name(elsewhere: Path, make_ingot: MakeIngot, command: str) -> None:
    ingot, more = elsewhere, ["--prompt-ids", "5,6"]
    if command == "classify":
        ingot = make_ingot(Path("jetmoe"), "ort", task="classify", preset="tiny", kernels="ingot")
    elif command == "bench":
        more = ["--batch", "1", "--length", "4", "--repetitions", "2"]
    arguments = [command, str(ingot), *more]
    without = CliRunner().invoke(main, arguments)
    assert (without.exit_code, without.stdout) == (2, "")
    (line,) = without.stderr.splitlines()
    check_sentence(line.removeprefix("error: "), ingot)
    result = CliRunner().invoke(main, [*arguments, "--operators", str(ingot / LIBRARY)])
    assert result.exit_code == 0, result.output
    assert result.stdout
