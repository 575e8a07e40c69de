"""The suite of planted faults: its tables are sane, and one fault of each kind is seen."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from proof.__main__ import chosen, groups_of, table
from proof.bases import BASES
from proof.fault import Fault, Outcome, Where
from proof.faults import FAULTS
from proof.rights import RIGHTS
from proof.running import judged

from ingot.validate.result import Check, Location, Report, TensorResult

KINDS = dict.fromkeys(fault.kind for fault in FAULTS)
ONE_OF_EACH = [next(fault for fault in FAULTS if fault.kind == kind) for kind in KINDS]
REPORT = Report("ingot", "olmoe", "ort", "float32", "nothing", 0, ())
WRONG = TensorResult("prefill", "logits", "logits", None, 1.0, 1e-7, 1.0, 8.0, "it is wrong")


def test_has_faults_of_every_kind_in_every_place() -> None:
    titles = Counter(fault.title for fault in FAULTS)
    assert [title for title, count in titles.items() if count > 1] == []
    assert len(FAULTS) >= 150 and len(RIGHTS) >= 60
    places = Counter(fault.place for fault in FAULTS)
    assert all(places[place] >= 20 for place in ("graph", "weights", "manifest", "session"))
    assert all(places[place] >= 20 for place in ("kernel", "export"))
    assert {fault.base for fault in FAULTS} == set(BASES)


def test_has_the_numbers_see_what_no_file_shows() -> None:
    unseen = [f for f in FAULTS if f.place in ("session", "kernel") and f.kind != "below the floor"]
    assert all(fault.by == ("numbers",) for fault in unseen)


def test_a_share_has_every_kind_and_another_seed_another_share() -> None:
    one, right = chosen(0, 0.2, "", FAULTS, list(RIGHTS))
    other, _ = chosen(1, 0.2, "", FAULTS, list(RIGHTS))
    assert {fault.kind for fault in one} == set(KINDS)
    assert len(FAULTS) * 0.1 < len(one) < len(FAULTS) * 0.35
    assert [fault.title for fault in one] != [fault.title for fault in other]
    # Each once, with what begins with the same base.
    groups = groups_of(one, right)
    assert sum(len(faults) for _, faults, _ in groups) == len(one)
    assert sorted(base.name for base, _, asked in groups if asked) == sorted(right)


@pytest.mark.parametrize(
    ("report", "missed"),
    [
        (REPORT, "not seen by numbers"),
        (replace(REPORT, checks=(Check("graph", 1, ("it differs",)),)), "not seen by numbers"),
        (replace(REPORT, tensors=(WRONG,)), "no location"),
        (replace(REPORT, tensors=(WRONG,), location=Location(0, "MoE", "y", 9.0)), "found at"),
        (replace(REPORT, tensors=(WRONG,), location=Location(1, "MatMul", "y", 9.0)), "found at"),
        (replace(REPORT, tensors=(WRONG,), location=Location(1, "MoE", "y", 9.0)), ""),
    ],
)
def test_misses_what_is_not_seen_or_not_found_where_it_is(report: Report, missed: str) -> None:
    fault: Fault = replace(ONE_OF_EACH[0], by=("numbers",), where=Where(1, ("MoE",)))
    found = judged(fault, report)
    assert found == "" if not missed else missed in found


def test_the_table_counts_what_only_a_check_sees() -> None:
    outcome = Outcome("x", "constant", "failed", ("graph",), 1.0, "", 0.1, "missed")
    (_, row) = table([outcome, replace(outcome, by=("graph", "numbers"), missed="")]).splitlines()
    assert row.split() == ["constant", "2", "1", "2", "1", "0", "1"]
