"""The four files of one validation: JSON, JUnit XML, Markdown and one HTML page."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Integral, Real
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ingot.plugins.errors import IngotError
from ingot.validate.result import Report, Routing, TensorResult

# How many failures a summary lists; the JSON and the JUnit file have all of them.
LISTED = 10
MISSING = "none"

# What XML 1.0 has no way to hold, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~$#])")


class ReportError(IngotError):
    """A place reports cannot be written to."""


def write(report: Report, folder: Path) -> None:
    """Write ``report.json``, ``junit.xml``, ``summary.md`` and ``report.html`` into a folder.

    Equal reports give equal bytes. Everything is made before the first file is written, and each
    file appears whole or not at all.
    """
    # Here: only a process that writes a page pays for importing matplotlib.
    try:
        from ingot.validate.report.html import page
    except ImportError as error:
        raise ReportError(
            f"{error.name} is missing; install what draws the page with: pip install "
            "'ingot[report]'"
        ) from error

    files = {
        "report.json": json_text(report),
        "junit.xml": junit_text(report),
        "summary.md": markdown_text(report),
        "report.html": page(report),
    }
    for name, text in files.items():
        write_whole(folder / name, text)


def write_json(report: Report, folder: Path) -> None:
    """Write ``report.json`` alone, as an export does into its ingot."""
    write_whole(folder / "report.json", json_text(report))


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and rename it; its folder is made where missing."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(text.encode("utf-8"))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror or error}.") from error


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
    if report.verdict == "skipped":
        return f"NOT PROVEN: {what}, against {report.against}: {report.reason}."
    count = len(report.failures)
    return f"FAILED: {what}, against {report.against}: {count} problem{'s' * (count != 1)}."


def figures(report: Report) -> list[tuple[str, str]]:
    """Routing, growth and distribution figures, each in words."""
    rows = [(f"Routing, {mode}", _routing(found)) for mode, found in report.routing.items()]
    if report.growth:
        by_kind = ", ".join(f"{each.kind} {number(each.ratio)}" for each in report.growth)
        rows.append(("Growth of the error over decode, in floors", f"{by_kind}-fold"))
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
    rows.append(
        (
            "Top-1 agreement",
            f"{found.top1_agreement:.2%}; {found.near_ties} of the others are near-ties",
        )
    )
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


def json_text(report: Report) -> str:
    """Everything of the report as strict JSON; infinities and NaN are strings."""
    data = asdict(report)
    for row, tensor in zip(data["tensors"], report.tensors, strict=True):
        row["score"] = tensor.score
    data["verdict"] = report.verdict
    data["failures"] = report.failures
    data["summary"] = report.summary()
    first = {"schema_version": data.pop("schema_version"), "verdict": data.pop("verdict")}
    return json.dumps(plain({**first, **data}), indent=1, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """A value as strict JSON can hold it; figures may be numpy's."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    if isinstance(value, Integral):
        return int(value)
    found = float(value)
    if math.isfinite(found):
        return found
    return "NaN" if math.isnan(found) else "Infinity" if found > 0 else "-Infinity"


def junit_text(report: Report) -> str:
    """One test case per tensor of a stage and one per routing mode."""
    suite = ElementTree.Element("testsuite", name="validate", time=f"{report.seconds:.3f}")
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(report).items():
        ElementTree.SubElement(properties, "property", name=clean(name), value=clean(value))
    prefix = f"{report.model_type}.{report.target}.{report.precision}"
    for tensor in report.tensors:
        problems = [tensor.problem] if tensor.problem else []
        _case(suite, f"{prefix}.{tensor.stage}", tensor.name, problems, report.reason)
    for mode, routing in report.routing.items():
        problems = [
            f"{routing.name(flip.router)}, row {flip.row}, token {flip.token}: "
            f"{list(flip.chosen)} over {list(flip.expected)} at a margin of {flip.margin:.2g}, "
            f"and rounding explains {flip.explained:.2g}"
            for flip in routing.flips
            if flip.fails
        ]
        _case(suite, f"{prefix}.routing", mode, problems, report.reason)
    if not any(tensor.error is not None for tensor in report.tensors):
        # Without this, a report that compared nothing would be a green suite.
        _case(suite, prefix, "compared tensors", ["nothing was compared"], report.reason)
    for name, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
        suite.set(name, str(sum(1 for _ in suite.iter(tag))))
    suite.set("errors", "0")
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _properties(report: Report) -> dict[str, str]:
    result = {
        "verdict": report.verdict,
        "ingot": report.ingot,
        "against": report.against,
        "seed": str(report.seed),
    }
    if report.location is not None:
        result["location"] = str(report.location)
    return result | {f"environment {name}": value for name, value in report.environment.items()}


def _case(
    suite: ElementTree.Element, group: str, name: str, problems: list[str], reason: str | None
) -> None:
    """One test case; where passing says nothing about the ingot it is a skipped one."""
    case = ElementTree.SubElement(suite, "testcase", classname=clean(group), name=clean(name))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        failure = ElementTree.SubElement(case, "failure", message=clean(problems[0] + more))
        failure.text = clean("\n".join(problems))
    elif reason is not None:
        ElementTree.SubElement(case, "skipped", message=clean(reason))


def markdown_text(report: Report) -> str:
    """A summary for people who read the log of a CI job."""
    lines = [f"## Validation: {_escape(headline(report))}", ""]
    if report.location is not None:
        lines += [f"**It begins at:** {_escape(str(report.location))}", ""]
    lines += ["| Kind | Worst score | Limit | Stage | Tensor |", "|---|---:|---:|---|---|"]
    lines += [_worst_row(kind, tensor) for kind, tensor in report.worst.items()]
    lines += ["", "A score is the target's error over the error of eager PyTorch itself."]
    rows = figures(report)
    if rows:
        lines += ["", *(f"- **{_escape(name)}:** {_escape(text)}" for name, text in rows)]
    failures = report.failures
    if failures:
        lines += ["", "### Problems", ""]
        lines += [f"- {_escape(failure)}" for failure in failures[:LISTED]]
        if len(failures) > LISTED:
            lines.append(f"- and {len(failures) - LISTED} more in report.json")
    lines += ["", f"Seed {report.seed}; {report.seconds:.1f} s; {_escape(report.ingot)}"]
    return "\n".join(lines) + "\n"


def _worst_row(kind: str, tensor: TensorResult) -> str:
    cells = (kind, number(tensor.score), number(tensor.limit), tensor.stage, tensor.name)
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line, and that mentions nobody."""
    flat = " ".join(clean(text).split()).replace("&", "&amp;")
    return _MARKDOWN.sub(r"\\\1", flat).replace("@", "&#64;")


def _routing(routing: Routing) -> str:
    worst = min(routing.agreement, default=1.0)
    failing = sum(flip.fails for flip in routing.flips)
    share = "all"
    if worst < 1:
        share = f"at least {worst:.2%} ({routing.name(routing.agreement.index(worst))}) of"
    return (
        f"{share} tokens have the truth's experts at each router; "
        f"{len(routing.flips)} flips, {failing} beyond what rounding explains"
    )
