"""An ingot's tokenizer.json makes the ids of AutoTokenizer, whichever file says them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizer_shapes import SHAPES, byte_level
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from ingot.export import tokenizer_worker
from ingot.export.build import build
from ingot.export.progress import Stages
from ingot.export.request import ExportRequest
from ingot.export.tokenizer import TokenizerError, copy_tokenizer, make_tokenizer
from ingot.export.tokenizer_files import TokenizerFilesError, read_tokenizer_files
from ingot.plugins.errors import IngotError
from ingot.runtime.tokenizer import encode_text, load_tokenizer

CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
TEXTS = (
    "The quick brown caf\u00e9, cafe\u0301",
    "a<|call|>b  <|call|> c<think>fox</think> <image>",
    "the<|end|> THE </s><s>[MASK] dog<pad>fox <|call|>",
    "",
)


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **plain, "special": True, **flags}


def typed(content: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", **token(content, **flags)}


# Beside tokenizer.json: what each file says.
FILES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "decoder": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "900": token("<|call|>"),
                "901": token("<think>", special=False, normalized=True),
                "899": token("dog", special=False, single_word=True),
            }
        }
    },
    "stripping": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "900": token("<|call|>", lstrip=True),
                "901": token("fox", rstrip=True, special=False),
                "902": token("THE", normalized=True, single_word=True),
            }
        }
    },
    "named": {
        "tokenizer_config": {
            "pad_token": "<pad>",
            "mask_token": typed("[MASK]", lstrip=True),
            "eos_token": "<|end|>",
            "cls_token": None,
            "image_token": "<image>",
        }
    },
    "additional": {
        "tokenizer_config": {
            "additional_special_tokens": ["<|call|>", typed("<think>", rstrip=True), "dog"],
            "added_tokens_decoder": {"900": token("</think>", special=False)},
        }
    },
    "extra": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<image>", "b": "fox"}}},
    "extra list": {"tokenizer_config": {"extra_special_tokens": ["<|call|>", "<image>"]}},
    "map": {
        "special_tokens_map": {
            "bos_token": token("<|call|>", rstrip=True),
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "additional_special_tokens": ["<think>", "<|call|>"],
        },
        "tokenizer_config": {"eos_token": "<|end|>", "mask_token": "[MASK]"},
    },
    "map that does not count": {
        "special_tokens_map": {"pad_token": "<pad>", "additional_special_tokens": ["<|call|>"]},
        "tokenizer_config": {"added_tokens_decoder": {"900": token("<think>")}},
    },
    "added": {
        "added_tokens": {"<|call|>": 901, "<think>": 900, "dog": 902},
        "tokenizer_config": {"eos_token": "<think>"},
    },
    "first and last": {
        "tokenizer_config": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "add_bos_token": True,
            "add_eos_token": True,
        }
    },
    "split": {
        "tokenizer_config": {
            "split_special_tokens": True,
            "additional_special_tokens": ["<|call|>"],
        }
    },
    "padded": {"tokenizer_config": {"mask_token": "[MASK]"}, "padding": {"pad_token": "<pad>"}},
}


@cache
def _shape(name: str) -> str:
    return SHAPES[name]().to_str()


def write(folder: Path, shape: str, files: dict[str, Any], model_type: str = "granite") -> Path:
    raw = json.loads(_shape(shape))
    if "padding" in files:
        made = Tokenizer(models.BPE())
        made.enable_padding(**files["padding"])
        raw["padding"] = json.loads(made.to_str())["padding"]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    config = {**CLASS, **files.get("tokenizer_config", {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("special_tokens_map", "added_tokens"):
        if name in files:
            (folder / f"{name}.json").write_text(json.dumps(files[name]))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a child does, here: a hundred interpreters would take half a minute."""

    def ask(_worker: Path, request: Any, **_limits: int) -> Any:
        return tokenizer_worker.answer(json.loads(json.dumps(request)))

    monkeypatch.setattr("ingot.export.tokenizer.ask", ask)


def as_ingot(folder: Path, out: Path, family_class: str = "GPT2Tokenizer") -> Tokenizer:
    out.mkdir()
    copy_tokenizer(folder.joinpath, make_tokenizer(folder.joinpath, family_class), out)
    return load_tokenizer(out)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_makes_the_ids_of_transformers(tmp_path: Path, shape: str, files: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder, shape, FILES[files])
    oracle = AutoTokenizer.from_pretrained(folder)
    mine = as_ingot(folder, tmp_path / "ingot")
    for text in TEXTS:
        expected = oracle(text)["input_ids"]
        assert encode_text(mine, text) == expected, text
        plain = oracle(text, add_special_tokens=False)["input_ids"]
        assert encode_text(mine, text, add_special_tokens=False) == plain
        assert mine.decode(expected) == oracle.decode(expected, skip_special_tokens=True)
    if files == "nothing":
        assert (tmp_path / "ingot/tokenizer.json").read_bytes() == (
            folder / "tokenizer.json"
        ).read_bytes()
    elif files not in ("first and last", "split"):
        assert len(encode_text(mine, TEXTS[1] + TEXTS[2])) < len(
            load_tokenizer(folder).encode(TEXTS[1] + TEXTS[2]).ids
        ), "tokens are whole that tokenizer.json alone splits"


@pytest.mark.usefixtures("in_process")
def test_keeps_its_ids_where_it_is_read_again(tmp_path: Path) -> None:
    # Also an ingot's own folder is one that transformers reads.
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder, "byte_fallback", FILES["map"])
    mine = as_ingot(folder, tmp_path / "ingot")
    shutil.copyfile(folder / "config.json", tmp_path / "ingot/config.json")
    oracle = AutoTokenizer.from_pretrained(tmp_path / "ingot")
    assert all(oracle(text)["input_ids"] == encode_text(mine, text) for text in TEXTS)
    assert make_tokenizer((tmp_path / "ingot").joinpath, "GPT2Tokenizer") is None


VOCAB_FILES: list[tuple[str, dict[str, Any]]] = [
    ("olmoe", {}),
    ("mamba2", {"tokenizer_class": "GPTNeoXTokenizerFast", "add_bos_token": True}),
    ("olmoe", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
    ("jetmoe", {"tokenizer_class": "GPT2TokenizerFast", "pad_token": "<pad>"}),
    ("jetmoe", {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "add_bos_token": True}),
    (
        "jetmoe",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_bos_token": True,
            "add_eos_token": True,
            "eos_token": typed("<|end|>", lstrip=True),
            "added_tokens_decoder": {"900": token("<|call|>")},
        },
    ),
    ("jetmoe", {"tokenizer_class": "GPT2Tokenizer", "bos_token": None, "add_bos_token": True}),
]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("model_type", "config"), VOCAB_FILES)
def test_makes_one_of_vocabulary_and_merges(
    tmp_path: Path, model_type: str, config: dict[str, Any]
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    byte_level().model.save(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    oracle = AutoTokenizer.from_pretrained(folder)
    family = "GPTNeoXTokenizer" if model_type in ("olmoe", "mamba2") else "GPT2Tokenizer"
    mine = as_ingot(folder, tmp_path / "ingot", family)
    for text in (*TEXTS, "<|endoftext|>a<|padding|> b"):
        assert encode_text(mine, text) == oracle(text)["input_ids"]


def test_leaves_vocabularies_of_other_classes_alone(tmp_path: Path) -> None:
    byte_level().model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    assert make_tokenizer(tmp_path.joinpath, "GPT2Tokenizer") is None


def test_a_checkpoint_without_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    assert make_tokenizer(tmp_path.joinpath, "GPT2Tokenizer") is None


def test_an_export_carries_all_of_it(
    make_checkpoint: Callable[..., Path], traces: Any, tmp_path: Path
) -> None:
    folder = make_checkpoint("olmoe")
    write(folder, "byte_level", FILES["decoder"], "olmoe")
    config = json.loads((folder / "config.json").read_text())
    shutil.copyfile(make_checkpoint("olmoe") / "config.json", folder / "config.json")
    assert config == {"model_type": "olmoe"}
    (folder / "added_tokens.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("tools")
    out = tmp_path / "out"
    manifest = build(
        ExportRequest(str(folder), "onnx", out), Stages(), None, capture=traces
    ).manifest
    text = TEXTS[1]
    expected = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert encode_text(load_tokenizer(out), text) == expected
    listed = {"tokenizer.json", "added_tokens.json", "additional_chat_templates/tool_use.jinja"}
    assert listed <= set(manifest.files)


def charsmap(raw: bytes) -> dict[str, Any]:
    text = base64.b64encode(raw).decode()
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": text}}


def regex(pattern: str) -> dict[str, Any]:
    return {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
    }


BOMB = [{"type": "Replace", "pattern": {"String": "o"}, "content": "o" * 1000}] * 5
HOSTILE: dict[str, dict[str, Any]] = {
    "no charsmap": charsmap(b""),
    "a charsmap of 4 GB": charsmap(struct.pack("<I", 0xFFFFFFFC) + bytes(64)),
    "a pattern that backtracks": regex("(.*)*.*(.*)*x$"),
    "a pattern that is none": regex("("),
    "a text that grows": {"normalizer": {"type": "Sequence", "normalizers": BOMB}},
    "a token that is not there": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<none>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "no pieces": {"model": {"type": "Unigram", "unk_id": 0, "vocab": []}},
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_outlives_one_that_ends_its_process(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingot.export.tokenizer.MEGABYTES", 512)
    raw = {**json.loads(_shape("byte_level")), **HOSTILE[fault]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json cannot be used \(.*\); put a whole"
    ) as e:
        make_tokenizer(tmp_path.joinpath, "GPT2Tokenizer")
    assert len(str(e.value)) < 600 and "\n" not in str(e.value)


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"{}", b"\xff", b'{"model":' * 100_000])
def test_refuses_a_file_that_is_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(TokenizerError, match="cannot be used"):
        make_tokenizer(tmp_path.joinpath, "GPT2Tokenizer")


def test_refuses_a_file_of_absurd_size(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        os.ftruncate(file.fileno(), 65 << 20)
    with pytest.raises(TokenizerError, match="has 68,157,440 bytes, and a tokenizer has at most"):
        make_tokenizer(tmp_path.joinpath, "GPT2Tokenizer")


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("tokenizer_config", "[]"),
        ("tokenizer_config", '{"eos_token": 2}'),
        ("tokenizer_config", '{"eos_token": {"lstrip": true}}'),
        ("tokenizer_config", '{"pad_token": {"content": "x", "lstrip": "yes"}}'),
        ("tokenizer_config", '{"added_tokens_decoder": ["x"]}'),
        ("tokenizer_config", '{"added_tokens_decoder": {"x": {"content": "x"}}}'),
        ("tokenizer_config", '{"added_tokens_decoder": {"-1": {"content": "x"}}}'),
        ("tokenizer_config", '{"added_tokens_decoder": {"5": "x"}}'),
        ("tokenizer_config", '{"additional_special_tokens": "x"}'),
        ("tokenizer_config", '{"additional_special_tokens": [7]}'),
        ("tokenizer_config", '{"extra_special_tokens": {"a": [1]}}'),
        ("special_tokens_map", '"x"'),
        ("special_tokens_map", '{"bos_token": {"content": 5}}'),
        ("special_tokens_map", '{"bos_token": ["<s>"]}'),
        ("added_tokens", '{"x": "5"}'),
        ("added_tokens", '{"x": -5}'),
        ("added_tokens", '{"x": true}'),
        ("added_tokens", "[" * 100_000),
        ("special_tokens_map", '{"x": ' + "9" * 5000 + "}"),
    ],
)
def test_refuses_tokens_that_are_none(tmp_path: Path, name: str, raw: str) -> None:
    (tmp_path / f"{name}.json").write_text(raw)
    with pytest.raises(IngotError) as error:
        read_tokenizer_files(tmp_path.joinpath)
    assert isinstance(error.value, TokenizerFilesError) and len(str(error.value)) < 500
