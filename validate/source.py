"""Where the checkpoint of a validation is: a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from ingot.export.ingot import Manifest
from ingot.graphs.adapter import refuse_forgotten
from ingot.graphs.folder import Folder, is_file, is_folder
from ingot.graphs.hub import HUB_NAME, Source, find, meant
from ingot.graphs.names import FAMILIES, RELEASED
from ingot.plugins.errors import IngotError, shown


def find_checkpoint(
    checkpoint: str, manifest: Manifest, revision: str | None, adapter: Path | None
) -> Source:
    """Where a checkpoint is, its config read as far as its architecture.

    Of a name on the hub all but the weights is downloaded, unless the hub's cache has it. Without a
    revision it is the one that the ingot was made from, where the ingot names it.

    Args:
        checkpoint: a folder, or ``org/name`` on the hub.
        manifest: of the ingot.
        revision: branch, tag or commit on the hub.
        adapter: the folder of what was merged into the checkpoint, if anything was.

    Raises:
        IngotError: no such folder, hub name or revision, or a checkpoint without weights or of an
            architecture that is not there.
    """
    if revision is not None and is_folder(checkpoint):
        raise IngotError(
            f"--revision is of a name on the hub, and {shown(checkpoint)} is a folder, which has "
            "the one revision that lies there; leave it out."
        )
    if not is_folder(checkpoint) and not is_file(checkpoint):
        _refuse_name(checkpoint)
        if revision is None and manifest.source.get("checkpoint") == checkpoint:
            revision = manifest.source.get("revision")
    source = find(checkpoint, revision)
    # Before its config, which a folder that is an adapter and nothing else does not have.
    refuse_forgotten(source.folder, adapter, source.hub_name)
    folder = Folder.read(source.folder)
    if source.hub_name is None:
        # On the hub the weights are looked for when they are fetched.
        folder.weight_map()
    if folder.family != manifest.model_type:
        raise IngotError(
            f"{checkpoint} is a checkpoint of {folder.family} and the ingot was made from one of "
            f"{manifest.model_type}; give the checkpoint it was made from."
        )
    return source


def _refuse_name(checkpoint: str) -> None:
    """Refuse what is no name on the hub, with what was meant, where that shows."""
    if checkpoint in FAMILIES:
        raise IngotError(
            f"{checkpoint!r} is the name of a family and not of one checkpoint; give the folder or "
            f"the hub name that the ingot was made from, such as {RELEASED[checkpoint]}, or for a "
            "preset the folder that its export made in `checkpoints`, beside the ingot."
        )
    if not HUB_NAME.match(checkpoint):
        raise IngotError(
            f"{shown(checkpoint)} is not a folder, nor org/name on the hub{meant(checkpoint)}"
        )
