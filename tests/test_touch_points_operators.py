"""How many source files an operator takes, counted on those that are there.

What a newcomer with kernels and a TensorRT plugin edits are the files whose *code* names the
operator, in any spelling, and the record of its kernels' grids, which has their names instead.
Not counted: comments and docstrings, where an operator is an example; graphs/, which call it;
and the lowerings in export/, which an operator whose node is in the canonical graph has only where
a target has something better for it than its function body. Each of those is written for its own
sake and may come later.

Kernels for CPUs may come later too. They are counted apart: the interface, the kernel, what calls
it by ctypes and in ONNX Runtime, the check, and what reads its weights for a validation.

CausalConv is no node of the canonical graph, so its lowering for TensorRT is not optional. It took
eleven files: the seven, its translation in export/capture.py, which is counted here, and
export/passes/match.py, export/passes/causal_conv.py and export/lower_trt.py, which are not.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from ingot.plugins.operator import Operator
from ingot.plugins.registry import OPERATORS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("export", "plugins", "runtime", "validate")
NOT_COUNTED = re.compile(r"export/(passes/|lower_)|runtime/embed/(tests|examples)/")
OF_CPU = ("plugins/cpu/", "validate/identity/weights_panels.py")
# Those of its kernels for CPUs.
MOST_OF_CPU = 6
# The files that a newcomer edits, or adds, most of them for the kernels.
MOST = 8
# Names kernels, not operators.
RECORD = "plugins/kernels/record.py"


def code(path: Path) -> str:
    """The text of a source file without its comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [each for each in node.body if not _is_string(each)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


CODE = {
    path.relative_to(ROOT).as_posix(): code(path)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cpp", ".jinja")
    and not NOT_COUNTED.match(path.relative_to(ROOT).as_posix())
}


def files_of(operator: Operator) -> set[str]:
    """The source files that a newcomer edits for an operator like this one."""
    spelling = re.compile(operator.snake.replace("_", "[ _-]?"), re.IGNORECASE)
    return {name for name, text in CODE.items() if spelling.search(text)} | {RECORD}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda each: each.name)
def test_an_operator_takes_few_files(operator: Operator) -> None:
    every = files_of(operator)
    of_cpu = {name for name in every if name.startswith(OF_CPU)}
    assert len(of_cpu) <= MOST_OF_CPU, sorted(of_cpu)
    found = every - of_cpu
    assert len(found) <= MOST, sorted(found)
    # Its own, the registry, the kernels, their plan and its interface, and the check.
    assert found >= {
        f"plugins/{operator.snake}.py",
        "plugins/registry.py",
        f"plugins/kernels/{operator.kernels}.py",
        f"plugins/csrc/{operator.kernels}.cpp",
        "plugins/csrc/ingot_kernels.h",
        "plugins/check.py",
        RECORD,
    }


def test_code_is_told_from_what_is_said_of_it() -> None:
    assert "moe_linear" in CODE["plugins/csrc/moe.cpp"]
    # Its docstring has MoeDispatch for an example.
    assert "MoeDispatch" in (ROOT / "plugins/library.py").read_text()
    assert "MoeDispatch" not in CODE["plugins/library.py"]
