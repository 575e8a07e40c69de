"""Where a file really lies, for folders that come from somebody else.

An archive or a clone may hold a link to any file of the machine that opens it; what is read through
it, and copied into what is published, would be that file. Standard library only.
"""

from __future__ import annotations

from pathlib import Path

from ingot.plugins.errors import IngotError, shown


class LinkError(IngotError):
    """A link that leads out of its folder."""


def require_inside(folder: Path, name: str, *, hub: bool = False) -> Path:
    """The path of a file of a folder, which lies there and not elsewhere.

    A link within the folder is followed, and the folder itself may be reached by one.

    Args:
        folder: that the file is to be of.
        name: of the file, relative.
        hub: whether the folder may be a snapshot of the hub's cache, whose files are links to the
            same model's ``blobs``.

    Raises:
        LinkError: the file is a link, or lies below one, that leads out or nowhere.
    """
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve()
        dangling = path.is_symlink() and not real.exists()
    # A circle of links is a RuntimeError; a name may be longer than the system takes.
    except (OSError, RuntimeError) as error:
        raise LinkError(f"{shown(str(path))} cannot be followed to a file.") from error
    if real.is_relative_to(home):
        if dangling:
            raise LinkError(f"{path} is a link to nothing; put the file itself there.")
        return path
    model = home.parent.parent
    in_hub = hub and home.parent.name == "snapshots" and model.name.startswith("models--")
    if in_hub and real.parent == model / "blobs" and real.is_file():
        return path
    raise LinkError(
        f"{path} is a link out of its folder, and what it leads to may be anybody's; put the file "
        "itself there (cp -L), or leave it out."
    )
