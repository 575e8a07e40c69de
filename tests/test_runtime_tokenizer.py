"""The tokenizer of an ingot: all of a text becomes ids, whatever was saved with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from damage import copied
from tokenizers import Tokenizer, models, pre_tokenizers

from ingot.runtime.cli import generate_command
from ingot.runtime.tokenizer import TokenizerError, load_tokenizer

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
    # Read by the name; the manifest lists what an export copied.
    ingot = copied(tiny_onnx, tmp_path / "ingot")
    cut_and_padded(ingot)
    asked = _generate(ingot, "--prompt", TEXT)
    assert asked.exit_code == 0, asked.output

    def by_ids(count: int) -> list[int]:
        ids = ",".join(map(str, range(count)))
        return [int(token) for token in _generate(ingot, "--prompt-ids", ids).stdout.split()]

    whole = by_ids(40)
    assert asked.stdout.strip() == words().decode(whole)
    assert whole != by_ids(5), "a prompt that was cut would give the same"
