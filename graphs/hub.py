"""Finding a checkpoint folder: a local path, or a name on the Hugging Face hub to download."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from ingot.graphs.adapter import ADAPTER_WEIGHTS
from ingot.graphs.folder import (
    INDEX,
    SINGLE,
    CheckpointError,
    Folder,
    is_file,
    is_folder,
    pickles,
    read_weight_map,
)
from ingot.graphs.names import ALIASES, FAMILIES, RELATIVES, nearest
from ingot.plugins.errors import shown

# Configuration and tokenizer, which come before any weight; never pickles, never code.
PATTERNS = ("*.json", "*.model", "*.jinja", "vocab.txt", "merges.txt")
ADAPTER_PATTERNS = (ADAPTER_WEIGHTS, *PATTERNS)
# Of a repository's folders, which hold the same weights for other programs, the one that is read.
TEMPLATES = "additional_chat_templates"
# A pattern's star is any text, slashes too, so none says "in any other folder": the name of another
# differs at some letter, or ends too early or too late.
ELSEWHERE = (
    *(f"{TEMPLATES[:at]}[!{letter}]*/*" for at, letter in enumerate(TEMPLATES)),
    *(f"{TEMPLATES[:at]}/*" for at in range(len(TEMPLATES))),
    f"{TEMPLATES}[!/]*/*",
    f"{TEMPLATES}/*/*",
    *(f"{TEMPLATES}/{pattern}" for pattern in PATTERNS if pattern != "*.jinja"),
)
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*\Z")
ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", re.ASCII
)
# A branch, tag, commit or pull request (refs/pr/1): a path of names, none of them hidden.
REVISION = re.compile(r"[A-Za-z0-9_][\w.+@=-]*(/[A-Za-z0-9_][\w.+@=-]*)*\Z", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}\Z")
OFFLINE = (
    "Without a network: give the path of a checkpoint folder, a hub name that is already in the "
    "Hugging Face cache, or a family name with --preset tiny for seeded random weights."
)


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found; one on the hub has no weights here yet.

    Attributes:
        folder: the local folder, with all but the weights.
        hub_name: ``org/name`` where the weights are; None where they are in the folder.
    """

    folder: Path
    hub_name: str | None = None

    def fetch(self) -> Path:
        """The folder with its weights: those that are read of it, each once.

        Raises:
            CheckpointError: no weights of a kind that is read, or no network.
        """
        if self.hub_name is None or self._has_weights():
            return self.folder
        name, commit = self.hub_name, self.folder.name
        import huggingface_hub as hub

        with _hub_errors(name, commit):
            files = list(hub.HfApi().list_repo_files(name, revision=commit))
        _download(name, commit, tuple(map(escape, self._weights(files))))
        return self.folder

    def _has_weights(self) -> bool:
        """Whether an earlier download left them in the cache."""
        if (self.folder / SINGLE).is_file():
            return True
        if not (self.folder / INDEX).is_file():
            return False
        shards = set(read_weight_map(self.folder / INDEX).values())
        return all((self.folder / shard).is_file() for shard in shards)

    def _weights(self, files: list[str]) -> list[str]:
        """Which of the repository's files hold the weights, in the order they are looked for."""
        if SINGLE in files:
            return [SINGLE]
        if INDEX not in files:
            top = sorted(file for file in files if "/" not in file)
            layout = Folder.read(self.folder).layout
            raise CheckpointError(
                pickles(top, str(self.hub_name), layout)
                or f"{self.hub_name} has neither {SINGLE} nor {INDEX} on the hub."
            )
        shards = sorted(set(read_weight_map(self.folder / INDEX).values()))
        for shard in shards:
            if shard not in files or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{self.hub_name}: {INDEX} names {shown(shard)}, which is no safetensors file "
                    "of that repository; its upload may be unfinished."
                )
        return shards


def describe(folder: Path) -> dict[str, str | None]:
    """What to call a checkpoint folder in a manifest: hub name and commit, or the folder's name."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return {"checkpoint": name, "revision": folder.name}
    return {"checkpoint": folder.resolve().name, "revision": None}


def find(model: str, revision: str | None = None) -> Source:
    """Where ``model`` is; of one on the hub, all but the weights is downloaded.

    Args:
        model: a folder, or ``org/name`` on the hub (downloaded with huggingface_hub's own
            progress bars, or taken from its cache).
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: no such folder, hub name, revision or network.
    """
    if is_folder(model):
        return Source(Path(model))
    if is_file(model):
        raise CheckpointError(f"{shown(model)} is a file; give the folder that holds it.")
    if not HUB_NAME.match(model):
        raise CheckpointError(
            f"{shown(model)} is neither a folder, nor a family name ({', '.join(FAMILIES)}), nor "
            f"org/name on the hub{meant(model)}"
        )
    # It becomes part of paths in the client's cache.
    if revision is not None and not (REVISION.match(revision) and ".." not in revision):
        raise CheckpointError(
            f"{shown(revision)} is no revision; give a branch, a tag or a commit of {model}."
        )
    return Source(_snapshot(model, revision, PATTERNS), model)


def meant(model: str) -> str:
    """How a sentence ends that knows no such model: with what was meant, where that shows."""
    address = ADDRESS.match(model)
    if address:
        return f"; did you mean {address[1]}?"
    if model in ALIASES:
        return f"; give the folder or the hub name of a {model} checkpoint."
    if model in RELATIVES:
        relative, has = RELATIVES[model]
        asked = f"; did you mean {relative}?" if relative in FAMILIES else "."
        return f"{asked} {model} is not there: it has {has}."
    name = nearest(model, FAMILIES)
    return f"; did you mean {name}?" if name else "."


def resolve_adapter(adapter: str) -> Path:
    """The local folder of an adapter: a folder, or ``org/name`` on the hub.

    Raises:
        CheckpointError: no such folder, hub name or network.
    """
    if is_folder(adapter):
        return Path(adapter)
    if not HUB_NAME.fullmatch(adapter):
        raise CheckpointError(
            f"--adapter {shown(adapter)} is neither a folder nor org/name on the hub."
        )
    return _snapshot(adapter, None, ADAPTER_PATTERNS)


def _snapshot(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """``_download``, of a commit that is one."""
    folder = _download(name, revision, patterns)
    if not COMMIT.match(folder.name):
        raise CheckpointError(
            f"the hub calls the commit of {name} {shown(folder.name)}, which is none; look whom "
            "HF_ENDPOINT names."
        )
    return folder


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The client's folder of one commit, with the files that fit a pattern.

    They are those at the top of it, and templates of chats in their folder.
    """
    import huggingface_hub as hub

    with _hub_errors(name, revision):
        return Path(
            hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(ELSEWHERE),
            )
        )


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """The client's errors as sentences."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {shown(revision)} on the hub.") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated on the hub: accept its terms there, then run `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {name}, and no public model of that name on the hub."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreached(name, error) from error
    except ValueError as error:
        # Of a name, an answer or a file's name in it, that the client does not take.
        raise CheckpointError(
            f"there is no folder {name}, and the hub's client refused the name or what the hub "
            f"answered ({_reason(error)}). {OFFLINE}"
        ) from error
    # The client's transport errors derive from no class of huggingface_hub's own.
    except Exception as error:
        raise _unreached(name, error) from error


def _unreached(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"there is no folder {name}, and the hub could not be reached ({_reason(error)}). {OFFLINE}"
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
