"""The token side of a session: its checks, the running attention mask and the positions."""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from typing import Any

import numpy as np

from ingot.export.ingot import SIZES
from ingot.graphs.state import State
from ingot.plugins.errors import shown
from ingot.runtime.session import Ids, SessionError

# Attention kernels count tokens, and runtimes sizes, in 32 bits.
MOST_SIZE = 2**31 - 1


def whole(value: Any) -> int | None:
    """A whole number of Python or numpy as an int; None for anything else.

    True is an int to Python, and no size, count or token id to anybody.
    """
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def items(given: Any) -> list[Any] | None:
    """What a sequence holds, an array by its first axis; None for anything else.

    Text and bytes iterate too, as do a dictionary and a set, and none of them is a list of tokens.
    """
    other = isinstance(given, str | bytes | bytearray | memoryview | Mapping | Set)
    if other or not isinstance(given, Iterable) or not isinstance(given, Sized):
        return None
    try:
        return list(given)
    # An array without a dimension.
    except TypeError:
        return None


def token_ids(given: Any, what: str) -> list[int]:
    """Token ids as a list: of a sequence of whole numbers, which may be empty.

    Raises:
        SessionError: anything else, as ``what``.
    """
    found = items(given)
    ids = [whole(item) for item in found or ()]
    if found is None or None in ids:
        raise SessionError(
            f"{what} is {shown(given)}; it must be a list of token ids, which are whole numbers."
        )
    return [number for number in ids if number is not None]


def rows_kept(task: str, tokens: int, logits_to_keep: Any) -> int:
    """Of how many of the last T columns the main output is wanted, all of them for 0.

    Raises:
        SessionError: what is no number of columns, or a task whose outputs are not one a token.
    """
    count = whole(logits_to_keep)
    if count is None or count < 0:
        raise SessionError(
            f"logits_to_keep is {shown(logits_to_keep)}; it must be a whole number, 0 for all."
        )
    if count and task != "generate":
        raise SessionError(
            f"logits_to_keep is {count}, and the ingot was exported for the task {task!r}, which "
            "has no logits of each token; leave it out."
        )
    return min(count, tokens) or tokens


def no_memory(states: Sequence[State], batch: int, capacity: int) -> SessionError:
    """The refusal of a ``reset`` whose states do not fit into memory."""
    size = sum(SIZES[state.dtype] * math.prod(state.shape(batch, capacity)) for state in states)
    return SessionError(
        f"there is no memory for {batch} sequences of {capacity} tokens, whose states take "
        f"{size / 1e9:,.1f} GB; reset with a smaller batch or capacity."
    )


class OneCall:
    """Refuses a call of a session in which another call is still at work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        # Waiting would answer with the state that the other call leaves.
        if not self._lock.acquire(blocking=False):
            raise SessionError(
                "the session is busy with a call of another thread; give each thread a session of "
                "its own: fork() it."
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class TokenInputs:
    """Turns each call's tokens into the graph's three token inputs.

    Args:
        vocab_size: ids must be below it.
        states: the graph's states. Where one grows, the attention mask covers its past as well;
            a graph without any takes each call for itself. One of fixed size is recurrent.

    Attributes:
        batch: B, rows of every call.
        capacity: most tokens of a sequence, padding included.
        mask: ``[B, P]``, the attention mask of the tokens seen.
        lost: set by the session while the graph runs. A run that failed, or was interrupted, leaves
            states of which some have the new tokens and some have not.
        changes: see ``Session.changes``.
        call: held by the session during each of its calls.
    """

    def __init__(self, vocab_size: int, states: Sequence[State]) -> None:
        self.vocab_size = vocab_size
        self.stateful = bool(states)
        self.cached = any(state.axis is not None for state in states)
        self.recurrent = any(state.axis is None for state in states)
        self.call = OneCall()
        self.changes = 0
        self.reset(1, 0)

    def reset(self, batch: int, capacity: int) -> None:
        """Forget the tokens seen.

        Raises:
            SessionError: sizes that are none; the state is lost then, as the caller wanted.
        """
        self.lost = True
        self.changes += 1
        rows, room = whole(batch), whole(capacity)
        if rows is None or room is None or not (0 < rows <= MOST_SIZE and 0 <= room <= MOST_SIZE):
            raise SessionError(
                f"a session of {shown(batch)} sequences of {shown(capacity)} tokens was asked for; "
                "give a batch of at least 1 and a capacity of at least 0, whole numbers below 2^31."
            )
        self.batch = rows
        self.capacity = room
        self.mask: Ids = np.zeros((rows, 0), dtype=np.int64)
        self.lost = False

    @property
    def seen(self) -> int:
        """P, the tokens of every row so far, padding included; 0 without state."""
        return int(self.mask.shape[1]) if self.stateful else 0

    def append(self, input_ids: Ids, attention_mask: Ids) -> dict[str, Ids]:
        """The graph's inputs for T more tokens, ``[B, T]`` each; call ``check`` first."""
        past = self.mask[:, : self.seen]
        self.mask = np.concatenate((past, attention_mask), axis=1)
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)
        return {
            "input_ids": input_ids,
            "attention_mask": self.mask if self.cached else attention_mask,
            "position_ids": positions[:, -input_ids.shape[1] :],
        }

    def usable(self) -> None:
        """Refuse a state that was lost.

        Raises:
            SessionError: the last call failed.
        """
        if self.lost:
            raise SessionError("the last call failed and the state is lost; call reset first.")

    def check(self, input_ids: Ids, attention_mask: Ids) -> None:
        """Refuse tokens that the graph would misread.

        Raises:
            SessionError: dtype, shape, batch, capacity or an id outside the vocabulary, padding
                that a recurrent state would take for tokens, or a state that was lost.
        """
        self.usable()
        for name, array in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            # Who calls may not check types.
            if not isinstance(array, np.ndarray):
                raise SessionError(
                    f"{name} is {shown(array)}; it must be a numpy array, int64 [batch, tokens]."
                )
            if array.dtype != np.int64 or array.ndim != 2:
                raise SessionError(
                    f"{name} is {array.dtype} of shape {list(array.shape)}; it must be int64 "
                    "[batch, tokens]."
                )
        if input_ids.shape != attention_mask.shape or input_ids.shape[0] != self.batch:
            raise SessionError(
                f"input_ids {list(input_ids.shape)} and attention_mask "
                f"{list(attention_mask.shape)} must both be [{self.batch}, tokens]."
            )
        if input_ids.shape[1] < 1:
            raise SessionError("input_ids holds no tokens; give at least one.")
        if not np.isin(attention_mask, (0, 1)).all():
            raise SessionError("attention_mask must hold only 1 (token) and 0 (padding).")
        total = self.seen + input_ids.shape[1]
        if total > self.capacity:
            raise SessionError(
                f"{total} tokens do not fit the session's capacity of {self.capacity}."
            )
        outside = (input_ids < 0) | (input_ids >= self.vocab_size)
        if outside.any():
            raise SessionError(
                f"token id {input_ids[outside][0]} is outside the vocabulary of {self.vocab_size}."
            )
        if self.recurrent and not attention_mask.all():
            self._check_padding(attention_mask)

    def _check_padding(self, attention_mask: Ids) -> None:
        """A convolution's window would hold padding that stands between tokens, or behind them.

        Caches have no such rule: attention looks at no masked position, wherever it stands.
        """
        began = self.mask[:, : self.seen].any(axis=1, keepdims=True)
        behind = np.logical_or.accumulate(np.hstack((began, attention_mask != 0)), axis=1)[:, :-1]
        wrong = (behind & (attention_mask == 0)).any(axis=1)
        if wrong.any():
            raise SessionError(
                f"attention_mask has padding behind the first token of row {wrong.argmax()}; this "
                "model's state is recurrent and takes padding before a row's first token only: "
                "pad on the left, and rows that go on by different lengths one by one, each in a "
                "session of its own."
            )
