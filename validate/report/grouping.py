"""Problems of one kind and one cause as one line: a fault shows at every call after it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ingot.validate.result import Report, TensorResult

# Names of single tensors that a line has room for.
NAMED = 2

_NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?|\b(?:nan|inf)\b|\[[^\]]*\]")
_FLIP = re.compile(r"(routing \([^)]*\)), ([^:]*): (token .*)", re.DOTALL)


@dataclass(frozen=True)
class Group:
    """Problems that are said in one line.

    Attributes:
        text: the line.
        count: of how many problems.
    """

    text: str
    count: int


@dataclass
class _Found:
    """The problems of one group: texts in full, and of tensors what belongs to each."""

    problems: list[str] = field(default_factory=list)
    tensors: list[tuple[TensorResult, str]] = field(default_factory=list)
    flips: list[tuple[str, str]] = field(default_factory=list)


def grouped(report: Report, problems: Iterable[str]) -> list[Group]:
    """The problems, those alike as one, in the order in which each kind of them first arose.

    Args:
        report: whose problems they are, or what got worse of it.
        problems: ``Report.failures`` or ``Report.worse``.
    """
    tensors = {f"{tensor.stage}, {tensor.name}": tensor for tensor in report.tensors}
    groups: dict[tuple[str, ...], _Found] = {}
    for problem in problems:
        where, _, cause = problem.partition(": ")
        tensor = tensors.get(where) if cause else None
        flip = _FLIP.fullmatch(problem)
        if tensor is not None:
            found = groups.setdefault(("tensor", tensor.kind, _pattern(cause)), _Found())
            found.tensors.append((tensor, cause))
        elif flip:
            found = groups.setdefault(("flip", flip[1]), _Found())
            found.flips.append((flip[2], flip[3]))
        else:
            found = groups.setdefault(("other", _pattern(problem)), _Found())
        found.problems.append(problem)
    return [Group(_text(report, found), len(found.problems)) for found in groups.values()]


def _pattern(text: str) -> str:
    """A text without its numbers: what is left is its cause."""
    return _NUMBER.sub("#", text)


def _text(report: Report, found: _Found) -> str:
    if len(found.problems) == 1:
        return found.problems[0]
    if found.tensors:
        return _of_tensors(report, found.tensors)
    if found.flips:
        mode = found.problems[0].partition(",")[0]
        routers = len({router for router, _ in found.flips})
        first, said = found.flips[0]
        at = first if routers == 1 else f"{routers} routers"
        return f"{mode}: {len(found.flips)} tokens at {at}, the first at {first}: {said}"
    return f"{found.problems[0]} (and {len(found.problems) - 1} more like it)"


def _of_tensors(report: Report, found: list[tuple[TensorResult, str]]) -> str:
    """The same problem of tensors of one kind: at how many calls, and the worst."""
    kind = found[0][0].kind
    worst, cause = max(found, key=lambda pair: _rank(pair[0]))
    calls = len({tensor.stage for tensor, _ in found})
    of = len({tensor.stage for tensor in report.tensors if tensor.kind == kind})
    names = list(dict.fromkeys(tensor.name for tensor, _ in found))
    at = f"at {calls} of {of} calls" if of > 1 else f"at {found[0][0].stage}"
    if len(names) == 1:
        what, which = names[0], ""
    else:
        what = f"{kind} ({', '.join(_few(names))})"
        which = f"{worst.name} "
    place = f"worst {which}at {worst.stage}" if of > 1 else f"worst {worst.name}"
    return f"{what} {at}, {place}: {cause}"


def _few(names: list[str]) -> Iterator[str]:
    yield from names[:NAMED]
    if len(names) > NAMED:
        yield f"and {len(names) - NAMED} more"


def _rank(tensor: TensorResult) -> tuple[int, float]:
    """The key by which problems are the worse: NaN is worse than any number, none is the least."""
    score = tensor.score
    if score is None:
        return 0, 0.0
    return (2, 0.0) if math.isnan(score) else (1, score)
