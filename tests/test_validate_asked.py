"""Coverage and checks in words, and that every report has them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from test_validate_report import covered_report, plain_report

from ingot.validate.coverage import Experts, LeftOut, Part
from ingot.validate.report import html, texts
from ingot.validate.report.asked import asked, check_words, experts_words
from ingot.validate.report.terminal import print_report
from ingot.validate.result import Check, Report

LACKING = Part("a second turn of one row", 0, None, "no such call was made")
REPLAYED = Part("a prompt of one token", 3, "replayed")


def short_report(**changes: Any) -> Report:
    """A passing report with a part that is not covered, one that was replayed, and all checks."""
    found = covered_report(
        checks=(Check("weights", 29), Check("graph", 112), Check("contract", 1)), **changes
    )
    assert found.coverage is not None
    parts = (*found.coverage.parts, REPLAYED, LACKING)
    return replace(found, coverage=replace(found.coverage, parts=parts))


def printed(report: Report, capsys: pytest.CaptureFixture[str]) -> str:
    print_report(report)
    return capsys.readouterr().out


def test_what_was_asked_is_said_in_a_few_lines() -> None:
    assert asked(short_report()) == [
        ("Weights", "29 tensors are the checkpoint's"),
        ("Graph", "112 nodes are those of a fresh capture"),
        ("Contract", "1 field is what the checkpoint says"),
        (
            "Fed",
            "45 calls of 1, 2 or 3 rows and 1, 2 or 19 tokens each; sequences up to 51 of 4,096 "
            "tokens; padding: left, right; 94 of 512 token ids; up to 3 chunks of the scan",
        ),
        (
            "Experts",
            "3 of 4 of 1 router were chosen, 1 more ran because they were given (layer 0: 3)",
        ),
        (
            "Shapes of use",
            "2 of 3 were covered; with the truth's experts alone: a prompt of one token",
        ),
        ("Left out", "3 of 95 tokens: a near-tie turned before them"),
        ("Not asked", "contexts beyond 51 of 4,096 tokens"),
    ]


def test_what_there_is_not_is_not_said() -> None:
    assert asked(plain_report()) == []
    found = covered_report(checks=()).coverage
    assert found is not None
    bare = replace(
        found, experts=(), parts=(), left_out=(), not_asked=(), chunks=0, context=None, paddings=()
    )
    ((name, text),) = asked(plain_report(coverage=bare))
    assert name == "Fed" and "padding: none" in text and "up to 51 tokens" in text
    assert "chunk" not in text
    many = replace(bare, lengths=tuple(range(1, 20)), rows=(1,), calls=1)
    assert asked(plain_report(coverage=many))[0][1].startswith("1 call of 1 row and 1 to 19 tokens")


def test_of_a_graph_that_was_run_in_float32_alone_it_says_so() -> None:
    found = plain_report(precision="bfloat16")
    tensors = [replace(found.tensors[0], stage=f"decode {n}, in float32") for n in (1, 2)]
    assert asked(replace(found, tensors=(*tensors, tensors[0]))) == [
        ("Fed", "2 calls of the graph, in float32 alone"),
        ("Not asked", "whatever is computed in bfloat16"),
    ]
    assert asked(replace(found, tensors=(*tensors, *found.tensors))) == []


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_name_of_a_tensor_or_a_call_is_cut_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    found = plain_report()
    stage, name = "seed 2, padding in every row, decode 117, replayed", "present_states.11.conv"
    (tensor,) = found.tensors
    terminal = printed(replace(found, tensors=(replace(tensor, stage=stage, name=name),)), capsys)
    rows = [line.split("│")[1:-1] for line in terminal.splitlines() if line.startswith("│")]
    *_, stages, names = ("".join(column).replace(" ", "") for column in zip(*rows, strict=True))
    assert (stages, names) == (stage.replace(" ", ""), name)


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (Check("weights", 291), "291 tensors are the checkpoint's"),
        (Check("weights", 3, ("a", "b")), "3 tensors compared, 2 problems found"),
        (Check("graph", 0, left_out="made by torch 2.12"), "nothing was compared; not compared: "),
        (Check("graph", 9, left_out="two nodes"), "9 nodes are those of a fresh capture; not comp"),
        (Check("other", 2), "2 values are right"),
    ],
)
def test_a_check_says_what_it_compared(check: Check, said: str) -> None:
    assert check_words(check).startswith(said)


def test_experts_that_never_ran_are_named() -> None:
    routers = [Experts(f"layer {n}", (0,), (1,), tuple(range(2, 14))) for n in range(5)]
    said = experts_words(routers)
    assert said.startswith("5 of 70 of 5 routers were chosen, 5 more ran because they were given (")
    assert "60 never ran (layer 0: 2, 3, 4, 5, 6, 7, 8, 9 and 4 more; layer 1: " in said
    assert said.endswith("; and of 2 more)")


def test_every_report_names_what_is_not_covered(capsys: pytest.CaptureFixture[str]) -> None:
    found = short_report()
    assert found.verdict == "passed, in part"
    lacks = "a second turn of one row: no such call was made"
    terminal = printed(found, capsys)
    assert terminal.startswith("PASSED, IN PART: olmoe, ort, float32")
    assert f"NOT COVERED {lacks}\n" in terminal
    assert "Weights: 29 tensors are the checkpoint's\n" in terminal
    summary = texts.markdown_text(found)
    assert "### Not covered\n\n- " + lacks in summary
    assert "- **Weights:** 29 tensors are the checkpoint's" in summary
    page = html.page(replace(found, tensors=found.tensors[:1], routing={}, distribution=None))
    assert 'class="verdict part"' in page and f"<li>{lacks}</li>" in page
    assert "29 tensors are the checkpoint&#39;s" in page
    assert '<tr class="lacking"><th scope="row">a second turn of one row</th>' in page
    data = json.loads(texts.json_text(found))
    assert data["coverage"]["parts"][2]["why"] == "no such call was made"
    assert [check["compared"] for check in data["checks"]] == [29, 112, 1]
    assert data["summary"]["short"] == [lacks]


def test_the_manifest_keeps_the_coverage_in_short() -> None:
    kept = short_report().summary()
    assert kept["checks"] == {"weights": 29, "graph": 112, "contract": 1}
    assert kept["coverage"] == {
        "calls": 45,
        "rows": [1, 2, 3],
        "lengths": [1, 2, 19],
        "positions": 51,
        "context": 4096,
        "paddings": ["left", "right"],
        "ids": 94,
        "vocab_size": 512,
        "parts": 3,
        "covered": 2,
        "replayed": ["a prompt of one token"],
        "chunks": 3,
        "experts": {"layer 0": {"chosen": 3, "forced": [3], "never": []}},
        "left_out": ["3 of 95 tokens: a near-tie turned before them"],
        "not_asked": ["contexts beyond 51 of 4,096 tokens"],
    }


def test_junit_has_a_case_a_part_and_a_check() -> None:
    found = short_report()
    checks = (Check("weights", 29, ("a is not b", "c is not d")), *found.checks[1:])
    partly = Check("other", 3, left_out="no memory")
    suite = ElementTree.fromstring(
        texts.junit_text(replace(found, checks=(*checks, partly))).encode()
    )[0]
    cases = {(c.get("classname"), c.get("name")): c for c in suite.iter("testcase")}

    def inside(group: str, name: str) -> list[tuple[str, str | None]]:
        return [(e.tag, e.get("message")) for e in cases[f"olmoe.ort.float32.{group}", name]]

    assert inside("coverage", "decode of one sequence") == []
    assert inside("coverage", "a prompt of one token") == []
    assert inside("coverage", "a second turn of one row") == [("skipped", "no such call was made")]
    assert inside("checks", "weights") == [("failure", "a is not b (and 1 more)")]
    assert inside("checks", "graph") == []
    assert inside("checks", "other") == [("skipped", "no memory")]
    assert (suite.get("failures"), suite.get("skipped")) == ("1", "2")


def test_left_out_tensors_are_counted_apart() -> None:
    found = short_report()
    assert found.coverage is not None
    left = (LeftOut("tensors", 7, 90, "x"), LeftOut("tokens", 1, 95, "y"))
    rows = asked(replace(found, coverage=replace(found.coverage, left_out=left)))
    assert [text for name, text in rows if name == "Left out"] == [
        "7 of 90 tensors: x",
        "1 of 95 tokens: y",
    ]


def test_strict_takes_a_verdict_in_part_for_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from ingot.validate.cli import validate_command

    for report, usual, strict in (
        (short_report(), 0, 1),
        (plain_report(), 0, 0),
        (plain_report(reason="no GPU"), 0, 1),
    ):
        monkeypatch.setattr("ingot.validate.api.validate", lambda *_a, found=report, **_o: found)
        for options, status in (([], usual), (["--strict"], strict)):
            arguments = [str(tmp_path), "--checkpoint", str(tmp_path), *options]
            assert CliRunner().invoke(validate_command, arguments).exit_code == status
