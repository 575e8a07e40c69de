"""What lies in a checkpoint folder: its config, its architecture and the files of its weights.

Nothing here needs PyTorch, so what can be refused without it is refused before it is imported.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ingot.graphs import mamba_ssm, names
from ingot.plugins.errors import IngotError, named, shown
from ingot.plugins.json_file import MOST_BYTES, JsonError, read_json

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of config.json: a field that is far too long is refused by its name.
MOST_CONFIG_BYTES = 32 << 20
SUPPORTED = ", ".join((*names.FAMILIES, *names.ALIASES))
# Weights by the name that transformers and mamba_ssm give them; then those of other tools, among
# which a trainer leaves its own states.
PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")
NO_WEIGHTS = ("training_args.*", "optimizer.*", "scheduler.*", "rng_state*", "scaler.*")

# Popped one by one, so that no more than one tensor is in memory twice; cloned, because tied
# tensors share memory, which safetensors refuses.
CONVERT = (
    "import sys, torch; from pathlib import Path; from safetensors.torch import save_file; "
    "folder = Path(sys.argv[1]); files = sorted(folder.glob(sys.argv[2])); "
    'held = [torch.load(file, map_location="cpu", weights_only=True) for file in files]; '
    "w = {name: tensor for each in held "
    'for name, tensor in each.get("state_dict", each.get("model", each)).items()}; '
    "del held; "
    "w = {name: w.pop(name).contiguous().clone() for name in list(w)}; "
    'save_file(w, folder / "model.safetensors", metadata={"format": "pt"})'
)


class CheckpointError(IngotError):
    """A checkpoint folder that cannot be read, or does not hold what its config promises."""


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder whose config was read, and nothing else.

    Attributes:
        path: the folder.
        config: ``config.json``, parsed, as transformers writes it.
        layout: whose ``config.json`` and tensor names are in the folder.
    """

    path: Path
    config: dict[str, Any]
    layout: str = "Hugging Face"

    @classmethod
    def read(cls, path: Path) -> Folder:
        """Read the config.

        Raises:
            IngotError: no folder or config, or one that is no JSON object or of another kind of
                layout than its fields say.
        """
        if not is_folder(path):
            raise CheckpointError(f"{path} is not a folder; give a Hugging Face checkpoint folder.")
        config = read_object(path / CONFIG)
        if mamba_ssm.wrote(config):
            return cls(path, mamba_ssm.config(config), mamba_ssm.LAYOUT)
        return cls(path, config)

    @property
    def family(self) -> str:
        """The architecture, of ``names.FAMILIES``.

        Raises:
            CheckpointError: no ``model_type``, or one Ingot does not have.
        """
        return family_name(model_type_of(self.config))

    @property
    def sizes(self) -> str:
        """What messages call the place that says how large each tensor is."""
        foreign = self.layout == mamba_ssm.LAYOUT
        return f"config.json ({mamba_ssm.SIZES})" if foreign else CONFIG

    def tensor_names(self, stored: Iterable[str]) -> dict[str, str]:
        """What transformers calls each tensor of the folder.

        Raises:
            ConfigError: tensors that do not belong to the config.
        """
        if self.layout == mamba_ssm.LAYOUT:
            return mamba_ssm.tensor_names(self.config, stored)
        return {name: name for name in stored}

    def weight_map(self) -> dict[str, str] | None:
        """Tensor name -> the file it lies in, or None where all lie in ``model.safetensors``.

        Raises:
            CheckpointError: no such files, or an index that is malformed or names files elsewhere.
        """
        if (self.path / SINGLE).is_file():
            return None
        if not (self.path / INDEX).is_file():
            files = sorted(file.name for file in self.path.iterdir() if file.is_file())
            raise CheckpointError(
                pickles(files, self.path, self.layout)
                or f"{self.path} has neither {SINGLE} nor {INDEX}, so no weights that can be read"
                f"{_others(files)}; download or copy them there, with the names they had."
            )
        return read_weight_map(self.path / INDEX)


def _others(files: list[str]) -> str:
    found = [name for name in files if name.endswith(".safetensors")]
    return f" beside {shown(found[0])}" if found else ""


def is_folder(path: str | Path) -> bool:
    """Whether a folder is there; a name that no file system takes is none, nor is an empty one."""
    try:
        return bool(str(path)) and Path(path).is_dir()
    except OSError:
        return False


def is_file(path: str | Path) -> bool:
    """Whether a file is there; see ``is_folder``."""
    try:
        return Path(path).is_file()
    except OSError:
        return False


def model_type_of(config: dict[str, Any]) -> str:
    """The ``model_type`` of a ``config.json``.

    Raises:
        CheckpointError: there is none.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"config.json has no model_type; supported: {SUPPORTED}.")
    return model_type


def family_name(model_type: str) -> str:
    """The architecture that computes a ``model_type``, of ``names.FAMILIES``.

    Raises:
        CheckpointError: none does.
    """
    name = names.ALIASES.get(model_type, model_type)
    if name not in names.FAMILIES:
        raise CheckpointError(
            f"config.json: model_type is {shown(model_type)}; supported: {SUPPORTED}."
            f"{names.nearest_relative(model_type)}"
        )
    return name


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint that holds an object.

    Raises:
        CheckpointError: no such file, no JSON, or no object.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} has no {path.name}; a Hugging Face checkpoint folder holds config.json "
            "and model.safetensors (or model.safetensors.index.json and its shards)."
        )
    try:
        value = read_json(path, most_bytes=MOST_CONFIG_BYTES if path.name == CONFIG else MOST_BYTES)
    except JsonError as error:
        raise CheckpointError(f"{error}. Download or copy it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard, as an index of a sharded checkpoint has them.

    Raises:
        CheckpointError: a malformed index, or a shard that is no file name.
    """
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map object.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{INDEX} places {named(name)} in {shown(shard)}, which is no file name."
            )
        if Path(shard).name != shard:
            raise CheckpointError(f"{INDEX} names a shard outside the folder: {shown(shard)}.")
    return weight_map


def pickles(files: list[str], place: Path | str, layout: str) -> str | None:
    """A refusal that says how to convert, where some of the files are pickled weights.

    Args:
        files: names of all files of a checkpoint.
        place: its folder, or its name on the hub.
        layout: of the checkpoint.
    """
    candidates = [name for name in files if not any(fnmatch(name, no) for no in NO_WEIGHTS)]
    for pattern in PICKLES:
        found = [name for name in candidates if fnmatch(name, pattern)]
        if found:
            break
    else:
        return None
    folder, fetch = str(place), ""
    if isinstance(place, str):
        folder = place.rpartition("/")[2]
        fetch = f"hf download {shlex.quote(place)} --local-dir {shlex.quote(folder)} && "
    command = shlex.join(("python", "-c", CONVERT, folder, pattern if len(found) > 1 else found[0]))
    return (
        f"{place} holds pickle weights only ({', '.join(map(shown, found[:3]))}, in the layout of "
        f"{layout}); loading a pickle can run any code, so Ingot reads safetensors alone. Convert "
        f"them, and export {folder}: {fetch}{command}"
    )
