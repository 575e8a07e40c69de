"""From a file of tokens to the numbers that weights are stored in."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

from ingot.export.calibration.budget import fitted
from ingot.export.calibration.choose import choose, of_tables
from ingot.export.calibration.effects import effects
from ingot.export.calibration.tokens import Calibration
from ingot.export.codecs.blocks import Blocks
from ingot.export.codecs.coder import Coder, blocks_of
from ingot.export.graph import Opened, Recipe
from ingot.export.progress import Stages
from ingot.export.quantization import BITS, BLOCKS, Quantization


def calibrate(
    recipe: Recipe,
    opened: Opened,
    calibration: Calibration,
    method: str,
    budget: float | None,
    stages: Stages,
    *,
    any_block: bool = False,
) -> tuple[Recipe, Coder]:
    """Choose the numbers of a model's weights, and before how many bits and what blocks each has.

    Args:
        recipe: of weights in whole numbers.
        opened: the checkpoint, by it.
        calibration: the tokens.
        method: of ``choose.METHODS``.
        budget: bits a weight, scales and zero points included; None where all have the same.
        stages: shows the steps.
        any_block: whether the budget chooses the size of blocks as well.

    Returns:
        The recipe that says so, and the numbers.

    Raises:
        ExportError: a budget that is too small.
    """
    said = recipe.quantization
    assert said is not None
    facts: dict[str, Any] = {"sha256": calibration.sha256, "tokens": calibration.tokens}
    sequences, steps = calibration.sequences, len(opened.model.decoder.by_layer()) + 1
    tables = cache(partial(of_tables, opened, method, sequences))
    if budget is not None:
        with stages.stage("measure each weight's effect", steps) as advance:
            usual, *others = _formats(recipe, said, any_block)
            found = effects(opened, [usual, *others], method, sequences, advance, tables=tables)
        parameters = dict(opened.model.named_parameters())
        shapes = {name: tuple(parameters[name].shape) for group in found for name in group}
        fits = fitted(found, shapes, budget)
        by_name = {name: blocks for group, blocks in fits.items() for name in group}
        measured = {group: costs[usual] for group, costs in found.items()}
        order = sorted(measured, key=lambda group: -measured[group])
        facts |= {
            "budget": budget,
            "effects": {name: _short(measured[group]) for group in order for name in group},
        }
        said = replace(
            said,
            bits={name: of.bits for name, of in by_name.items() if of.bits != usual.bits},
            blocks={name: of.size for name, of in by_name.items() if of.size != usual.size},
        )
    recipe = replace(recipe, quantization=replace(said, method=method, calibration=facts))
    formats = recipe.coder(opened)
    assert formats is not None
    with stages.stage("choose numbers for weights", steps) as advance:
        return recipe, choose(opened, formats, method, sequences, advance, tables=tables)


def _formats(recipe: Recipe, said: Quantization, any_block: bool) -> list[Blocks]:
    """What a budget has to choose of: the usual format, which is measured, and all others."""
    sizes = BLOCKS if any_block else (said.block,)
    every = [blocks_of(said, bits, size) for bits in BITS.values() for size in sizes]
    return sorted(every, key=lambda each: each != blocks_of(said, BITS[recipe.weights]))


def _short(number: float) -> float:
    """To three digits, which are what people compare."""
    return float(f"{number:.3g}")
