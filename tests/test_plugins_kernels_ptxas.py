"""Which ptxas makes a kernel, and that no kernel of another one is taken for its."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ingot.plugins.errors import IngotError
from ingot.plugins.kernels import ptxas
from ingot.plugins.kernels.ptxas import CHOICES, Ptxas, choose, minimum_driver

OLDER, NEWER = Ptxas(Path("ptxas"), "12.9.86"), Ptxas(Path("ptxas-blackwell"), "13.4.59")

# Compiles one form for one device by each choice, in this process and in the workers of a build;
# one cache. Prints the ELF's ABI version, which is 7 of CUDA 12 and 8 of CUDA 13.
BUILD = """
import json, os, sys
from pathlib import Path
from ingot.plugins.kernels import build

out = Path(sys.argv[1])
form = build.all_forms()["mamba2_step_bf16_n128"]
os.environ["TRITON_CACHE_DIR"] = str(out / "cache")
found = []
for choice in ("older", "newer", "older", "default"):
    here = build.compile_form(form, 90, out, choice)
    (there,) = build.compile_all([form], (90,), out, choice)
    found += [[c.image.read_bytes()[8], c.ptxas.split(".")[0]] for c, _ in (here, there)]
names = [name for name in os.environ if "PTXAS" in name]
print(json.dumps([found, len(list((out / "cache").rglob("*.cubin"))), names]))
"""


@pytest.mark.parametrize(
    ("choice", "made_by"),
    [
        ("default", {80: OLDER, 89: OLDER, 90: OLDER, 100: NEWER, 120: NEWER}),
        ("older", dict.fromkeys((80, 90, 100, 120), OLDER)),
        ("newer", dict.fromkeys((80, 90, 100, 120), NEWER)),
    ],
)
def test_the_newer_one_is_for_what_is_newer_than_hopper(
    monkeypatch: pytest.MonkeyPatch, choice: str, made_by: dict[int, Ptxas]
) -> None:
    monkeypatch.setattr(ptxas, "available", lambda: (OLDER, NEWER))
    assert {capability: choose(choice, capability) for capability in made_by} == made_by


@pytest.mark.parametrize("choice", CHOICES)
def test_one_alone_is_taken_for_everything(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    monkeypatch.setattr(ptxas, "available", lambda: (OLDER,))
    assert {choose(choice, capability) for capability in (80, 90, 120)} == {OLDER}


def test_tools_are_ordered_by_number_and_not_by_letter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """9.10 is newer than 9.2; what cannot say its version is no ptxas."""
    import triton

    folder = tmp_path / "backends" / "nvidia" / "bin"
    folder.mkdir(parents=True)
    for name, words in (("ptxas", "V9.10.1"), ("ptxas-b", "V9.2.30"), ("ptxas-c", "no")):
        (folder / name).write_text(f"#!/bin/sh\necho 'Cuda compilation tools, {words}'\n")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    ptxas.available.cache_clear()
    try:
        assert [tool.version for tool in ptxas.available()] == ["9.2.30", "9.10.1"]
    finally:
        ptxas.available.cache_clear()


def test_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import triton

    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    ptxas.available.cache_clear()
    with pytest.raises(IngotError, match="has no ptxas and none is installed; install Triton"):
        ptxas.available()


@pytest.mark.parametrize(
    ("capability", "version", "release", "cuda"),
    [
        (80, "12.9.86", 525, 12000),
        (89, "12.8.93", 525, 12000),
        (90, "12.9.86", 525, 12000),
        (100, "12.9.86", 570, 12080),
        (120, "12.9.86", 570, 12080),
        (80, "13.4.59", 580, 13000),
        (90, "13.4.59", 580, 13000),
        (120, "13.0.1", 580, 13000),
    ],
)
def test_knows_the_first_driver(capability: int, version: str, release: int, cuda: int) -> None:
    found = minimum_driver(capability, version)
    assert (found.release, found.cuda) == (release, cuda)


def test_refuses_to_guess_the_driver_of_a_future_toolkit() -> None:
    with pytest.raises(IngotError, match=r"ptxas 14\.0\.1 is of no CUDA toolkit whose driver"):
        minimum_driver(90, "14.0.1")


def test_a_compiled_kernel_of_one_is_never_taken_for_that_of_the_other(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env=clean,
    )
    assert done.returncode == 0, done.stderr
    found, cached, names = json.loads(done.stdout.splitlines()[-1])
    older, newer = [[7, "12"]] * 2, [[8, "13"]] * 2
    assert found == older + newer + older + older
    # Each was compiled once, by whichever process came first, and the choice has left no trace.
    assert cached == 2 and names == []
