"""What one validation feeds: a few recorded sequences, and every shape of use cut out of them.

Whatever a recorded call gives for a token, another call that has the same tokens before it gives as
well, however many rows it has, wherever padding stands and wherever calls are cut. So the truth
computes a few *recorded* runs, and all others are cut out of those: a run has, in each row, the
first tokens of some row of a recorded one, in order. Of a state of fixed size the truth is known
where a recorded call ended after as many tokens.

Where positions are turned by the length of a call (``Facts.switch_length``), a cut that crosses
that length does not compute the same, and is recorded itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ingot.runtime.session import Ids
from ingot.validate.truth.inputs import ROWS, SPLIT, Inputs, Plan, make_inputs

MAIN, LONG, CONTEXT = "main", "long", "context"
# Tokens of the long prompt of a model with positions: beyond 128 and 256, from which on half types
# round positions.
LONG_PROMPT = 259
# A length at which a model changes is crossed where it is at most this.
MOST_CROSSED = 512
# Without ``--length``; beyond, attention in float64 takes hours.
MOST_CONTEXT = 4096
# Tokens of one call of a sequence as long as the context.
CONTEXT_PIECE = 256
# Tokens of the calls behind a prompt with padding: decode steps and a turn.
AFTER_PADDING = (1, 1, 2)
# Of the largest batch.
MOST_ROWS = 5
# Kernels take tokens and rows in tiles whose sizes are powers of two. What is wrong only where no
# tile is left part empty is seen in calls that fill them: a sequence of so many tokens, up to four
# times as many, and so many rows.
TILE = 64
TILE_ROWS = 4
TILES = "whole tiles"
# Kernels leave out tiles that are padding as a whole, and begin others where a row does.
PADDED_TILES = "a tile of padding"
# Tokens of each of those rows; together they fill one tile.
TILE_TOKENS = TILE // TILE_ROWS
# Tokens that a session is given room for in a chat, of which it is fed few, as in use.
ROOM = 1024
# About as many tokens of a long call are recorded.
KEPT = 96


@dataclass(frozen=True)
class Traits:
    """What decides which shapes of use a model and its target have.

    Attributes:
        vocab_size: ids are below it.
        stateful: whether calls follow one another.
        cached: whether a state grows by a token's each.
        recurrent: whether a state is of fixed size, so that padding stands before tokens only.
        chunk: of a scan; 0 without one.
        width: W of a convolution; 0 without one.
        context: longest sequence that the model is meant for; None where nothing limits it.
        switch: see ``graphs.config.Facts.switch_length``.
        most_rows: that the target takes; None where nothing limits it.
        longest: sequence that the target takes; None where nothing limits it.
        threads: whether a session may be given a number of threads.
        by_token: whether a session feeds several tokens of several rows behind others one by one,
            as ``runtime.ort`` does where buffers are shared.
        keeps: whether the graph may be asked for the last logits alone.
    """

    vocab_size: int
    stateful: bool = True
    cached: bool = True
    recurrent: bool = False
    chunk: int = 0
    width: int = 0
    context: int | None = None
    switch: int | None = None
    most_rows: int | None = None
    longest: int | None = None
    threads: bool = True
    by_token: bool = False
    keeps: bool = False

    @property
    def rows(self) -> int:
        """Of the main run."""
        return ROWS if self.most_rows is None else min(ROWS, self.most_rows)

    @property
    def anywhere(self) -> bool:
        """Whether padding may stand anywhere."""
        return not self.recurrent

    @property
    def tile(self) -> int:
        """Tokens that fill a kernel's tiles: a scan's chunk, or what chunks are a part of."""
        return self.chunk if self.chunk and (not self.cached or TILE % self.chunk) else TILE

    def crosses(self, inputs: Inputs) -> bool:
        """Whether a call reaches beyond the length at which positions are turned otherwise."""
        return self.switch is not None and int(inputs.attention_mask.sum(1).max()) > self.switch


@dataclass(frozen=True)
class Run:
    """Calls from an empty state, and where their tokens were recorded.

    Attributes:
        name: for messages.
        inputs: that are fed.
        source: number of the recorded run that it is cut out of; of a recorded one its own.
        recorded: whether it is one.
        rows: by row the source's row.
        columns: ``[B, C]``, by token its column in that row; -1 for padding.
    """

    name: str
    inputs: Inputs
    source: int
    recorded: bool
    rows: tuple[int, ...]
    columns: npt.NDArray[np.int64]

    @property
    def whole(self) -> bool:
        """Whether the caches are compared as a whole after the last call too."""
        return self.inputs.kept is None and len(self.inputs.steps) > 1


def make_runs(traits: Traits, plan: Plan, seed: int, *, context: bool = True) -> list[Run]:
    """All runs of one set of token ids; the recorded ones come first, the main run before all.

    Args:
        traits: of the model and the target.
        plan: how much is fed.
        seed: of the ids.
        context: whether the plan's sequence of the context's length is among them.
    """
    main = make_inputs(
        traits.vocab_size,
        seed,
        plan,
        chunk_size=traits.chunk,
        stateful=traits.stateful,
        longest=traits.longest,
        rows=traits.rows,
    )
    recorded = [recorded_run(MAIN, main, 0)]
    random = np.random.default_rng([seed, 1])
    long = _long(traits, main, random)
    if long is not None:
        recorded.append(recorded_run(LONG, long, len(recorded)))
    cuts = [*(_cuts(traits, recorded[0]) if traits.stateful else _calls(traits, recorded[0]))]
    if long is not None and traits.stateful and long.prefill > 4:
        cuts.append(split_run(recorded[1], (2, long.prefill - 2), "long split"))
        cuts += _tiles(recorded[1], traits.tile)
        cuts += _padded_tiles(traits, recorded[1])
    whole = _context(traits, plan, random) if context else None
    if whole is not None:
        recorded.append(recorded_run(CONTEXT, whole, len(recorded)))
    # Of one call a first piece is the same call again.
    found: list[Run] = []
    for run in cuts:
        if not traits.crosses(recorded[run.source].inputs):
            found.append(run)
        elif traits.by_token and len(run.rows) > 1:
            # There the calls that count are of one token each.
            single = recorded_run(f"{run.name}, by token", _by_token(run), len(recorded))
            recorded.append(single)
            found.append(
                replace(run, source=single.source, rows=single.rows, columns=single.columns)
            )
        else:
            recorded.append(recorded_run(run.name, run.inputs, len(recorded)))
    return [*recorded, *found]


def _by_token(run: Run) -> Inputs:
    """The same columns in a first call as long, and calls of one token."""
    first, last = run.inputs.prefill, run.columns.shape[1]
    calls = [(f"{run.name}, by token, {stop}", stop) for stop in range(first, last + 1)]
    return replace(run.inputs, calls=tuple(calls))


def recorded_run(name: str, inputs: Inputs, number: int) -> Run:
    """A run that the truth computes, the ``number``-th of them."""
    columns = np.broadcast_to(np.arange(inputs.input_ids.shape[1]), inputs.input_ids.shape)
    rows = tuple(range(len(inputs.input_ids)))
    return Run(name, inputs, number, True, rows, np.where(inputs.attention_mask, columns, -1))


# --- what is recorded beside the main run


def _long(traits: Traits, main: Inputs, random: np.random.Generator) -> Inputs | None:
    """One row whose prompt is longer than three chunks and than what a model changes at.

    After it come some decode steps, and a turn that is longer than a chunk.
    """
    wanted = [3 * traits.chunk + 5 if traits.chunk else 0]
    # A classifier has positions as well.
    if traits.cached or not traits.stateful:
        wanted.append(LONG_PROMPT)
    prompt = max(wanted)
    turn = max(traits.chunk + 1, 33 if traits.cached else 0) if traits.stateful else 0
    after = [1, 1, 1, turn] if traits.stateful else []
    for limit in (traits.context, traits.longest):
        if limit is not None:
            prompt = min(prompt, limit - sum(after))
    # To cross it is to leave the context, where a scaling has a factor of 1.
    crossed = 0 if traits.switch is None or traits.switch > MOST_CROSSED else traits.switch + 3
    if crossed + sum(after) <= (traits.longest or crossed + sum(after)):
        prompt = max(prompt, crossed)
    if prompt <= main.prefill:
        return None
    if not traits.stateful and prompt > TILE:
        # A call of its own, whose main output is of its last token.
        return _one_row(traits, random, [TILE, prompt - TILE], [f"{LONG}, {TILE} tokens", LONG])
    names = [LONG, *(f"{LONG}, decode {n}" for n in (1, 2, 3)), f"{LONG}, then {turn} tokens"]
    return _one_row(traits, random, [prompt, *after], names[: 1 + len(after)])


def _context(traits: Traits, plan: Plan, random: np.random.Generator) -> Inputs | None:
    """One row as long as the model's context, or as the plan says, in pieces."""
    length = plan.length
    if length is None and plan.whole and traits.context is not None:
        length = min(traits.context, MOST_CONTEXT)
    if length is None:
        return None
    if traits.longest is not None:
        length = min(length, traits.longest)
    if not traits.stateful:
        return _one_row(traits, random, [length], [f"{CONTEXT}, {length} tokens"])
    # The last token by itself, as in use.
    sizes = [CONTEXT_PIECE] * ((length - 1) // CONTEXT_PIECE)
    rest = length - 1 - sum(sizes)
    sizes += [rest] * (rest > 0) + [1]
    names = [f"{CONTEXT}, {stop} tokens" for stop in np.cumsum(sizes).tolist()]
    return _one_row(traits, random, sizes, names, ends_only=True)


def _one_row(
    traits: Traits,
    random: np.random.Generator,
    sizes: Sequence[int],
    names: Sequence[str],
    *,
    ends_only: bool = False,
) -> Inputs:
    stops = np.cumsum(sizes).tolist()
    ids = random.integers(0, traits.vocab_size, size=(1, stops[-1]), dtype=np.int64)
    kept = np.zeros(ids.shape, dtype=np.bool_)
    kept[0, np.array(stops) - 1] = True
    if not ends_only:
        # Odd, so that it meets every place of a tile or a chunk.
        kept[0, :: max(sizes) // KEPT | 1] = True
        # Decoded by themselves; see ``_tiles``.
        edges = np.array([n * traits.tile for n in (1, 2, 4)])
        edges = np.concatenate((edges - 1, edges))
        kept[0, edges[edges < ids.shape[1]]] = True
    calls = tuple(zip(names, stops, strict=True))
    mask = np.ones_like(ids)
    return Inputs(ids, mask, sizes[0], traits.stateful, calls, None if kept.all() else kept)


# --- what is cut out of the main run


def _cuts(traits: Traits, main: Run) -> list[Run]:
    """The main run's tokens in other calls, beside other rows and behind other padding."""
    inputs = main.inputs
    prefill, rows = inputs.prefill, range(len(inputs.input_ids))
    places = [*inputs.splits]
    if traits.chunk and SPLIT % traits.chunk:
        places.append(traits.chunk)
    places = [at for at in dict.fromkeys(places) if at < prefill]
    runs = [split_run(main, (at, prefill - at), "split") for at in places]
    # One of them with two rows.
    runs[1:2] = [_first_rows(run, 2) for run in runs[1:2]]
    # Two tokens, and as many as a convolution looks back.
    short = (2, max(2, traits.width - 1))
    if prefill > sum(short):
        runs.append(split_run(main, (*short, prefill - sum(short)), "split"))
    lengths = [int(inputs.attention_mask[row, :prefill].sum()) for row in rows]
    turns = [(1, 1, 3, 2), (1, 2, 9), (1, 1, 2, 3)]
    for row, after in zip(rows, turns, strict=False):
        runs.append(row_run(main, f"row {row} alone", row, (lengths[row], *after)))
    # As a chat: a short prompt, an answer, turns of several lengths, and room for many more.
    chat = row_run(main, "chat", 0, (3, 1, 9, 1, 2, 1, 3))
    runs.append(replace(chat, inputs=replace(chat.inputs, room=_room(traits, chat.inputs))))
    if len(rows) > 2:
        runs.append(_two_rows(main, (prefill, 1, 1)))
    runs += _four_rows(traits, main, (min(TILE_TOKENS, prefill), 1, 1))
    last = rows[-1]
    if lengths[last] > 1:
        runs.append(row_run(main, "one token", last, (1, 1, 1, 2, 3)))
    runs.append(row_run(main, "padding first", last, (3, 2, 1), padding=3))
    # Together with what follows as long as the prefill, for which every target has room.
    first = prefill - sum(AFTER_PADDING)
    if len(rows) > 1 and first > 10:
        several = (*rows, *rows)[: min(MOST_ROWS, traits.most_rows or MOST_ROWS)]
        runs.append(_padded(main, "every row padded", first, _lefts(first), several))
        if traits.anywhere:
            runs.append(_padded(main, "right padding", first, _rights(first)))
            runs.append(_padded(main, "padding within", first, _middles(first)))
    return [run for run in runs if run.columns.shape[1] > 0]


def _calls(traits: Traits, main: Run) -> list[Run]:
    """The main run's tokens in other calls that stand alone."""
    prefill, rows = main.inputs.prefill, range(len(main.inputs.input_ids))
    lengths = [int(main.inputs.attention_mask[row, :prefill].sum()) for row in rows]
    runs = [row_run(main, f"row {row} alone", row, (lengths[row],)) for row in rows]
    if len(rows) > 2:
        runs.append(_two_rows(main, (prefill,)))
    runs += _four_rows(traits, main, (prefill,))
    if len(rows) > 1:
        room = main.inputs.input_ids.shape[1]
        right = [[1] * n + [0] * (room - n) for n in lengths]
        left = [[0] * (room - n) + [1] * n for n in lengths]
        both = [[0] * ((room - n) // 2) + [1] * n for n in lengths]
        both = [row + [0] * (room - len(row)) for row in both]
        named = {"right padding": right, "every row padded": left, "padding on both sides": both}
        runs += [_cut(main, name, rows, np.array(mask), (room,)) for name, mask in named.items()]
    return runs


def _room(traits: Traits, inputs: Inputs) -> int:
    """For how many tokens more than are fed a session is asked."""
    limits = (ROOM, traits.context, traits.longest)
    most = min(limit for limit in limits if limit is not None)
    return max(0, most - int(inputs.input_ids.shape[1]))


def _lefts(size: int) -> list[list[int]]:
    """Paddings of different lengths in every row, one of them longer than most of the call."""
    paddings = (2, size - 5, size - 3, 1, 9)
    return [[0] * padding + [1] * (size - padding) for padding in paddings]


def _rights(size: int) -> list[list[int]]:
    tokens = (size, 5, 1)
    return [[1] * count + [0] * (size - count) for count in tokens]


def _middles(size: int) -> list[list[int]]:
    rows = np.ones((ROWS, size), dtype=np.int64)
    rows[0, 4:7] = 0
    rows[1, :2] = rows[1, 6:14] = rows[1, -1] = 0
    rows[2, 2:-2] = 0
    rows[2, 0] = 0
    found: list[list[int]] = rows.tolist()
    return found


def split_run(source: Run, sizes: Sequence[int], name: str) -> Run:
    """The first call in pieces; each is named by the sizes up to it."""
    columns = source.inputs.attention_mask[:, : sum(sizes)]
    run = _cut(source, name, source.rows, columns, sizes)
    stops = [stop for _, stop in run.inputs.calls]
    joined = ["+".join(map(str, sizes[: n + 1])) for n in range(len(stops))]
    calls = tuple((f"{name} {each}", stop) for each, stop in zip(joined, stops, strict=True))
    return replace(run, name=calls[-1][0], inputs=replace(run.inputs, calls=calls))


def row_run(source: Run, name: str, row: int, sizes: Sequence[int], padding: int = 0) -> Run:
    """One row by itself."""
    mask = np.ones((1, sum(sizes)), dtype=np.int64)
    mask[:, :padding] = 0
    return _cut(source, name, [row], mask, sizes)


def _two_rows(source: Run, sizes: Sequence[int]) -> Run:
    """The first two rows, as they lie in the main run: a batch that is neither one row nor many."""
    mask = source.inputs.attention_mask[:2, : sum(sizes)]
    return _cut(source, "two rows", source.rows[:2], mask, sizes)


def _four_rows(traits: Traits, source: Run, sizes: Sequence[int]) -> list[Run]:
    """The first two rows, each twice, as they lie in the main run; none where few rows fit."""
    if traits.most_rows is not None and traits.most_rows < TILE_ROWS:
        return []
    rows = (0, 1, 0, 1)
    mask = source.inputs.attention_mask[list(rows), : sum(sizes)]
    return [_cut(source, "four rows", rows, mask, sizes)]


def _tiles(long: Run, tile: int) -> list[Run]:
    """A long row in calls that end where tiles do.

    A prompt that fills a tile, and decode steps of the token after it, of the last of two and of
    four tiles, and of those after them. As many as fit, so it may be none.
    """
    sizes = (tile, 1, tile - 2, 1, 1, 2 * tile - 2, 1, 1)
    mask = np.ones((1, sum(sizes)), dtype=np.int64)
    run = _cut(long, TILES, [0], mask, sizes)
    return [run] if run.columns.shape[1] else []


def _padded_tiles(traits: Traits, long: Run) -> list[Run]:
    """Two rows of a long one: one begins with more padding than a tile, the other with some.

    Behind it a decode step, of the last token of a tile in each row, which is kept of the long run,
    and a turn of both.
    """
    if traits.most_rows is not None and traits.most_rows < 2:
        return []
    tile = traits.tile
    sizes = (2 * tile + 2, 1, 3)
    mask = np.ones((2, sum(sizes)), dtype=np.int64)
    mask[0, : tile + 3] = 0
    mask[1, :3] = 0
    run = _cut(long, PADDED_TILES, [0, 0], mask, sizes)
    return [run] if run.columns.shape[1] else []


def _padded(
    source: Run,
    name: str,
    first: int,
    masks: list[list[int]],
    rows: Sequence[int] | None = None,
) -> Run:
    """Rows with padding of their own in the first call, two decode steps, and a turn."""
    rows = source.rows if rows is None else rows
    mask = np.array(masks[: len(rows)], dtype=np.int64)
    mask = np.hstack((mask, np.ones((len(rows), sum(AFTER_PADDING)), dtype=np.int64)))
    return _cut(source, name, rows, mask, (first, *AFTER_PADDING))


def _first_rows(run: Run, rows: int) -> Run:
    """The same calls of the first rows alone."""
    inputs = replace(
        run.inputs,
        input_ids=run.inputs.input_ids[:rows],
        attention_mask=run.inputs.attention_mask[:rows],
        kept=None if run.inputs.kept is None else run.inputs.kept[:rows],
    )
    return replace(run, inputs=inputs, rows=run.rows[:rows], columns=run.columns[:rows])


def _cut(source: Run, name: str, rows: Iterable[int], mask: Ids, sizes: Sequence[int]) -> Run:
    """A run of some rows' first tokens, where a mask has room for them.

    Calls at the end for which a row has no tokens are left out. A row that is too short, alone for
    the first call and beside others for all of them, gives its place to the longest one.
    """
    inputs = source.inputs
    places = [np.flatnonzero(each) for each in inputs.attention_mask]
    longest = max(range(len(places)), key=lambda row: len(places[row]))
    least = mask[:, : sizes[0]].sum(1) if len(mask) == 1 else mask.sum(1)
    rows = tuple(
        row if len(places[row]) >= needed else longest
        for row, needed in zip(rows, least, strict=True)
    )
    stops = np.cumsum(sizes).tolist()
    has = np.array([len(places[row]) for row in rows])
    # No longer than the source, which the target takes.
    room = inputs.input_ids.shape[1]
    fitting = [s for s in stops if s <= room and (mask[:, :s].sum(1) <= has).all()]
    mask = mask[:, : fitting[-1] if fitting else 0]
    columns = np.full(mask.shape, -1, dtype=np.int64)
    for index, row in enumerate(rows):
        real = np.flatnonzero(mask[index])
        columns[index, real] = places[row][: len(real)]
    taken = np.array(rows)[:, None], np.maximum(columns, 0)
    ids = inputs.input_ids[taken]
    kept = None if inputs.kept is None else inputs.kept[taken] & (columns >= 0)
    calls = tuple(zip(_names(name, sizes[: len(fitting)]), fitting, strict=True))
    prefill = fitting[0] if fitting else 0
    cut = Inputs(ids, mask, prefill, inputs.stateful, calls, kept)
    return Run(name, cut, source.source, False, rows, columns)


def _names(name: str, sizes: Sequence[int]) -> list[str]:
    """What the calls of a run are called: a prompt, decode steps, and turns of several tokens."""
    found = [name]
    decoded = 0
    for size in sizes[1:]:
        decoded += size == 1
        found.append(f"{name}, decode {decoded}" if size == 1 else f"{name}, then {size} tokens")
    return found[: len(sizes)]
