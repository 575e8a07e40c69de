"""The README's commands, run as written, in a copy of the repository."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from clone import ROOT, make_clone, run
from kinds import KINDS

from ingot.graphs.names import FAMILIES

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clone(tmp_path_factory.mktemp("clone"))


def test_the_two_commands(clone: Path) -> None:
    block = re.search(r"```sh\n(.*?)```", README, re.DOTALL)
    assert block is not None
    export, test = block.group(1).splitlines()
    done = run(export, clone)
    assert done.returncode == 0, done.stderr
    assert "verdict" in done.stdout
    assert "passed" in done.stdout
    generated = re.search(r"generated ids: ([\d ]+)", done.stdout)
    assert generated is not None
    assert len(generated.group(1).split()) == 16
    # The README shows what this very command printed.
    assert generated.group(0).strip() in README
    # This suite is what `make test` runs; here only that the command exists.
    assert test == "make test"
    assert run("make --dry-run test", clone).returncode == 0


# One beside OLMoE, with a state of another kind; their own files test that all of them pass.
WITH_MAKE = [pytest.param(family, marks=pytest.mark.slow) for family in KINDS if family != "olmoe"]


def test_every_family_has_a_row() -> None:
    for family in FAMILIES:
        assert f"| `{family}` |" in README


@pytest.mark.parametrize("family", WITH_MAKE)
def test_every_family_exports_with_make(clone: Path, family: str) -> None:
    done = run(f"make export MODEL={family} TARGET=ort", clone)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
    assert (clone / "out" / f"{family}-ort" / "ingot.json").is_file()


def test_an_own_checkpoint(clone: Path) -> None:
    commands = re.findall(r"^python -m .*$", README, re.MULTILINE)
    assert len(commands) == 3
    checkpoint = clone / "out" / "checkpoints" / "olmoe-tiny-seed0"
    assert checkpoint.is_dir(), "test_the_two_commands made it"
    shutil.copytree(checkpoint, clone / "DIR")
    _write_tokenizer(clone / "DIR")
    for command in commands:
        done = run(f"PATH={clone}/.venv/bin:$PATH; {command}", clone)
        assert done.returncode == 0, done.stderr
    assert (clone / "OUT-TRT" / "model.engine").is_file()
    python = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert python is not None
    (clone / "example.py").write_text(python.group(1))
    done = run(".venv/bin/python example.py", clone)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
