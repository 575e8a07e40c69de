"""The C++ library of ``runtime/embed`` against the Python session, over its example program.

``make cpp-test`` builds it and says where with ``INGOT_CPP``; what needs no Python to judge is in
``runtime/embed/tests``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_hybrid
from conftest import MakeCheckpoint, MakeIngot
from kinds import KINDS
from test_export_ingot_schema import (
    BUFFERS,
    IN_NUMBERS,
    REFUSED,
    change,
    listed,
    one_buffer,
    with_states,
)
from test_export_ingot_schema import DATA as SCHEMA_1

from ingot.export.ingot import LIBRARY, MANIFEST, Manifest, ManifestError
from ingot.plugins.cpu.library import CpuLibrary
from ingot.plugins.cpu.operators import INSTALLED
from ingot.runtime.generate import generate
from ingot.runtime.loading import load
from ingot.runtime.session import Session

BUILD = Path(os.environ.get("INGOT_CPP", "/nowhere"))
EXAMPLE = BUILD / "ingot_generate"
CONSUMER = Path(__file__).resolve().parent.parent / "runtime" / "embed" / "tests" / "consumer"

pytestmark = [
    pytest.mark.cpp,
    pytest.mark.skipif(
        not EXAMPLE.is_file(), reason="the C++ example is not built; run make cpp-test"
    ),
]

PROMPTS = [[17, 300, 5, 44, 101, 256, 7], [411], [9, 8, 207]]
NEW = 64


def _run(ingot: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(item) for item in (EXAMPLE, ingot, *arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def _refused(ingot: Path, *arguments: object) -> str:
    done = _run(ingot, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def _cpp(ingot: Path, prompts: list[list[int]], *arguments: object) -> list[list[int]]:
    given = [word for prompt in prompts for word in ("--prompt-ids", ",".join(map(str, prompt)))]
    done = _run(ingot, *given, *arguments)
    assert done.returncode == 0, done.stderr
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


def _python(session: Session, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    steps = list(generate(session, prompts, max_new_tokens=NEW, **options))
    return [[t for t in row if t is not None] for row in zip(*steps, strict=True)]


@pytest.fixture(scope="module", params=[*KINDS, "toy_hybrid"])
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Iterator[Path]:
    # With its output tied to its embedding, a random Granite repeats its last token for ever.
    repeats = request.param.startswith("granite")
    config = {"tie_word_embeddings": False} if repeats else {}
    with toy_hybrid.registered():
        yield make_checkpoint(request.param, **config)


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_generates_greedily_what_python_does(
    checkpoint: Path, target: str, make_ingot: MakeIngot
) -> None:
    ingot = make_ingot(checkpoint, target)
    session = load(ingot)
    together = _python(session, PROMPTS)
    assert [len(row) for row in together] == [NEW] * len(PROMPTS)
    # A model that repeats one token would hide a wrong position or cache.
    assert all(len(set(row)) > 3 for row in together)
    assert _cpp(ingot, PROMPTS, "--max-new-tokens", NEW) == together
    assert _cpp(ingot, PROMPTS[:1], "--max-new-tokens", NEW) == _python(session, PROMPTS[:1])


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_generates_the_same_whatever_weights_are_stored_in(
    checkpoint: Path, weights: str, make_ingot: MakeIngot
) -> None:
    ingot = make_ingot(checkpoint, "ort", weights=weights)
    assert _cpp(ingot, PROMPTS, "--max-new-tokens", NEW) == _python(load(ingot), PROMPTS)


@pytest.mark.parametrize("weights", ["checkpoint", "bf16", "int8", "int4"])
def test_generates_on_ingots_own_kernels_what_python_does(
    checkpoint: Path, weights: str, make_ingot: MakeIngot, cpu_library: CpuLibrary
) -> None:
    ingot = make_ingot(checkpoint, "ort", kernels="ingot", weights=weights)
    library = INSTALLED if weights == "int4" else ingot / LIBRARY
    more = ("--max-new-tokens", NEW, "--operators", library)
    assert _cpp(ingot, PROMPTS, *more) == _python(load(ingot), PROMPTS)
    assert "no library that has them is named" in _refused(ingot, "--prompt-ids", 1)


def test_stops_where_python_does(tiny_ort: Path) -> None:
    session = load(tiny_ort)
    stop = _python(session, PROMPTS)[0][5]
    expected = _python(session, PROMPTS, stop_ids=[stop])
    assert len(expected[0]) < NEW
    assert _cpp(tiny_ort, PROMPTS, "--max-new-tokens", NEW, "--stop-id", stop) == expected


@pytest.mark.parametrize("task", ["features", "classify"])
def test_refuses_an_ingot_of_another_task(task: str, make_ingot: MakeIngot) -> None:
    family = {"features": "olmoe", "classify": "jetmoe"}[task]
    ingot = make_ingot(Path(family), "ort", task=task, preset="tiny")
    assert _refused(ingot, "--prompt-ids", 1) == (
        f"this ingot was exported for the task '{task}' and cannot generate; export it with "
        "--task generate."
    )


def _damaged(ingot: Path, out: Path, what: str) -> Path:
    shutil.copytree(ingot, out)
    if what == "weights":
        path = out / "weights.safetensors"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif what == "truncated":
        path = out / MANIFEST
        path.write_bytes(path.read_bytes()[:1000])
    else:
        raw = json.loads((out / MANIFEST).read_text())
        if what == "failed":
            raw["validation"]["verdict"] = "failed"
        elif what == "schema":
            raw["schema_version"] = 2
        (out / MANIFEST).write_text(json.dumps(raw))
    return out


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weights", "is not the file that was validated (its SHA-256 differs from ingot.json)"),
        ("truncated", "ingot.json is damaged ("),
        ("failed", "failed its validation, so its numbers are wrong"),
        ("schema", "has schema version 2; this library reads 1"),
    ],
)
def test_refuses_what_python_refuses(
    what: str, message: str, tiny_ort: Path, tmp_path: Path
) -> None:
    ingot = _damaged(tiny_ort, tmp_path / what, what)
    assert message in _refused(ingot, "--prompt-ids", 1)
    with pytest.raises(Exception, match=r"validat|damaged|schema version"):
        load(ingot)
    if what == "failed":
        assert _cpp(ingot, [[1]], "--allow-failed", "--max-new-tokens", 1)


@pytest.mark.parametrize(
    ("place", "value", "named"), REFUSED, ids=[f"{each[0]}-{n}" for n, each in enumerate(REFUSED)]
)
def test_refuses_every_field_that_python_refuses(
    place: str, value: Any, named: str, tmp_path: Path
) -> None:
    ingot = Path(shutil.copytree(SCHEMA_1 / "granite-ort", tmp_path / "ingot"))
    assert _cpp(ingot, [[1]], "--max-new-tokens", 1)
    change(ingot, place, value)
    if (place, value) == ("model_type", "gpt2"):
        # Any architecture: the graph is all that a C++ session knows of it.
        assert _cpp(ingot, [[1]], "--max-new-tokens", 1)
    else:
        assert "ingot.json" in _refused(ingot, "--prompt-ids", 1)


@pytest.mark.parametrize("kernels", ["portable", "ingot", None])
@pytest.mark.parametrize("weights", ["bfloat16", "int8", None])
@pytest.mark.parametrize("scales", ["float16", "float32", "int8", None])
@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_has_pythons_verdict_on_kernels_and_what_goes_with_them(
    kernels: str | None,
    weights: str | None,
    scales: str | None,
    library: bool,
    target: str,
    tmp_path: Path,
) -> None:
    ingot = Path(shutil.copytree(SCHEMA_1 / "mamba2-onnx", tmp_path / "ingot"))
    said = IN_NUMBERS if weights == "int8" else None
    said = said and ({**said, "scales": scales} if scales else said)
    for place, value in {
        "kernels": kernels,
        "weights": weights,
        "quantization": said,
        "target": target,
    }.items():
        if value is not None:
            change(ingot, place, value)
    if library:
        (ingot / LIBRARY).write_bytes(b"program")
        listed(ingot, LIBRARY)
    done = _run(ingot, "--prompt-ids", 1, "--max-new-tokens", 1)
    try:
        runs = Manifest.read(ingot).kernels != "ingot"
    except ManifestError:
        assert "ingot.json is damaged (" in done.stderr
    else:
        assert done.returncode == (0 if runs else 2)
        assert runs or "no library that has them is named" in done.stderr


@pytest.mark.parametrize("kind", ["key", "value", "conv", "ssm"])
@pytest.mark.parametrize(("target", "kernels", "kinds"), BUFFERS)
def test_has_pythons_verdict_on_states_that_are_one_buffer(
    target: str, kernels: str | None, kinds: set[str], kind: str, tmp_path: Path
) -> None:
    ingot = with_states(tmp_path, kind)
    one_buffer(ingot, target, kernels, kind)
    done = _run(ingot, "--prompt-ids", 1, "--max-new-tokens", 1)
    if kind not in kinds:
        with pytest.raises(ManifestError, match="shared"):
            Manifest.read(ingot)
        assert "ingot.json is damaged (states[" in done.stderr and ".shared" in done.stderr
    else:
        Manifest.read(ingot)
        assert "damaged" not in done.stderr
        assert kernels != "ingot" or "no library that has them is named" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-ids", "1,512"], "token id 512 is outside the vocabulary of 512"),
        (["--prompt-ids", "1", "--max-new-tokens", "512"], "exceed this model's context of 512"),
        (["--prompt-ids", "1", "--max-new-tokens", "0"], "it must be at least 1"),
        (["--prompt-ids", "1,,2"], "--prompt-ids '' is not a number"),
        (["--prompt-ids", "99999999999999999999"], "is not a number that fits"),
        (["--prompt-ids", "1", "--temperature", "nan"], "temperature is nan"),
        (["--prompt-ids"], "--prompt-ids needs a value"),
        (["--prompt-ids", "1", "--operators"], "--operators needs a value"),
        (["--prompt-id", "1"], "'--prompt-id' is not an option"),
        ([], "at least one --prompt-ids"),
    ],
)
def test_refuses_a_wrong_command_line(arguments: list[str], message: str, tiny_ort: Path) -> None:
    assert message in _refused(tiny_ort, *arguments)


def test_says_how_to_make_what_is_missing(tmp_path: Path) -> None:
    message = _refused(tmp_path / "gone", "--prompt-ids", 1)
    assert "is not an ingot: it has no ingot.json; make one with ingot export" in message


def test_leaves_nothing_in_the_users_home(tiny_ort: Path, tmp_path: Path) -> None:
    # ONNX Runtime's own telemetry would make a database there.
    command = [str(EXAMPLE), str(tiny_ort), "--prompt-ids", "1", "--max-new-tokens", "2"]
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    assert list(tmp_path.rglob("*")) == []


def test_the_c_example_generates_the_same(tiny_ort: Path) -> None:
    command = [str(BUILD / "ingot_generate_c"), str(tiny_ort), *map(str, PROMPTS[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    expected = _python(load(tiny_ort), PROMPTS[:1])[0]
    assert [int(word) for word in done.stdout.split()] == expected[:16]


def test_the_c_example_takes_a_library_by_name(
    ingots: Callable[..., Path], cpu_library: CpuLibrary
) -> None:
    ingot = ingots("mamba2", kernels="ingot", weights="checkpoint")
    ids = list(map(str, PROMPTS[0]))
    command = [str(BUILD / "ingot_generate_c"), str(ingot)]
    done = subprocess.run([*command, *ids], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "no library that has them is named" in done.stderr
    command += ["--operators", str(ingot / LIBRARY)]
    done = subprocess.run([*command, *ids], capture_output=True, text=True, check=True, timeout=300)
    expected = _python(load(ingot), PROMPTS[:1])[0]
    assert [int(word) for word in done.stdout.split()] == expected[:16]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


def test_the_c_example_refuses_what_is_no_id(tiny_ort: Path) -> None:
    command = [str(BUILD / "ingot_generate_c"), str(tiny_ort), "17", "3x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: '3x' is no token id; give whole numbers.\n"


def test_an_installed_library_is_found_by_cmake(tiny_ort: Path, tmp_path: Path) -> None:
    def cmake(*arguments: object) -> None:
        command = ["cmake", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    prefix, build = tmp_path / "prefix", tmp_path / "build"
    cmake("--install", BUILD, "--prefix", prefix)
    cmake("-S", CONSUMER, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("--build", build)
    command = [str(build / "consumer"), str(tiny_ort)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) == _python(load(tiny_ort), [[1]])[0][0]
    # The installed example starts, so it finds both libraries where they are.
    command = [str(prefix / "bin" / "ingot_generate"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.startswith("usage: ingot_generate INGOT")
