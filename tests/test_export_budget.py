"""Formats that a budget chooses, against every choice there is and against a greedy one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest

from ingot.export.calibration import budget as budget_module
from ingot.export.calibration.budget import Group, Shape, fitted
from ingot.export.codecs.blocks import Blocks
from ingot.export.request import ExportError

Effects = Mapping[Group, Mapping[Blocks, float]]

LOW, HIGH = Blocks(4, 128), Blocks(8, 128)
LADDER = (LOW, Blocks(4, 64), Blocks(4, 32), HIGH)


def size(choice: Mapping[Group, Blocks], shapes: Mapping[str, Shape]) -> int:
    """Bytes, all rows of a stack as those of one matrix."""
    flat = {name: (math.prod(shape[:-1]), shape[-1]) for name, shape in shapes.items()}
    return sum(blocks.nbytes(*flat[name]) for group, blocks in choice.items() for name in group)


def cost(choice: Mapping[Group, Blocks], effects: Effects) -> float:
    return sum(effects[group][blocks] for group, blocks in choice.items())


def drawn(seed: int, groups: int) -> tuple[Effects, dict[str, Shape], float]:
    """Effects, shapes and a budget; every third time effects do not fall with the bytes."""
    random = np.random.default_rng(seed)
    effects, shapes = dict[Group, dict[Blocks, float]](), dict[str, Shape]()
    for number in range(groups):
        shape = tuple(int(n) for n in random.integers(1, 9, 2) * (8, 64))
        names: Group = (f"{number}",) if random.random() < 0.7 else (f"{number}", f"{number}b")
        for name in names:
            shapes[name] = shape if len(names) == 1 else (int(random.integers(2, 5)), *shape)
        falls = random.uniform(0.5, 1.0, 4) if seed % 3 else random.uniform(0.2, 2.0, 4)
        falls[0], falls[3] = 1.0, falls[3] / 50
        times = np.cumprod(falls) * 10.0 ** random.uniform(-6, -2)
        effects[names] = dict(zip(LADDER, map(float, times), strict=True))
    return effects, shapes, float(random.uniform(4.1, 8.6))


def every(
    effects: Effects, shapes: Mapping[str, Shape], budget: float
) -> list[dict[Group, Blocks]]:
    """All choices that fit."""
    allowed = budget * sum(math.prod(shape) for shape in shapes.values()) / 8
    choices = (
        dict(zip(effects, choice, strict=True))
        for choice in itertools.product(LADDER, repeat=len(effects))
    )
    return [choice for choice in choices if size(choice, shapes) <= allowed]


def greedy(effects: Effects, shapes: Mapping[str, Shape], budget: float) -> dict[Group, Blocks]:
    """All in the low format, and of those that fit raised what loses most by a byte."""
    allowed = budget * sum(math.prod(shape) for shape in shapes.values()) / 8
    choice = dict.fromkeys(effects, LOW)
    more = {group: size({group: HIGH}, shapes) - size({group: LOW}, shapes) for group in effects}
    for group in sorted(effects, key=lambda group: -effects[group][LOW] / more[group]):
        if size({**choice, group: HIGH}, shapes) <= allowed:
            choice[group] = HIGH
    return choice


@pytest.mark.parametrize("seed", range(60))
def test_is_the_best_of_every_choice_that_fits(seed: int) -> None:
    effects, shapes, budget = drawn(seed, 1 + seed % 6)
    fits = every(effects, shapes, budget)
    if not fits:
        with pytest.raises(ExportError, match="is less than these weights take at the least"):
            fitted(effects, shapes, budget)
        return
    found = fitted(effects, shapes, budget)
    assert found in fits
    least = min(cost(choice, effects) for choice in fits)
    assert cost(found, effects) == pytest.approx(least, rel=1e-12)


def bound(effects: Effects, shapes: Mapping[str, Shape], budget: float) -> tuple[float, float]:
    """What no choice goes below, were formats mixed in any shares; and the largest single step."""
    allowed = budget * sum(math.prod(shape) for shape in shapes.values()) / 8
    options = [
        [(size({group: blocks}, shapes), effect) for blocks, effect in each.items()]
        for group, each in effects.items()
    ]
    slopes = {
        (one[1] - other[1]) / (other[0] - one[0])
        for each in options
        for one, other in itertools.permutations(each, 2)
        if one[0] != other[0]
    }
    worths = sorted({0.0, *(slope for slope in slopes if slope > 0)}, reverse=True)
    least, step = 0.0, 0.0
    for worth in worths:
        sums = [min(effect + worth * of for of, effect in each) for each in options]
        least = max(least, sum(sums) - worth * allowed)
    for each in options:
        # From the smallest on, whatever is best for some worth of a byte.
        best = [min(each), *(min(each, key=lambda one: one[1] + w * one[0]) for w in worths)]
        steps = [one[1] - other[1] for one, other in itertools.pairwise(best)]
        step = max(step, *steps)
    return least, step


@pytest.mark.parametrize("seed", range(30))
def test_is_within_a_step_of_the_best_where_few_choices_are_kept(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    effects, shapes, _ = drawn(seed, 40)
    monkeypatch.setattr(budget_module, "MOST", 3)
    weights = sum(map(math.prod, shapes.values()))
    smallest = 0
    for group in effects:
        smallest += min(size({group: blocks}, shapes) for blocks in LADDER)
    for budget in (smallest * 8 / weights, 4.9, 5.4, 6.2, 8.0):
        if budget * weights < smallest * 8:
            continue
        found = fitted(effects, shapes, budget)
        least, step = bound(effects, shapes, budget)
        assert size(found, shapes) * 8 <= budget * weights * (1 + 1e-12)
        assert least * (1 - 1e-9) <= cost(found, effects) <= least + step * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(1, 40, 3))
def test_costs_no_more_than_raising_whole_matrices_of_many(seed: int) -> None:
    effects, shapes, _ = drawn(seed, 120)
    for budget in (4.6, 5.1, 6.3, 7.9):
        found, other = fitted(effects, shapes, budget), greedy(effects, shapes, budget)
        assert size(found, shapes) * 8 <= budget * sum(map(math.prod, shapes.values()))
        if size(other, shapes) * 8 <= budget * sum(map(math.prod, shapes.values())):
            assert cost(found, effects) <= cost(other, effects)


def test_small_blocks_fill_what_a_whole_matrix_does_not_fit_in() -> None:
    shapes: dict[str, Shape] = {"a": (256, 256), "b": (256, 256)}
    effects: Effects = {
        ("a",): {LOW: 0.3, Blocks(4, 64): 0.27, Blocks(4, 32): 0.2, HIGH: 0.001},
        ("b",): {LOW: 0.2, Blocks(4, 64): 0.18, Blocks(4, 32): 0.14, HIGH: 0.001},
    }
    # What both take, and three quarters of a bit more of one of them.
    assert fitted(effects, shapes, 4.25 + 0.75 / 2) == {("a",): Blocks(4, 32), ("b",): LOW}
    assert fitted(effects, shapes, 5.0) == dict.fromkeys(effects, Blocks(4, 32))
    assert fitted(effects, shapes, 4.25) == dict.fromkeys(effects, LOW)
    assert fitted(effects, shapes, 8.25) == dict.fromkeys(effects, HIGH)
    said = r"--bits 4.2 is less than these weights take at the least, 4.250 bits .*; give more\."
    with pytest.raises(ExportError, match=said):
        fitted(effects, shapes, 4.2)
    alone = {group: {Blocks(4, 32): each[Blocks(4, 32)]} for group, each in effects.items()}
    with pytest.raises(ExportError, match=r"5\.000 bits .*; give more, or larger blocks\."):
        fitted(alone, shapes, 4.9)
