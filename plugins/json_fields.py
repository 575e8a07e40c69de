"""Typed reading of JSON that somebody else wrote: each value with the place where it stands."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from ingot.plugins.errors import IngotError, shown

# Characters that would end a line, move a terminal's cursor, turn the order of what is read around,
# or cannot be written in UTF-8. Joiners stay: Persian and emoji are spelled with them.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LETTERS = 400
_SHA256 = re.compile(r"[0-9a-f]{64}")
# One part of a path: no dot or hyphen at the beginning, no dot or space at the end, and nothing
# that is special on any system.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_ .+@=,()-]{0,126}[A-Za-z0-9_+@=,()-])?"
_FILE = re.compile(rf"(?=.{{1,255}}$){_PART}(?:/{_PART}){{0,7}}")
# Names that a message lists.
_LISTED = 12


class FieldError(IngotError):
    """A value of the wrong kind; the message names its place and ends without a full stop."""


def safe(text: str, most: int = LETTERS) -> str:
    """A text as ``Field.text`` takes it: cut, and without characters that act on their reader."""
    return UNSAFE.sub("\ufffd", text)[:most]


class Field:
    """One value of a JSON file.

    Args:
        value: what ``plugins.json_file`` parsed.
        place: what messages call it, such as ``states[0].axis``.
    """

    def __init__(self, value: Any, place: str = "") -> None:
        self.value = value
        self.place = place

    def refuse(self, expected: str) -> NoReturn:
        """Raise the ``FieldError`` of a value that is not as expected."""
        raise FieldError(f"{self.place or 'it'} is {shown(self.value)} and must be {expected}")

    def whole(self, least: int, most: int) -> int:
        """An integer; ``true`` and ``2.0`` are none."""
        if type(self.value) is not int or not least <= self.value <= most:
            self.refuse(f"a whole number of {least} to {most}")
        return self.value

    def flag(self) -> bool:
        """``true`` or ``false``."""
        if not isinstance(self.value, bool):
            self.refuse("true or false")
        return self.value

    def text(self, *, most: int = LETTERS) -> str:
        """Text of one line, which may be printed as it is."""
        if not isinstance(self.value, str):
            self.refuse("text")
        if len(self.value) > most or UNSAFE.search(self.value):
            self.refuse(f"one line of at most {most} letters without control characters")
        return self.value

    def matching(self, pattern: re.Pattern[str], expected: str) -> str:
        """Text that a pattern describes from end to end."""
        if not isinstance(self.value, str) or not pattern.fullmatch(self.value):
            self.refuse(expected)
        return self.value

    def sha256(self) -> str:
        """A SHA-256 in hexadecimal, in small letters."""
        return self.matching(_SHA256, "a SHA-256 in hexadecimal")

    def file_name(self) -> str:
        """The name of a file in a folder and below, which every system reads alike."""
        return self.matching(
            _FILE,
            "the name of a file in the folder, without .. and of letters, digits and "
            "_ . + @ = , ( ) -",
        )

    def one_of(self, known: Collection[str]) -> str:
        """One of the known names."""
        if not isinstance(self.value, str) or self.value not in known:
            more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
            self.refuse(f"one of {', '.join(list(known)[:_LISTED])}{more}")
        return self.value

    def maybe(self) -> Field | None:
        """The field itself, or None where it is ``null``."""
        return None if self.value is None else self

    def elements(self, *, least: int = 0, most: int) -> list[Field]:
        """The items of a list."""
        if not isinstance(self.value, list):
            self.refuse("a list")
        if not least <= len(self.value) <= most:
            self._refuse_count("list", least, most)
        return [Field(item, f"{self.place}[{n}]") for n, item in enumerate(self.value)]

    def entries(self, *, most: int) -> dict[str, Field]:
        """What an object holds under names that are free."""
        if not isinstance(self.value, dict):
            self.refuse("an object")
        if len(self.value) > most:
            self._refuse_count("object", 0, most)
        return {
            name: Field(item, f"{self.place}[{shown(name)}]") for name, item in self.value.items()
        }

    def members(
        self, required: Collection[str], optional: Collection[str] | None = ()
    ) -> dict[str, Field]:
        """What an object holds under names that are given.

        Args:
            required: must be there.
            optional: may be there, and nothing else; None where anything else may.
        """
        if not isinstance(self.value, dict):
            self.refuse("an object")
        dot = f"{self.place}." if self.place else ""
        for name in required:
            if name not in self.value:
                raise FieldError(f"{dot}{name} is missing")
        for name in self.value:
            if optional is not None and name not in required and name not in optional:
                raise FieldError(f"{self.place or 'it'} has {shown(name)}, which is not known here")
        return {name: Field(item, f"{dot}{name}") for name, item in self.value.items()}

    def _refuse_count(self, kind: str, least: int, most: int) -> NoReturn:
        raise FieldError(
            f"{self.place} is a {kind} of {len(self.value)} and holds {least} to {most}"
        )


def distinct(fields: Collection[Field], key: Callable[[str], str] = str) -> None:
    """Refuse two fields that hold one text, or one ``key`` of it.

    Raises:
        FieldError: naming the second.
    """
    seen: dict[str, str] = {}
    for field in fields:
        before = seen.setdefault(key(field.value), field.place)
        if before != field.place:
            raise FieldError(f"{field.place} is {shown(field.value)}, and so is {before}")
