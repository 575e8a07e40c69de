"""What an ingot's stored weights cost, of eager PyTorch over them and over the checkpoint's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ingot.export.progress import Stages
from ingot.runtime.session import Ids
from ingot.validate.judge.distribution import log_softmax, perplexities, text_calls
from ingot.validate.judge.divergence import Divergences
from ingot.validate.judge.limits import NEGLIGIBLE, QUANTISATION, TIMES_PLAIN
from ingot.validate.judge.metrics import Array
from ingot.validate.quantisation import Divergence, LayerError, Limits, Quantisation
from ingot.validate.truth.cache import Recording
from ingot.validate.truth.inputs import Inputs
from ingot.validate.truth.plain import BlockFormat, plain_checkpoint
from ingot.validate.truth.recording import (
    HIDDEN_STATES,
    Layout,
    all_router_logits,
    by_router,
    numbered,
)
from ingot.validate.truth.reference import Reference
from ingot.validate.truth.replay import choices
from ingot.validate.truth.stored import StoredCheckpoint
from ingot.validate.truth.text import compare_text
from ingot.validate.truth.weight_errors import weight_errors

# Tokens of a text that see each other, and rows of a call.
WINDOW, ROWS = 256, 4


@dataclass(frozen=True)
class Recorded:
    """One run that both sides are fed.

    Attributes:
        inputs: the calls.
        truth: what the stored weights give in each, from ``Reference.truths``.
    """

    inputs: Inputs
    truth: Recording


def judge_quantisation(
    weights: str,
    reference: Reference,
    layout: Layout,
    runs: Sequence[Recorded],
    stages: Stages,
    *,
    text: Ids | None = None,
    max_kl: float | None = None,
) -> Quantisation | None:
    """What storing the weights costs; None where nothing is lost.

    Args:
        weights: as ``ingot.json`` says what they are stored in.
        reference: of the stored weights.
        layout: of the outputs.
        runs: that were recorded of it.
        stages: shows the steps.
        text: tokens ``[n]`` whose divergence and perplexity are measured as well.
        max_kl: the largest mean divergence that the user accepts.
    """
    stored = reference.stored
    if stored is None:
        return None
    formats = block_formats(stored)
    plain = plain_checkpoint(stored.base, formats) if formats else None
    original = reference.of_weights(stored.base)
    inputs = [run.inputs for run in runs]
    truth = _joined(original.truths(layout, inputs, stages))
    sides = [_joined([run.truth for run in runs])]
    if plain is not None:
        # What it costs is a yardstick alone, for which float32 is exact enough.
        rounded = reference.of_weights(plain)
        sides.append(_joined(rounded.truths(layout, inputs, stages, torch.float32)))
    main = layout.main_output
    logits = main == "logits"
    divergences = [_divergence(truth, side, main) if logits else None for side in sides]
    # A classifier has one distribution a row: too few for a median beside another's. Its hidden
    # states say it.
    of_plain = divergences[1] if plain is not None and not layout.of_rows(main) else None
    names = lossy(stored)
    size = sum(stored.entries[name].end - stored.entries[name].begin for name in names)
    with stages.stage("compare the weights with the checkpoint's", size) as advance:
        of_weights = weight_errors(stored.base, stored, plain, names, advance)
    return Quantisation(
        weights,
        Limits(
            QUANTISATION[weights].share,
            TIMES_PLAIN if formats else None,
            max_kl,
            QUANTISATION[weights].nats,
            NEGLIGIBLE,
        ),
        divergences[0],
        of_plain,
        _of_text(original, reference, text, stages) if text is not None else None,
        _layers(reference, truth, sides),
        _routing(truth, sides[0], reference.routers.top_k),
        of_weights,
    )


def lossy(stored: StoredCheckpoint) -> list[str]:
    """The tensors of a checkpoint that lose something by how they are stored."""
    return list(dict.fromkeys([*stored.stored, *stored.decoded.stored]))


def block_formats(stored: StoredCheckpoint) -> dict[str, BlockFormat]:
    """The format of each tensor that is stored in blocks of whole numbers."""
    return {
        name: BlockFormat(weight.bits, weight.size, not weight.has_zero_points)
        for name, places in stored.decoded.stored.items()
        for weight in (places[0].weight,)
    }


def _joined(recordings: Iterable[Recording]) -> Recording:
    """The calls of all runs."""
    return [call for recording in recordings for call in recording]


def _divergence(truth: Recording, found: Recording, main: str) -> Divergence | None:
    sums = Divergences()
    for expected, other in zip(truth, found, strict=True):
        sums.add(expected[main], other[main])
    return sums.result


def _layers(
    reference: Reference, truth: Recording, sides: Sequence[Recording]
) -> tuple[LayerError, ...]:
    """The error of each hidden state, of the stored weights and of plain rounding."""
    result = []
    for name in numbered(truth[0], HIDDEN_STATES):
        errors = [_by_token(truth, side, name) for side in sides]
        layer = reference.layers.get(name, reference.layer_count - 1)
        result.append(LayerError(layer, name not in reference.layers, *errors))
    return tuple(sorted(result, key=lambda each: (each.layer, each.normed)))


def _by_token(truth: Recording, found: Recording, name: str) -> float:
    """RMS over all tokens of how far each is off, relative to its own size."""
    squares = []
    for expected, other in zip(truth, found, strict=True):
        wide = expected[name].astype(np.float64)
        moved, size = ((array**2).sum(-1) for array in (other[name] - wide, wide))
        with np.errstate(divide="ignore", invalid="ignore"):
            # Of a state of zeros that is exact nothing is off.
            squares.append(np.where(moved == 0, 0.0, moved / size))
    every = np.concatenate(squares)
    return math.sqrt(every.mean()) if every.size else math.nan


def _routing(truth: Recording, found: Recording, top_k: int) -> tuple[float, ...]:
    """By router the share of tokens with the same experts."""
    sides = [by_router(map(all_router_logits, calls)) for calls in (truth, found)]
    return tuple(
        float((choices(one, top_k) == choices(other, top_k)).all(-1).mean())
        for one, other in zip(*sides, strict=True)
    )


@dataclass
class _Likelihoods:
    """What both sides give each token of a text after those before it, in nats."""

    truth: list[float] = field(default_factory=list)
    found: list[float] = field(default_factory=list)

    def add(self, ids: Ids, truth: Array, found: Array) -> None:
        """One call's ids ``[B, T]`` and logits ``[B, T, V]``."""
        for side, logits in ((self.truth, truth), (self.found, found)):
            side += [
                float(-log_softmax(logits[row, at])[ids[row, at + 1]])
                for row in range(len(ids))
                for at in range(ids.shape[1] - 1)
            ]


def _of_text(
    original: Reference, reference: Reference, text: Ids, stages: Stages
) -> Divergence | None:
    sums, likelihoods = Divergences(), _Likelihoods()

    def take(ids: Ids, truth: Array, found: Array) -> None:
        sums.add(truth.reshape(-1, truth.shape[-1]), found.reshape(-1, found.shape[-1]))
        likelihoods.add(ids, truth, found)

    # Of a last window of one token nothing is predicted.
    calls = [ids for ids in text_calls(text, WINDOW, ROWS) if ids.shape[1] > 1]
    compare_text(original, reference, calls, take, stages)
    result = sums.result
    if result is None:
        return None
    of_truth, of_found = (np.array(each) for each in (likelihoods.truth, likelihoods.found))
    perplexity, truth_perplexity, interval = perplexities(of_truth, of_found, WINDOW)
    found = replace(
        result.found,
        perplexity=perplexity,
        truth_perplexity=truth_perplexity,
        ratio_interval=interval,
    )
    return replace(result, found=found)
