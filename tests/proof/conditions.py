"""Shapes of use as booleans of an ONNX graph: one token, a second turn, a padded row, and more.

Each is a ``Condition``: from an editor and the rank of what it decides over to a boolean that
broadcasts to it. Values of rank 3 are ``[B, T, ...]``, and of other ranks ``[B, ...]``.
"""

from __future__ import annotations

from proof.editing import Condition, Editor

MASK, IDS, POSITIONS = "attention_mask", "input_ids", "position_ids"


def both(*conditions: Condition) -> Condition:
    """All of them hold."""

    def holds(edit: Editor, rank: int) -> str:
        first, *others = (condition(edit, rank) for condition in conditions)
        for other in others:
            first = edit("And", first, other)
        return first

    return holds


def tokens(least: int, most: int | None = None) -> Condition:
    """The call has so many new tokens."""
    return lambda edit, _rank: _within(edit, edit("Shape", IDS, start=1, end=2), least, most)


def rows(least: int, most: int | None = None) -> Condition:
    """The call has so many rows."""
    return lambda edit, _rank: _within(edit, edit("Shape", IDS, start=0, end=1), least, most)


def in_all(count: int) -> Condition:
    """The call has so many new tokens, of all its rows together."""

    def holds(edit: Editor, _rank: int) -> str:
        return _within(edit, edit("ReduceProd", edit("Shape", IDS)), count, None)

    return holds


def total(least: int, most: int | None = None) -> Condition:
    """The mask is so long: past and new tokens of a model with caches."""
    return lambda edit, _rank: _within(edit, edit("Shape", MASK, start=1, end=2), least, most)


def after_a_past(edit: Editor, _rank: int) -> str:
    """A model with caches has seen tokens before this call."""
    new, all_of_them = (edit("Shape", name, start=1, end=2) for name in (IDS, MASK))
    return edit("Greater", all_of_them, new)


def first_call(edit: Editor, rank: int) -> str:
    """It has not."""
    return edit("Not", after_a_past(edit, rank))


def with_state(state: str) -> Condition:
    """A recurrent state is not all zeros, as it is in a first call."""

    def holds(edit: Editor, _rank: int) -> str:
        size = edit("ReduceMax", edit("Abs", state), keepdims=0)
        return edit("Greater", edit("Cast", size, to=1), edit.constant(0, "float32"))

    return holds


def positions(least: int) -> Condition:
    """The token stands there or later; of a value ``[B, T, ...]``."""

    def holds(edit: Editor, rank: int) -> str:
        found = edit("GreaterOrEqual", POSITIONS, edit.constant(least))
        return _by_token(edit, found, rank)

    return holds


def row(number: int) -> Condition:
    """The row has this number."""

    def holds(edit: Editor, rank: int) -> str:
        zeros = edit("ConstantOfShape", edit("Shape", IDS, start=0, end=1))
        ones = edit("Add", edit("Cast", zeros, to=7), edit.constant(1))
        order = edit("CumSum", ones, edit.constant(0))
        return _by_row(edit, edit("Equal", order, edit.constant(number + 1)), rank)

    return holds


def padded_row(edit: Editor, rank: int) -> str:
    """The row has padding somewhere."""
    least = edit("ReduceMin", MASK, edit.constant([1]), keepdims=0)
    return _by_row(edit, edit("Equal", least, edit.constant(0)), rank)


def paddings(least: int) -> Condition:
    """The row has so many paddings or more."""

    def holds(edit: Editor, rank: int) -> str:
        real = edit("ReduceSum", MASK, edit.constant([1]), keepdims=0)
        missing = edit("Sub", edit("Shape", MASK, start=1, end=2), real)
        return _by_row(edit, edit("GreaterOrEqual", missing, edit.constant(least)), rank)

    return holds


def every_row_padded(edit: Editor, _rank: int) -> str:
    """Each row has padding somewhere."""
    least = edit("ReduceMin", MASK, edit.constant([1]), keepdims=0)
    return edit("Equal", edit("ReduceMax", least, keepdims=0), edit.constant(0))


def nothing_but_padding(edit: Editor, rank: int) -> str:
    """No new token of the row is one."""
    count = edit("Shape", IDS, start=1, end=2)
    begin, end = edit("Neg", count), edit.constant([2**62])
    new = edit("Slice", MASK, begin, end, edit.constant([1]))
    most = edit("ReduceMax", new, edit.constant([1]), keepdims=0)
    return _by_row(edit, edit("Equal", most, edit.constant(0)), rank)


def padded_behind(edit: Editor, rank: int) -> str:
    """The last column of the row is padding."""
    last = edit("Gather", MASK, edit.constant(-1), axis=1)
    return _by_row(edit, edit("Equal", last, edit.constant(0)), rank)


def _within(edit: Editor, size: str, least: int, most: int | None) -> str:
    """Of a size ``[1]``; exactly ``least`` where there is no ``most``, and -1 is without end."""
    if most is None:
        return edit("Equal", size, edit.constant([least]))
    above = edit("GreaterOrEqual", size, edit.constant([least]))
    if most < 0:
        return above
    return edit("And", above, edit("LessOrEqual", size, edit.constant([most])))


def _by_row(edit: Editor, found: str, rank: int) -> str:
    return edit("Unsqueeze", found, edit.constant(list(range(1, rank)))) if rank > 1 else found


def _by_token(edit: Editor, found: str, rank: int) -> str:
    return edit("Unsqueeze", found, edit.constant(list(range(2, rank)))) if rank > 2 else found
