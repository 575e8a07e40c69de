"""What was measured, as tables of Markdown and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.on_peers import ceilings, shares
from benchmarks.on_peers.ceilings import Best
from benchmarks.on_peers.samples import Sample

# Two programs that compute the same in float32 differ by less: seen were 1e-14 to 1e-9.
SAME_KL = 1e-6
PREFILL, DECODE = "prefill", "decode"


@dataclass
class Row:
    """One program in one format on one model.

    Attributes:
        family: of the model.
        program: its name.
        format: its name.
        exact: see ``Format``.
        arithmetic: see ``Format``.
        bytes: of the weights' files.
        kl: of the distributions from the truth's, in nats, the larger of both positions; None where
            it was not checked.
        samples: one of each round.
        refusal: why there are none.
        details: what the program said of it.
        read: bytes that a decoded token reads, of ours.
        products: multiply-adds of a token of a prompt, of ours.
    """

    family: str
    program: str
    format: str
    exact: bool = False
    arithmetic: str = "float32"
    bytes: int = 0
    kl: float | None = None
    samples: list[Sample] = field(default_factory=list)
    refusal: str = ""
    details: str = ""
    read: float | None = None
    products: float | None = None

    @property
    def key(self) -> str:
        return f"{self.family}/{self.program}/{self.format}"

    @property
    def other_model(self) -> bool:
        """Whether it is another model than transformers', though nothing was rounded."""
        return self.exact and self.kl is not None and not self.kl < SAME_KL

    def rates(self, what: str) -> list[float]:
        return [float(sample[what]) for sample in self.samples]

    def median(self, what: str) -> float | None:
        found = self.rates(what)
        return statistics.median(found) if found else None

    def figures(self, truth: Row | None, found: Mapping[str, Best]) -> dict[str, Any]:
        """For JSON."""
        figures: dict[str, Any] = {
            "program": self.program,
            "format": self.format,
            "refusal": self.refusal,
            "details": self.details,
            "bytes": self.bytes,
            # JSON has no infinity.
            "kl": self.kl if self.kl is not None and math.isfinite(self.kl) else None,
            "other_model": self.other_model,
        }
        for what in (PREFILL, DECODE):
            figures[what] = self.rates(what)
            figures[f"{what}_times"] = times(self, truth, what)
        figures["load"] = self.rates("load")
        figures["memory"] = self.rates("memory")
        figures["shares"] = share_figures(self, found)
        return figures


def times(row: Row, truth: Row | None, what: str) -> float | None:
    """How often the truth's rate a row's is, by medians."""
    mine, theirs = row.median(what), truth.median(what) if truth else None
    return None if mine is None or not theirs else mine / theirs


def share_figures(row: Row, found: Mapping[str, Best]) -> dict[str, float]:
    """How near a row of ours is to the ceilings; empty for others and without ceilings."""
    figures: dict[str, float] = {}
    decoded, prompt = row.median(DECODE), row.median(PREFILL)
    if row.read is not None and decoded is not None and ceilings.READ in found:
        figures["bytes_a_token"] = row.read
        bandwidth = found[ceilings.READ].rate
        figures["of_reading"] = shares.share_of_reading(row.read, decoded, bandwidth)
    peak = ceilings.peak_of(row.arithmetic, found)
    if row.products is not None and prompt is not None and peak is not None:
        figures["products_a_token"] = row.products
        figures["of_peak"] = shares.share_of_peak(row.products, prompt, peak[1].rate)
    return figures


def rates_table(
    rows: Sequence[Row], truth: Row | None, prompt: int, past: int, new: int
) -> Iterator[str]:
    """Every row of one model.

    Args:
        rows: those.
        truth: the one that rates are multiples of.
        prompt: tokens of the prompt that was timed.
        past: tokens before those that were decoded.
        new: tokens that were decoded.
    """
    heads = ["program", "format", "weights", "KL", "load", "memory"]
    heads += [f"prompt of {prompt}, tokens/s", "times", f"{new} after {past}, tokens/s", "times"]
    yield line(heads)
    yield line(["---"] * len(heads))
    for row in rows:
        if row.refusal:
            yield line([row.program, row.format, row.refusal, *[""] * (len(heads) - 3)])
            continue
        load, memory = row.median("load"), row.median("memory")
        cells = [row.program, row.format, megabytes(row.bytes), divergence(row)]
        cells += ["" if load is None else f"{load:.1f} s"]
        cells += ["" if memory is None else megabytes(memory)]
        for what in (PREFILL, DECODE):
            cells += [spread(row.rates(what)), multiple(times(row, truth, what))]
        yield line(cells)


def shares_table(rows: Iterable[Row], found: Mapping[str, Best]) -> Iterator[str]:
    """Ours beside the ceilings."""
    yield line(
        ["", "format", "read a token", "of the reading", "operations a token", "of the peak", "of"]
    )
    yield line(["---"] * 7)
    for row in rows:
        figures = share_figures(row, found)
        if not figures:
            continue
        peak = ceilings.peak_of(row.arithmetic, found)
        read, products = figures.get("bytes_a_token"), figures.get("products_a_token")
        yield line(
            [
                row.family,
                row.format,
                "" if read is None else megabytes(read),
                percent(figures.get("of_reading")),
                "" if products is None else f"{2 * products / 1e6:.0f} M",
                percent(figures.get("of_peak")),
                "" if peak is None else peak[0],
            ]
        )


def ceilings_lines(found: Mapping[str, Best]) -> Iterator[str]:
    """What the machine can do at most, one line a kind."""
    for kind, best in found.items():
        if kind == ceilings.READ:
            yield f"- reading: {best.rate / 1e9:.1f} GB/s ({best.loop})"
        else:
            yield f"- products of {kind}: {best.rate / 1e9:.0f} G operations/s ({best.loop})"


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def multiple(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def divergence(row: Row) -> str:
    """A row's KL; of one that should be the same model and is not, that too."""
    if row.kl is None:
        return "not checked"
    return f"{row.kl:.1e}" + (", another model" if row.other_model else "")


def spread(values: Sequence[float]) -> str:
    """Median, and in brackets the least and the most."""
    if not values:
        return ""
    digits = 0 if min(values) >= 10 else 1
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({least:.{digits}f}-{most:.{digits}f})"
