"""Where an export's checkpoint comes from, seen in what lies in the folders afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ingot.export.progress import Stages
from ingot.export.request import ExportError, ExportRequest
from ingot.export.source import check_space, open_checkpoint
from ingot.graphs.hub import Source


def _opened(model: str, out: Path, **request: Any) -> Path:
    return open_checkpoint(ExportRequest(model, "onnx", out, **request), Stages()).path


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with 1000 bytes left."""
    usage = type(shutil.disk_usage("/"))(2000, 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_takes_a_folder_as_it_is(tiny: Path, tmp_path: Path) -> None:
    assert _opened(str(tiny), tmp_path / "out") == tiny
    assert list(tmp_path.iterdir()) == []


def test_takes_a_family_s_released_model_without_a_preset(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Fetched(Source):
        def fetch(self) -> Path:
            return self.folder

    def find(model: str, revision: str | None) -> Source:
        asked.append((model, revision))
        return Fetched(tiny, model)

    monkeypatch.setattr("ingot.export.early.find", find)
    assert _opened("olmoe", tmp_path / "out", revision="v1") == tiny
    assert asked == [("allenai/OLMoE-1B-7B-0924", "v1")]


def test_makes_a_preset_beside_the_ingot_and_finds_it_again(tmp_path: Path) -> None:
    made = _opened("olmoe", tmp_path / "out", preset="tiny")
    assert made == tmp_path / "checkpoints" / "olmoe-tiny-seed0"
    content, times = _content(made), {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert _opened("olmoe", tmp_path / "another", preset="tiny", task="features") == made
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == times
    other = _opened("olmoe", tmp_path / "out", preset="tiny", seed=1)
    assert other == tmp_path / "checkpoints" / "olmoe-tiny-seed1"
    assert {name for name, text in _content(other).items() if text != content[name]} == {
        "model.safetensors"
    }


def test_makes_a_classifier_s_preset_of_its_own(tmp_path: Path) -> None:
    made = [
        _opened("jetmoe", tmp_path / "out", preset="tiny", task=task).name
        for task in ("generate", "classify")
    ]
    assert made == ["jetmoe-tiny-seed0", "jetmoe-tiny-seed0-classify"]


def test_refuses_a_preset_s_folder_that_holds_another_config(tmp_path: Path) -> None:
    made = _opened("olmoe", tmp_path / "out", preset="tiny")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    content = _content(made)
    with pytest.raises(
        ExportError, match=r"olmoe-tiny-seed0 holds another config than preset tiny"
    ):
        _opened("olmoe", tmp_path / "out", preset="tiny")
    assert _content(made) == content


def test_refuses_a_preset_of_a_folder(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--preset goes with a family name"):
        _opened(str(tiny), tmp_path / "out", preset="tiny")


@pytest.mark.parametrize("preset", [None, "tiny"])
def test_refuses_a_name_that_is_a_family_and_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "olmoe").mkdir()
    with pytest.raises(
        ExportError, match=r"is a family name and also a folder here; write \./olmoe"
    ):
        _opened("olmoe", tmp_path / "out", preset=preset)


@pytest.mark.usefixtures("full")
def test_makes_nothing_where_a_preset_has_no_room(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"olmoe-tiny-seed0 needs .* GB and .* has 0\.0 GB free"):
        _opened("olmoe", tmp_path / "out", preset="tiny")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("full")
def test_asks_for_no_more_room_than_there_is(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "yet" / "there", 1000)
    with pytest.raises(ExportError, match=f"there needs .* and {tmp_path} has"):
        check_space(tmp_path / "not" / "yet" / "there", 1001)
