"""The end of an export: the verdict in the table, and in the status."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from test_validate_asked import short_report
from test_validate_report import (
    covered_report,
    failing_report,
    in_float32,
    make_report,
    plain_report,
)

from ingot.export.cli import export_command
from ingot.export.ingot import Manifest
from ingot.export.summary import _verdict_rows
from ingot.validate.result import Routing


def of(validation: dict[str, Any]) -> Manifest:
    """A manifest as far as it is asked."""
    manifest = Manifest.__new__(Manifest)
    object.__setattr__(manifest, "validation", validation)
    return manifest


def test_says_what_was_checked_and_covered() -> None:
    rows = _verdict_rows(of(short_report().summary()))
    assert ("verdict", "[yellow]passed, in part[/yellow]") in rows
    assert ("not covered", "a second turn of one row: no such call was made") in rows
    checked = "29 weights, 112 nodes of the graph, 1 fields of the contract, against the checkpoint"
    assert ("checked", checked) in rows
    covered = "2 of 3 shapes of use, sequences up to 51 of 4,096 tokens, 94 of 512 token ids"
    assert ("covered", covered) in rows
    assert ("not asked", "contexts beyond 51 of 4,096 tokens") in rows
    assert ("routing, free", "99.5% of tokens have the truth's experts") in rows


def test_says_figures_of_half_precision_and_those_in_float32() -> None:
    found = make_report(precision="float16", routing={"forced": Routing((1.0, 1.0), ())})
    both = replace(found, tensors=(*found.tensors, *in_float32(found)))
    rows = [row for row in _verdict_rows(of(both.summary())) if "error" in row[1]]
    names = ["logits", "key", "value"]
    assert [name for name, _ in rows] == [*names, *(f"{name}, in float32" for name in names)]
    assert rows[0][1] != rows[3][1]
    forced = ("routing, forced", "100.0% of tokens used the experts they were given")
    assert forced in _verdict_rows(of(both.summary()))


def test_an_older_ingot_says_what_it_has() -> None:
    names = [name for name, _ in _verdict_rows(of(plain_report().summary()))]
    assert names[:2] == ["verdict", "compared"]
    assert not {"checked", "covered", "not covered"} & set(names)


@pytest.mark.parametrize(
    ("validation", "usual", "strict"),
    [
        (covered_report(checks=()).summary(), 0, 0),
        (short_report().summary(), 0, 1),
        (failing_report().summary(), 1, 1),
        ({"verdict": "skipped", "reason": "--no-validate was given"}, 0, 1),
    ],
    ids=["passed", "in part", "failed", "skipped"],
)
def test_the_status_is_the_verdict(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    validation: dict[str, Any],
    usual: int,
    strict: int,
) -> None:
    made = SimpleNamespace(checkpoint=tmp_path, manifest=of(validation))
    monkeypatch.setattr("ingot.export.api.export", lambda *_arguments, **_options: made)
    monkeypatch.setattr("ingot.export.summary.print_summary", lambda *_arguments: None)
    for options, status in (([], usual), (["--strict"], strict)):
        result = CliRunner().invoke(export_command, ["--model", str(tmp_path), *options])
        assert result.exit_code == status, result.output
