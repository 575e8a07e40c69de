"""The one reader of JSON files, all of which may come from somebody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ingot.plugins.errors import IngotError, shown

# A config, an index or a manifest of the largest models has some megabytes; parsed, a hostile file
# of this size takes half a gigabyte, and not more.
MOST_BYTES = 8 << 20
# What any such file needs, and far from where a recursion over it would end.
MOST_DEPTH = 64
# What a file of MOST_BYTES can hold; a reader of larger ones allows longer texts, and not more of
# what takes memory.
MOST_VALUES = MOST_BYTES


class JsonError(IngotError):
    """A file that is no JSON, or JSON that nobody needs: too large, too deep, of absurd numbers.

    The message names the file and ends without a full stop: who reads it says what to do.
    """


def read_json(path: Path, *, most_bytes: int = MOST_BYTES) -> Any:
    """What a JSON file holds, in UTF-8 without a byte order mark.

    ``NaN`` and ``Infinity`` are numbers, as transformers writes them.

    Args:
        path: the file.
        most_bytes: a larger file is not read.

    Raises:
        JsonError: it cannot be read, is no JSON, is larger than ``most_bytes``, is nested more than
            ``MOST_DEPTH`` deep, holds more than ``MOST_VALUES`` values, or has an integer of
            thousands of digits.
    """
    try:
        # A pipe or a device in its place would be waited for, or have no end.
        if path.exists() and not path.is_file():
            raise JsonError(f"{path} cannot be read: it is no file")
        with path.open("rb") as file:
            raw = file.read(most_bytes + 1)
    except OSError as error:
        raise JsonError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(raw) > most_bytes:
        raise JsonError(f"{path} is larger than {most_bytes:,} bytes, the most that is read of it")
    return parse_json(raw, str(path))


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds that must hold an object.

    Raises:
        JsonError: as ``read_json``, or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise JsonError(f"{path} holds {shown(value)}, which is no JSON object")
    return value


def parse_json(raw: bytes, name: str) -> Any:
    """What JSON text in UTF-8 holds; ``name`` is what messages call it.

    Raises:
        JsonError: as ``read_json``.
    """
    # Text may have such characters too, so this counts too many rather than too few.
    if sum(map(raw.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise JsonError(f"{name} holds more than {MOST_VALUES:,} values")
    try:
        value = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise JsonError(_deep(name)) from None
    except UnicodeDecodeError as error:
        raise JsonError(f"{name} is not valid JSON: it is not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"{name} is not valid JSON: {error}") from None
    # Python's refusal of more than 4,300 digits, whose advice is for programs.
    except ValueError:
        raise JsonError(f"{name} holds an integer of thousands of digits") from None
    if _deeper_than(value, MOST_DEPTH):
        raise JsonError(_deep(name))
    return value


def _deep(name: str) -> str:
    return f"{name} is nested more than {MOST_DEPTH} deep"


def _deeper_than(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return True
