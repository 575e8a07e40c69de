"""Finding a checkpoint folder: a local path, or a name on the Hugging Face hub to download."""

from __future__ import annotations

import re
from pathlib import Path

from ingot.graphs.checkpoint import CheckpointError

# Weights, configuration and tokenizer; never pickles, never code.
PATTERNS = ("*.safetensors", "*.json", "*.model", "*.jinja", "vocab.txt", "merges.txt")
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
OFFLINE = (
    "Without a network: give the path of a checkpoint folder, a hub name that is already in the "
    "Hugging Face cache, or a family name with --preset tiny for seeded random weights."
)


def describe(folder: Path) -> dict[str, str | None]:
    """What to call a checkpoint folder in a manifest: hub name and commit, or the folder's name."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return {"checkpoint": name, "revision": folder.name}
    return {"checkpoint": folder.resolve().name, "revision": None}


def resolve(model: str, revision: str | None = None) -> Path:
    """The local folder of ``model``.

    Args:
        model: a folder, or ``org/name`` on the hub (downloaded with huggingface_hub's own
            progress bars, or taken from its cache).
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: no such folder, hub name, revision or network.
    """
    if Path(model).is_dir():
        return Path(model)
    if not HUB_NAME.match(model):
        raise CheckpointError(
            f"{model!r} is neither a folder, nor a family name, nor org/name on the hub."
        )
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        return Path(hub.snapshot_download(model, revision=revision, allow_patterns=list(PATTERNS)))
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model} has no revision {revision!r} on the hub.") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model} is gated on the hub: accept its terms there, then run `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {model}, and no public model of that name on the hub."
        ) from error
    # The client's transport errors derive from no class of huggingface_hub's own.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"there is no folder {model}, and the hub could not be reached ({reason[0]}). {OFFLINE}"
        ) from error
