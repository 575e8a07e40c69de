"""Which node of one list is which of another, as ``diff`` aligns lines of text.

Both lists are in the order of computation, and the same exporter made them or nearly so. Nodes that
compute the same are told apart most finely; in the gaps between those that are aligned, by what
they are themselves, and then by their operator alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

from ingot.validate.identity.bodies import Node

Pair = tuple[Node | None, Node | None]
Telling = Callable[[Node], Any]
TELLINGS: tuple[Telling, ...] = (
    lambda node: node.computes,
    lambda node: node.local,
    lambda node: node.operator,
)


def aligned(
    nodes: Sequence[Node], others: Sequence[Node], tellings: Sequence[Telling] = TELLINGS
) -> Iterator[Pair]:
    """Every node of both lists once, in order, with its partner or None.

    As many nodes in a gap as there are others stand in their places, and the same operators in one
    order are each other's, whatever they read.
    """
    alike = [node.operator for node in nodes] == [other.operator for other in others]
    if alike or (not tellings and len(nodes) == len(others)):
        yield from zip(nodes, others, strict=True)
        return
    if not nodes or not others or not tellings:
        yield from ((node, None) for node in nodes)
        yield from ((None, other) for other in others)
        return
    tell, *coarser = tellings
    mine, theirs = [tell(node) for node in nodes], [tell(node) for node in others]
    begin, other_begin = 0, 0
    for at, other_at in [*_matches(mine, theirs), (len(mine), len(theirs))]:
        yield from aligned(nodes[begin:at], others[other_begin:other_at], coarser)
        if at < len(mine):
            yield nodes[at], others[other_at]
        begin, other_begin = at + 1, other_at + 1


def _matches(mine: Sequence[Any], theirs: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Places of equal keys, ascending on both sides.

    What stands once on both sides comes first: most nodes of a graph read a weight, so that only
    short pieces are left, for which the time of ``SequenceMatcher`` does not matter.
    """
    begin, other_begin = 0, 0
    for at, other_at in [*_unique(mine, theirs), (len(mine), len(theirs))]:
        some, some_others = mine[begin:at], theirs[other_begin:other_at]
        matcher = SequenceMatcher(None, some, some_others, autojunk=False)
        for one, other, size in matcher.get_matching_blocks():
            yield from ((begin + one + k, other_begin + other + k) for k in range(size))
        if at < len(mine):
            yield at, other_at
        begin, other_begin = at + 1, other_at + 1


def _unique(mine: Sequence[Any], theirs: Sequence[Any]) -> list[tuple[int, int]]:
    """The longest ascending row of places whose key stands once on both sides."""
    counted, others = Counter(mine), Counter(theirs)
    places = {key: place for place, key in enumerate(theirs)}
    both = [
        (place, places[key])
        for place, key in enumerate(mine)
        if counted[key] == 1 and others[key] == 1
    ]
    # By length less one, the least end of an ascending row, and where that is in ``both``.
    ends: list[int] = []
    last: list[int] = []
    before: list[int] = []
    for index, (_, other) in enumerate(both):
        length = bisect_left(ends, other)
        before.append(last[length - 1] if length else -1)
        ends[length:] = [other, *ends[length + 1 :]]
        last[length:] = [index, *last[length + 1 :]]
    row: list[tuple[int, int]] = []
    at = last[-1] if last else -1
    while at >= 0:
        row.append(both[at])
        at = before[at]
    return row[::-1]
