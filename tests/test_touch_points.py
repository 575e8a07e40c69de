"""How many source files what comes next has to touch, counted on what is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy_hybrid

from ingot.graphs.names import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("export", "graphs", "plugins", "runtime", "validate")


# Architectures


def strings_and_imports(source: str) -> Iterator[str]:
    """The strings of a source text, its docstrings apart, and the modules of graphs/ it imports."""
    tree = ast.parse(source)
    other = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            other |= {id(first.value)} if isinstance(first, ast.Expr) else set()
        elif isinstance(node, ast.keyword) and node.arg == "kernels":
            # The file of an operator's kernels, which may be called as an architecture is.
            other.add(id(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield "" if id(node) in other else node.value
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ingot.graphs"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("ingot.graphs"))


def naming(architecture: str) -> set[str]:
    """The source files that know one architecture by its name."""
    word = re.compile(rf"\b{architecture}\b", re.IGNORECASE)
    return {
        str(path.relative_to(ROOT))
        for part in PARTS
        for path in (ROOT / part).rglob("*.py")
        if any(map(word.search, strings_and_imports(path.read_text(encoding="utf-8"))))
    }


# Layouts in which other packages than transformers write an architecture, and what configs may call
# one kind of its layers.
LAYOUTS = {"mamba2": {"graphs/mamba_ssm.py", "graphs/mamba2_mixer.py"}}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_architecture_is_one_file_and_its_name(name: str) -> None:
    assert naming(name) == {f"graphs/{name}.py", "graphs/names.py"} | LAYOUTS.get(name, set())


def test_no_source_knows_the_toy() -> None:
    # It lives in tests/, and its fixture adds its name: the same two.
    assert naming(toy_hybrid.FAMILY.model_type) == set()


def test_finds_what_names_an_architecture() -> None:
    text = '"""Of OLMoE."""\nfrom ingot.graphs.granite import FAMILY\nx = ["mamba2", "jetmoe_2"]\n'
    found = " ".join(strings_and_imports(text))
    assert "OLMoE" not in found
    assert all(name in found for name in ("granite", "mamba2"))
