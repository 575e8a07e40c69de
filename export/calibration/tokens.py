"""The tokens that somebody gives to calibrate with: a text, or ids that were made elsewhere."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from ingot.export.request import ExportError
from ingot.export.tokenizer import MEGABYTES, SECONDS, TOKENIZER, Find
from ingot.plugins.child import ChildError, ask
from ingot.plugins.errors import shown
from ingot.plugins.json_file import JsonError, parse_json

Ids = npt.NDArray[np.int64]

WORKER = Path(__file__).with_name("tokens_worker.py")
# What is not one of these is a text.
OF_IDS = (".json", ".npy", ".safetensors")
# Of the file; a text of this size has far more tokens than are taken.
MOST_BYTES = 64 << 20
# Tokens: fewer say nothing of a layer's inputs, and more cost hours of a large model.
LEAST, MOST = 256, 1 << 14
# Of a sequence.
LENGTH = 512


@dataclass(frozen=True)
class Calibration:
    """Tokens to calibrate with.

    Attributes:
        sequences: ``[n, T]``.
        sha256: of the file.
    """

    sequences: Ids
    sha256: str

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.sequences.size


def read_calibration(
    path: Path, vocab_size: int, length: int | None, find: Find, tokenizer: str | None
) -> Calibration:
    """Read a file of text or of token ids, its beginning where it is long.

    Args:
        path: a text in UTF-8; or ids, in any nesting: ``.json`` of lists, ``.npy`` or
            ``.safetensors`` of one array.
        vocab_size: of the model.
        length: the longest sequence that it takes; None where nothing limits it.
        find: the path of a file of the checkpoint, by its name.
        tokenizer: what ``tokenizer.json`` must hold, by ``make_tokenizer``; None for the
            checkpoint's.

    Raises:
        ExportError: a file that is not there or damaged, ids that the model has not, too few of
            them, or a text for a checkpoint without a tokenizer.
    """
    data = _read(path)
    found = _ids(path, data) if path.suffix in OF_IDS else _encoded(path, data, find, tokenizer)
    ids = found.reshape(-1)[:MOST]
    if len(ids) < LEAST:
        raise ExportError(
            f"--calibration {path} has {len(ids)} tokens; give at least {LEAST}, and better some "
            "thousands of the kind that the model is used for."
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ExportError(
            f"--calibration {path} has the token id {wrong}, and the model's are 0 to "
            f"{vocab_size - 1}; give ids of this model's tokenizer, or a text."
        )
    each = min(LENGTH, len(ids), length or LENGTH)
    whole = len(ids) // each * each
    return Calibration(ids[:whole].reshape(-1, each), hashlib.sha256(data).hexdigest())


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ExportError(
                f"--calibration {path} has {size:,} bytes, and at most {MOST_BYTES:,} are read; "
                f"give a part of it, since no more than {MOST:,} tokens are taken."
            )
        return path.read_bytes()
    except OSError as error:
        raise ExportError(
            f"--calibration {path} cannot be read ({error.strerror}); give a file of text or of "
            "token ids."
        ) from error


def _ids(path: Path, data: bytes) -> Ids:
    read: dict[str, Callable[[bytes], Any]] = {
        ".json": lambda given: np.array(_flat(parse_json(given, str(path)))),
        ".npy": _npy,
        ".safetensors": _safetensors,
    }
    try:
        found = np.asarray(read[path.suffix](data))
    except (JsonError, SafetensorError, ValueError, OverflowError, EOFError) as error:
        raise ExportError(f"--calibration {path} holds no array of token ids ({error}).") from error
    if found.dtype.kind not in "iu":
        raise ExportError(
            f"--calibration {path} holds {found.dtype} and must hold token ids, whole numbers; a "
            "text has another ending than .json, .npy and .safetensors."
        )
    return found.astype(np.int64)


def _flat(value: Any) -> list[int]:
    """The numbers of nested lists, in their order."""
    if type(value) is int:
        return [value]
    if not isinstance(value, list):
        raise ValueError(f"it holds {shown(value)}, and only lists of whole numbers are read")
    return [number for item in value for number in _flat(item)]


def _npy(data: bytes) -> Any:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _safetensors(data: bytes) -> Any:
    tensors = load_safetensors(data)
    if len(tensors) != 1:
        raise ValueError(f"it holds {len(tensors)} tensors, and one is read")
    return next(iter(tensors.values()))


def _encoded(path: Path, data: bytes, find: Find, tokenizer: str | None) -> Ids:
    file = find(TOKENIZER)
    if tokenizer is None and not file.is_file():
        raise ExportError(
            f"--calibration {path} is a text, and the checkpoint has no tokenizer; give token ids "
            f"({', '.join(OF_IDS)})."
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ExportError(
            f"--calibration {path} is no text in UTF-8 (byte {error.start}); token ids are read of "
            f"{', '.join(OF_IDS)}."
        ) from error
    # Four times as many letters as the most tokens have mostly, and never too many to be encoded.
    request = {
        "file": str(file.absolute()) if tokenizer is None else None,
        "tokenizer": tokenizer,
        "text": text[: 16 * MOST],
        "most": MOST,
    }
    try:
        ids = ask(WORKER, request, seconds=SECONDS, megabytes=MEGABYTES)
    except ChildError as error:
        raise ExportError(
            f"the checkpoint's tokenizer cannot encode {path} ({error}); give token ids "
            f"({', '.join(OF_IDS)})."
        ) from error
    return np.array(ids, np.int64)
