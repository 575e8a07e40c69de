"""Where the checkpoint of a validation is found, and what is said where it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ingot.export.ingot import Manifest
from ingot.graphs.folder import CheckpointError
from ingot.graphs.hub import Source
from ingot.graphs.names import FAMILIES
from ingot.plugins.errors import IngotError
from ingot.validate.source import find_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"

# huggingface_hub reads its environment when it is imported.
FIND = """
import sys
from types import SimpleNamespace
from ingot.plugins.errors import IngotError
from ingot.validate.source import find_checkpoint
for revision in (None, "main", "v2", "none"):
    of = {"checkpoint": "org/name", "revision": sys.argv[1]}
    manifest = SimpleNamespace(source=of, model_type="olmoe")
    try:
        print(find_checkpoint("org/name", manifest, revision, None).fetch())
    except IngotError as error:
        print("refused:", error)
"""


def of(model_type: str = "olmoe", **source: Any) -> Manifest:
    """A manifest as far as it is asked."""
    manifest = Manifest.__new__(Manifest)
    object.__setattr__(manifest, "model_type", model_type)
    object.__setattr__(manifest, "source", source)
    return manifest


def test_a_folder_is_itself(tiny: Path) -> None:
    found = find_checkpoint(str(tiny), of(), None, None)
    assert (found, found.fetch()) == (Source(tiny), tiny)


def test_a_hub_name_is_found_in_the_cache_without_a_network(tiny: Path, tmp_path: Path) -> None:
    for commit, name in ((COMMIT, "main"), (OTHER, "v2")):
        snapshot = tmp_path / "models--org--name" / "snapshots" / commit
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        snapshot.symlink_to(tiny)
        refs = tmp_path / "models--org--name" / "refs"
        refs.mkdir(exist_ok=True)
        (refs / name).write_text(commit)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", FIND, OTHER],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    recorded, main, tag, absent = done.stdout.splitlines()
    # Without a revision it is the one that the ingot names, wherever its branch is by now.
    assert [Path(line).name for line in (recorded, main, tag)] == [OTHER, COMMIT, OTHER]
    assert absent.startswith("refused: there is no folder org/name, and the hub could not be")


def test_a_revision_is_the_ingots_only_for_its_own_checkpoint(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def find(name: str, revision: str | None) -> Source:
        asked.append((name, revision))
        return Source(tiny, name)

    monkeypatch.setattr("ingot.validate.source.find", find)
    named = {"checkpoint": "org/name", "revision": COMMIT}
    for name, revision in (("org/name", None), ("org/name", "v2"), ("org/other", None)):
        find_checkpoint(name, of(**named), revision, None)
    assert asked == [("org/name", COMMIT), ("org/name", "v2"), ("org/other", None)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((family, f"'{family}' is the name of a family and not of one") for family in FAMILIES),
        ("olmoe-tiny", "'olmoe-tiny' is not a folder, nor org/name on the hub; did you mean olmoe"),
        ("/absent/folder", "'/absent/folder' is not a folder, nor org/name on the hub."),
        ("https://huggingface.co/org/name", "; did you mean org/name?"),
        ("a b/c", "is not a folder, nor org/name on the hub"),
    ],
)
def test_what_is_no_checkpoint_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IngotError, match=r"^[^\n]*[.?]$") as error:
        find_checkpoint(name, of(), None, None)
    assert said in str(error.value)


def test_a_revision_goes_with_a_hub_name(tiny: Path) -> None:
    with pytest.raises(IngotError, match=r"^--revision is of a name on the hub, and .* leave it"):
        find_checkpoint(str(tiny), of(), "main", None)
    with pytest.raises(CheckpointError, match=r"'\.\./x' is no revision"):
        find_checkpoint("org/name", of(), "../x", None)


def test_another_architecture_is_refused_before_anything_is_downloaded(tiny: Path) -> None:
    with pytest.raises(IngotError, match=r"checkpoint of olmoe and .* one of mamba2"):
        find_checkpoint(str(tiny), of("mamba2"), None, None)


def test_a_folder_without_weights_or_config_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(IngotError, match=r"has no config\.json"):
        find_checkpoint(str(tmp_path), of(), None, None)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tiny / "config.json").read_text()))
    )
    with pytest.raises(IngotError, match=r"model\.safetensors"):
        find_checkpoint(str(tmp_path), of(), None, None)
    (tmp_path / "file").write_text("")
    with pytest.raises(IngotError, match=r"is a file; give the folder that holds it"):
        find_checkpoint(str(tmp_path / "file"), of(), None, None)
