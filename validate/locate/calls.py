"""The calls with which a failed run is run once more, and what each of them feeds by definition."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ingot.graphs.state import State
from ingot.runtime.session import Ids


class Fed(NamedTuple):
    """One call of a run.

    Attributes:
        stage: its name in a report.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, of its own tokens.
    """

    stage: str
    input_ids: Ids
    attention_mask: Ids


def feeds(calls: Sequence[Fed], number: int, states: Iterable[State]) -> dict[str, Ids]:
    """A graph's token inputs of one call of a run, by their definition.

    A token's position is the number of real tokens before it, so it shares no code with the
    sessions, which count on from call to call.

    Args:
        calls: of the run, from its begin on; without a state each stands alone.
        number: of the call.
        states: of the graph; where one of them is a cache, the mask covers the past too.

    Returns:
        Ids and positions ``[B, T]``, and the mask ``[B, T]`` or ``[B, S]``.
    """
    states = list(states)
    call = calls[number]
    before = [each.attention_mask for each in calls[:number]] if states else []
    so_far = np.concatenate([*before, call.attention_mask], axis=1)
    cached = any(state.axis is not None for state in states)
    positions = so_far.cumsum(axis=1) - so_far
    return {
        "input_ids": call.input_ids,
        "attention_mask": so_far if cached or not states else call.attention_mask,
        "position_ids": positions[:, so_far.shape[1] - call.input_ids.shape[1] :],
    }


def real_so_far(calls: Sequence[Fed], number: int) -> Ids:
    """``[B, S]``: which tokens of a run are real, up to the end of one call."""
    return np.concatenate([call.attention_mask for call in calls[: number + 1]], axis=1)


def other_padding(calls: Sequence[Fed], vocab_size: int) -> list[Fed] | None:
    """The same calls with other ids in their padding; None where there is none."""
    if all((call.attention_mask != 0).all() for call in calls):
        return None
    return [
        call._replace(
            input_ids=np.where(
                call.attention_mask == 0, (call.input_ids + 1) % vocab_size, call.input_ids
            )
        )
        for call in calls
    ]


def one_by_one(calls: Sequence[Fed], by_token: bool) -> list[Fed]:
    """The calls as a session feeds them; see ``Manifest.by_token``."""
    if not by_token:
        return list(calls)
    result: list[Fed] = []
    for stage, ids, mask in calls:
        rows, tokens = ids.shape
        size = 1 if result and rows > 1 else tokens
        result += [
            Fed(stage, ids[:, at : at + size], mask[:, at : at + size])
            for at in range(0, tokens, size)
        ]
    return result
