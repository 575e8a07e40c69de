"""Text as the languages of a repository's files read it: none of it is taken for more than text.

What is written comes from an ingot that somebody else may have made. Its manifest was checked
(``export/ingot_schema.py``), and the files hold without that.
"""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from ingot.plugins.errors import shown
from ingot.plugins.json_fields import UNSAFE
from ingot.runtime.triton_plan import TritonError

_RUN_OF_TICKS = re.compile("`+")
# Within a word an underscore means nothing.
_MARKDOWN = re.compile(r"([\\`<>&\[\]!|*~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def one_line(value: Any) -> Any:
    """What every ``{{ }}`` passes: text that would end a line, and a comment with it, is refused.

    Raises:
        TritonError: a line break, a control character or one that turns the text around.
    """
    if isinstance(value, str) and UNSAFE.search(value):
        raise TritonError(f"{shown(value)} of the ingot is no text of one line; export it again.")
    return value


def shell(value: Any) -> str:
    """One word of a shell."""
    return shlex.quote(str(value))


def protobuf(value: Any) -> str:
    """A string of protobuf's text format, with its quotes."""
    plain = (
        chr(byte) if 32 <= byte < 127 and byte not in b"\"'\\" else f"\\{byte:03o}"
        for byte in str(value).encode("utf-8", "replace")
    )
    return f'"{"".join(plain)}"'


def quoted(value: Any) -> str:
    """A string of YAML and of Python, with its quotes."""
    return json.dumps(str(value), ensure_ascii=False)


def code(value: Any) -> str:
    """A code span of Markdown, with its ticks: longer than any that it holds.

    Bars are escaped as in the cell of a table; elsewhere the backslash shows.
    """
    text = str(value).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in _RUN_OF_TICKS.findall(text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def prose(value: Any) -> str:
    """Words of Markdown: no tag, link, picture, code, emphasis or cell of a table."""
    return _MARKDOWN.sub(r"\\\1", str(value))


FILTERS = {
    "shell": shell,
    "protobuf": protobuf,
    "quoted": quoted,
    "code": code,
    "prose": prose,
}
