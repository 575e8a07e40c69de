"""The coverage of one validation: what its recorded calls add up to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from ingot.validate.counting import Fed
from ingot.validate.coverage import Coverage, Experts, LeftOut, Part
from ingot.validate.judge.judge import Judge
from ingot.validate.parts import parts
from ingot.validate.truth.runs import Traits

FLIPPED = (
    "they come behind a choice of experts that rounding may turn; their numbers were compared with "
    "the truth's experts given"
)
DOUBTFUL = "they come behind a choice of experts that rounding may turn, and nothing shows which"
UNFORCED = "each expert by itself, since the experts of an engine cannot be given"
UNKNOWN = "of a recurrent state the truth is known only where a recorded call ended"
SAMPLED = "of long calls the outputs of some tokens are compared"


def coverage(
    traits: Traits,
    calls: Sequence[Fed],
    judges: Sequence[Judge],
    forced: Mapping[int, Sequence[int]] | None = None,
    unread: Mapping[int, str] = MappingProxyType({}),
) -> Coverage:
    """Add up what was asked.

    Args:
        traits: of the model and the target.
        calls: that the target was given, of all sets of token ids.
        judges: one for each set.
        forced: by router, the experts that were run because they were given; None where none
            could be given.
        unread: by router, why it cannot be seen which experts it chose.
    """
    compared = [call for call in calls if call.purpose == "compare"]
    ids = {int(each) for call in calls for each in np.unique(call.input_ids)}
    positions = max((call.positions for call in calls), default=0)
    longest = max((call.tokens for call in calls), default=0)
    chunks = -(-longest // traits.chunk) if traits.chunk else 0
    rows = tuple(sorted({call.rows for call in calls}))
    return Coverage(
        calls=len(calls),
        rows=rows,
        lengths=tuple(sorted({call.tokens for call in calls})),
        positions=positions,
        context=traits.context,
        paddings=tuple(_paddings(calls)),
        ids=len(ids),
        vocab_size=traits.vocab_size,
        chunks=chunks,
        experts=_experts(judges, forced or {}),
        parts=(*parts(traits, calls), *_unread(judges[0].routers.names(), unread)),
        left_out=tuple(_left_out(compared, judges, forced is None)),
        not_asked=(
            *_not_asked(traits, positions, max(rows, default=0), len(ids)),
            *(UNFORCED for _ in judges[0].routers.names()[:1] if forced is None),
        ),
    )


def _paddings(calls: Sequence[Fed]) -> Iterator[str]:
    masks = [call.mask for call in calls]
    if any((mask[:, 0] == 0).any() for mask in masks):
        yield "left"
    if any(call.padded_behind for call in calls):
        yield "right"
    if any(call.padded_within for call in calls):
        yield "between tokens"
    if any(call.rows > 1 and min(call.paddings) > 0 for call in calls):
        yield "in every row"
    if any(not row.any() for call in calls for row in call.attention_mask):
        yield "all of a row"


def _experts(judges: Sequence[Judge], forced: Mapping[int, Sequence[int]]) -> tuple[Experts, ...]:
    first = judges[0]
    found = []
    for router, name in enumerate(first.routers.names()):
        chosen = set().union(*(judge.chosen[router] for judge in judges))
        given = set(forced.get(router, ())) - chosen
        never = set(range(first.experts[router])) - chosen - given
        found.append(Experts(name, *(tuple(sorted(each)) for each in (chosen, given, never))))
    return tuple(found)


def _unread(names: Sequence[str], unread: Mapping[int, str]) -> Iterator[Part]:
    for router, why in sorted(unread.items()):
        yield Part(f"the experts that {names[router]} chooses", 0, None, why)


def _left_out(calls: Sequence[Fed], judges: Sequence[Judge], unseen: bool) -> Iterator[LeftOut]:
    known, free = sum(call.recorded for call in calls), sum(call.free for call in calls)
    if free < known:
        yield LeftOut("tokens", known - free, known, DOUBTFUL if unseen else FLIPPED)
    tokens = sum(int(call.attention_mask.sum()) for call in calls)
    if known < tokens:
        yield LeftOut("tokens", tokens - known, tokens, SAMPLED)
    states, compared = (sum(judge.states[index] for judge in judges) for index in (0, 1))
    if compared < states:
        yield LeftOut("tensors", states - compared, states, UNKNOWN)


def _not_asked(traits: Traits, positions: int, rows: int, ids: int) -> Iterator[str]:
    if traits.context is not None and positions < traits.context:
        yield f"sequences of {positions + 1} to {traits.context} tokens"
    elif traits.context is None:
        yield f"sequences of more than {positions} tokens"
    if traits.switch is not None and positions <= traits.switch:
        yield f"sequences past the {traits.switch} tokens at which positions change"
    if traits.most_rows is None or rows < traits.most_rows:
        yield f"batches of more than {rows} rows"
    if ids < traits.vocab_size:
        yield f"{traits.vocab_size - ids} of {traits.vocab_size} token ids"
