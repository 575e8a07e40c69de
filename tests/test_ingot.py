"""The package as a Python program sees it: four functions, whatever else was imported before."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ingot

ROOT = Path(__file__).resolve().parent.parent
# Every module that can be imported here, which sets each as an attribute of its package.
IMPORT_ALL = """
import importlib, pkgutil
import ingot

for module in pkgutil.walk_packages(ingot.__path__, "ingot.", onerror=lambda name: None):
    # Only Triton's server has what that one imports.
    if module.name != "ingot.runtime.triton_model":
        importlib.import_module(module.name)
"""
CALL_ALL = """
import json, sys

checkpoint, out = sys.argv[1:]
made = ingot.export.export(checkpoint, out, target="onnx", validate=False)
report = ingot.validate.validate(out, checkpoint, plan="quick")
session = ingot.load(out)
tokens = list(ingot.generate(session, [[1, 2, 3]], max_new_tokens=4))
again = list(ingot.generate(out, [[1, 2, 3]], max_new_tokens=4))
print(json.dumps([made.manifest.verdict, report.verdict, tokens == again, len(tokens)]))
"""


def _python(code: str, *arguments: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_no_module_hides_a_function(tiny: Path, tmp_path: Path) -> None:
    printed = _python(IMPORT_ALL + CALL_ALL, tiny, tmp_path / "out")
    assert json.loads(printed) == ["skipped", "passed", True, 4]


def test_imports_nothing_by_itself() -> None:
    code = (
        "import sys; before = set(sys.modules); import ingot; print(*(set(sys.modules) - before))"
    )
    loaded = {name.partition(".")[0] for name in _python(code).split()}
    assert loaded - set(sys.stdlib_module_names) == {"ingot"}


def test_refuses_a_name_it_does_not_have() -> None:
    for module in (ingot, ingot.export, ingot.validate):
        with pytest.raises(AttributeError, match="has no attribute 'exprot'"):
            _ = module.exprot


def test_every_public_name_is_there() -> None:
    assert {name for name in ingot.__all__ if getattr(ingot, name) is None} == set()


def test_lists_public_names_before_their_first_use() -> None:
    for name in ("ingot", "ingot.export", "ingot.runtime", "ingot.validate"):
        code = f"import {name} as m; print(*{{*m.__all__, '__doc__'}} - set(dir(m)))"
        assert _python(code).split() == [], name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "tensorrt"}, "'tensorrt' is no target; give one of: onnx, ort, trt, trt-rtx."),
        ({"task": "chat"}, "'chat' is no task; give one of: generate, features, classify."),
        ({"precision": "int4"}, "'int4' is no precision; give one of: fp32, fp16, bf16."),
        ({"preset": "huge"}, "'huge' is no preset; give one of: tiny, small, full."),
        ({"builder": "me"}, "'me' is no builder; give one of: auto, tensorrt, tensorrt-rtx, none."),
        (
            {"extra_outputs": ["logits"]},
            "'logits' is no extra output; give one of: router_logits, hidden_states.",
        ),
        ({"precision": "bf16"}, "--precision bf16 goes with a TensorRT target"),
    ],
)
def test_export_refuses_what_the_command_refuses(
    tiny: Path, tmp_path: Path, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(ingot.IngotError) as caught:
        ingot.export.export(tiny, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_validate_refuses_what_the_command_refuses(tiny: Path, tiny_onnx: Path) -> None:
    with pytest.raises(ingot.IngotError, match="'fast' is no plan; give one of: quick, standard"):
        ingot.validate.validate(tiny_onnx, tiny, plan="fast")  # type: ignore[arg-type]
    with pytest.raises(ingot.IngotError, match="is not an ingot"):
        ingot.validate.validate(tiny, tiny)


def test_generate_refuses_a_folder_that_is_no_ingot(tiny: Path) -> None:
    with pytest.raises(ingot.IngotError, match="is not an ingot"):
        next(ingot.generate(tiny, [[1]]))


def test_finds_its_parts_where_links_did_not_survive(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "ingot", tmp_path / "ingot", symlinks=True)
    for link in [path for path in (tmp_path / "ingot").iterdir() if path.is_symlink()]:
        # As git writes it where it makes no links, and as some programs unpack a zip file.
        text = str(link.readlink())
        link.unlink()
        link.write_text(text)
    for part in ("export", "graphs", "plugins", "runtime", "validate"):
        skipped = shutil.ignore_patterns("__pycache__", "lib")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=skipped)
    code = (
        "import ingot.export.api, ingot.runtime.triton_repository as triton\n"
        "assert all(triton.source(file).is_file() for file in triton.CARRIED)\n"
        "print(ingot.export.api.__file__)"
    )
    assert _python(code, cwd=tmp_path).strip() == str(tmp_path / "export" / "api.py")
