"""What it costs to store one weight in each of some formats.

Measured is the first of them. For each weight, or both stacks of a mixture of experts, which one
kernel reads, the model runs with that one rounded and all others as they are, over some of the
calibration's tokens: its effect is the mean KL of the model's next-token distribution against that
of the model as it is. All of these runs go through a layer together, so each weight is read once.

Of the other formats it follows: a small change of a weight costs what its squared error ``(w - v)^T
H (w - v)`` over its inputs of second moments H is, times something that is the model's and not the
format's. So an effect is the measured one times how many times as large that error is, of some rows
of some experts. On the trained checkpoints of ``tests/data``, from int4 in blocks of 128, Mamba2's
effects in five formats are 0.94 to 1.13 times what this says, Granite's 0.6 to 2.0 times. Where
routers are it is steadier than measuring again: one rounding or another makes a router choose
otherwise at some token, and measured effects of one weight of OLMoE's rise from a format to a finer
one, up to 60-fold. What Mamba2 and Granite are given by it at five budgets is as good, to 1 %, as
what they are given by a measurement of every format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from ingot.export.calibration.choose import (
    METHODS,
    Chosen,
    Tables,
    chosen,
    chosen_tables,
    of_tables,
)
from ingot.export.calibration.moments import of_head, of_layer
from ingot.export.calibration.walk import Advance, Batch, Walk
from ingot.export.codecs.blocks import Blocks, Floats
from ingot.export.codecs.coder import Nearest
from ingot.export.graph import Opened

# Tokens that effects are measured on, and those of which a mean still tells what a weight is worth.
TOKENS = 2048
LEAST_TOKENS = 512
# Products of all runs with weights; where they would be more, fewer tokens are taken. So many take
# a core some three minutes. For SmolLM2-135M's 211 weights it is a quarter of all tokens' products.
MOST_PRODUCTS = 2**43
# Logits of one run that are looked at together, few enough for their memory to be used again: that
# of a whole batch would be touched for the first time at every step of the way.
AT_ONCE = 2**21

# Of each matrix and each stack so many rows and experts say how the errors of formats compare.
ROWS = 256
EXPERTS = 8

# Weights that are stored alike -> their mean KL in nats in each format, the measured one first.
Effects = dict[tuple[str, ...], dict[Blocks, float]]

# By batch, the hidden states ``[B, T, H]`` of one run.
Run = list[torch.Tensor]


def effects(
    opened: Opened,
    formats: Sequence[Blocks],
    method: str,
    sequences: npt.NDArray[np.int64],
    advance: Advance = lambda _layers: None,
    *,
    tables: Tables | None = None,
) -> Effects:
    """The effect of storing each weight in each format, by the names of the parameters.

    All experts of a stack are rounded together.

    Args:
        opened: the checkpoint, in float32, of a model with a head.
        formats: the one in which effects are measured, and those in which they follow from it.
        method: of ``choose.METHODS``.
        sequences: token ids ``[n, T]``.
        advance: told of each finished layer, the head among them.
        tables: ``of_tables`` of the same, where it serves others as well.
    """
    moments = (tables or partial(of_tables, opened, method, sequences))()
    with torch.inference_mode():
        return _Effects(Walk(opened), formats, method, moments).measure(sequences, advance)


class _Effects:
    def __init__(
        self, walk: Walk, formats: Sequence[Blocks], method: str, tables: torch.Tensor | None
    ) -> None:
        self.walk, self.method, self.tables = walk, method, tables
        measured, *self.others = formats
        self.formats = Nearest(measured)
        self.probes: list[Batch] = []
        self.runs: dict[tuple[str, ...], Run] = {}
        # By group, how many times as much each format costs as the measured one.
        self.times: dict[tuple[str, ...], dict[Blocks, float]] = {}
        # The head's numbers, where it is a table: its run begins with the rows as they are stored.
        self.tied_head: list[Chosen] = []

    def measure(self, sequences: npt.NDArray[np.int64], advance: Advance) -> Effects:
        walk = self.walk
        some = self._some(sequences)
        walk.load(walk.tables)
        batches, self.probes = list(walk.begin(sequences)), list(walk.begin(some))
        for name in walk.tables:
            found = list(chosen_tables(walk, self.formats, [name], self.tables))
            if name == walk.head:
                self.tied_head = found
            if found:
                self._compare((name,), found, lambda _each: self.tables)
                self._put(found)
                self.runs[name,] = [batch.x for batch in walk.begin(some)]
                self._put_back(found)
        for number in range(len(walk.layers)):
            self._layer(number, batches)
            advance(1)
        result = self._at_head(batches)
        advance(1)
        return result

    def _some(self, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The begin of some sequences, from everywhere: a file may change its kind on the way."""
        some = sequences[:: max(1, sequences.size // TOKENS)]
        matrices = {n: p.numel() for n, p in self.walk.model.named_parameters() if p.dim() > 1}
        head = matrices[self.walk.head]
        layers = sum(size for name, size in matrices.items() if name not in self.walk.tables)
        # A weight's run goes through the layers behind it, which are half of them on the mean.
        each = len(matrices) * (head + (layers - head * (not self.walk.tied)) // 2)
        most = max(LEAST_TOKENS, MOST_PRODUCTS // each)
        return some[:, : -(-most // len(some))]

    def _layer(self, number: int, batches: Sequence[Batch]) -> None:
        walk = self.walk
        names = walk.names(number)
        walk.load(names)
        moments = of_layer(walk, number, batches)
        for run in self.runs.values():
            run[:] = self._through(number, run)
        before = [batch.x for batch in self.probes]
        for group in moments.groups():
            found = list(chosen(walk, self.formats, self.method, group, moments))
            if found:
                self._compare(group, found, lambda each: moments.of(each.name, each.expert))
                self._put(found)
                self.runs[group] = self._through(number, before)
                self._put_back(found)
        for batch in (*batches, *self.probes):
            batch.x, _ = walk.through(number, batch)
        walk.unload(names)

    def _through(self, number: int, run: Run) -> Run:
        return [
            self.walk.through(number, dataclasses.replace(batch, x=x))[0]
            for batch, x in zip(self.probes, run, strict=True)
        ]

    def _at_head(self, batches: Sequence[Batch]) -> Effects:
        walk = self.walk
        walk.load([walk.head])
        head = (walk.head,)
        found = self.tied_head
        if not walk.tied:
            moments = of_head(walk, batches)
            found = list(chosen(walk, self.formats, self.method, head, moments))
            if found:
                self._compare(head, found, lambda each: moments.of(each.name, each.expert))
                self.runs[head] = [batch.x for batch in self.probes]
        totals, tokens = dict.fromkeys(self.runs, 0.0), 0
        for expected, of_runs in self._pieces():
            truth = walk.logits(expected)[0].double().log_softmax(-1)
            shares = truth.exp()
            known = float((shares * truth).sum())
            for group, x in of_runs.items():
                if group == head:
                    self._put(found)
                logits = walk.logits(x)[0].double()
                if group == head:
                    self._put_back(found)
                # Of shares p the KL is sum(p log p) - sum(p logits) + logsumexp(logits).
                told = float((shares * logits).sum() - logits.logsumexp(-1).sum())
                totals[group] += known - told
            tokens += len(truth)
        return {
            group: {blocks: times * total / tokens for blocks, times in self.times[group].items()}
            for group, total in totals.items()
        }

    def _pieces(self) -> Iterator[tuple[torch.Tensor, dict[tuple[str, ...], torch.Tensor]]]:
        """What enters the end of the model ``[1, n, H]``, as it is and in each run."""
        count = max(1, AT_ONCE // self.walk.shape(self.walk.head)[0])
        for place, batch in enumerate(self.probes):
            for first in range(0, batch.ids.numel(), count):
                here = slice(first, first + count)
                runs = {
                    group: run[place].flatten(0, 1)[None, here] for group, run in self.runs.items()
                }
                yield batch.x.flatten(0, 1)[None, here], runs

    def _compare(
        self,
        group: tuple[str, ...],
        found: Sequence[Chosen],
        moments: Callable[[Chosen], torch.Tensor | None],
    ) -> None:
        """Note how the errors of all formats compare; of several matrices alike the mean is."""
        measured = found[0].blocks
        total = dict.fromkeys((measured, *self.others), 0.0)
        for name in group:
            stack = [each for each in found if each.name == name]
            some = stack[:: -(-len(stack) // EXPERTS)]
            errors = [self._errors(each, moments(each)) for each in some]
            own, *others = map(sum, zip(*errors, strict=True))
            total[measured] += 1
            for blocks, error in zip(self.others, others, strict=True):
                # What is stored as it is costs as much in any format.
                total[blocks] += error / own if own else 1
        self.times[group] = {blocks: times / len(group) for blocks, times in total.items()}

    def _errors(self, each: Chosen, moments: torch.Tensor | None) -> list[float]:
        """Squared errors of some rows, over inputs of known second moments, in each format."""
        step = -(-len(each.rows) // ROWS)
        rows = np.ascontiguousarray(each.rows[::step])

        def error(decoded: Floats) -> float:
            off = torch.from_numpy(rows - decoded)
            return float((off * (off if moments is None else off @ moments)).sum())

        result = [error(each.decoded[::step])]
        for blocks in self.others:
            if moments is None:
                encoded = blocks.encode(rows)
            else:
                encoded = METHODS[self.method](blocks, rows, moments)
            result.append(error(blocks.decode(encoded, rows.shape[1])))
        return result

    def _put(self, found: Sequence[Chosen]) -> None:
        for each in found:
            self.walk.put(each.name, each.expert, each.decoded)

    def _put_back(self, found: Sequence[Chosen]) -> None:
        for each in found:
            self.walk.put(each.name, each.expert, each.rows)
