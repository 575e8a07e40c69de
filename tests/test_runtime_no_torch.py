"""An ingot runs where PyTorch and the exporter's packages are not installed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ingot.runtime.generate import generate
from ingot.runtime.loading import load

PROMPTS = [[3, 14, 15], [9, 2, 6, 5, 3]]
BLOCKED = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript")

# Refuses the packages in argument 1 as if they were not installed; the rest runs after it.
WITHOUT = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in json.loads(sys.argv[1]):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Absent())
"""
GENERATE = """
import ingot.runtime
from ingot.runtime.generate import generate

session = ingot.runtime.load(sys.argv[2])
print(json.dumps(list(generate(session, json.loads(sys.argv[3]), max_new_tokens=8))))
"""
COMMAND = """
from click.testing import CliRunner
from ingot.runtime.cli import main

result = CliRunner().invoke(main, ["generate", *sys.argv[2:]], catch_exceptions=False)
print(json.dumps([result.exit_code, result.stdout]))
"""
LOADED = """
print(json.dumps(sorted(sys.modules)))
"""


def _without(code: str, *arguments: str) -> list[str]:
    """Lines printed by a Python of its own in which the packages cannot be imported."""
    command = [sys.executable, "-c", WITHOUT + code + LOADED, json.dumps(BLOCKED), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_package_itself_imports_nothing() -> None:
    (loaded,) = _without("import ingot.runtime\nassert 'ingot.runtime.session' not in sys.modules")
    assert "ingot" in json.loads(loaded) and "numpy" not in json.loads(loaded)
    with pytest.raises(AttributeError, match=r"'ingot\.runtime' has no attribute 'lode'"):
        _ = importlib.import_module("ingot.runtime").lode


@pytest.mark.parametrize("blocked", BLOCKED)
def test_blocks_what_it_says_it_blocks(blocked: str) -> None:
    # Without this, a finder that blocks nothing would let every other test here pass.
    code = f"""
try:
    import {blocked}
except ImportError as error:
    print(error)
"""
    printed, loaded = _without(code)
    assert printed == f"{blocked} is not installed"
    assert blocked not in json.loads(loaded)


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_generates_without_torch(request: pytest.FixtureRequest, target: str) -> None:
    ingot: Path = request.getfixturevalue(f"tiny_{target}")
    tokens, loaded = _without(GENERATE, str(ingot), json.dumps(PROMPTS))
    assert json.loads(tokens) == list(generate(load(ingot), PROMPTS, max_new_tokens=8))
    names = set(json.loads(loaded))
    assert names.isdisjoint(BLOCKED)
    # The exporter's own folders stay out too, all but the manifest and what it names.
    exporter = ("ingot.export", "ingot.graphs", "ingot.validate")
    assert {name for name in names if name.startswith(exporter)} == {
        "ingot.export",
        "ingot.export.external_data",
        "ingot.export.ingot",
        "ingot.export.ingot_schema",
        "ingot.export.quantization",
        "ingot.graphs",
        "ingot.graphs.names",
        "ingot.graphs.state",
    }


def test_runs_its_command_without_torch(tiny_ort: Path) -> None:
    arguments = [str(tiny_ort), "--prompt-ids", "3,14,15", "--max-new-tokens", "8"]
    printed, loaded = _without(COMMAND, *arguments)
    status, output = json.loads(printed)
    expected = [row[0] for row in generate(load(tiny_ort), PROMPTS[:1], max_new_tokens=8)]
    assert status == 0
    assert [int(token) for token in output.split()] == expected
    assert set(json.loads(loaded)).isdisjoint(BLOCKED)


def test_keeps_no_record_of_its_use(tiny_ort: Path, tmp_path: Path) -> None:
    code = "import json, sys" + GENERATE
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        environment[name] = str(tmp_path)
    command = [sys.executable, "-c", code, "[]", str(tiny_ort), json.dumps(PROMPTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
