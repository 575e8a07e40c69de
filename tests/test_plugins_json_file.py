"""The reader of JSON files from somebody else."""

import json
import os
from pathlib import Path

import pytest

from ingot.plugins.errors import shown
from ingot.plugins.json_file import MOST_DEPTH, JsonError, parse_json, read_json, read_object


def written(folder: Path, raw: bytes) -> Path:
    path = folder / "config.json"
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, 2.5, "x", null, true]}', '{"a": Infinity, "b": -1e400}', "[]", '"é"', "3"],
)
def test_reads_what_json_reads(tmp_path: Path, text: str) -> None:
    assert read_json(written(tmp_path, text.encode())) == json.loads(text)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b'{"a": "\xe9"}', "not UTF-8"),
        ("\ufeff{}".encode(), "BOM"),
        (b"[" * 100_000 + b"]" * 100_000, "deep"),
        (b"[" * 500 + b"]" * 500, "deep"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "deep"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "integer of thousands of digits$"),
    ],
)
def test_refuses_in_one_sentence_that_names_the_file(tmp_path: Path, raw: bytes, why: str) -> None:
    with pytest.raises(JsonError, match=why) as refused:
        read_json(written(tmp_path, raw))
    assert "config.json" in str(refused.value)
    assert len(str(refused.value)) < 400


def test_takes_the_depth_that_it_names(tmp_path: Path) -> None:
    just = b"[" * MOST_DEPTH + b"1" + b"]" * MOST_DEPTH
    assert read_json(written(tmp_path, just)) == json.loads(just)
    with pytest.raises(JsonError, match="deep"):
        parse_json(b"[" + just + b"]", "it")


def test_does_not_read_more_than_it_may(tmp_path: Path) -> None:
    path = written(tmp_path, b"[" + b" " * 1000 + b"]")
    assert read_json(path, most_bytes=1002) == []
    with pytest.raises(JsonError, match="larger"):
        read_json(path, most_bytes=1001)


def test_refuses_a_folder_a_pipe_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path, tmp_path / "pipe.json", tmp_path / "none.json"):
        with pytest.raises(JsonError, match="cannot be read"):
            read_json(path)


@pytest.mark.parametrize(
    "value", ["x" * 10**6, 10**4000, list(range(10**5)), {"a": "y" * 10**6}, [[["z" * 999]]]]
)
def test_values_are_quoted_in_few_characters(value: object) -> None:
    assert len(shown(value)) < 300


def test_a_short_value_is_quoted_as_it_is() -> None:
    assert shown("softmax") == "'softmax'"
    assert shown([1, 2]) == "[1, 2]"


def test_an_object_is_asked_for(tmp_path: Path) -> None:
    assert read_object(written(tmp_path, b'{"a": 1}')) == {"a": 1}
    for raw in (b"[]", b"null", b'"x"', b"1"):
        with pytest.raises(JsonError, match=r"config\.json holds .* no JSON object"):
            read_object(written(tmp_path, raw))
