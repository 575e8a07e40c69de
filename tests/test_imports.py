"""Who may import whom, read from the source: the table of docs/design.md."""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("export", "graphs", "plugins", "runtime", "validate")
OURS = tuple(f"ingot.{part}" for part in PARTS)
# Folders without source of ours, and tests/, which may import everything.
SKIPPED = {"tests", "out", "build", "dist", "docs"}

# What a manifest is read by; all of it stays with the standard library.
MANIFEST_READS = (
    "ingot.export.external_data",
    "ingot.export.ingot_schema",
    "ingot.export.quantization",
    "ingot.graphs.names",
    "ingot.graphs.state",
    "ingot.plugins.cpu.operators",
    "ingot.plugins.errors",
    "ingot.plugins.json_fields",
    "ingot.plugins.json_file",
    "ingot.plugins.links",
    "ingot.plugins.whole",
)

# What compares the weights of an ingot and a checkpoint: nothing that an export lays them out with,
# nor what it reads them with, so that no fault of those is on both sides.
WEIGHTS = tuple(
    f"ingot.validate.identity.weights{part}"
    for part in (
        *("", "_adapter", "_blocks", "_checkpoint", "_compare", "_explained", "_factors"),
        *("_files", "_found", "_graph", "_header", "_names", "_packed", "_panels", "_piece"),
        "_rounding",
    )
)
WEIGHTS_READ = (
    *WEIGHTS,
    "ingot.export.progress",
    "ingot.graphs.names",
    "ingot.graphs.patterns",
    # A name, and nothing of how panels are made.
    "ingot.plugins.cpu.operators.DOMAIN",
    "ingot.plugins.errors",
    "ingot.validate.identity.subject.Subject",
    "ingot.validate.result",
)

# What a module may import of ours, beside its own folder; the longest match of its name counts.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "ingot.plugins": (),
    "ingot.graphs": ("ingot.plugins",),
    "ingot.export": ("ingot.graphs", "ingot.plugins"),
    "ingot.export.api": OURS,
    "ingot.export.cli": OURS,
    "ingot.export.ingot": MANIFEST_READS,
    "ingot.export.ingot_schema": MANIFEST_READS,
    "ingot.export.external_data": (),
    "ingot.export.quantization": (),
    "ingot.runtime": (
        "ingot.graphs.state",
        "ingot.plugins.command_line",
        "ingot.plugins.cpu.operators",
        "ingot.plugins.device",
        "ingot.plugins.errors",
        "ingot.plugins.json_fields",
        "ingot.plugins.json_file",
        "ingot.plugins.links",
        "ingot.plugins.library",
        "ingot.plugins.registry",
        "ingot.plugins.startup",
        "ingot.plugins.tensorrt",
        "ingot.plugins.whole",
        "ingot.plugins.child",
        "ingot.plugins.json_file",
        "ingot.export.ingot",
        "ingot.export.tokenizer_files",
    ),
    "ingot.validate": OURS,
    **dict.fromkeys(WEIGHTS, WEIGHTS_READ),
}
# What everybody may import of the package itself.
VERSION = "ingot.version.__version__"
# What trains checkpoints as others do, for tests and benchmarks.
TRAINING = ("benchmarks.train_tiny", "benchmarks.training")
# What both programs of a comparison are held against, and a matrix that the other one is given.
COMPARED = (
    "benchmarks.on_weights.importance",
    "benchmarks.on_weights.truth",
    "benchmarks.on_peers.workers.run_transformers",
)
# What runs another program's graph in that program's environment, where there is no Ingot.
ELSEWHERE = "benchmarks/on_peers/workers/run_onnx.py"
# Modules that leave the standard library for nothing but this.
STANDARD_LIBRARY_AND: dict[str, tuple[str, ...]] = {
    "ingot.export.ingot": MANIFEST_READS,
    "ingot.export.ingot_schema": MANIFEST_READS,
    "ingot.export.external_data": (),
    "ingot.export.quantization": (),
    "ingot.export.tokenizer_files": ("ingot.plugins.errors", "ingot.plugins.json_file"),
    "ingot.graphs.names": (),
    "ingot.graphs.state": (),
    "ingot.plugins.child": (),
    "ingot.plugins.errors": (),
    "ingot.plugins.json_fields": ("ingot.plugins.errors",),
    "ingot.plugins.json_file": ("ingot.plugins.errors",),
    "ingot.plugins.links": ("ingot.plugins.errors",),
    "ingot.plugins.whole": ("ingot.plugins.errors",),
    "ingot.validate.judge.metrics": ("numpy",),
}

# Options, provider and telemetry are decided where a session is opened, and so in one place.
OPENER = "ingot.runtime.onnxruntime_session"


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
    folder = ".".join(module.split(".")[:2])
    names = sorted(imported(source))
    rule = next((m for m in (module, folder) if m in MAY_IMPORT), None)
    problems = []
    for name in names:
        top = name.partition(".")[0]
        if name.startswith("."):
            problems.append(f"{module} imports {name} by a relative name")
        if top in PARTS:
            problems.append(f"{module} imports {name} as if its folder were a package of its own")
        if top == "ingot" and name != VERSION and rule is not None:
            # The file with a rule of its own may not even reach into its own folder.
            own = (folder,) if rule == folder else ()
            if not _within(name, own + MAY_IMPORT[rule]):
                problems.append(f"{module} imports {name}")
        if top == "transformers" and not module.startswith((*TRAINING, *COMPARED)):
            problems.append(f"{module} imports {name}; it is the tests' oracle only")
        if _within(name, ("torch.onnx",)) and module != "ingot.export.capture":
            problems.append(f"{module} uses torch.onnx; only export.capture may")
        if top == "onnxruntime" and folder in OURS and module != OPENER:
            problems.append(f"{module} imports {name}; only {OPENER} may")
        if top == "torch" and folder == "ingot.runtime":
            problems.append(f"{module} imports {name}; the runtime works without PyTorch")
        extra = STANDARD_LIBRARY_AND.get(module)
        if extra is not None and top not in sys.stdlib_module_names and not _within(name, extra):
            problems.append(f"{module} imports {name}, which is not of the standard library")
    return problems


def test_opens_a_graph_in_one_place() -> None:
    found = {
        file.relative_to(ROOT).as_posix()
        for folder in (*PARTS, "benchmarks", "tests")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and (_dotted(node.func) or "").rpartition(".")[2] == "InferenceSession"
    }
    assert found == {"runtime/onnxruntime_session.py", ELSEWHERE}


def _sources() -> dict[str, Path]:
    """Every Python file outside tests/ by module name."""
    folders = [p for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")]
    files = [file for p in folders if p.name not in SKIPPED for file in p.rglob("*.py")]
    named = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in [*files, *ROOT.glob("*.py")]
    }
    # The folders of the parts are linked into the package.
    return {
        f"ingot.{name}" if name.partition(".")[0] in PARTS else name: file
        for name, file in named.items()
        if len(file.relative_to(ROOT).parts) < 2
        or file.parts[len(ROOT.parts)] != "ingot"
        or file.parent.name == "ingot"
    }


SOURCES = _sources()


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_only_what_its_folder_may(module: str) -> None:
    assert offences(module, SOURCES[module].read_text(encoding="utf-8")) == []


def test_reads_the_sources_of_all_five_packages() -> None:
    # A checker that reads no file would pass for ever.
    assert {".".join(module.split(".")[:2]) for module in SOURCES} >= set(OURS)
    for module in (
        "ingot.plugins.errors",
        "ingot.export.ingot",
        "ingot.export.capture",
        "ingot.validate.judge.metrics",
    ):
        assert module in SOURCES


def test_has_a_rule_for_every_file_that_compares_weights() -> None:
    found = {module for module in SOURCES if module.startswith("ingot.validate.identity.weights")}
    assert found == set(WEIGHTS)


def test_finds_the_uses_it_must_find_in_the_real_sources() -> None:
    def of(module: str) -> set[str]:
        return imported(SOURCES[module].read_text(encoding="utf-8"))

    assert "torch.onnx" in of("ingot.export.capture")
    assert "ingot.export.ingot.Manifest" in of("ingot.runtime.session")
    assert "ingot.validate.truth.reference.Reference" in of("ingot.export.api"), (
        "an import inside a function"
    )


@pytest.mark.parametrize(
    ("module", "source", "named"),
    [
        ("ingot.plugins.op", "import ingot.graphs", "ingot.graphs"),
        (
            "ingot.plugins.op",
            "from ingot.export.ingot import Manifest",
            "ingot.export.ingot.Manifest",
        ),
        ("ingot.plugins.errors", "import click", "click"),
        ("ingot.graphs.olmoe", "from ingot.export import capture", "ingot.export.capture"),
        (
            "ingot.graphs.olmoe",
            "def f():\n    from ingot.validate.run import x",
            "ingot.validate.run.x",
        ),
        ("ingot.graphs.olmoe", "import transformers.models as m", "transformers.models"),
        ("ingot.graphs.olmoe", "from transformers import AutoModel", "transformers.AutoModel"),
        ("ingot.export.build", "import ingot.runtime.session", "ingot.runtime.session"),
        (
            "ingot.export.build",
            "if TYPE_CHECKING:\n    from ingot.validate import run",
            "ingot.validate.run",
        ),
        ("ingot.export.build", "import torch\ntorch.onnx.export(m)", "torch.onnx"),
        ("ingot.export.build", "from torch import onnx", "torch.onnx"),
        ("ingot.export.build", "import torch.onnx.ops", "torch.onnx"),
        ("ingot.export.ingot", "import numpy", "numpy"),
        (
            "ingot.export.ingot",
            "from ingot.export.request import TASKS",
            "ingot.export.request.TASKS",
        ),
        (
            "ingot.export.ingot",
            "from ingot.plugins.moe_dispatch import f",
            "ingot.plugins.moe_dispatch.f",
        ),
        (
            "ingot.validate.identity.weights_graph",
            "from ingot.export.passes.weights import Weight",
            "ingot.export.passes.weights.Weight",
        ),
        (
            "ingot.validate.identity.weights",
            "from ingot.graphs.checkpoint import Checkpoint",
            "ingot.graphs.checkpoint.Checkpoint",
        ),
        ("ingot.runtime.ort", "import torch", "torch"),
        ("ingot.runtime.ort", "import ingot.plugins", "ingot.plugins"),
        ("ingot.runtime.ort", "from ingot.plugins import *", "ingot.plugins.*"),
        (
            "ingot.runtime.ort",
            "from ingot.plugins import moe_dispatch",
            "ingot.plugins.moe_dispatch",
        ),
        ("ingot.runtime.ort", "from ingot.graphs import layers", "ingot.graphs.layers"),
        ("ingot.graphs.state", "import torch", "torch"),
        ("ingot.graphs.state", "from ingot.plugins import errors", "ingot.plugins.errors"),
        ("ingot.runtime.ort", "from ingot.export import build", "ingot.export.build"),
        ("ingot.runtime.ort", "import importlib\nimportlib.import_module('torch')", "torch"),
        (
            "ingot.runtime.ort",
            "from importlib import *\nimport_module(f'ingot.graphs.{x}')",
            "ingot.graphs",
        ),
        ("ingot.runtime.ort", "import export.ingot", "export.ingot"),
        ("ingot.graphs.olmoe", "from graphs.state import BATCH", "graphs.state.BATCH"),
        ("ingot.runtime.ort", "__import__('ingot.validate.run')", "ingot.validate.run"),
        ("ingot.runtime.ort", "from .session import load", ".session.load"),
        ("ingot.runtime.ort", "import onnxruntime", "onnxruntime"),
        ("ingot.validate.locate.locate", "from onnxruntime import InferenceSession", "onnxruntime"),
        ("ingot.validate.judge.metrics", "import torch", "torch"),
        ("ingot.validate.run", "import transformers", "transformers"),
    ],
)
def test_reports_a_forbidden_import(module: str, source: str, named: str) -> None:
    found = offences(module, source)
    assert found and named in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ingot.plugins.op", "import torch\nfrom ingot.plugins.errors import IngotError"),
        ("ingot.plugins.errors", "from __future__ import annotations"),
        (
            "ingot.graphs.olmoe",
            "from ingot.plugins import op\nfrom ingot.graphs.state import BATCH",
        ),
        ("ingot.export.capture", "import torch\ntorch.onnx.export(m)"),
        (
            "ingot.export.cli",
            "from ingot.validate.run import x\nfrom ingot.runtime.loading import load",
        ),
        ("ingot.export.ingot", "import json\nfrom ingot.plugins.errors import IngotError"),
        ("ingot.export.ingot", "from ingot.graphs.state import State"),
        ("ingot.runtime.ort", "from ingot.graphs.state import State"),
        (
            "ingot.runtime.trt",
            "from ingot.plugins import errors, library\nfrom ingot.export import ingot",
        ),
        ("ingot.runtime.ort", "import numpy\nx = 'import torch'  # import torch"),
        ("ingot.runtime.onnxruntime_session", "import os\nimport onnxruntime"),
        ("ingot.validate.run", "import torch\nfrom ingot.export.ingot import Manifest"),
    ],
)
def test_accepts_an_allowed_import(module: str, source: str) -> None:
    assert offences(module, source) == []


# The package, and the parts that name what a program begins with.
PUBLIC = {
    f"{name}.__init__" for name in ("ingot", "ingot.export", "ingot.runtime", "ingot.validate")
}


@pytest.mark.parametrize(
    "module", sorted(m for m in SOURCES if m.endswith("__init__") and m not in PUBLIC)
)
def test_keeps_package_files_to_a_docstring(module: str) -> None:
    body = ast.parse(SOURCES[module].read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    assert isinstance(body[0].value.value, str)


def test_has_no_module_called_utils() -> None:
    named = {piece for module in SOURCES for piece in module.split(".")}
    assert named.isdisjoint({"utils", "util", "helpers", "misc"})


def dependencies(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules that each one imports, wherever in its text, also inside functions and for types.

    Args:
        sources: by module name; one that is not among them does not count. A package is its
            ``__init__``, which counts where it is named itself, and not on the way to a submodule.
    """
    known = {name.removesuffix(".__init__"): name for name in sources}

    def module_of(name: str) -> str | None:
        # ``a.b.c`` is a module, or what the module ``a.b`` holds.
        while name and name not in known:
            name = name.rpartition(".")[0]
        return known.get(name)

    return {
        module: {found for name in imported(source) if (found := module_of(name))} - {module}
        for module, source in sources.items()
    }


def circle(sources: Mapping[str, str]) -> list[str]:
    """The modules of one import circle, the first again at its end; empty where there is none."""
    try:
        TopologicalSorter(dependencies(sources)).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circle({name: file.read_text(encoding="utf-8") for name, file in SOURCES.items()}) == []


@pytest.mark.parametrize(
    "back",
    [
        "from ingot.a import one",
        "import ingot.a as one",
        "from ingot import a",
        "def late():\n    from ingot.a import one",
        "if TYPE_CHECKING:\n    from ingot.a import one",
        "import importlib\nimportlib.import_module('ingot.a')",
    ],
)
def test_finds_a_circle(back: str) -> None:
    sources = {"ingot.a": "import ingot.b.c", "ingot.b.c": back, "ingot.__init__": ""}
    assert set(circle(sources)) == {"ingot.a", "ingot.b.c"}
    assert circle({**sources, "ingot.b.c": "import os"}) == []


def test_finds_a_circle_through_a_package_file() -> None:
    sources = {"ingot.b.__init__": "from ingot.b.c import d", "ingot.b.c": "from ingot.b import d"}
    assert set(circle(sources)) == set(sources)
    assert circle({**sources, "ingot.b.c": "import ingot.b.e", "ingot.b.e": ""}) == []
