"""What an export takes of a checkpoint beside its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ingot.export.build import build
from ingot.export.progress import Stages
from ingot.export.request import ExportRequest
from ingot.plugins.links import LinkError


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the graph was captured before the folder was looked at")


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
        *("chat_template.jinja", "chat_templates/tool_use.jinja", "generation_config.json"),
    ],
)
def test_carries_nothing_into_an_ingot_that_lies_elsewhere(
    tiny: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret").write_text("the key of another service")
    checkpoint = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).symlink_to(tmp_path / "secret")
    request = ExportRequest(str(checkpoint), "ort", tmp_path / "out")
    with pytest.raises(LinkError, match=f"{name} is a link out of its folder"):
        build(request, Stages(), None, capture=_never)
    assert not (tmp_path / "out").exists()
