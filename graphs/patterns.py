"""Regular expressions out of somebody else's file, matched where they cannot take long."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from ingot.plugins.errors import IngotError, shown

SECONDS = 10
# No repetition, no alternative: as quick to match as text. Nearly all patterns are names.
PLAIN = re.compile(r"[\w.^$\\-]*")
# A pattern of a few characters can take years or gigabytes, to compile as well as to match, and
# Python's matcher cannot be interrupted from inside of its process.
PROGRAM = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
patterns, names = json.load(sys.stdin)
compiled = [re.compile(pattern) for pattern in patterns]
print(json.dumps([[name for name in names if each.fullmatch(name)] for each in compiled]))
"""


class PatternError(IngotError):
    """A regular expression that is none, or that takes too long.

    The message ends without a full stop: who reads it says what to do.
    """


def full_matches(
    patterns: Sequence[str], names: Sequence[str], *, after_dot: bool = False
) -> list[set[str]]:
    """Which of ``names`` each pattern matches from end to end.

    Args:
        patterns: as Python's ``re`` has them.
        names: dotted, such as those of modules.
        after_dot: it is enough to match what follows some dot of a name.

    Raises:
        PatternError: a pattern that does not compile, or that takes seconds or much memory.
    """
    before = r"(?:.*\.)?" if after_dot else ""
    plain = [bool(PLAIN.fullmatch(pattern)) for pattern in patterns]
    whole = [f"{before}({pattern})" for pattern in patterns]
    others = [pattern for pattern, quick in zip(whole, plain, strict=True) if not quick]
    apart = iter(_in_a_process(others, names) if others else ())
    return [
        set(filter(_compile(pattern).fullmatch, names)) if quick else next(apart)
        for pattern, quick in zip(whole, plain, strict=True)
    ]


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PatternError(f"{shown(pattern)} is no regular expression ({error})") from None


def _in_a_process(patterns: Sequence[str], names: Sequence[str]) -> list[set[str]]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", PROGRAM],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PatternError(
            f"{shown(list(patterns))} took more than {SECONDS} seconds to match"
        ) from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["the process was ended"])[-1]
        raise PatternError(f"{shown(list(patterns))} cannot be matched ({reason[:200]})")
    return [set(matched) for matched in json.loads(done.stdout)]
