"""The checks as a whole: before the run, where there is none, and over anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint, MakeIngot
from identity import Kept, changed
from traces import Traces

from ingot.export.ingot import Manifest
from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.plugins.errors import IngotError
from ingot.validate.identity.checks import CHECKS, checks
from ingot.validate.identity.subject import Subject
from ingot.validate.result import Check, Report
from ingot.validate.run import examine, examine_unrun
from ingot.validate.truth.inputs import QUICK
from ingot.validate.truth.reference import Reference


@pytest.fixture(scope="module")
def kept(
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    traces: Traces,
    tiny: Path,
    tiny_ort: Path,
) -> Kept:
    return Kept(make_checkpoint, make_ingot, traces, tiny, {"ort": tiny_ort})


def of(folder: Path, tiny: Path) -> tuple[Path, Reference, Stages]:
    """What a validation of a folder is given first."""
    manifest = Manifest.read(folder)
    reference = Reference(Checkpoint.open(tiny), manifest.task, manifest.precision)
    return folder, reference, Stages()


def not_shared(raw: dict[str, Any]) -> None:
    for state in raw["states"]:
        state["shared"] = False


def few_tokens(raw: dict[str, Any]) -> None:
    raw["vocab_size"] = raw["outputs"][0]["shape"][2] = 2


def test_every_check_is_made_of_a_right_ingot(kept: Kept, tiny_ort: Path) -> None:
    found = checks(kept.subject(tiny_ort, "olmoe"))
    assert [check.name for check in found] == list(CHECKS) == ["weights", "graph", "contract"]
    assert all(check.problems == () and check.left_out == "" for check in found)
    assert all(check.compared > 20 for check in found)


@pytest.mark.parametrize("error", [IngotError("It is upside down;\n turn it."), KeyError("three")])
def test_what_keeps_a_check_from_being_made_is_a_problem(
    kept: Kept, tiny_ort: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(_subject: Subject) -> Check:
        raise error

    monkeypatch.setitem(CHECKS, "graph", fails)
    found = checks(kept.subject(tiny_ort, "olmoe"))[1]
    says = {
        "IngotError": "It is upside down; turn it",
        "KeyError": "it cannot be compared (KeyError: 'three')",
    }
    assert found.problems == (says[type(error).__name__],)


def test_an_ingot_that_cannot_be_run_fails_by_what_the_checks_say(
    kept: Kept, tiny: Path, tiny_ort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_arguments: Any, **_options: Any) -> Report:
        raise RuntimeError("batch_size must be 1")

    monkeypatch.setattr("ingot.validate.run.validate_ingot", cannot)
    monkeypatch.setattr(
        "ingot.validate.run.Subject", lambda folder, *_: kept.subject(folder, "olmoe")
    )
    report = examine(*of(changed(tiny_ort, tmp_path / "copy", said=not_shared), tiny))
    assert report.verdict == "failed"
    shared = "contract: states[past_key_values.0.key].shared of ingot.json is False, and True in"
    assert any(each.startswith(shared) for each in report.failures)
    assert report.failures[-1] == "session: the ingot cannot be run: batch_size must be 1"
    # Where they find nothing, it is for whoever runs it to see.
    with pytest.raises(RuntimeError, match="batch_size must be 1"):
        examine(*of(tiny_ort, tiny))


def test_what_cannot_be_run_here_is_checked_all_the_same(
    kept: Kept, tiny: Path, tiny_ort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ingot.validate.run.Subject", lambda folder, *_: kept.subject(folder, "olmoe")
    )
    report = examine_unrun(*of(tiny_ort, tiny), "there is no card")
    assert (report.verdict, report.reason) == ("skipped", "there is no card")
    assert [check.compared > 0 for check in report.checks] == [True] * 3
    wrong = changed(tiny_ort, tmp_path / "copy", said=few_tokens)
    report = examine_unrun(*of(wrong, tiny), "there is no card")
    assert report.verdict == "failed"
    assert any("vocab_size of ingot.json is 2, and 512" in each for each in report.failures)


@pytest.mark.slow
@pytest.mark.parametrize("said", [not_shared, few_tokens])
def test_a_session_that_a_wrong_contract_breaks_is_no_trace(
    traces: Traces, tiny: Path, tiny_ort: Path, tmp_path: Path, said: Any
) -> None:
    copy = changed(tiny_ort, tmp_path / "copy", said=said)
    report = examine(*of(copy, tiny), plan=QUICK, capture=traces)
    assert report.verdict == "failed"
    assert any(each.startswith("contract: ") for each in report.failures)
    assert report.failures[-1].startswith("session: the ingot cannot be run: ")


@pytest.mark.slow
def test_a_bfloat16_ingot_is_checked_without_a_card(
    kept: Kept, tiny: Path, tiny_ort: Path, tmp_path: Path, traces: Traces
) -> None:
    ingot = kept.ingot("olmoe", "trt", "bf16")
    report = examine_unrun(*of(ingot, tiny), "no card", capture=traces)
    assert report.verdict == "skipped"
    assert all(check.problems == () and check.compared for check in report.checks)
    forged = changed(tiny_ort, tmp_path / "copy", said=lambda raw: raw.update(precision="bfloat16"))
    report = examine_unrun(*of(forged, tiny), "no card", capture=traces)
    assert report.verdict == "failed"
    assert any("precision of ingot.json is bfloat16" in each for each in report.failures)
