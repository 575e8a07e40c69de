"""The shapes of use that a validation is to have asked for, as questions to its recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ingot.validate.counting import Fed
from ingot.validate.coverage import Part
from ingot.validate.truth.inputs import ROWS
from ingot.validate.truth.runs import LONG_PROMPT, MOST_CROSSED, TILE, TILE_ROWS, Traits

Shape = Callable[[Fed], bool]
# A turn of a chat is several tokens after a decode step; of so many, and of any other number.
TURNS = (2, 3, 9)


@dataclass(frozen=True)
class Asked:
    """One shape of use.

    Attributes:
        name: in words.
        is_it: whether a call has it.
    """

    name: str
    is_it: Shape


def required(traits: Traits) -> list[Asked]:
    """What is asked of a model and its target by default."""
    asked = [*(_stateful(traits) if traits.stateful else _alone(traits))]
    asked.append(Asked("equal calls give equal bits", lambda call: call.purpose == "repeat"))
    if traits.keeps:
        asked.append(Asked("the last logits alone", lambda call: call.purpose == "kept"))
    if traits.threads:
        asked.append(Asked("another number of threads", lambda call: call.purpose == "threads"))
    return asked


def parts(traits: Traits, calls: Sequence[Fed]) -> tuple[Part, ...]:
    """How each shape of use was judged, if it was.

    Args:
        traits: of the model and the target.
        calls: that were made.
    """
    return tuple(_part(asked, calls) for asked in required(traits))


def _part(asked: Asked, calls: Sequence[Fed]) -> Part:
    found = [call for call in calls if asked.is_it(call)]
    free, replayed = sum(call.free for call in found), sum(call.replayed for call in found)
    if free:
        return Part(asked.name, free, "session")
    if replayed:
        return Part(asked.name, replayed, "replayed")
    why = (
        "no such call was made"
        if not found
        else "every token of such calls comes behind a choice of experts that rounding may turn"
    )
    return Part(asked.name, 0, None, why)


def _compared(is_it: Shape) -> Shape:
    return lambda call: call.purpose == "compare" and is_it(call)


def _stateful(traits: Traits) -> Iterator[Asked]:
    def asked(name: str, is_it: Shape) -> Asked:
        return Asked(name, _compared(is_it))

    room = traits.longest
    several = traits.rows > 1
    yield asked("a prompt of one sequence", lambda c: c.rows == 1 and not c.turns and c.tokens > 1)
    yield asked("decode of one sequence", lambda c: c.rows == 1 and bool(c.turns) and c.tokens == 1)
    yield asked("a prompt of one token", lambda c: c.rows == 1 and not c.turns and c.tokens == 1)
    yield asked(
        "decode after a prompt of one token",
        lambda c: c.rows == 1 and c.tokens == 1 and c.turns == (1,),
    )
    for count in TURNS:
        if room is None or room > 2 * count:
            yield asked(f"a turn of {count} tokens after decode steps", _turn_of(count))
    yield asked(
        "a prompt in pieces",
        lambda c: c.tokens > 1 and bool(c.past.any()) and min(c.turns) > 1,
    )
    yield asked(
        "padding before the prompt is a call of its own", lambda c: c.rows == 1 and c.began_padded
    )
    if traits.width > 2:
        yield asked(
            "pieces shorter than the convolution", lambda c: bool(1 < c.tokens < traits.width)
        )
    if traits.chunk and (room is None or room > 4 * traits.chunk + 8):
        yield asked("a prompt of more than three chunks", lambda c: _over(c, 3 * traits.chunk))
        yield asked(
            "a turn of more than a chunk", lambda c: _is_turn(c) and c.tokens > traits.chunk
        )
        if not traits.cached:
            yield from _tiles(traits)
    yield from _long(traits)
    if several:
        yield from _several(traits)


def _is_turn(call: Fed) -> bool:
    return call.rows == 1 and len(call.turns) > 1 and call.turns[-1] == 1 and call.tokens > 1


def _turn_of(count: int) -> Shape:
    return lambda call: _is_turn(call) and call.tokens == count


def _over(call: Fed, tokens: int) -> bool:
    return call.rows == 1 and not call.turns and call.tokens > tokens


def _several(traits: Traits) -> Iterator[Asked]:
    def asked(name: str, is_it: Shape) -> Asked:
        return Asked(name, _compared(lambda call: call.rows > 1 and is_it(call)))

    def different(call: Fed) -> bool:
        return len(set(call.paddings)) == min(ROWS, traits.rows)

    most = traits.rows
    if traits.stateful:
        yield asked(
            f"a prompt of {most} sequences of different length",
            lambda c: c.rows == most and not c.turns and different(c),
        )
        yield asked(
            f"decode of {most} sequences of different length",
            lambda c: c.rows == most and bool(c.turns) and c.tokens == 1 and different(c),
        )
        if most > 2:
            yield asked(
                "decode of two sequences", lambda c: c.rows == 2 and bool(c.turns) and c.tokens == 1
            )
        yield asked(
            "a turn of several sequences",
            lambda c: len(c.turns) > 1 and c.turns[-1] == 1 and c.tokens > 1,
        )
        if traits.most_rows is None or traits.most_rows >= TILE_ROWS:
            yield asked(f"{TILE_ROWS} sequences", lambda c: c.rows == TILE_ROWS)
        if traits.most_rows is None or traits.most_rows > TILE_ROWS:
            yield asked(f"more than {TILE_ROWS} sequences", lambda c: c.rows > TILE_ROWS)
        yield asked("a call that is all padding in one of several rows", lambda c: c.began_padded)
    else:
        if most > 2:
            yield asked("two rows", lambda c: c.rows == 2)
        if traits.most_rows is None or traits.most_rows >= TILE_ROWS:
            yield asked(f"{TILE_ROWS} rows", lambda c: c.rows == TILE_ROWS)
        yield asked(f"{most} rows of different length", lambda c: c.rows == most and different(c))
    yield asked("padding in every row", lambda c: min(c.paddings) > 0)
    if traits.anywhere:
        yield asked("padding on the right", lambda c: c.padded_behind)
        if traits.stateful:
            yield asked("padding between tokens", lambda c: c.padded_within)


def _tiles(traits: Traits) -> Iterator[Asked]:
    """Calls that leave no tile of a kernel part empty; most lengths leave one."""
    tile = traits.tile if traits.stateful else TILE

    def full(call: Fed) -> bool:
        return call.rows == 1 and call.positions % tile == 0 < call.positions

    yield Asked(
        f"a prompt of {tile} tokens, or a multiple",
        _compared(lambda c: full(c) and not c.turns),
    )
    if traits.stateful:
        yield Asked(
            f"decode of the last of {tile} tokens, or a multiple",
            _compared(lambda c: full(c) and bool(c.turns) and c.tokens == 1),
        )


def _long(traits: Traits) -> Iterator[Asked]:
    """Where nothing keeps the target or the model from it."""
    room = [limit for limit in (traits.longest, traits.context) if limit is not None]
    after = (max(traits.chunk + 1, 33) + 3) if traits.stateful else 0
    positions = traits.cached or not traits.stateful
    if positions and min(room, default=LONG_PROMPT + after) >= LONG_PROMPT + after:
        yield Asked(
            "a prompt of more than 256 tokens", _compared(lambda c: _over(c, LONG_PROMPT - 3))
        )
        yield from _tiles(traits)
    switch = traits.switch
    most = MOST_CROSSED if traits.longest is None else traits.longest - after - 3
    if switch is not None and switch <= min(MOST_CROSSED, most):
        yield Asked(
            f"a prompt past the {switch} tokens at which positions change",
            _compared(lambda c: c.positions > switch and not c.turns),
        )


def _alone(traits: Traits) -> Iterator[Asked]:
    yield Asked("one row", _compared(lambda c: c.rows == 1 and c.tokens > 1))
    if traits.rows == ROWS:
        yield Asked("one token", _compared(lambda c: c.rows == 1 and c.tokens == 1))
    yield from _long(traits)
    if traits.rows > 1:
        yield from _several(traits)
