"""A validation's result in words: what every kind of report says alike."""

from __future__ import annotations

import math
import re

from ingot.validate.quantisation import Activations
from ingot.validate.result import FORCED, Report, Routing

# How many failures a summary lists; the JSON and the JUnit file have all of them.
LISTED = 10
MISSING = "none"

# What XML 1.0 has no way to hold, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    """The text with every character that XML cannot hold written as its code, ``\\x1b``."""
    return _NOT_XML.sub(lambda found: ascii(found[0])[1:-1], text)


def number(value: float | None, digits: int = 3) -> str:
    """A figure for people."""
    return MISSING if value is None else f"{value:.{digits}g}"


def headline(report: Report) -> str:
    """The verdict in one sentence."""
    what = f"{report.model_type}, {report.target}, {report.precision}"
    if report.verdict == "passed":
        return f"PASSED: {what}, against {report.against}."
    if report.verdict == "passed, in part":
        parts = len(report.short)
        return (
            f"PASSED, IN PART: {what}, against {report.against}: {parts} "
            f"{'part was' if parts == 1 else 'parts were'} not covered."
        )
    if report.verdict == "skipped":
        return f"SKIPPED: {what}, against {report.against}: {report.reason}."
    count = len(report.failures)
    if count and count == len(report.costly):
        assert report.quantisation is not None
        return (
            f"FAILED: {what}, against {report.against}: it computes what its weights say, and "
            f"storing them in {report.quantisation.stored} costs too much."
        )
    if count:
        return f"FAILED: {what}, against {report.against}: {count} problem{'s' * (count != 1)}."
    assert report.gate is not None
    count = len(report.worse)
    figures = "figure is" if count == 1 else "figures are"
    since = report.gate.baseline
    return f"WORSE: {what}, against {report.against}: {count} {figures} worse than in {since}."


def scores(report: Report) -> str:
    """What the scores of a report are."""
    text = (
        "A score is the target's error over the floor, the error that eager PyTorch itself makes "
        "in the same precision: 1 is as good as the precision allows. The target is compared with "
        f"{report.against}."
    )
    if report.quantisation is not None:
        text += (
            f" All sides have the weights as they are stored; what storing them in "
            f"{report.quantisation.stored} costs is told apart from that."
        )
    if report.activations is not None:
        text += f" {rounded_words(report.activations)}"
    in_float32 = {tensor.in_float32 for tensor in report.tensors}
    if in_float32 == {True, False}:
        text += (
            f" What is in float32 is the same graph over the same {report.precision} weights, "
            "compared with eager PyTorch in float64, beside eager PyTorch in float32: there shows "
            "what rounding hides."
        )
    return text


def figures(report: Report) -> list[tuple[str, str]]:
    """Routing, gate, growth and distribution figures, each in words."""
    rows = [(f"Routing, {mode}", _routing(mode, found)) for mode, found in report.routing.items()]
    if report.gate is not None:
        count = len(report.worse)
        found_worse = f"{count} figure{'s are' if count != 1 else ' is'} worse"
        note = f", {report.gate.note}" if report.gate.note else ""
        since = f"{found_worse if count else 'nothing is worse'} than in {report.gate.baseline}"
        rows.append(("Gate", f"{since}{note}"))
    if report.growth:
        by_kind = ", ".join(f"{each.kind} {number(each.ratio)}" for each in report.growth)
        limit = max(each.limit for each in report.growth)
        accepted = f"-fold; up to {limit:g}-fold is accepted"
        rows.append(("Growth of the error over decode, in floors", f"{by_kind}{accepted}"))
    found = report.distribution
    if found is None or not found.kl:
        return rows
    rows.append(
        (
            "KL divergence of truth from target, nats",
            f"mean {number(found.kl_mean)}, p99 {number(found.kl_p99)}, "
            f"max {number(found.kl_max)} over {found.tokens} tokens",
        )
    )
    agreement = f"{found.top1_agreement:.2%}"
    if found.top1_agreement < 1:
        agreement += f"; {found.near_ties} of the other tokens are near-ties"
    rows.append(("Top-1 agreement", agreement))
    if found.perplexity is not None and found.truth_perplexity is not None:
        ratio = found.perplexity / found.truth_perplexity if found.truth_perplexity else math.nan
        interval = ""
        if found.ratio_interval is not None:
            low, high = found.ratio_interval
            interval = f" (95 % interval {number(low, 5)} to {number(high, 5)})"
        rows.append(
            (
                "Perplexity",
                f"{number(found.perplexity, 5)}, of the truth "
                f"{number(found.truth_perplexity, 5)}, ratio {number(ratio, 5)}{interval}",
            )
        )
    return rows


def rounded_words(found: Activations) -> str:
    """What was proved of kernels that round activations."""
    sizes = f", {' or '.join(map(str, found.blocks))} numbers a scale" * bool(found.blocks)
    text = (
        f"The kernels round activations to {found.to}{sizes}: what is rounded is held to the error "
        "that eager PyTorch makes with the same rounding"
    )
    if found.twin:
        return f"{text}, and the rest is the same graph without it, held to that of float32."
    return f"{text}, and nothing to that of float32, for {found.why}."


def _routing(mode: str, routing: Routing) -> str:
    worst = min(routing.agreement, default=1.0)
    share = "all"
    if worst < 1:
        share = f"at least {worst:.2%} ({routing.name(routing.agreement.index(worst))}) of"
    if mode.startswith(FORCED):
        return f"{share} tokens used the experts that they were given, each in turn"
    failing = sum(flip.fails for flip in routing.flips)
    ignored = len({each.router for each in routing.ignored})
    return (
        f"{share} tokens have the truth's experts at each router; "
        f"{len(routing.flips)} flips, {failing} beyond what rounding explains"
        + f"; {ignored} routers do not use the experts that they are given"
        * bool(ignored)
    )
