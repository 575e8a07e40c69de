"""What a validation asked and what it did not, in words: for every kind of report alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ingot.validate.coverage import Coverage, Experts
from ingot.validate.result import Check, Report

# Numbers are named one by one up to so many.
NAMED = 8
# Routers whose experts are named one by one.
NAMED_ROUTERS = 3

# What each check compares, and how one and several are said to be right.
_CHECKS: dict[str, tuple[str, str, str]] = {
    "weights": ("tensor", "is the checkpoint's", "are the checkpoint's"),
    "graph": ("node", "is that of a fresh capture", "are those of a fresh capture"),
    "contract": ("field", "is what the checkpoint says", "are what the checkpoint says"),
}


def asked(report: Report) -> list[tuple[str, str]]:
    """The checks, what was fed, the experts, and what was left out, each in a line of words."""
    rows = [(check.name.capitalize(), check_words(check)) for check in report.checks]
    found = report.coverage
    if found is None:
        stages = {tensor.stage for tensor in report.tensors}
        if stages and all(tensor.in_float32 for tensor in report.tensors):
            alone = f"{counted(len(stages), 'call')} of the graph, in float32 alone"
            rows += [("Fed", alone), ("Not asked", f"whatever is computed in {report.precision}")]
        return rows
    rows.append(("Fed", _fed(found)))
    if found.experts:
        rows.append(("Experts", experts_words(found.experts)))
    if found.parts:
        rows.append(("Shapes of use", parts_words(found)))
    rows += [
        ("Left out", f"{left.count} of {left.of} {left.what}: {left.why}")
        for left in found.left_out
    ]
    if found.not_asked:
        rows.append(("Not asked", "; ".join(found.not_asked)))
    return rows


def check_words(check: Check) -> str:
    """What one check compared and found."""
    what, one, many = _CHECKS.get(check.name, ("value", "is right", "are right"))
    if not check.compared:
        found = "nothing was compared"
    elif check.problems:
        count = len(check.problems)
        found = (
            f"{counted(check.compared, what)} compared, {count} problem{'s' * (count != 1)} found"
        )
    else:
        found = f"{counted(check.compared, what)} {one if check.compared == 1 else many}"
    return f"{found}; not compared: {check.left_out}" if check.left_out else found


def parts_words(found: Coverage) -> str:
    """How many parts were covered, and which of them not by the session itself."""
    covered = [part for part in found.parts if part.covered]
    replayed = [part.name for part in covered if part.how == "replayed"]
    text = f"{len(covered)} of {len(found.parts)} were covered"
    if replayed:
        text += f"; with the truth's experts alone: {', '.join(replayed)}"
    return text


def experts_words(experts: Sequence[Experts]) -> str:
    """How many experts of all routers ran; those that did not, or only since they were given."""
    total = sum(len(each.chosen) + len(each.forced) + len(each.never) for each in experts)
    forced = sum(len(each.forced) for each in experts)
    never = sum(len(each.never) for each in experts)
    chosen = total - forced - never
    text = f"{chosen} of {total} of {counted(len(experts), 'router')} were chosen"
    if forced:
        names = _named(experts, lambda each: each.forced)
        text += f", {forced} more ran because they were given ({names})"
    if never:
        names = _named(experts, lambda each: each.never)
        text += f", {never} never ran ({names})"
    return text


def _named(experts: Iterable[Experts], which: Callable[[Experts], tuple[int, ...]]) -> str:
    """The experts of each router that has some, by number."""
    some = [each for each in experts if which(each)]
    named = [f"{each.router}: {_numbers(which(each))}" for each in some[:NAMED_ROUTERS]]
    more = len(some) - len(named)
    return "; ".join(named) + (f"; and of {more} more" if more else "")


def _numbers(numbers: Sequence[int]) -> str:
    named = ", ".join(map(str, numbers[:NAMED]))
    more = len(numbers) - NAMED
    return f"{named} and {more} more" if more > 0 else named


def _fed(found: Coverage) -> str:
    context = "" if found.context is None else f" of {found.context:,}"
    text = (
        f"{counted(found.calls, 'call')} of {_listed(found.rows, 'row')} and "
        f"{_listed(found.lengths, 'token')} each; sequences up to {found.positions:,}{context} "
        f"tokens; padding: {', '.join(found.paddings) or 'none'}; {found.ids:,} of "
        f"{found.vocab_size:,} token ids"
    )
    if found.chunks:
        text += f"; up to {counted(found.chunks, 'chunk')} of the scan"
    return text


def counted(count: int, what: str) -> str:
    """A number of things."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def _listed(numbers: Sequence[int], what: str) -> str:
    """Numbers in ascending order, one by one or as a range."""
    if not numbers:
        return f"no {what}s"
    plural = what if tuple(numbers) == (1,) else f"{what}s"
    if len(numbers) > NAMED:
        return f"{numbers[0]:,} to {numbers[-1]:,} {plural}"
    *first, last = (f"{number:,}" for number in numbers)
    return f"{', '.join(first)} or {last} {plural}" if first else f"{last} {plural}"
