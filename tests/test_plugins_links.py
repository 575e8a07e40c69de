"""Links: those that stay in their folder, and those that lead out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingot.plugins.links import LinkError, require_inside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``a/`` with a file, beside ``ab/`` with a secret."""
    for name in ("a/more", "ab"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "file").write_text("x")
    (tmp_path / "ab" / "secret").write_text("key")
    return tmp_path / "a"


@pytest.mark.parametrize("target", ["file", "./more/../file", "../a/file"])
def test_follows_a_link_within_the_folder(folder: Path, target: str) -> None:
    (folder / "link").symlink_to(target)
    assert require_inside(folder, "link").read_text() == "x"


def test_takes_a_folder_that_is_a_link_itself(folder: Path) -> None:
    folder.with_name("other").symlink_to(folder)
    assert require_inside(folder.with_name("other"), "file").is_file()
    # What is not there is for the reader to miss.
    assert not require_inside(folder, "absent").exists()


@pytest.mark.parametrize("target", ["../ab/secret", "/etc/hostname", "..", "/", "../a-not"])
def test_refuses_a_link_that_leads_out(folder: Path, target: str) -> None:
    (folder / "link").symlink_to(target)
    with pytest.raises(LinkError, match=r"is a link out of its folder"):
        require_inside(folder, "link")


def test_refuses_a_file_below_a_link_and_one_that_climbs(folder: Path) -> None:
    (folder / "link").symlink_to("../ab")
    for name in ("link/secret", "../ab/secret", str(folder.with_name("ab") / "secret")):
        with pytest.raises(LinkError, match="link out of its folder"):
            require_inside(folder, name)


def test_refuses_a_link_to_nothing_and_a_circle(folder: Path) -> None:
    (folder / "gone").symlink_to("never")
    with pytest.raises(LinkError, match="link to nothing"):
        require_inside(folder, "gone")
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to("one")
    with pytest.raises(LinkError, match="cannot be followed"):
        require_inside(folder, "one")


def _cache(tmp_path: Path, model: str) -> Path:
    """A snapshot of the hub's cache, and a blob of its model."""
    snapshot = tmp_path / f"models--org--{model}" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot.parents[1] / "blobs" / "ff").write_text(model)
    return snapshot


def test_follows_a_snapshot_to_the_blobs_of_its_own_model_alone(tmp_path: Path) -> None:
    snapshot = _cache(tmp_path, "open")
    _cache(tmp_path, "private")
    (snapshot / "ours").symlink_to("../../blobs/ff")
    assert require_inside(snapshot, "ours", hub=True).read_text() == "open"
    with pytest.raises(LinkError):
        require_inside(snapshot, "ours")
    for n, target in enumerate(
        ("../../../models--org--private/blobs/ff", "../../blobs", "../../refs", "/etc/hostname")
    ):
        (snapshot / f"link{n}").symlink_to(target)
        with pytest.raises(LinkError):
            require_inside(snapshot, f"link{n}", hub=True)
