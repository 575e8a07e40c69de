"""The plots of a validation's page: SVG without styles or scripts, readable without colour."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from ingot.plugins.errors import install_hint
from ingot.validate.judge.growth import over_decode, step_scores
from ingot.validate.quantisation import Quantisation
from ingot.validate.report.words import clean, number
from ingot.validate.result import IN_FLOAT32, ROUNDED, Hidden, Report, TensorResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 30

# No two of the first eight series share a marker or a line style; the colours are of about one
# darkness and only help those who see them.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLES = (
    "solid",
    (0, (6, 2)),
    (0, (6, 2, 1, 2)),
    (0, (1, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (9, 3)),
    (0, (3, 2)),
    (0, (9, 2, 3, 2)),
)
COLOURS = ("#0b4f8a", "#a33b00", "#1b6e3c", "#6a3d9a", "#444444", "#8a1c4a", "#7a5c00", "#006b75")

_RC: dict[Any, Any] = {
    "font.size": 10.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "ingot",
    # Names come from the report; one with a dollar sign is not a formula.
    "text.parse_math": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "lines.markersize": 5.0,
    "lines.linewidth": 1.4,
    "hatch.linewidth": 0.6,
}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Plot:
    """One figure of the page.

    Attributes:
        title: above it.
        caption: what it shows in words, and what it could not draw.
        svg: the drawing; empty where there is nothing to draw, and the caption says why.
    """

    title: str
    caption: str
    svg: str = ""


@dataclass(frozen=True)
class Series:
    """One line: ``(x, y)`` in ascending order of x."""

    label: str
    points: tuple[tuple[float, float], ...]


def plots(report: Report) -> list[Plot]:
    """The figures; where what draws them is missing, one without a drawing that says so."""
    missing = cannot_draw()
    if missing is not None:
        return [Plot("No plots", missing)]
    every = [_by_layer(report), _over_decode(report), _kl(report)]
    if report.quantisation is not None:
        every.append(_costs(report.quantisation))
    # A model without routers has no margins, nor has what was run with the truth's experts alone.
    return [*every, _margins(report)] if report.routing else every


def cannot_draw() -> str | None:
    """Why there are no plots, in one sentence; None where there are."""
    try:
        # What a figure needs of it; a package may be there and broken.
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        return (
            f"The page has no plots, for matplotlib cannot be imported ({error}); install it with: "
            f"{install_hint('report')}"
        )
    return None


def _by_layer(report: Report) -> Plot:
    title = "Error by layer against floor"
    words: dict[float, str] = {}
    states = report.hidden
    if states:
        series = [
            Series(f"{side}: hidden state", tuple((_place(s), getattr(s, side)) for s in states))
            for side in ("error", "floor")
        ]
        what = "The hidden state after each layer: error of the target, and its floor."
        words = _ends(states)
    else:
        series = _pairs(_drawn(report.tensors), lambda tensor: tensor.layer)
        what = "The worst state of each layer over all stages: error of the target, and its floor."
    if not series:
        return Plot(title, "Nothing to draw: no tensor that was compared belongs to a layer.")
    named = "".join(f"; {x:.0f}: {word}" for x, word in words.items())
    axis = f"layer (number{named})"
    return _lines("layer", title, what, series, axis, "relative RMS error (ratio)", words=words)


def _place(state: Hidden) -> float:
    """The final norm is drawn behind the last layer."""
    return float(state.layer + state.normed)


def _ends(states: Iterable[Hidden]) -> dict[float, str]:
    """What is no layer's own output, by its place on the axis."""
    embedding = {_place(state): "the embedding" for state in states if state.layer < 0}
    return embedding | {_place(state): "the final norm" for state in states if state.normed}


def _over_decode(report: Report) -> Plot:
    title = "Error over decode steps"
    # What only was run in float32 is of one set of token ids.
    tensors = [
        replace(tensor, stage=tensor.stage.removesuffix(IN_FLOAT32).removesuffix(ROUNDED))
        for tensor in _drawn(report.tensors)
    ]
    results = over_decode(tensors)
    steps = step_scores(results)
    if not steps:
        return Plot(title, "Nothing to draw: no tensor was compared after a decode step.")
    series = [
        Series(kind, tuple((float(step), score) for step, score in scores.items()))
        for kind, scores in steps.items()
    ]
    limits = sorted({tensor.limit for tensor in results if tensor.limit})
    said = " and ".join(number(limit) for limit in limits)
    what = (
        f"The error of each kind of tensor after each decode step, in floors; up to {said} are "
        "accepted."
    )
    axis = "decode step (tokens after the prefill)"
    scale = "error over its floor (ratio)"
    return _lines("decode", title, what, series, axis, scale, limits)


def _kl(report: Report) -> Plot:
    title = "KL divergence of each token"
    found = report.distribution
    if found is None or not found.kl:
        return Plot(title, "Nothing to draw: no next-token distributions were compared.")
    values = [value for value in found.kl if _drawable(value)]
    note = _left_out(len(found.kl) - len(values), "token", "zero, negative or not finite")
    if not values:
        return Plot(title, f"Nothing to draw on a logarithmic axis.{note}")
    low, high = math.log10(min(values)), math.log10(max(values))
    if high - low < 1e-3:
        low, high = low - 0.5, high + 0.5
    edges = [10 ** (low + (high - low) * i / BINS) for i in range(BINS + 1)]
    # Rounding of the powers must not push the extremes out of the first or the last bin.
    edges[0], edges[-1] = min(edges[0], min(values)), max(edges[-1], max(values))

    def draw(axes: Axes) -> None:
        axes.hist(values, edges, color="#c9d9ea", edgecolor="#0b4f8a", hatch="///", zorder=2)
        marks = (("mean", found.kl_mean), ("p99", found.kl_p99), ("max", found.kl_max))
        for index, (name, value) in enumerate(marks):
            if _drawable(value):
                label = f"{name}: {number(value)}"
                axes.axvline(value, color="#111111", linestyle=look(index)[1], label=label)
        axes.set_xscale("log")
        axes.set_xlabel("KL divergence, truth from target (nats)")
        axes.set_ylabel("tokens (count)")

    what = (
        f"How many of {found.tokens} tokens have which divergence: mean {number(found.kl_mean)}, "
        f"99th percentile {number(found.kl_p99)}, largest {number(found.kl_max)} nats."
    )
    return Plot(title, what + note, _draw("kl", title, what, draw, 3, log_x=True))


def _costs(found: Quantisation) -> Plot:
    title = f"Cost of {found.stored} weights by layer"
    if not found.layers:
        return Plot(title, "Nothing to draw: no hidden state was compared.")
    sides = [(f"error: {found.stored}", [each.error for each in found.layers])]
    plain = [each.plain for each in found.layers if each.plain is not None]
    if plain:
        sides.append(("floor: plain rounding", plain))
    # As the hidden states of ``_by_layer``, the final norm behind the last layer.
    places = [float(each.layer + each.normed) for each in found.layers]
    series = [Series(label, tuple(zip(places, values, strict=True))) for label, values in sides]
    what = (
        "The hidden state after each layer over the weights as they are stored: how far it is from "
        "that over the checkpoint's own, in no kernel."
    )
    scale = "relative RMS error (ratio)"
    return _lines("cost", title, what, series, "layer (number)", scale)


def _margins(report: Report) -> Plot:
    title = "Routing margin of each flip"
    flips = [(mode, flip) for mode, found in report.routing.items() for flip in found.flips]
    if not flips:
        return Plot(title, "Nothing to draw: every token has the truth's experts at every router.")
    groups: dict[str, list[tuple[float, float]]] = {}
    for mode, flip in flips:
        ratio = flip.margin / flip.explained if flip.explained else math.inf
        if _drawable(ratio):
            word = "fails" if flip.fails else "explained"
            groups.setdefault(f"{word}: {mode}", []).append((flip.router, ratio))
    failing = sum(flip.fails for _, flip in flips)
    routers = 1 + max(flip.router for _, flip in flips)
    routers = max(routers, *(len(found.agreement) for found in report.routing.values()))
    left = len(flips) - sum(map(len, groups.values()))
    note = _left_out(left, "flip", "a margin of zero, or a limit of zero")
    what = (
        "Each token whose experts differ from the truth's: its margin over the largest that "
        f"rounding explains. {failing} of {len(flips)} lie above 1 and fail."
    )
    if not groups:
        return Plot(title, f"Nothing to draw on a logarithmic axis.{note}")

    def draw(axes: Axes) -> None:
        axes.axhline(1.0, color="#111111", linestyle="dashed", label="limit")
        for index, (label, points) in enumerate(sorted(groups.items())):
            marker, _, colour = look(index)
            # Failing ones are filled: what matters most is seen first, with colour or without.
            face = colour if label.startswith("fails") else "white"
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker, color=colour, markerfacecolor=face, label=_label(label))
        axes.set_yscale("log")
        axes.set_xlim(-0.5, routers - 0.5)
        axes.set_xlabel("router (number, in the order they run)")
        axes.set_ylabel("margin over the limit (ratio)")

    svg = _draw("margins", title, what, draw, len(groups) + 1, integers=True)
    return Plot(title, what + note, svg)


def _drawn(tensors: Sequence[TensorResult]) -> list[TensorResult]:
    """Without what was run in float32, or where activations are rounded, whose errors are others.

    Where all was so, that.
    """
    own = [tensor for tensor in tensors if not tensor.in_float32 and not tensor.rounded]
    return own or list(tensors)


def _pairs(
    tensors: Iterable[TensorResult], position: Callable[[TensorResult], int | None]
) -> list[Series]:
    """Error and floor of every kind along an axis, each of the worst tensor at its position."""
    worst: dict[str, dict[int, TensorResult]] = {}
    for tensor in tensors:
        x, score = position(tensor), tensor.score
        if x is None or score is None:
            continue
        group = worst.setdefault(tensor.kind, {})
        before = group.get(x)
        if before is None or _rank(score) > _rank(before.score or 0.0):
            group[x] = tensor
    result = []
    for kind, group in worst.items():
        places = sorted(group.items())
        for side in ("error", "floor"):
            points = tuple((float(x), float(getattr(tensor, side))) for x, tensor in places)
            result.append(Series(f"{side}: {kind}", points))
    return result


def _lines(
    name: str,
    title: str,
    what: str,
    series: list[Series],
    axis: str,
    scale: str,
    limits: Sequence[float] = (),
    words: Mapping[float, str] = MappingProxyType({}),
) -> Plot:
    """Lines over a common axis, on a logarithmic scale, and the limits that they are held to.

    Args:
        name: of a place on the axis, in front of its number.
        title: above it.
        what: it shows.
        series: the lines.
        axis: the horizontal one's label.
        scale: the vertical one's.
        limits: horizontal lines.
        words: what places on the axis are called that are no ``name``.
    """
    values = [(y, x, line.label) for line in series for x, y in line.points]
    drawn = [value for value in values if _drawable(value[0])]
    note = _left_out(len(values) - len(drawn), "value", "zero or not finite")
    if not drawn:
        return Plot(title, f"Nothing to draw on a logarithmic axis.{note}")

    def draw(axes: Axes) -> None:
        for index, limit in enumerate(limits):
            label = "limit" if not index else "_"
            axes.axhline(limit, color="#111111", linestyle="dashed", linewidth=2.0, label=label)
        for index, line in enumerate(series):
            marker, line_style, colour = look(index)
            axes.plot(
                [x for x, _ in line.points],
                # A gap, not a line across what could not be drawn.
                [y if _drawable(y) else math.nan for _, y in line.points],
                marker=marker,
                linestyle=line_style,
                color=colour,
                markerfacecolor="white" if line.label.startswith("floor") else colour,
                label=_label(line.label),
            )
        axes.set_yscale("log")
        axes.set_xlabel(axis)
        axes.set_ylabel(scale)

    top, x, label = max(drawn)
    place = words.get(x, f"{name} {x:.0f}")
    entries = len(series) + bool(limits)
    spoken = f"{what} The highest point is {number(top)} at {place} ({label})."
    return Plot(title, spoken + note, _draw(name, title, spoken, draw, entries, integers=True))


def _draw(
    name: str,
    title: str,
    label: str,
    draw: Callable[[Axes], None],
    entries: int,
    *,
    integers: bool = False,
    log_x: bool = False,
) -> Markup:
    """One figure as an SVG element; equal figures are equal text.

    Args:
        name: prefix of its ids, which share one page with those of other figures.
        title: part of the accessible name.
        label: the rest of it.
        draw: fills the axes.
        entries: of the legend, for which the figure is made higher.
        integers: the horizontal axis counts something.
        log_x: the horizontal axis is the logarithmic one, and not the vertical one.
    """
    import matplotlib
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    # The user's matplotlibrc has no part in a report.
    with style.context("default", after_reset=True), matplotlib.rc_context(_RC):
        figure = Figure(figsize=(4.5, 2.9 + 0.2 * math.ceil(entries / 2)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        draw(axes)
        scaled = axes.xaxis if log_x else axes.yaxis
        set_limits = axes.set_xlim if log_x else axes.set_ylim
        low, high = _widened(*(axes.get_xlim() if log_x else axes.get_ylim()))
        set_limits(low, high)
        # Within a few decades their powers alone are too few to read a value from.
        subs = (1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)
        scaled.set_major_locator(LogLocator(subs=subs, numticks=7))
        scaled.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        scaled.set_minor_formatter(NullFormatter())
        counted = axes.yaxis if log_x else axes.xaxis
        counted.set_major_locator(MaxNLocator(nbins=8, integer=integers or log_x))
        figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=3.5)
        return _inline(_save(figure), name, f"{title}. {label}")


def _widened(low: float, high: float) -> tuple[float, float]:
    """Limits of a logarithmic axis that span a decade at least, so that it has labels."""
    missing = max(1.0, math.sqrt(10 * low / high))
    return low / missing, high * missing


def _save(figure: Figure) -> str:
    buffer = io.StringIO()
    # No metadata: it holds the date and addresses.
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    # What is not drawn is the page's, which may be dark.
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    return clean(buffer.getvalue())


def _inline(text: str, name: str, label: str) -> Markup:
    """An SVG file as an element of a page: ids of its own, an accessible name, no global style."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{_SVG}}}style":
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{_XLINK}}}href":
                element.set(key, value.replace("#", f"#{name}-", 1))
            else:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    root.set("role", "img")
    root.set("aria-label", clean(label))
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _rank(score: float) -> tuple[bool, float]:
    """The key that scores are ordered by: a NaN is worse than any number."""
    return math.isnan(score), 0.0 if math.isnan(score) else score


def _label(text: str) -> str:
    """A name as a legend has room for it."""
    flat = " ".join(clean(text).split())
    return flat if len(flat) <= 20 else f"{flat[:19]}…"


def _drawable(value: float) -> bool:
    """Whether a logarithmic axis has a place for it."""
    return math.isfinite(value) and value > 0


def _left_out(count: int, what: str, why: str) -> str:
    if not count:
        return ""
    return f" Not drawn: {count} {what}{'s' * (count != 1)} ({why})."


def look(index: int) -> tuple[str, Any, str]:
    """Marker, line style and colour of a series by its number."""
    at = index % len(MARKERS)
    return MARKERS[at], STYLES[at], COLOURS[at]
