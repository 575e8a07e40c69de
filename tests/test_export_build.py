"""What an export takes of a checkpoint beside its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint, MakeIngot

from ingot.export.build import build
from ingot.export.early import check_request
from ingot.export.ingot import Manifest
from ingot.export.progress import Stages
from ingot.export.request import ExportError, ExportRequest
from ingot.plugins.errors import IngotError
from ingot.plugins.links import LinkError
from ingot.runtime.generate import generate
from ingot.runtime.loading import load
from ingot.runtime.session import SessionError


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the graph was captured before the folder was looked at")


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
        *(
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
            "generation_config.json",
        ),
        "model.safetensors",
        "config.json",
    ],
)
def test_carries_nothing_into_an_ingot_that_lies_elsewhere(
    tiny: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret").write_text("the key of another service")
    checkpoint = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    (checkpoint / name).parent.mkdir(exist_ok=True)
    if (checkpoint / name).is_file():
        shutil.move(checkpoint / name, tmp_path / "secret")
    (checkpoint / name).symlink_to(tmp_path / "secret")
    request = ExportRequest(str(checkpoint), "ort", tmp_path / "out")
    with pytest.raises(LinkError, match=f"{name} is a link out of its folder"):
        build(request, Stages(), None, capture=_never)
    assert not (tmp_path / "out").exists()


def _tokens(ingot: Path, prompt: int, new: int) -> list[Any]:
    steps = generate(load(ingot), [list(range(1, 1 + prompt))], max_new_tokens=new, stop_ids=())
    return list(steps)


def test_takes_sequences_as_long_as_asked_for(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    folder = make_checkpoint("granite", max_position_embeddings=16)
    plain, longer, shorter = (
        make_ingot(folder, "ort", context=context) for context in (None, 20, 8)
    )
    lengths = [
        Manifest.read(ingot).generation["context_length"] for ingot in (plain, longer, shorter)
    ]
    assert lengths == [16, 20, 8]
    for ingot, length in zip((plain, longer, shorter), lengths, strict=True):
        with pytest.raises(SessionError, match=f"context of {length}.* --context"):
            _tokens(ingot, length - 2, 3)
    assert len(_tokens(longer, 18, 2)) == 2
    # Nothing but the limit is another.
    assert _tokens(longer, 10, 5) == _tokens(plain, 10, 5)


def test_limits_what_nothing_limits_where_asked_to(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    ingot = make_ingot(make_checkpoint("mamba2"), "ort", context=5)
    assert Manifest.read(ingot).generation["context_length"] == 5


@pytest.mark.parametrize("context", [0, -1, 2**31, 10**400, True, "4096", 16.0])
def test_refuses_a_context_that_is_no_length(tmp_path: Path, context: Any) -> None:
    request = ExportRequest("x", "ort", tmp_path / "out", context=context)
    with pytest.raises(ExportError, match="--context is"):
        check_request(request)


def test_refuses_a_file_that_a_manifest_could_not_name(tiny: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "$(x).jinja").write_text("{{ messages }}")
    request = ExportRequest(str(checkpoint), "ort", tmp_path / "out")
    with pytest.raises(IngotError, match=r"\$\(x\).jinja' and must be the name of a file"):
        build(request, Stages(), None, capture=_never)
