"""Stop ids, padding and beginnings are ids of the vocabulary, or the export says which is none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ingot.export.cli import export_command
from ingot.export.generation import GenerationError, read_generation
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.config import Facts, ModelConfig

FACTS = Facts(routers=(), context_length=64, eos_token_ids=(2,), pad_token_id=1)
CONFIG = ModelConfig(100, 8, 1, False, FACTS)
NO_IDS = ["</s>", "2", True, False, 2.0, float("nan"), [2, "x"], [[2]], [None], {"a": 2}, -2, 100]


def read(
    folder: Path, raw: bytes | None = None, *, facts: Facts = FACTS, **fields: Any
) -> dict[str, Any]:
    if raw is not None:
        (folder / "generation_config.json").write_bytes(raw)
    return read_generation(Checkpoint(folder, fields, {}), replace(CONFIG, facts=facts))


def given(folder: Path, **fields: Any) -> dict[str, Any]:
    return read(folder, json.dumps(fields).encode())


def test_takes_what_config_json_says(tmp_path: Path) -> None:
    assert read(tmp_path) == {"eos_token_ids": [2], "pad_token_id": 1, "context_length": 64}


@pytest.mark.parametrize(
    ("fields", "ends", "pad"),
    [
        ({"eos_token_id": 7}, [7], 1),
        ({"eos_token_id": [0, 99]}, [0, 99], 1),
        ({"eos_token_id": []}, [], 1),
        ({"eos_token_id": [7, 0, 7, 7]}, [7, 0], 1),
        ({"eos_token_id": None, "pad_token_id": None, "bos_token_id": None}, [2], 1),
        ({"pad_token_id": 99, "bos_token_id": 0, "temperature": "hot"}, [2], 99),
        # As LLaMA's first conversions have it.
        ({"pad_token_id": -1}, [2], 0),
    ],
)
def test_prefers_generation_config(
    tmp_path: Path, fields: dict[str, Any], ends: list[int], pad: int
) -> None:
    found = given(tmp_path, **fields)
    assert (found["eos_token_ids"], found["pad_token_id"]) == (ends, pad)


@pytest.mark.parametrize("value", NO_IDS)
@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id", "pad_token_id"])
def test_refuses_what_is_no_id(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(GenerationError, match=rf"^generation_config\.json: {name} is .* 0 to 99"):
        given(tmp_path, **{name: value})


def test_refuses_a_list_where_one_id_is_meant(tmp_path: Path) -> None:
    for name in ("bos_token_id", "pad_token_id"):
        with pytest.raises(GenerationError, match=f"{name} is .1, 2.; it must be a token id of"):
            given(tmp_path, **{name: [1, 2]})


def test_refuses_an_id_of_config_json_too(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match=r"^config\.json: eos_token_id is \[100\]"):
        read(tmp_path, facts=replace(FACTS, eos_token_ids=(100,)))
    with pytest.raises(GenerationError, match=r"^config\.json: pad_token_id is -3"):
        read(tmp_path, facts=replace(FACTS, pad_token_id=-3))
    with pytest.raises(GenerationError, match=r"^config\.json: bos_token_id is 'x'"):
        read(tmp_path, bos_token_id="x")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b'"text"',
        b'{"eos_token_id": 2,}',
        b'\xef\xbb\xbf{"eos_token_id": 2}',
        '{"eos_token_id": 2, "_name": "café"}'.encode("latin-1"),
        '{"eos_token_id": 2}'.encode("utf-16"),
        b'{"eos_token_id": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
    ],
)
def test_refuses_a_file_that_is_none(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(GenerationError, match=r"generation_config\.json.*mend the file or remove"):
        read(tmp_path, raw)


def test_says_so_before_anything_is_made(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    arguments = ["--model", str(folder), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(export_command, arguments)
    assert result.exit_code == 2 and "eos_token_id is '</s>'" in result.output
    assert "write weights" not in result.output
    assert not (tmp_path / "out").exists()
