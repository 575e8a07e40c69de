"""Who may import whom, read from the source: the table of docs/design.md."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("export", "graphs", "plugins", "runtime", "validate")
# Folders without source of ours, and tests/, which may import everything.
SKIPPED = {"tests", "out", "build", "dist", "docs"}

# What a module may import of ours, beside its own folder; the longest match of its name counts.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "plugins": (),
    "graphs": ("plugins",),
    "export": ("graphs", "plugins"),
    "export.cli": OURS,
    "export.ingot": ("plugins.errors",),
    "runtime": (
        "plugins.device",
        "plugins.errors",
        "plugins.library",
        "plugins.tensorrt",
        "export.ingot",
    ),
    "validate": OURS,
}
# Modules that leave the standard library for nothing but this.
STANDARD_LIBRARY_AND: dict[str, tuple[str, ...]] = {
    "export.ingot": ("plugins.errors",),
    "validate.metrics": ("numpy",),
}


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return owner and f"{owner}.{node.attr}"
    return None


def _dynamic(call: ast.Call) -> str | None:
    """The module a call of ``import_module`` or ``__import__`` names, as far as the text says."""
    if (_dotted(call.func) or "").rpartition(".")[2] not in ("import_module", "__import__"):
        return None
    name = call.args[0] if call.args else None
    if isinstance(name, ast.JoinedStr) and name.values:
        name = name.values[0]
    if isinstance(name, ast.Constant) and isinstance(name.value, str):
        return name.value.rstrip(".")
    return None


def imported(source: str) -> set[str]:
    """Full dotted names of everything a source text imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            found |= {f"{start}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):
            found.add(_dynamic(node) or "")
        elif isinstance(node, ast.Attribute) and (_dotted(node) or "").startswith("torch.onnx"):
            # `import torch` is enough to reach torch.onnx, so the use counts as well.
            found.add("torch.onnx")
    return {name for name in found if name and not name.startswith("__future__.")}


def _within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == start or name.startswith(start + ".") for start in allowed)


def offences(module: str, source: str) -> list[str]:
    """Every import of ``module`` that the table forbids, as a sentence."""
    folder = module.partition(".")[0]
    names = sorted(imported(source))
    rule = next((m for m in (module, folder) if m in MAY_IMPORT), None)
    problems = []
    for name in names:
        top = name.partition(".")[0]
        if name.startswith("."):
            problems.append(f"{module} imports {name} by a relative name")
        if top in OURS and rule is not None:
            # The file with a rule of its own may not even reach into its own folder.
            own = (folder,) if rule == folder else ()
            if not _within(name, own + MAY_IMPORT[rule]):
                problems.append(f"{module} imports {name}")
        if top == "transformers":
            problems.append(f"{module} imports {name}; it is the tests' oracle only")
        if _within(name, ("torch.onnx",)) and module != "export.capture":
            problems.append(f"{module} uses torch.onnx; only export.capture may")
        if top == "torch" and folder == "runtime":
            problems.append(f"{module} imports {name}; the runtime works without PyTorch")
        if module == "plugins.errors":
            problems.append(f"{module} imports {name}; it imports nothing")
        extra = STANDARD_LIBRARY_AND.get(module)
        if extra is not None and top not in sys.stdlib_module_names and not _within(name, extra):
            problems.append(f"{module} imports {name}, which is not of the standard library")
    return problems


def _sources() -> dict[str, Path]:
    """Every Python file outside tests/ by module name."""
    folders = [p for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")]
    files = [file for p in folders if p.name not in SKIPPED for file in p.rglob("*.py")]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in [*files, *ROOT.glob("*.py")]
    }


SOURCES = _sources()


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_only_what_its_folder_may(module: str) -> None:
    assert offences(module, SOURCES[module].read_text(encoding="utf-8")) == []


def test_reads_the_sources_of_all_five_packages() -> None:
    # A checker that reads no file would pass for ever.
    assert {module.partition(".")[0] for module in SOURCES} >= set(OURS)
    for module in ("plugins.errors", "export.ingot", "export.capture", "validate.metrics"):
        assert module in SOURCES


def test_finds_the_uses_it_must_find_in_the_real_sources() -> None:
    def of(module: str) -> set[str]:
        return imported(SOURCES[module].read_text(encoding="utf-8"))

    assert "torch.onnx" in of("export.capture")
    assert "export.ingot.Manifest" in of("runtime.session")
    assert "validate.reference.Reference" in of("export.cli"), "an import inside a function"


@pytest.mark.parametrize(
    ("module", "source", "named"),
    [
        ("plugins.op", "import graphs", "graphs"),
        ("plugins.op", "from export.ingot import Manifest", "export.ingot.Manifest"),
        ("plugins.errors", "import os", "os"),
        ("graphs.olmoe", "from export import capture", "export.capture"),
        ("graphs.olmoe", "def f():\n    from validate.run import x", "validate.run.x"),
        ("graphs.olmoe", "import transformers.models as m", "transformers.models"),
        ("graphs.olmoe", "from transformers import AutoModel", "transformers.AutoModel"),
        ("export.build", "import runtime.session", "runtime.session"),
        ("export.build", "if TYPE_CHECKING:\n    from validate import run", "validate.run"),
        ("export.build", "import torch\ntorch.onnx.export(m)", "torch.onnx"),
        ("export.build", "from torch import onnx", "torch.onnx"),
        ("export.build", "import torch.onnx.ops", "torch.onnx"),
        ("export.ingot", "import numpy", "numpy"),
        ("export.ingot", "from export.request import TASKS", "export.request.TASKS"),
        ("export.ingot", "from plugins.moe_dispatch import f", "plugins.moe_dispatch.f"),
        ("runtime.ort", "import torch", "torch"),
        ("runtime.ort", "import plugins", "plugins"),
        ("runtime.ort", "from plugins import *", "plugins.*"),
        ("runtime.ort", "from plugins import moe_dispatch", "plugins.moe_dispatch"),
        ("runtime.ort", "from graphs.state import BATCH", "graphs.state.BATCH"),
        ("runtime.ort", "from export import build", "export.build"),
        ("runtime.ort", "import importlib\nimportlib.import_module('torch')", "torch"),
        ("runtime.ort", "from importlib import *\nimport_module(f'graphs.{x}')", "graphs"),
        ("runtime.ort", "__import__('validate.run')", "validate.run"),
        ("runtime.ort", "from .session import load", ".session.load"),
        ("validate.metrics", "import torch", "torch"),
        ("validate.run", "import transformers", "transformers"),
    ],
)
def test_reports_a_forbidden_import(module: str, source: str, named: str) -> None:
    found = offences(module, source)
    assert found and named in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plugins.op", "import torch\nfrom plugins.errors import IngotError"),
        ("plugins.errors", "from __future__ import annotations"),
        ("graphs.olmoe", "from plugins import op\nfrom graphs.state import BATCH"),
        ("export.capture", "import torch\ntorch.onnx.export(m)"),
        ("export.cli", "from validate.run import x\nfrom runtime.session import load"),
        ("export.ingot", "import json\nfrom plugins.errors import IngotError"),
        ("runtime.trt", "from plugins import errors, library\nfrom export import ingot"),
        ("runtime.ort", "import onnxruntime\nx = 'import torch'  # import torch"),
        ("validate.run", "import torch\nfrom export.ingot import Manifest"),
    ],
)
def test_accepts_an_allowed_import(module: str, source: str) -> None:
    assert offences(module, source) == []


# `runtime` also names what a program begins with, `runtime.load`.
@pytest.mark.parametrize(
    "module", sorted(m for m in SOURCES if m.endswith("__init__") and m != "runtime.__init__")
)
def test_keeps_package_files_to_a_docstring(module: str) -> None:
    body = ast.parse(SOURCES[module].read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    assert isinstance(body[0].value.value, str)


def test_has_no_module_called_utils() -> None:
    named = {piece for module in SOURCES for piece in module.split(".")}
    assert named.isdisjoint({"utils", "util", "helpers", "misc"})
