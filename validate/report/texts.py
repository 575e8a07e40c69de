"""A validation's result as JSON, JUnit XML and Markdown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Integral, Real
from typing import Any
from xml.etree import ElementTree

from ingot.validate.report.asked import asked
from ingot.validate.report.costs import Table, cost_tables, costs
from ingot.validate.report.grouping import Group, grouped
from ingot.validate.report.words import LISTED, clean, figures, headline, number, scores
from ingot.validate.result import Report, TensorResult

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~$#])")


def json_text(report: Report) -> str:
    """Everything of the report as strict JSON; infinities and NaN are strings."""
    data = asdict(report)
    for row, tensor in zip(data["tensors"], report.tensors, strict=True):
        row["score"] = tensor.score
    for name in ("gate", "quantisation", "activations"):
        if data[name] is None:
            # Most have none, those of exports among them, whose bytes do not change.
            del data[name]
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
    """One test case a tensor of a stage, routing mode, check, part and figure that got worse."""
    suite = ElementTree.Element("testsuite", name="validate", time=f"{report.seconds:.3f}")
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(report).items():
        ElementTree.SubElement(properties, "property", name=clean(name), value=clean(value))
    prefix = f"{report.model_type}.{report.target}.{report.precision}"
    for tensor in report.tensors:
        problems = [tensor.problem] if tensor.problem else []
        _case(suite, f"{prefix}.{tensor.stage}", tensor.name, problems, report.reason)
    for mode, routing in report.routing.items():
        _case(suite, f"{prefix}.routing", mode, routing.problems, report.reason)
    for check in report.checks:
        # One that was made in part is not green, and what it found is red all the same.
        left_out = report.reason or check.left_out or None
        _case(suite, f"{prefix}.checks", check.name, list(check.problems), left_out)
    if report.coverage is not None:
        for part in report.coverage.parts:
            why = report.reason or (None if part.covered else part.why)
            _case(suite, f"{prefix}.coverage", part.name, [], why)
    for growth in report.growth:
        if growth.problem:
            _case(suite, f"{prefix}.growth", growth.kind, [growth.problem], report.reason)
    if report.quantisation is not None:
        name, problems = report.quantisation.stored, list(report.quantisation.problems)
        _case(suite, f"{prefix}.quantisation", name, problems, report.reason)
    if report.gate is not None:
        # One that passes, so that a gate is seen to have been there.
        _case(suite, f"{prefix}.gate", f"against {report.gate.baseline}", [], report.reason)
        for problem in report.worse:
            _case(suite, f"{prefix}.gate", problem, [f"WORSE {problem}"], report.reason)
    if not any(tensor.error is not None for tensor in report.tensors):
        # Without this, a report that compared nothing would be a green suite.
        problems = ["nothing was compared"] if report.reason is None else []
        _case(suite, prefix, "compared tensors", problems, report.reason)
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
        "plan": report.plan,
    }
    if report.date:
        result["date"] = report.date
    if report.place is not None:
        result["location"] = report.place
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
    if report.place is not None:
        lines += [f"**It begins at:** {_escape(report.place)}", ""]
    lines += ["| Kind | Worst score | Limit | Stage | Tensor |", "|---|---:|---:|---|---|"]
    lines += [_worst_row(kind, tensor) for kind, tensor in report.worst.items()]
    lines += ["", _escape(scores(report))]
    rows = figures(report)
    if rows:
        lines += ["", *(f"- **{_escape(name)}:** {_escape(text)}" for name, text in rows)]
    rows = costs(report)
    if rows:
        lines += ["", "### What storing the weights costs", ""]
        lines += [f"- **{_escape(name)}:** {_escape(text)}" for name, text in rows]
        for table in cost_tables(report):
            lines += ["", f"**{_escape(table.title)}**", "", *_table(table)]
    covered = asked(report)
    if covered:
        lines += ["", "### What was asked", ""]
        lines += [f"- **{_escape(name)}:** {_escape(text)}" for name, text in covered]
    if report.short:
        lines += ["", "### Not covered", "", *(f"- {_escape(part)}" for part in report.short)]
    lines += _problems("Problems", "", grouped(report, report.failures))
    lines += _problems("Worse than the baseline", "WORSE ", grouped(report, report.worse))
    version = report.environment.get("ingot")
    made = [
        *([f"Ingot {version}"] if version else []),
        *([report.date] if report.date else []),
        f"plan {report.plan}",
        f"seed {report.seed}",
        f"{report.seconds:.1f} s",
        report.ingot,
    ]
    lines += ["", _escape("; ".join(made))]
    return "\n".join(lines) + "\n"


def _problems(title: str, word: str, groups: list[Group]) -> list[str]:
    """A section of problems; nothing where there are none."""
    if not groups:
        return []
    lines = ["", f"### {title}", ""]
    lines += [f"- {word}{_escape(group.text)}" for group in groups[:LISTED]]
    more = sum(group.count for group in groups[LISTED:])
    if more:
        lines.append(f"- and {more} more in report.json")
    return lines


def _table(table: Table) -> list[str]:
    """Lines of a table whose first column names the rows."""
    ruled = "|---|" + "---:|" * (len(table.columns) - 1)
    head, *rows = [
        "| " + " | ".join(map(_escape, cells)) + " |" for cells in (table.columns, *table.rows)
    ]
    return [head, ruled, *rows]


def _worst_row(kind: str, tensor: TensorResult) -> str:
    cells = (kind, number(tensor.score), number(tensor.limit), tensor.stage, tensor.name)
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line, and that mentions nobody."""
    flat = " ".join(clean(text).split()).replace("&", "&amp;")
    return _MARKDOWN.sub(r"\\\1", flat).replace("@", "&#64;")
