"""The commands of docs/embedding.md, run as written, in a copy of the repository.

What needs a Docker engine or a Kubernetes cluster is not run here; the server's own launch script
takes their place.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import triton_server
from clone import ROOT, make_clone, run

from ingot.runtime import load
from ingot.runtime.generate import generate

TEXT = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
PROMPTS = [[17, 300, 5], [4]]
NEW = 16


def block(section: str, language: str) -> str:
    """The first block of a section in a language."""
    found = re.search(rf"```{language}\n(.*?)```", SECTIONS[section], re.DOTALL)
    assert found is not None
    return found.group(1)


def commands(section: str) -> list[str]:
    return block(section, "sh").splitlines()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clone(tmp_path_factory.mktemp("clone"))


def ran(command: str, clone: Path) -> str:
    done = run(command, clone)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def expected(clone: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What the Python session generates greedily."""
    steps = list(generate(load(clone / "out" / "olmoe-ort"), prompts, max_new_tokens=NEW))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def printed(text: str) -> list[list[int]]:
    return [[int(word) for word in line.split()] for line in text.splitlines()]


def test_starts_everything_in_at_most_five_commands() -> None:
    assert set(SECTIONS) == {"Python", "C++", "C", "Triton Inference Server", "Kubernetes"}
    for section in SECTIONS:
        assert 2 <= len(commands(section)) <= 5
        assert commands(section)[0] == "make export MODEL=olmoe TARGET=ort"


@pytest.mark.slow
def test_python(clone: Path) -> None:
    export, generated, inspected, measured = commands("Python")
    ran(export, clone)
    assert printed(ran(generated, clone)) == expected(clone, PROMPTS)
    assert "2 GroupQueryAttention, 2 MoE" in " ".join(ran(inspected, clone).split())
    assert "peak memory" in ran(measured, clone)
    (clone / "example.py").write_text(block("Python", "python"))
    assert len(ran(".venv/bin/python example.py", clone).splitlines()) == 8


@pytest.mark.cpp
@pytest.mark.skipif("INGOT_CPP" not in os.environ, reason="`make cpp-test` builds C++")
@pytest.mark.parametrize(("section", "prompts"), [("C++", PROMPTS), ("C", PROMPTS[:1])])
def test_a_program_in(section: str, prompts: list[list[int]], clone: Path) -> None:
    *before, last = commands(section)
    for command in before:
        ran(command, clone)
    assert printed(ran(last, clone)) == expected(clone, prompts)


@pytest.mark.triton
@pytest.mark.skipif(triton_server.missing() is not None, reason=str(triton_server.missing()))
def test_triton(clone: Path, tmp_path: Path) -> None:
    export, made, build, start, asked = commands("Triton Inference Server")
    assert build.startswith("docker build") and start.startswith("docker run")
    ran(export, clone)
    ran(made, clone)
    assert ran(".venv/bin/python -m runtime triton --check repository", clone)
    with triton_server.boot(clone / "repository", "olmoe_generate", tmp_path / "log") as server:
        streamed = ran(asked.replace(":8000", f":{server.http}"), clone)
    events = [json.loads(line) for line in re.findall(r"^data: (.*)$", streamed, re.MULTILINE)]
    assert [[event["token_id"] for event in events]] == expected(clone, PROMPTS[:1])
    # Kubernetes is told the same, and its pod asked the same.
    assert commands("Kubernetes")[:3] == [export, made, build]
    asked = re.sub(r"--retry\S* (\d+ )?", "", asked)
    assert f"\nkubectl exec deploy/olmoe -- {asked}\n" in SECTIONS["Kubernetes"]
