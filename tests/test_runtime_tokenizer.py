"""The tokenizer of an ingot: all of a text becomes ids, whatever was saved with it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from damage import copied
from tokenizers import Tokenizer, models, pre_tokenizers

from ingot.export.ingot import Manifest, file_infos
from ingot.runtime.cli import generate_command
from ingot.runtime.tokenizer import TokenizerError, decode_ids, encode_text, load_tokenizer

TEXT = " ".join(f"w{number}" for number in range(40))


def words(count: int = 512) -> Tokenizer:
    """``w0`` is 0, ``w1`` is 1, and so on."""
    vocabulary = {f"w{number}": number for number in range(count)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def cut_and_padded(folder: Path) -> None:
    """Save one as a training run leaves it: five tokens of a text, or as many of padding."""
    tokenizer = words()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5, pad_id=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (saved.encode(TEXT).ids, saved.encode("w3").ids) == ([0, 1, 2, 3, 4], [3, 9, 9, 9, 9])


def test_encodes_all_of_a_text_and_adds_nothing(tmp_path: Path) -> None:
    cut_and_padded(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(TEXT).ids == list(range(40))
    assert tokenizer.encode("w3").ids == [3]


def test_names_the_option_that_needs_none(tmp_path: Path) -> None:
    message = re.escape(
        f"{tmp_path} holds no tokenizer.json, so text cannot be encoded; give token ids: "
        "--prompt-ids 1,2,3."
    )
    with pytest.raises(TokenizerError, match=f"^{message}$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": {}}'])
def test_refuses_a_damaged_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is no tokenizer \(.*\); export"):
        load_tokenizer(tmp_path)


def _generate(ingot: Path, *arguments: str) -> Result:
    return CliRunner().invoke(generate_command, [str(ingot), "--max-new-tokens", "8", *arguments])


def test_a_prompt_is_fed_whole(tiny_onnx: Path, tmp_path: Path) -> None:
    ingot = copied(tiny_onnx, tmp_path / "ingot")
    cut_and_padded(ingot)
    sealed(ingot)
    asked = _generate(ingot, "--prompt", TEXT)
    assert asked.exit_code == 0, asked.output

    def by_ids(count: int) -> list[int]:
        ids = ",".join(map(str, range(count)))
        return [int(token) for token in _generate(ingot, "--prompt-ids", ids).stdout.split()]

    whole = by_ids(40)
    assert asked.stdout.strip() == words().decode(whole)
    assert whole != by_ids(5), "a prompt that was cut would give the same"


def saved(folder: Path, **parts: Any) -> Path:
    """An ingot's tokenizer whose parts are replaced, as whoever writes the folder can."""
    raw = {**json.loads(words().to_str()), **parts}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


def sealed(ingot: Path) -> None:
    """Let the manifest list what lies there."""
    manifest = Manifest.read(ingot)
    replace(manifest, files=file_infos(ingot, {})).write(ingot)


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def test_refuses_one_that_panics(tmp_path: Path) -> None:
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(TokenizerError, match=r"is no tokenizer \(.*\); export again"):
        load_tokenizer(saved(tmp_path, normalizer=charsmap))
    tokenizer = load_tokenizer(saved(tmp_path, pre_tokenizer=split("(a+)+$")))
    with pytest.raises(TokenizerError, match=r"the text cannot be encoded \(.*\); give token ids"):
        encode_text(tokenizer, "a" * 40 + "c")
    assert encode_text(load_tokenizer(saved(tmp_path)), "w3 w9") == [3, 9]


@pytest.mark.parametrize("text", ["\ud800", None, 5, ["w1"]])
def test_refuses_what_is_no_text(tmp_path: Path, text: Any) -> None:
    with pytest.raises(TokenizerError, match="cannot be encoded"):
        encode_text(load_tokenizer(saved(tmp_path)), text)


@pytest.mark.parametrize("ids", [[-1], [2**32], ["1"], [1.5], None])
def test_refuses_what_are_no_ids(tmp_path: Path, ids: Any) -> None:
    with pytest.raises(TokenizerError, match="cannot be decoded"):
        decode_ids(load_tokenizer(saved(tmp_path)), ids)


def test_lets_the_user_interrupt(tmp_path: Path) -> None:
    class Interrupted:
        def encode(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_text(Interrupted(), "text")  # type: ignore[arg-type]


def test_a_command_says_what_its_tokenizer_does(tiny_onnx: Path, tmp_path: Path) -> None:
    ingot = copied(tiny_onnx, tmp_path / "ingot")
    for parts in (
        {"pre_tokenizer": split("(a+)+$")},
        {"model": {"type": "WordLevel", "vocab": {"w0": 0}, "unk_token": "?"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    ):
        saved(ingot, **parts)
        for option in ("--prompt", "--chat"):
            (ingot / "chat_template.jinja").write_text("{{ messages[0].content }}")
            sealed(ingot)
            result = _generate(ingot, option, "a" * 40 + "c")
            assert result.exit_code == 2 and "token" in result.stderr, result.output
            assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_refuses_a_file_of_absurd_size(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(TokenizerError, match=r"has 1,073,741,824 bytes, and a tokenizer has at"):
        load_tokenizer(tmp_path)


def test_names_the_command_that_makes_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"pip install transformers sentencepiece protobuf,.*"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("said", [None, False, True])
def test_splits_special_tokens_where_the_config_says_so(tmp_path: Path, said: bool | None) -> None:
    tokenizer = words()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"split_special_tokens": said}))
    ids = encode_text(load_tokenizer(tmp_path), "w1 <s>")
    assert ids == ([1, 0] if said else [1, 512])


def test_refuses_a_damaged_config(tmp_path: Path) -> None:
    (saved(tmp_path) / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)
