"""The closing table: failures first, then one line for what matters of each phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.on_gpu.runner import CUT, FAILED, OK, REFUSED, Found, Outcome
from benchmarks.on_gpu.tuning import tables

# One screenful.
LINES, WIDTH = 60, 160


def closing(
    outcomes: Mapping[str, Outcome], missing: list[str], seconds: float, capability: int | None
) -> str:
    """The table of a run.

    Args:
        outcomes: by phase, in order.
        missing: phases that were not entered.
        seconds: that the run took.
        capability: of the card; None where what was measured means nothing.
    """
    lines = [*_failures(outcomes, missing), "", *_phases(outcomes), ""]
    # Two more come behind the figures.
    room = LINES - len(lines) - 2
    measured = list(_figures(outcomes, capability)) if capability else []
    lines += measured[:room]
    if len(measured) > room:
        lines.append(f"... and {len(measured) - room} more in results.json")
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
    if missing:
        found = True
        yield f"MISSING {', '.join(missing)}: not entered"
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


def _figures(outcomes: Mapping[str, Outcome], capability: int) -> Iterator[str]:
    """Texts of what was measured; of the checks the count above says enough."""
    for name in ("load", "ceilings", "models", "sanitizer"):
        for found in outcomes[name].items.values() if name in outcomes else ():
            yield from _text(found)
    if "tuning" in outcomes:
        yield from tables(outcomes["tuning"].items.values(), capability)
    if "timings" in outcomes:
        yield "in the cold, beside others (2x takes twice as long as the kernel):"
        for found in outcomes["timings"].items.values():
            yield from _text(found)


def _text(found: Found) -> Iterator[str]:
    if found["status"] in (OK, REFUSED):
        yield found["text"] if found["status"] == OK else f"refused: {found['text']}"
        yield from (f"    {line}" for line in found.get("lines", ()))
