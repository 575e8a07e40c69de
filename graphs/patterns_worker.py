"""Matches patterns in a process of its own; ``plugins/child.py`` runs it by ``patterns.py``."""

from __future__ import annotations

import re


def answer(request: tuple[list[str], list[str]]) -> list[list[str]]:
    """Which of the names each pattern matches from end to end."""
    patterns, names = request
    return [list(filter(re.compile(pattern).fullmatch, names)) for pattern in patterns]
