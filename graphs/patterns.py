"""Regular expressions out of somebody else's file, matched where they cannot take long."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ingot.plugins.child import ChildError, ask
from ingot.plugins.errors import IngotError, shown

# No repetition, no alternative: as quick to match as text. Nearly all patterns are names.
PLAIN = re.compile(r"[\w.^$\\-]*")
# A pattern of a few characters can take years, and Python's matcher cannot be interrupted inside of
# its process.
WORKER = Path(__file__).with_name("patterns_worker.py")
SECONDS = 10
MEGABYTES = 1024


class PatternError(IngotError):
    """A regular expression that is none, or that takes too long.

    The message ends without a full stop: who reads it says what to do.
    """


def full_matches(
    patterns: Sequence[str],
    names: Sequence[str],
    *,
    after_dot: bool = False,
    beginning: bool = False,
) -> list[set[str]]:
    """Which of ``names`` each pattern matches from end to end.

    Args:
        patterns: as Python's ``re`` has them.
        names: dotted, such as those of modules.
        after_dot: it is enough to match what follows some dot of a name.
        beginning: it is enough to match the beginning of a name, as ``re.match`` does.

    Raises:
        PatternError: a pattern that does not compile, or that takes seconds or much memory.
    """
    plain = [bool(PLAIN.fullmatch(pattern)) for pattern in patterns]
    whole = [rf"(?:.*\.)?({pattern})" if after_dot else pattern for pattern in patterns]
    whole = [rf"(?:{pattern})(?s:.*)" if beginning else pattern for pattern in whole]
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
        request = [list(patterns), list(names)]
        matched = ask(WORKER, request, seconds=SECONDS, megabytes=MEGABYTES)
    except ChildError as error:
        raise PatternError(f"{shown(list(patterns))} cannot be matched ({error})") from None
    return [set(each) for each in matched]
