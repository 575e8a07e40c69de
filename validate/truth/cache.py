"""Results of the eager truth, kept on disk: a large model takes minutes to compute them again.

A cache is a convenience and never a source of errors: what cannot be read is computed again, and
what cannot be written is not kept.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ingot.plugins.whole import (
    WriteError,
    is_workplace,
    remove_abandoned,
    sha256,
    staged_file,
)

# One dict of arrays a call.
Recording = list[dict[str, npt.NDArray[Any]]]

SCHEMA_VERSION = 1
# Bytes. Some recordings of a model of a few billion parameters, and less than one checkpoint.
LIMIT = 4 * 2**30
DTYPES = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "BOOL": np.bool_}

_ROOT = Path(__file__).resolve().parents[2]
# What computes the truth, and what is kept of it: the top of a package, or one file. Kernels below
# `plugins` run on targets only.
_CODE = (
    "graphs",
    "plugins",
    "validate/identity/weights_blocks.py",
    "validate/identity/weights_panels.py",
    "validate/identity/weights_piece.py",
    "validate/truth/decoded.py",
    "validate/truth/eager.py",
    "validate/truth/activations.py",
    "validate/truth/joined.py",
    "validate/truth/layerwise.py",
    "validate/truth/noise.py",
    "validate/truth/orders.py",
    "validate/truth/other_weights.py",
    "validate/truth/plain.py",
    "validate/truth/recording.py",
    "validate/truth/replay.py",
    "validate/truth/stacks.py",
    "validate/truth/stored.py",
)
_SUFFIX = ".safetensors"
_KEY = re.compile(r"[0-9a-f]{64}")
_FILE = _KEY.pattern + re.escape(_SUFFIX)
# Nanoseconds that the clock of another machine may be ahead.
_AHEAD = 60 * 10**9


class _DamagedError(Exception):
    """A file that is not what ``Cache.put`` wrote."""


class Cache:
    """A folder of recordings, one safetensors file each; the least recently used go first.

    Several processes may use one folder. Only files named as ``put`` names them are ever removed.

    Args:
        folder: made where missing, when the first recording is put.
        limit: bytes of all files together.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder = folder
        self.limit = limit

    def get(self, key: str) -> Recording | None:
        """What was put under a key; None where there is nothing, or nothing whole.

        Args:
            key: of ``key``.

        Returns:
            The calls in order, each with its arrays in the order of their dict; float32, float64,
            int64 or bool, of any shape.
        """
        path = self._path(key)
        try:
            recording = _read(path)
        except _DamagedError:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        except OSError:
            return None
        with suppress(OSError):
            _touch(path)
        return recording

    def put(self, key: str, recording: Recording) -> None:
        """Keep a recording, if it fits in the limit and the folder can be written to.

        Args:
            key: of ``key``.
            recording: float32, float64, int64 or bool arrays of any shape.

        Raises:
            TypeError: an array of another dtype.
        """
        path = self._path(key)
        calls = [{name: _plain(array) for name, array in call.items()} for call in recording]
        if sum(array.nbytes for call in calls for array in call.values()) > self.limit:
            return
        # safetensors reports what the system refuses, such as a full disk, as an error of its own.
        with suppress(OSError, SafetensorError, WriteError):
            self._write(path, calls)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a result of validate.truth.cache.key")
        return self.folder / (key + _SUFFIX)

    def _write(self, path: Path, calls: Recording) -> None:
        with staged_file(path) as part:
            save_file(_flat(calls), part, metadata=_metadata(calls))
            if part.stat().st_size > self.limit:
                raise OSError(errno.EFBIG, "more than the whole cache may hold")
            _touch(part)
        self._shrink(keep=path)

    def _shrink(self, keep: Path) -> None:
        """Remove what was used longest ago until the rest is within the limit, but not ``keep``.

        What killed processes left goes first; what others are writing counts, and stays.
        """
        remove_abandoned(self.folder, _FILE)
        found, total = [], 0
        latest = time.time_ns() + _AHEAD
        for path in self.folder.iterdir():
            # Another process may have removed it since.
            with suppress(OSError):
                status = path.stat()
                if path.suffix == _SUFFIX and _KEY.fullmatch(path.stem):
                    # Of a clock that was wrong, or a hand: it would stay for ever as the newest.
                    used = status.st_mtime_ns if status.st_mtime_ns <= latest else 0
                    found.append((path == keep, used, status.st_size, path))
                    total += status.st_size
                elif is_workplace(path, _FILE):
                    total += sum(each.stat().st_size for each in path.iterdir())
        # ``keep`` is the last, and within the limit by itself.
        for kept, _, size, path in sorted(found):
            if kept or total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size


def default_cache() -> Cache | None:
    """The cache of this user, or None where there is to be none.

    It lies in ``$INGOT_CACHE``, where ``off`` and the empty string mean none; else in
    ``$XDG_CACHE_HOME/ingot``, else in ``~/.cache/ingot``.
    """
    chosen = os.environ.get("INGOT_CACHE")
    if chosen is not None and chosen.lower() in ("", "off"):
        return None
    # Its specification has a relative path ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    try:
        if chosen is not None:
            return Cache(Path(chosen).expanduser())
        return Cache((base if base.is_absolute() else Path.home() / ".cache") / "ingot")
    except RuntimeError:
        # A user without a home.
        return None


def key(**parts: str | float | None) -> str:
    """The name of one result: SHA-256 over everything it depends on, in hexadecimal.

    Args:
        parts: such as the checkpoint's hash, task, precision, ``inputs_digest``, torch's version
            and ``code_digest``; their order does not count, their names do.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(parts, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def inputs_digest(*arrays: npt.NDArray[Any]) -> str:
    """SHA-256 over the dtype, shape and elements of each array, in order."""
    return _digest(("", array) for array in arrays)


@functools.cache
def code_digest() -> str:
    """SHA-256 over the source of everything that computes the truth."""
    return _digest_files(_ROOT, _source_files(_ROOT))


def _source_files(root: Path) -> list[Path]:
    found: set[Path] = set()
    for name in _CODE:
        place = root / name
        found |= set(place.glob("*.py")) if place.is_dir() else {place}
    return sorted(found)


def _digest_files(root: Path, files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(root).as_posix()}:{sha256(file)}\n".encode())
    return total.hexdigest()


def _digest(arrays: Iterable[tuple[str, npt.NDArray[Any]]]) -> str:
    total = hashlib.sha256()
    for name, array in arrays:
        total.update(f"{len(name)}:{name}{array.dtype.str}{array.shape};".encode())
        # A buffer of bytes: a view of an empty array or of bools has no other.
        total.update(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _plain(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array as safetensors needs it: it writes the memory as it lies, strides or not."""
    native = array.dtype.newbyteorder("=")
    if native not in DTYPES.values():
        raise TypeError(
            f"an array of {array.dtype}; a recording holds float32, float64, int64, bool"
        )
    return np.asarray(array, dtype=native, order="C")


def _flat(calls: Recording) -> dict[str, npt.NDArray[Any]]:
    return {
        f"{number}/{name}": array
        for number, call in enumerate(calls)
        for name, array in call.items()
    }


def _metadata(calls: Recording) -> dict[str, str]:
    """What the tensors of a file alone do not say: empty calls, the order, and whether all is well.

    safetensors sorts tensors, and a report lists them in the order in which they came.
    """
    return {
        "schema": str(SCHEMA_VERSION),
        "calls": str(len(calls)),
        "names": json.dumps([list(call) for call in calls]),
        "sha256": _digest(_flat(calls).items()),
    }


def _read(path: Path) -> Recording:
    """A whole recording.

    Raises:
        OSError: there is no such file, or it cannot be read.
        _DamagedError: it is not one.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("schema") != str(SCHEMA_VERSION):
                raise _DamagedError("another schema")
            names = json.loads(metadata["names"])
            flat = [f"{number}/{name}" for number, call in enumerate(names) for name in call]
            if sorted(flat) != sorted(file.keys()) or metadata["calls"] != str(len(names)):
                raise _DamagedError("other tensors than it says")
            if any(file.get_slice(name).get_dtype() not in DTYPES for name in flat):
                raise _DamagedError("another dtype")
            calls = [
                {name: file.get_tensor(f"{number}/{name}") for name in call}
                for number, call in enumerate(names)
            ]
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _DamagedError(str(error)) from error
    # The format itself says only how long a file is.
    if metadata.get("sha256") != _digest(_flat(calls).items()):
        raise _DamagedError("other numbers than were written")
    return calls


def _touch(path: Path) -> None:
    """Use it now, by a clock that tells two uses apart where the file system's own may not."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))
