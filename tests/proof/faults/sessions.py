"""What feeds the graph and keeps its states is wrong: positions, masks, states, races.

The patches are of the session's own classes, so that they are in force in the delivered session
and in the one with taps, as a fault of the code would be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ingot.runtime.onnxruntime_session import ort_value
from ingot.runtime.ort import OrtSession
from ingot.runtime.tokens import TokenInputs
from proof.fault import Fault, Patch, Where
from proof.planting import in_session

Feeds = dict[str, Any]
# Changes what is fed: the token side before the call, the call's tokens, and the inputs.
Feed = Callable[[int, Feeds], None]
# Changes what came of a call: the session, how many tokens were seen before it, and the output.
After = Callable[[OrtSession, int, Any], Any]


def fed(change: Feed) -> Patch:
    """The graph is fed something else; ``change`` gets the tokens seen and the inputs."""
    right = TokenInputs.append

    def append(self: TokenInputs, input_ids: Any, attention_mask: Any) -> Feeds:
        seen = self.seen
        feeds = {name: np.array(a) for name, a in right(self, input_ids, attention_mask).items()}
        change(seen, feeds)
        return feeds

    return lambda patch: patch.setattr(TokenInputs, "append", append)


def after(change: After) -> Patch:
    """What a run gives or leaves is something else."""
    right = OrtSession._run

    def run(self: OrtSession, input_ids: Any, attention_mask: Any, kept: int) -> Any:
        seen = self._tokens.seen
        output = right(self, input_ids, attention_mask, kept)
        return change(self, seen, output)

    return lambda patch: patch.setattr(OrtSession, "_run", run)


def _states(session: OrtSession, change: Callable[[str, Any], Any]) -> None:
    for state in session.manifest.states:
        array = np.array(session._state[state.input].numpy())
        other = np.ascontiguousarray(change(state.kind, array))
        session._state[state.input] = ort_value(other)


def shape(feeds: Feeds) -> tuple[int, int]:
    """B and T of a call."""
    rows, tokens = feeds["input_ids"].shape
    return rows, tokens


def positions_in(when: Callable[[int, int, int], bool]) -> Patch:
    """Positions are off by one; asks for the rows, the tokens and what was seen."""

    def change(seen: int, feeds: Feeds) -> None:
        if when(*shape(feeds), seen):
            feeds["position_ids"] = feeds["position_ids"] + 1

    return fed(change)


def mask_forgotten(when: Callable[[int, int, int], bool]) -> Patch:
    """Nothing is padding."""

    def change(seen: int, feeds: Feeds) -> None:
        if when(*shape(feeds), seen):
            feeds["attention_mask"] = np.ones_like(feeds["attention_mask"])

    return fed(change)


def padding_counts(seen: int, feeds: Feeds) -> None:
    """Positions are columns."""
    rows, tokens = shape(feeds)
    feeds["position_ids"] = np.tile(np.arange(seen, seen + tokens), (rows, 1))


def masks_of_row_zero(seen: int, feeds: Feeds) -> None:
    """From three rows on, others have row 0's mask."""
    if len(feeds["input_ids"]) > 2:
        feeds["attention_mask"] = np.repeat(feeds["attention_mask"][:1], len(feeds["input_ids"]), 0)


def large_ids(seen: int, feeds: Feeds) -> None:
    """Ids from 256 on are cut to a byte."""
    feeds["input_ids"] = feeds["input_ids"] % 256


def narrow_positions(seen: int, feeds: Feeds) -> None:
    """In a signed byte."""
    feeds["position_ids"] = feeds["position_ids"].astype(np.int8).astype(np.int64)


def states_through(dtype: Any) -> Patch:
    """Every state is kept in a narrower type."""

    def change(session: OrtSession, _seen: int, output: Any) -> Any:
        _states(session, lambda _kind, array: array.astype(dtype).astype(array.dtype))
        return output

    return after(change)


def rows_exchanged(when: Callable[[int], bool]) -> Patch:
    """The states of two rows change places."""

    def change(session: OrtSession, _seen: int, output: Any) -> Any:
        if when(len(output)):
            _states(session, lambda _kind, array: array[[1, 0, *range(2, len(array))]])
        return output

    return after(change)


def conv_lost(session: OrtSession, seen: int, output: Any) -> Any:
    """The convolution's window is empty after a call of two tokens."""
    if session._tokens.seen - seen == 2:
        _states(session, lambda kind, array: array * (kind != "conv"))
    return output


def halved(when: Callable[[int, int, int], bool]) -> Patch:
    """The output is half of itself; asks for the rows, the tokens and what was seen."""

    def change(session: OrtSession, seen: int, output: Any) -> Any:
        return output * 0.5 if when(len(output), session._tokens.seen - seen, seen) else output

    return after(change)


def race(amount: float, chance: float = 0.2) -> Patch:
    """Now and then a value is further off, as where two threads write to one place."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(5)

        def change(_session: OrtSession, _seen: int, output: Any) -> Any:
            if rng.random() < chance:
                output = np.array(output)
                output.reshape(-1)[rng.integers(output.size)] *= 1 + amount
            return output

        after(change)(patch)

    return apply


def every_fifth(amount: float) -> Patch:
    """Each fifth call, all of it."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        calls = [0]

        def change(_session: OrtSession, _seen: int, output: Any) -> Any:
            calls[0] += 1
            return output if calls[0] % 5 else output * np.float32(1 + amount)

        after(change)(patch)

    return apply


def stale(kind: str) -> Patch:
    """A reset leaves the states of one kind as they were, where the batch is the same."""
    right = OrtSession.reset

    def reset(self: OrtSession, batch: int, capacity: int) -> None:
        before = dict(getattr(self, "_state", {}))
        right(self, batch, capacity)
        for state in self.manifest.states:
            kept = before.get(state.input)
            if state.kind != kind or kept is None:
                continue
            if kept.shape() == self._state[state.input].shape():
                self._state[state.input] = kept

    return lambda patch: patch.setattr(OrtSession, "reset", reset)


def pieces_reversed(patch: pytest.MonkeyPatch) -> None:
    """Several rows of several tokens after a past are fed from the last token to the first."""
    right = OrtSession.step

    def step(self: OrtSession, input_ids: Any, attention_mask: Any, *kept: int) -> Any:
        later = self._tokens.seen and input_ids.shape[1] > 1 and input_ids.shape[0] > 1
        if later and any(state.shared for state in self.manifest.states):
            input_ids = input_ids[:, ::-1].copy()
        return right(self, input_ids, attention_mask, *kept)

    patch.setattr(OrtSession, "step", step)


def state_cut(patch: pytest.MonkeyPatch) -> None:
    """What is handed out of a cache begins with its second token."""
    right = OrtSession.state

    def state(self: OrtSession) -> Any:
        found = right(self)
        axes = {each.output: each.axis for each in self.manifest.states}
        return {n: np.roll(a, 1, axes[n]) if axes[n] is not None else a for n, a in found.items()}

    patch.setattr(OrtSession, "state", state)


def through(dtype: Any) -> Patch:
    """The output goes through another type."""
    return after(lambda _session, _seen, output: output.astype(dtype).astype(np.float32))


def one_buffer(patch: pytest.MonkeyPatch) -> None:
    """Calls whose output has one shape write over one another's."""
    buffers: dict[Any, Any] = {}

    def change(session: OrtSession, _seen: int, output: Any) -> Any:
        kept = buffers.setdefault((id(session), output.shape), output)
        kept[...] = output
        return kept

    after(change)(patch)


def fork_shares(patch: pytest.MonkeyPatch) -> None:
    """A fork counts on from its session, and its session from the fork."""
    right = OrtSession.fork

    def fork(self: OrtSession) -> OrtSession:
        twin = right(self)
        twin._tokens, twin._state = self._tokens, self._state
        return twin

    patch.setattr(OrtSession, "fork", fork)


def one_state_more(patch: pytest.MonkeyPatch) -> None:
    """Of a layer that there is not."""
    right = OrtSession.state
    more = {"present.9.key": np.ones((2, 3, 4, 5), np.float32)}
    patch.setattr(OrtSession, "state", lambda self: {**right(self), **more})


def room_of(when: Callable[[int], bool]) -> Patch:
    """The output is half of itself; asks for the tokens that there is room for."""
    return after(lambda s, _seen, output: output * 0.5 if when(s._tokens.capacity) else output)


SESSION = Where(None, ("session",))
# Where the session's numbers alone are wrong, or it is wrong only now and then, no place need be.
LOOSE = Where(None, ("session", "kernels"), or_none=True)


def _turn(rows: int, tokens: int, seen: int) -> bool:
    return rows == 1 and tokens > 1 and seen > 0


def _decode(rows: int, tokens: int, seen: int) -> bool:
    return tokens == 1 and seen > 0


FAULTS: list[Fault] = [
    in_session("positions off by one in decode", "granite onnx", positions_in(_decode), SESSION),
    in_session("positions off by one in decode", "olmoe ort", positions_in(_decode), SESSION),
    in_session(
        "positions off by one in a second turn", "granite ort", positions_in(_turn), SESSION
    ),
    in_session(
        "positions off by one in a second turn", "jetmoe onnx", positions_in(_turn), SESSION
    ),
    in_session(
        "positions off by one in a prompt of one token",
        "olmoe onnx",
        positions_in(lambda _rows, tokens, seen: tokens == 1 and not seen),
        SESSION,
    ),
    in_session(
        "positions off by one in decode of one row",
        "jetmoe ort",
        positions_in(lambda rows, tokens, seen: rows == 1 and _decode(rows, tokens, seen)),
        SESSION,
    ),
    in_session("columns for positions", "olmoe ort", fed(padding_counts), SESSION),
    in_session("columns for positions", "granite fp16", fed(padding_counts), SESSION),
    in_session("mask forgotten in decode", "granite ort", mask_forgotten(_decode), SESSION),
    in_session("mask forgotten", "olmoe onnx", mask_forgotten(lambda *_sizes: True), SESSION),
    in_session("mask forgotten", "mamba2 onnx", mask_forgotten(lambda *_sizes: True), SESSION),
    in_session(
        "mask forgotten in a piece",
        "granite onnx",
        mask_forgotten(lambda _rows, tokens, seen: seen > 0 and tokens > 1),
        SESSION,
    ),
    in_session("row 0's mask for three rows", "granite onnx", fed(masks_of_row_zero), SESSION),
    in_session("row 0's mask for three rows", "olmoe ort", fed(masks_of_row_zero), SESSION),
    in_session("ids in a byte", "granite ort", fed(large_ids), SESSION),
    in_session("ids in a byte", "jetmoe classify ort", fed(large_ids), SESSION),
    in_session("positions in a byte", "granite onnx", fed(narrow_positions), SESSION),
    in_session("states in float16", "mamba2 ort", states_through(np.float16), SESSION),
    in_session("states in float16", "granite ort", states_through(np.float16), SESSION),
    in_session("states in bfloat16", "granite onnx", states_through(ml_dtypes.bfloat16), SESSION),
    in_session("states in bfloat16", "olmoe fp16", states_through(ml_dtypes.bfloat16), LOOSE),
    in_session("rows' states exchanged", "mamba2 onnx", rows_exchanged(lambda n: n == 2), SESSION),
    in_session("rows' states exchanged", "granite ort", rows_exchanged(lambda n: n == 2), SESSION),
    in_session("three rows' exchanged", "olmoe onnx", rows_exchanged(lambda n: n > 2), SESSION),
    in_session("a window lost after two tokens", "mamba2 ort", after(conv_lost), SESSION),
    in_session(
        "halved in decode of one row",
        "mamba2 ort",
        halved(lambda rows, tokens, seen: rows == 1 and tokens == 1),
        LOOSE,
    ),
    in_session("halved in a second turn", "olmoe ort", halved(_turn), LOOSE),
    in_session(
        "halved where there is one row",
        "jetmoe classify onnx",
        halved(lambda rows, _tokens, _seen: rows == 1),
        LOOSE,
    ),
    in_session("a race by 1e-3", "granite ort", race(1e-3), None, "race"),
    in_session("a race by four ulps", "mamba2 onnx", race(5e-7, 0.6), None, "race"),
    in_session("each fifth call by 1e-6", "olmoe ort", every_fifth(1e-6), None, "race"),
    in_session("each fifth call by two ulps", "granite onnx", every_fifth(2.4e-7), None, "race"),
    in_session("each fifth call by 1e-3", "jetmoe classify ort", every_fifth(1e-3), None, "race"),
    in_session("a stale window after a reset", "mamba2 onnx", stale("conv"), SESSION),
    in_session("a stale state after a reset", "mamba2 ort", stale("ssm"), SESSION),
    in_session("a stale state after a reset", "hybrid ort", stale("ssm"), SESSION),
    in_session("pieces from their end", "granite ort", pieces_reversed, SESSION),
    in_session("pieces from their end", "hybrid ort", pieces_reversed, SESSION),
    in_session("caches rolled by one", "olmoe ort", state_cut, SESSION),
    in_session("one buffer for all outputs", "olmoe onnx", one_buffer, SESSION),
    in_session("one buffer for all outputs", "jetmoe classify ort", one_buffer, SESSION),
    in_session("a fork shares the state", "granite ort", fork_shares, SESSION),
    in_session("a fork shares the state", "mamba2 onnx", fork_shares, SESSION),
    in_session("a state that nobody knows", "granite onnx", one_state_more, SESSION),
    in_session("room for 400 tokens", "granite ort", room_of(lambda n: n > 400), SESSION),
    in_session("room for 400 tokens", "mamba2 ort", room_of(lambda n: n > 400), SESSION),
    in_session(
        "logits in float64", "olmoe ort", after(lambda _s, _n, o: o.astype(np.float64)), SESSION
    ),
    in_session("logits in float16", "granite onnx", through(np.float16), LOOSE),
    in_session(
        "hidden state in bfloat16", "granite features ort", through(ml_dtypes.bfloat16), LOOSE
    ),
]
