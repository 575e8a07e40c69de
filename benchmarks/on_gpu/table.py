"""The closing table: failures first, then one line for what matters of each phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.on_gpu.runner import CUT, FAILED, OK, REFUSED, Outcome

# One screenful.
LINES, WIDTH = 60, 150


def closing(outcomes: Mapping[str, Outcome], missing: list[str], seconds: float) -> str:
    """The table of a run.

    Args:
        outcomes: by phase, in order.
        missing: phases that were not entered.
        seconds: that the run took.
    """
    lines = [*_failures(outcomes, missing), "", *_phases(outcomes), ""]
    room = LINES - len(lines)
    figures = list(_figures(outcomes))
    lines += figures[:room]
    if len(figures) > room:
        lines.append(f"... and {len(figures) - room} more in results.json")
    lines.append(f"{seconds:.0f} s in all")
    return "\n".join(line[:WIDTH] for line in lines)


def _failures(outcomes: Mapping[str, Outcome], missing: list[str]) -> Iterator[str]:
    found = False
    for name, outcome in outcomes.items():
        if outcome.text and outcome.status != OK:
            found = True
            yield f"{outcome.status.upper():7} {name}: {outcome.text.splitlines()[0]}"
        wrong = [f for f in outcome.items.values() if f["status"] in (FAILED, CUT)]
        for item in wrong[:8]:
            found = True
            yield f"{item['status'].upper():7} {name}: {item['text']}"
        if len(wrong) > 8:
            yield f"        {name}: and {len(wrong) - 8} more"
    for name in missing:
        found = True
        yield f"MISSING {name}: not entered"
    if not found:
        yield "nothing failed"


def _phases(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    yield f"{'phase':12} {'status':7} {'ok':>4} {'failed':>6} {'refused':>7} {'seconds':>7}"
    for name, outcome in outcomes.items():
        counts = [_count(outcome, status) for status in (OK, FAILED, REFUSED)]
        yield (
            f"{name:12} {outcome.status:7} {counts[0]:4} {counts[1]:6} {counts[2]:7} "
            f"{outcome.seconds:7.1f}"
        )


def _count(outcome: Outcome, status: str) -> int:
    return sum(found["status"] == status for found in outcome.items.values())


def _figures(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """Texts of what was measured; of the checks the count above says enough."""
    for name in ("load", "ceilings", "models", "sanitizer", "timings", "tuning"):
        outcome = outcomes.get(name)
        for found in outcome.items.values() if outcome else ():
            yield from _text(name, found)


def _text(phase: str, found: Mapping[str, Any]) -> Iterator[str]:
    if found["status"] == OK:
        yield found["text"]
        if phase == "tuning":
            yield from (f"    {line}" for line in found.get("lines", ()))
    elif found["status"] == REFUSED:
        yield f"refused: {found['text']}"
