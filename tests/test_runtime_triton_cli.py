"""The command ``ingot triton``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ingot.export.cli import main as ingot_command
from ingot.export.ingot import GRAPH, LIBRARY
from ingot.runtime import operators
from ingot.runtime.cli import main as runtime_command

# On a machine that only runs the tests of GPUs it may be missing.
pytest.importorskip("tritonclient")

# Minutes of exports; `make test-slow` runs them, and so does CI.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("group", [ingot_command, runtime_command], ids=["ingot", "runtime"])
def test_makes_and_checks_a_repository_by_its_command(
    group: Any, tiny_ort: Path, tmp_path: Path
) -> None:
    run = CliRunner()
    out = tmp_path / "r"
    made = run.invoke(group, ["triton", str(tiny_ort), "--out", str(out), "--name", "m"])
    assert made.exit_code == 0 and "m, m_generate" in made.stdout
    checked = run.invoke(group, ["triton", "--check", str(out)])
    assert (checked.exit_code, checked.stdout) == (0, f"{out}: nothing found\n")
    (out / "m" / "1" / GRAPH).unlink()
    checked = run.invoke(group, ["triton", "--check", str(out)])
    assert checked.exit_code == 1 and GRAPH in checked.stdout
    again = run.invoke(group, ["triton", str(tiny_ort), "--out", str(out)])
    assert again.exit_code == 2
    assert (
        again.stderr == f"error: {out} exists; give --overwrite to replace it, or another --out.\n"
    )
    for arguments in ([], [str(tiny_ort)], [str(tiny_ort), "--check", str(out)]):
        assert run.invoke(group, ["triton", *arguments]).exit_code == 2


def test_takes_a_library_of_operators_by_name(
    own_kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "INSTALLED", tmp_path / "none.so")
    run = CliRunner()
    arguments = ["triton", str(own_kernels), "--out", str(tmp_path / "r"), "--name", "m"]
    without = run.invoke(runtime_command, arguments)
    assert without.exit_code == 2
    assert f"give --operators {own_kernels / LIBRARY} if you would run" in without.stderr
    assert not (tmp_path / "r").exists()
    named = ["--operators", str(own_kernels / LIBRARY)]
    made = run.invoke(runtime_command, [*arguments, *named])
    assert made.exit_code == 0, made.output
    assert "m_generate" in made.stdout and "one model only: the graph needs" in made.stdout
