"""What storing the weights costs, in words and tables: for every kind of report alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ingot.validate.quantisation import Divergence, LayerError, Quantisation
from ingot.validate.report.words import MISSING, number
from ingot.validate.result import Report

# Layers that a line has room for.
NAMED = 8


@dataclass(frozen=True)
class Table:
    """Figures by layer.

    Attributes:
        title: above it.
        columns: what each is of; the first names the row.
        rows: cells in words.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def costs(report: Report) -> list[tuple[str, str]]:
    """The figures, each in a line of words; none where nothing is lost."""
    found = report.quantisation
    if found is None:
        return []
    title = f"Cost of {found.stored} weights"
    rows = []
    if found.recorded is not None:
        rows.append((f"{title}, KL divergence in nats", _recorded(found, found.recorded)))
        rows.append((f"{title}, top-1 agreement", _top1(found, found.recorded)))
    if found.text is not None:
        rows += _text(found, found.text, title)
    if found.routing:
        worst = min(range(len(found.routing)), key=lambda router: found.routing[router])
        share = found.routing[worst]
        named = next(iter(report.routing.values()), None)
        name = f"router {worst}" if named is None else named.name(worst)
        least = "all" if share == 1 else f"at least {share:.2%} ({name}) of"
        rows.append((f"{title}, experts", f"{least} tokens have those of the checkpoint's weights"))
    if found.layers:
        rows.append((f"{title}, hidden states", f"off by {_by_layer(found)}"))
    if found.weights:
        worst_of = max(found.weights, key=lambda each: (math.isnan(each.worst), each.worst))
        rows.append(
            (
                f"{title}, the weights themselves",
                f"a relative RMS error of up to {number(worst_of.worst)}, of {worst_of.name}",
            )
        )
    return rows


def cost_tables(report: Report) -> list[Table]:
    """The hidden states and the weights by layer; none where nothing is lost."""
    found = report.quantisation
    if found is None:
        return []
    tables = []
    if found.layers:
        rows = tuple(
            (_place(each), number(each.error), number(each.plain)) for each in found.layers
        )
        columns = ("Behind", found.stored, "Plain rounding")
        tables.append(Table("Relative RMS error of hidden states", columns, rows))
    if found.weights:
        by_place = {(each.layer, each.kind): each for each in found.weights}
        # None is outside of the layers.
        for outside in (True, False):
            own = [each for each in found.weights if (each.layer is None) == outside]
            kinds = tuple(dict.fromkeys(each.kind for each in own))
            lines = tuple(
                (
                    "Outside of the layers" if layer is None else f"Layer {layer}",
                    *(
                        number(each.error) if (each := by_place.get((layer, kind))) else MISSING
                        for kind in kinds
                    ),
                )
                for layer in dict.fromkeys(each.layer for each in own)
            )
            if lines:
                what = "Relative RMS error of the weights"
                tables.append(Table(what, ("Where", *kinds), lines))
    return tables


def _recorded(found: Quantisation, own: Divergence) -> str:
    text = _kl(own)
    if found.text is None:
        text += f"; {_share(found, own)}"
    if found.times is not None:
        text += f"; in the median {number(found.times)} times what plain rounding costs"
        if found.limits.max_kl is None and found.limits.times is not None:
            text += f", up to {found.limits.times:g} times are accepted"
    return text


def _kl(own: Divergence) -> str:
    kl = own.found
    return (
        f"mean {number(kl.kl_mean)}, median {number(kl.kl_median)}, p99 {number(kl.kl_p99)}, max "
        f"{number(kl.kl_max)} over {kl.tokens} tokens"
    )


def _share(found: Quantisation, own: Divergence) -> str:
    share = f"{own.share:.2%} of what the model knows of the next token"
    if found.limits.max_kl is not None:
        return f"{share}; a mean of up to {number(found.limit)} is accepted, as was asked"
    if found.limit <= found.limits.nats:
        return f"{share}; a mean of up to {number(found.limit)} is accepted of any model"
    return f"{share}, up to {found.limits.share:.0%} ({number(found.limit)}) is accepted"


def _top1(found: Quantisation, own: Divergence) -> str:
    text = f"{own.found.top1_agreement:.2%}"
    if found.plain is not None:
        text += f"; with plain rounding {found.plain.found.top1_agreement:.2%}"
    return text


def _text(found: Quantisation, own: Divergence, title: str) -> list[tuple[str, str]]:
    rows = [
        (f"{title} over the text, KL divergence in nats", f"{_kl(own)}; {_share(found, own)}"),
        (f"{title} over the text, top-1 agreement", f"{own.found.top1_agreement:.2%}"),
    ]
    after, before = own.found.perplexity, own.found.truth_perplexity
    if after is not None and before is not None:
        ratio = after / before if before else math.nan
        interval = ""
        if own.found.ratio_interval is not None:
            low, high = own.found.ratio_interval
            interval = f" (95 % interval {number(low, 5)} to {number(high, 5)})"
        rows.append(
            (
                f"{title} over the text, perplexity",
                f"{number(after, 5)}, of the checkpoint's weights {number(before, 5)}, ratio "
                f"{number(ratio, 5)}{interval}",
            )
        )
    return rows


def _by_layer(found: Quantisation) -> str:
    """Some layers at even distances, the last one included."""
    layers = found.layers
    step = -(-len(layers) // NAMED)
    some = layers[::-step][::-1]
    return ", ".join(f"{number(each.error)} behind {_place(each)}" for each in some)


def _place(each: LayerError) -> str:
    if each.normed:
        return "the final norm"
    return "the embedding" if each.layer < 0 else f"layer {each.layer}"
