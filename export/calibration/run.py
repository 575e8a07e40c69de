"""From a file of tokens to the numbers that weights are stored in."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

from ingot.export.calibration.budget import raised
from ingot.export.calibration.choose import choose, of_tables
from ingot.export.calibration.effects import effects
from ingot.export.calibration.tokens import Calibration
from ingot.export.codecs.coder import Coder, blocks_of
from ingot.export.graph import Opened, Recipe
from ingot.export.progress import Stages
from ingot.export.quantization import BITS

# Bits of a weight that a budget gives more to.
RAISED = 8


def calibrate(
    recipe: Recipe,
    opened: Opened,
    calibration: Calibration,
    method: str,
    budget: float | None,
    stages: Stages,
) -> tuple[Recipe, Coder]:
    """Choose the numbers of a model's weights, and before how many bits each has.

    Args:
        recipe: of weights in whole numbers.
        opened: the checkpoint, by it.
        calibration: the tokens.
        method: of ``choose.METHODS``.
        budget: bits a weight, scales and zero points included; None where all have the same.
        stages: shows the steps.

    Returns:
        The recipe that says so, and the numbers.

    Raises:
        ExportError: a budget that is too small.
    """
    chosen, formats = recipe.quantization, recipe.coder(opened)
    assert chosen is not None and formats is not None
    facts: dict[str, Any] = {"sha256": calibration.sha256, "tokens": calibration.tokens}
    bits = dict(chosen.bits)
    sequences, steps = calibration.sequences, len(opened.model.decoder.by_layer()) + 1
    tables = cache(partial(of_tables, opened, method, sequences))
    if budget is not None:
        with stages.stage("measure each weight's effect", steps) as advance:
            measured = effects(opened, formats, method, sequences, advance, tables=tables)
        low = blocks_of(chosen, BITS[recipe.weights])
        parameters = dict(opened.model.named_parameters())
        shapes = {name: tuple(parameters[name].shape) for group in measured for name in group}
        names = raised(measured, shapes, low, blocks_of(chosen, RAISED), budget)
        bits |= dict.fromkeys(names, RAISED)
        order = sorted(measured, key=lambda group: -measured[group])
        by_name = {name: _short(measured[group]) for group in order for name in group}
        facts |= {"budget": budget, "effects": by_name}
    said = replace(chosen, method=method, bits=bits, calibration=facts)
    recipe = replace(recipe, quantization=said)
    formats = recipe.coder(opened)
    assert formats is not None
    with stages.stage("choose numbers for weights", steps) as advance:
        return recipe, choose(opened, formats, method, sequences, advance, tables=tables)


def _short(number: float) -> float:
    """To three digits, which are what people compare."""
    return float(f"{number:.3g}")
