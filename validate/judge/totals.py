"""What several judged sets of token ids add up to: the figures of one report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ingot.validate.judge.distribution import distribution
from ingot.validate.judge.growth import growth, over_decode
from ingot.validate.judge.judge import Judge
from ingot.validate.judge.limits import TIE_LIMIT
from ingot.validate.judge.metrics import rms
from ingot.validate.judge.routing import least_margin
from ingot.validate.result import Distribution, Growth, Hidden, Routing, TensorResult
from ingot.validate.truth.recording import HIDDEN_STATES, all_router_logits


def tensors(judges: Sequence[Judge], seeds: Sequence[int]) -> tuple[TensorResult, ...]:
    """Every result; with several seeds the stage begins with its own."""
    if len(seeds) == 1:
        return tuple(judges[0].results)
    return tuple(
        replace(result, stage=f"seed {seed}, {result.stage}")
        for seed, judge in zip(seeds, judges, strict=True)
        for result in judge.results
    )


def constant_main(judges: Sequence[Judge]) -> list[TensorResult]:
    """A problem where the truth's main output is one number in all recorded calls.

    In some calls it may be: a token whose embedding is zero may leave nothing behind it. But then
    others show that the model computes.
    """
    layout = judges[0].layout
    name = layout.main_output
    calls = [
        call[name]
        for judge in judges
        for references in judge.references
        for call in references.truth
        if call[name].size > 1
    ]
    if not calls or any(call.min() != call.max() for call in calls):
        return []
    said = f"every element of the reference is {calls[0].flat[0]}, which proves nothing"
    kind = layout.kind(name)
    return [TensorResult("all calls", name, kind, None, None, None, None, 0.0, said)]


def routing(judges: Sequence[Judge]) -> dict[str, Routing]:
    """The mean agreement and all flips of every set of token ids, by mode."""
    result: dict[str, Routing] = {}
    for mode in judges[0].routing:
        found = [judge.routing[mode] for judge in judges]
        agreement = np.mean([each.agreement for each in found], axis=0)
        flips = tuple(flip for each in found for flip in each.flips)
        ignored = tuple(router for each in found for router in each.ignored)
        result[mode] = Routing(tuple(map(float, agreement)), flips, found[0].names, ignored)
    return result


def worst_growth(judges: Sequence[Judge]) -> tuple[Growth, ...]:
    """The growth of each kind, of the set of token ids whose errors of that kind grow most."""
    worst: dict[str, Growth] = {}
    for judge in judges:
        for each in growth(over_decode(judge.results)):
            before = worst.get(each.kind)
            if before is None or _badness(each) > _badness(before):
                worst[each.kind] = each
    return tuple(worst.values())


def _badness(found: Growth) -> tuple[bool, float]:
    """A problem first: a larger ratio may be none, where the error stays below eager's own."""
    return bool(found.problem), math.inf if math.isnan(found.ratio) else found.ratio


def hidden(judges: Sequence[Judge], layers: Mapping[str, int], count: int) -> tuple[Hidden, ...]:
    """Error and floor of each hidden state over all calls, in the order of the layers.

    Args:
        judges: of every set of token ids.
        layers: see ``validate.truth.reference.Reference.layers``.
        count: how many layers there are.
    """
    found: dict[str, list[TensorResult]] = {}
    for judge in judges:
        for result in judge.results:
            if result.name.startswith(HIDDEN_STATES):
                found.setdefault(result.name, []).append(result)
    states = [
        Hidden(
            name,
            layers.get(name, count - 1),
            name not in layers,
            _rms(result.error for result in results),
            _rms(result.floor for result in results),
        )
        for name, results in found.items()
    ]
    return tuple(sorted(states, key=lambda state: (state.layer, state.normed)))


def _rms(values: Iterator[float | None]) -> float:
    squares = [math.nan if value is None else value * value for value in values]
    return math.sqrt(math.fsum(squares) / len(squares))


def margin(judges: Sequence[Judge]) -> float | None:
    """The truth's smallest margin of a choice."""
    found = [
        least_margin(all_router_logits(call), judge.routers.top_k)
        for judge in judges
        for references in judge.references
        for call in references.truth
    ]
    return min((each for each in found if each is not None), default=None)


def next_tokens(judges: Sequence[Judge]) -> Distribution | None:
    """The target's distributions over all recorded runs; None where the logits have another shape.

    Args:
        judges: each with its references, and with the logits ``[n, V]`` of each of their calls.
    """
    expected, truth, eager = [], [], []
    for judge in judges:
        for references in judge.compared:
            expected += [call["logits"] for call in references.expected]
            truth += [call["logits"] for call in references.truth]
            eager += [call["logits"] for call in references.eager]
    logits = [array for judge in judges for array in judge.logits]
    if any(found.shape != want.shape for found, want in zip(logits, expected, strict=True)):
        return None
    noise = np.concatenate(eager).astype(np.float64) - np.concatenate(truth)
    return distribution(np.concatenate(expected), np.concatenate(logits), TIE_LIMIT * rms(noise))
