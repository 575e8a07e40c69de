"""Numbers chosen for the inputs that calibration tokens make, layer after layer.

Each layer's inputs are those that the layers before it give as they are stored, so that what a
layer's numbers make up for includes what was lost before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ingot.export.calibration.moments import Moments, of_head, of_layer
from ingot.export.calibration.tables import table_moments
from ingot.export.calibration.walk import Advance, Walk
from ingot.export.codecs import gptq, importance
from ingot.export.codecs.blocks import Blocks, Encoded, Floats
from ingot.export.codecs.coder import Coder
from ingot.export.codecs.prepared import Prepared
from ingot.export.graph import Opened
from ingot.graphs.checkpoint import stack_height

GPTQ = "gptq"
METHODS = {"importance": importance.encode, GPTQ: gptq.encode}

# Gives what ``of_tables`` does, worked out when it is asked for.
Tables = Callable[[], torch.Tensor | None]


class Chosen(NamedTuple):
    """One matrix, encoded.

    Attributes:
        name: of the parameter.
        expert: its number in a stack, else 0.
        rows: as it is, ``[N, K]``.
        encoded: its numbers.
        blocks: their format.
    """

    name: str
    expert: int
    rows: Floats
    encoded: Encoded
    blocks: Blocks

    @property
    def decoded(self) -> Floats:
        """As it is stored, ``[N, K]``."""
        return self.blocks.decode(self.encoded, self.rows.shape[1])


def choose(
    opened: Opened,
    formats: Coder,
    method: str,
    sequences: npt.NDArray[np.int64],
    advance: Advance = lambda _layers: None,
    *,
    tables: Tables | None = None,
) -> Prepared:
    """The numbers of every matrix that the tokens reach.

    Args:
        opened: the checkpoint, in float32.
        formats: gives each weight's format, and encodes what no calibration can help.
        method: of ``METHODS``.
        sequences: token ids ``[n, T]``.
        advance: told of each finished layer, the head among them.
        tables: ``of_tables`` of the same, where it serves others as well.
    """
    moments = (tables or partial(of_tables, opened, method, sequences))()
    with torch.inference_mode():
        return _choose(Walk(opened), formats, method, moments, sequences, advance)


def of_tables(opened: Opened, method: str, sequences: npt.NDArray[np.int64]) -> torch.Tensor | None:
    """What the numbers of tables are chosen by; None where each is the nearest.

    That is so where a method weighs columns alone, and where no head ends the model.
    """
    if method != GPTQ or opened.model.main_output != "logits":
        return None
    return table_moments(opened, sequences)


def _choose(
    walk: Walk,
    formats: Coder,
    method: str,
    tables: torch.Tensor | None,
    sequences: npt.NDArray[np.int64],
    advance: Advance,
) -> Prepared:
    result = Prepared(formats)

    def store(found: Iterable[Chosen]) -> None:
        for each in found:
            result.add(each.name, each.expert, each.rows, each.encoded)
            walk.put(each.name, each.expert, each.decoded)

    walk.load(walk.tables)
    store(chosen_tables(walk, formats, walk.tables, tables))
    batches = list(walk.begin(sequences))
    if not walk.tied:
        walk.unload(walk.tables)
    for number in range(len(walk.layers)):
        names = walk.names(number)
        walk.load(names)
        moments = of_layer(walk, number, batches)
        store(chosen(walk, formats, method, moments.names(), moments))
        for batch in batches:
            batch.x, _ = walk.through(number, batch)
        walk.unload(names)
        advance(1)
    if walk.head and not walk.tied:
        walk.load([walk.head])
        moments = of_head(walk, batches)
        store(chosen(walk, formats, method, moments.names(), moments))
    advance(1)
    return result


def chosen_tables(
    walk: Walk, formats: Coder, names: Sequence[str], moments: torch.Tensor | None
) -> Iterator[Chosen]:
    """The numbers of tables, of which rows are looked up.

    Args:
        walk: the model.
        formats: gives each weight's format.
        names: of parameters.
        moments: by ``of_tables``.
    """
    for name in names:
        blocks = formats.format(name)
        if blocks is None:
            continue
        rows = walk.original(name).numpy()
        if moments is None:
            encoded = formats.encode(name, 0, rows)
        else:
            encoded = gptq.encode(blocks, rows, moments)
        yield Chosen(name, 0, rows, encoded, blocks)


def chosen(
    walk: Walk, formats: Coder, method: str, names: Sequence[str], moments: Moments
) -> Iterator[Chosen]:
    """The numbers of matrices, for the inputs that were seen.

    Args:
        walk: the model.
        formats: gives each weight's format.
        method: of ``METHODS``.
        names: of parameters.
        moments: of their inputs.
    """
    for name in names:
        blocks = formats.format(name)
        if blocks is None:
            continue
        for expert in range(stack_height(walk.shape(name))):
            rows = walk.original(name, expert).numpy()
            encoded = METHODS[method](blocks, rows, moments.of(name, expert))
            yield Chosen(name, expert, rows, encoded, blocks)
