"""The files of a validation: well-formed, escaped, self-contained, equal for equal reports."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import numpy as np
import pytest

from ingot.plugins.whole import WriteError
from ingot.validate.coverage import Coverage, Experts, LeftOut, Part
from ingot.validate.report import files, html, plots, texts, words
from ingot.validate.result import (
    Check,
    Distribution,
    Flip,
    Gate,
    Growth,
    Hidden,
    Location,
    Report,
    Routing,
    TensorResult,
)

HOSTILE = '<script>alert("1")</script>&\x00\x1b\ud800|`*_[x](http://y)$\\frac @all\n# head'
FILES = ["junit.xml", "report.html", "report.json", "summary.md"]
VOID = {"meta", "br", "hr", "link", "img", "input"}


def make_report(**changes: Any) -> Report:
    """A passing report of three layers, a prefill and eight decode steps."""
    draw = random.Random(0)
    tensors = []
    for step, stage in enumerate(["prefill", *(f"decode {n}" for n in range(1, 9))]):
        for layer in (None, 0, 1, 2):
            names = (
                [("logits", "logits")]
                if layer is None
                else [(f"present.{layer}.{kind}", kind) for kind in ("key", "value")]
            )
            for name, kind in names:
                floor = 1e-7 * (1 + (3 if layer is None else layer) + 0.1 * step)
                error = floor * draw.uniform(0.8, 1.6)
                tensors.append(TensorResult(stage, name, kind, layer, error, floor, 1.0, 4.0))
    kl = tuple(sorted(draw.lognormvariate(-20, 1.5) for _ in range(200)))
    flips = (Flip(1, 0, 4, (1, 3), (1, 5), 2e-8, 1e-6), Flip(2, 1, 9, (0, 2), (2, 7), 4e-7, 1e-6))
    values: dict[str, Any] = {
        "ingot": "/tmp/olmoe-ort",
        "model_type": "olmoe",
        "target": "ort",
        "precision": "float32",
        "against": "eager PyTorch, float64",
        "seed": 0,
        "tensors": tuple(tensors),
        "routing": {
            "free": Routing((1.0, 0.995, 0.995), flips),
            "replayed": Routing((1.0, 1.0, 1.0), ()),
        },
        "distribution": Distribution(200, kl, 0.995, 1, 12.5, 12.4999, (0.9999, 1.0001)),
        "environment": {"onnxruntime": "1.31.1", "torch": "2.13.0", "machine": "x86_64, 16 cores"},
        "seconds": 12.5,
    }
    return Report(**(values | changes))


def covered_report(**changes: Any) -> Report:
    """A passing report that says what it asked, and that left nothing out."""
    coverage = Coverage(
        calls=45,
        rows=(1, 2, 3),
        lengths=(1, 2, 19),
        positions=51,
        context=4096,
        paddings=("left", "right"),
        ids=94,
        vocab_size=512,
        chunks=3,
        experts=(Experts("layer 0", (0, 1, 2), (3,), ()),),
        parts=(Part("decode of one sequence", 32, "session"),),
        left_out=(LeftOut("tokens", 3, 95, "a near-tie turned before them"),),
        not_asked=("contexts beyond 51 of 4,096 tokens",),
    )
    checks = (Check("weights", 29), Check("graph", 0, left_out="made by torch 2.12"))
    return make_report(**({"coverage": coverage, "checks": checks} | changes))


def with_tensor(found: Report, index: int, **changes: Any) -> Report:
    """The same report with one tensor changed."""
    tensors = list(found.tensors)
    tensors[index] = replace(tensors[index], **changes)
    return replace(found, tensors=tuple(tensors))


def failing_report() -> Report:
    """One where a layer went wrong, an expert was flipped and an output is missing."""
    found = with_tensor(make_report(), 3, error=3e-5, problem="score 141 above 4")
    found = with_tensor(found, 7, error=None, floor=None, norm_ratio=None, problem="no such output")
    flip = Flip(1, 0, 2, (1, 3), (1, 6), 0.3, 1e-6)
    return replace(
        found,
        routing={**found.routing, "replayed": Routing((1.0, 0.99, 1.0), (flip,))},
        location=Location(1, "MoeDispatch", "layers.1.moe", 214.0),
    )


def hostile_report() -> Report:
    """One whose every text tries to be markup."""
    found = failing_report()
    tensors = tuple(
        replace(tensor, name=HOSTILE, kind=HOSTILE, problem=tensor.problem and HOSTILE)
        for tensor in found.tensors
    )
    return replace(
        found,
        tensors=tensors,
        ingot=HOSTILE,
        model_type=HOSTILE,
        target=HOSTILE,
        against=HOSTILE,
        routing={HOSTILE: found.routing["replayed"]},
        location=Location(None, HOSTILE, HOSTILE, math.inf),
        environment={HOSTILE: HOSTILE},
    )


def plain_report(**changes: Any) -> Report:
    """One with nothing to draw, which is quick, but for the changes."""
    one = make_report().tensors[:1]
    return make_report(**({"tensors": one, "routing": {}, "distribution": None} | changes))


@cache
def page_of(make: Callable[[], Report]) -> str:
    """The page of a report, drawn once for all tests."""
    return html.page(make())


class Page(HTMLParser):
    """Elements, attributes and text of a page; refuses one that is not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def strict(text: str) -> Any:
    """JSON that holds nothing but JSON."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def svgs(text: str) -> list[ElementTree.Element]:
    """The drawings of a page, each well-formed on its own."""
    parts = text.split("<svg")[1:]
    return [ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>") for part in parts]


def write(found: Report, folder: Path) -> dict[str, str]:
    files.write(found, folder)
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("make", [make_report, hostile_report])
def test_writes_four_files_equal_for_equal_reports(
    make: Callable[[], Report], tmp_path: Path
) -> None:
    first, second = write(make(), tmp_path / "new" / "a"), write(make(), tmp_path / "b")
    assert sorted(first) == FILES
    assert first == second
    strict(first["report.json"])
    ElementTree.fromstring(first["junit.xml"].encode())
    Page(first["report.html"])


def test_page_does_not_depend_on_the_users_matplotlib_or_on_what_was_drawn_before() -> None:
    import matplotlib

    expected = page_of(make_report)
    page_of(failing_report)
    with matplotlib.rc_context({"font.size": 31.0, "svg.fonttype": "path", "axes.grid": False}):
        assert html.page(make_report()) == expected


def test_replaces_files_and_leaves_no_part(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    files = write(plain_report(), tmp_path)
    assert sorted(files) == FILES
    assert strict(files["report.json"])["verdict"] == "passed"


def test_a_report_that_cannot_be_drawn_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_report: Report) -> str:
        raise RuntimeError("no")

    monkeypatch.setattr(html, "page", fails)
    with pytest.raises(RuntimeError):
        files.write(plain_report(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"^cannot write [^\n]*\.$"):
        files.write(plain_report(), tmp_path / "file")


def test_json_holds_everything() -> None:
    data = strict(texts.json_text(failing_report()))
    assert next(iter(data)) == "schema_version"
    assert data["schema_version"] == 1
    assert data["verdict"] == "failed"
    assert len(data["failures"]) == 3
    assert len(data["tensors"]) == 63
    assert data["tensors"][0]["score"] == pytest.approx(make_report().tensors[0].score)
    assert data["tensors"][7]["score"] is None
    assert data["routing"]["free"]["flips"][0]["expected"] == [1, 3]
    assert len(data["distribution"]["kl"]) == 200
    assert data["location"]["operator"] == "MoeDispatch"
    assert data["summary"]["first_failure"] == data["failures"][0]


def test_json_writes_what_json_cannot_hold_as_strings() -> None:
    found = with_tensor(make_report(), 0, floor=0.0)
    found = with_tensor(found, 1, error=math.nan, norm_ratio=-math.inf)
    found = with_tensor(found, 2, error=np.float32(0.5), layer=np.int64(2))
    rows = strict(texts.json_text(found))["tensors"]
    assert rows[0]["score"] == "Infinity"
    assert (rows[1]["error"], rows[1]["norm_ratio"]) == ("NaN", "-Infinity")
    assert (rows[2]["error"], rows[2]["layer"]) == (0.5, 2)


def test_plain_keeps_truth_values() -> None:
    assert texts.plain({"a": (True, None, 1, "x")}) == {"a": [True, None, 1, "x"]}


def junit(found: Report) -> ElementTree.Element:
    suite = ElementTree.fromstring(texts.junit_text(found).encode()).find("testsuite")
    assert suite is not None
    for name, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
        assert suite.get(name) == str(len(list(suite.iter(tag))))
    return suite


def test_junit_has_a_case_per_tensor_and_mode() -> None:
    suite = junit(make_report())
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("65", "0", "0")
    cases = {(case.get("classname"), case.get("name")) for case in suite.iter("testcase")}
    assert len(cases) == 65
    assert ("olmoe.ort.float32.decode 3", "present.1.key") in cases
    assert ("olmoe.ort.float32.routing", "replayed") in cases


def test_junit_failures_have_messages() -> None:
    suite = junit(failing_report())
    assert suite.get("failures") == "3"
    messages = [failure.get("message") or "" for failure in suite.iter("failure")]
    assert messages[:2] == ["score 141 above 4", "no such output"]
    assert messages[2].startswith("router 1: token 2 of row 0 chose [1, 6] over [1, 3]")
    properties = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert properties["verdict"] == "failed"
    assert (properties["location"] or "").startswith("layer 1, MoeDispatch")
    assert properties["environment torch"] == "2.13.0"


def test_junit_counts_failing_flips_beyond_the_first() -> None:
    flip = Flip(1, 0, 2, (1, 3), (1, 6), 0.3, 1e-6)
    suite = junit(make_report(routing={"free": Routing((0.5,), (flip, flip, flip))}))
    (failure,) = suite.iter("failure")
    assert (failure.get("message") or "").endswith("(and 2 more)")
    assert len((failure.text or "").splitlines()) == 3


def test_junit_says_skipped_where_passing_proves_nothing() -> None:
    assert junit(make_report(reason="no GPU")).get("skipped") == "65"
    mixed = junit(replace(failing_report(), reason="no GPU"))
    assert (mixed.get("skipped"), mixed.get("failures")) == ("62", "3")


def test_junit_of_nothing_compared_is_not_green() -> None:
    assert junit(make_report(tensors=())).get("failures") == "1"
    empty = with_tensor(make_report(), 0, error=None)
    assert junit(replace(empty, tensors=empty.tensors[:1])).get("failures") == "1"


def test_junit_holds_any_text() -> None:
    (failure, *_) = junit(hostile_report()).iter("failure")
    message = failure.get("message") or ""
    assert message.startswith('<script>alert("1")</script>&\\x00\\x1b\\ud800|')


def test_summary_of_a_pass() -> None:
    text = texts.markdown_text(make_report())
    assert text.startswith("## Validation: PASSED: olmoe, ort, float32")
    assert text.count("\n| ") == 4
    assert "- **Routing, free:** at least 99.50% (router 1) of tokens" in text
    assert "2 flips, 0 beyond" in text
    assert "- **Routing, replayed:** all tokens have" in text
    assert "- **KL divergence" in text
    assert "99.50%; 1 of the other tokens are near-ties" in text
    assert "ratio 1 (95 % interval 0.9999 to 1.0001)" in text
    assert "Problems" not in text


def test_summary_names_worst_tensor_location_and_problems() -> None:
    text = texts.markdown_text(failing_report())
    assert "FAILED: olmoe, ort, float32, against eager PyTorch, float64: 3 problems." in text
    assert "**It begins at:** layer 1, MoeDispatch output layers.1.moe, 214x floor" in text
    assert "| key | 150 | 4 | prefill | present.1.key |" in text
    assert "- prefill, present.1.key: score 141 above 4" in text


def test_says_why_there_is_no_place() -> None:
    found = replace(failing_report(), location=None, unlocated="ONNX Runtime cannot load it")
    place = "a place that could not be found: ONNX Runtime cannot load it"
    assert f"**It begins at:** {place}" in texts.markdown_text(found)
    assert f"It begins at: {place}" in html.page(plain_report(unlocated=found.unlocated))
    properties = {p.get("name"): p.get("value") for p in junit(found).iter("property")}
    assert properties["location"] == found.summary()["location"] == place
    assert json.loads(texts.json_text(found))["unlocated"] == "ONNX Runtime cannot load it"


def test_summary_lists_some_problems_and_counts_the_rest() -> None:
    found = make_report()
    bad = replace(found, tensors=tuple(replace(t, problem="bad") for t in found.tensors))
    text = texts.markdown_text(bad)
    # One line a kind, each of which says how many calls it is of.
    assert text.count(": bad") == 3
    assert "- logits at 9 of 9 calls, worst at decode " in text
    unlike = (replace(t, problem="bad" + "!" * n) for n, t in enumerate(found.tensors))
    text = texts.markdown_text(replace(found, tensors=tuple(unlike)))
    assert text.count(": bad") == words.LISTED
    assert f"and {63 - words.LISTED} more in report.json" in text


def test_summary_of_a_skip_says_why() -> None:
    assert "SKIPPED: olmoe, ort, float32" in texts.markdown_text(make_report(reason="no GPU"))


def test_summary_without_routing_or_distribution() -> None:
    text = texts.markdown_text(make_report(routing={}, distribution=None))
    assert "Routing" not in text
    assert "KL" not in text


def test_summary_escapes() -> None:
    text = texts.markdown_text(hostile_report())
    assert "<script>" not in text.replace("\\<", "")
    assert "@" not in text
    assert "\n# head" not in text
    assert all(
        line.replace("\\|", "").count("|") == 6 for line in text.split("\n") if line[:1] == "|"
    )


def test_figures_have_their_limits_and_no_empty_words() -> None:
    growth = (Growth("key", 1.0, 2.0, 4.0), Growth("value", 1.0, 1.0, 4.0))
    found = make_report(growth=growth, routing={})
    assert found.distribution is not None
    all_agree = replace(found.distribution, top1_agreement=1.0, near_ties=0)
    rows = dict(words.figures(replace(found, distribution=all_agree)))
    said = "key 2, value 1-fold; up to 4-fold is accepted"
    assert rows["Growth of the error over decode, in floors"] == said
    assert rows["Top-1 agreement"] == "100.00%"


def test_figures_leave_out_what_is_not_there() -> None:
    found = make_report()
    assert found.distribution is not None
    short = replace(found.distribution, perplexity=None)
    names = [name for name, _ in words.figures(replace(found, distribution=short, routing={}))]
    assert names == ["KL divergence of truth from target, nats", "Top-1 agreement"]
    odd = replace(found.distribution, truth_perplexity=0.0, ratio_interval=None)
    assert words.figures(replace(found, distribution=odd))[-1][1].endswith("ratio nan")
    assert words.figures(replace(found, distribution=replace(short, kl=()), routing={})) == []


@pytest.mark.parametrize("make", [make_report, failing_report, hostile_report])
def test_page_is_self_contained(make: Callable[[], Report]) -> None:
    page = Page(page_of(make))
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "img", "iframe", "object", "base", "a", "image"}
        assert "src" not in attributes
        for name, value in attributes.items():
            assert not name.startswith("on")
            if "href" in name:
                assert (value or "").startswith("#")
            if not name.startswith("xmlns"):
                assert "http" not in (value or "") or name == "aria-label"
    assert "url(" not in "".join(page_of(make).split("<style>")[1].split("</style>")[0])


@pytest.mark.parametrize("make", [make_report, failing_report, hostile_report])
def test_page_is_accessible(make: Callable[[], Report]) -> None:
    page = Page(page_of(make))
    assert page.of("html") == [{"lang": "en"}]
    assert len(page.of("title")) == len(page.of("h1")) == len(page.of("main")) == 1
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.of("meta")
    drawings = page.of("svg")
    assert len(drawings) == 4
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 60 for svg in drawings)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_page_drawings_are_well_formed_and_refer_to_their_own_parts() -> None:
    text = page_of(failing_report)
    assert len(svgs(text)) == 4
    for root in svgs(text):
        ids = {element.get("id") for element in root.iter()}
        for element in root.iter():
            for name, value in element.attrib.items():
                if name.endswith("href"):
                    assert value[1:] in ids
                if "url(#" in value:
                    assert value.split("url(#")[1].split(")")[0] in ids


def test_page_says_what_was_found() -> None:
    words = " ".join(Page(page_of(failing_report)).words.split())
    assert "FAILED: olmoe, ort, float32, against eager PyTorch, float64: 3 problems." in words
    assert "It begins at: layer 1, MoeDispatch output layers.1.moe, 214x floor" in words
    assert "present.1.key: score 141 above 4" in words
    assert "onnxruntime" in words
    assert "Worst score of each kind" in words
    passed = Page(page_of(make_report)).words
    assert "PASSED" in passed
    assert "It begins at" not in passed
    assert "SKIPPED" in Page(html.page(plain_report(reason="no GPU"))).words


def test_page_escapes_every_text() -> None:
    page = Page(page_of(hostile_report))
    assert page.of("script") == []
    assert page.words.count('<script>alert("1")</script>') > 10
    assert "\x00" not in page.words
    assert "\x1b" not in page.words


def test_page_axes_have_names_and_units() -> None:
    words = Page(page_of(make_report)).words
    for label in (
        "layer (number)",
        "decode step (tokens after the prefill)",
        "relative RMS error (ratio)",
        "KL divergence, truth from target (nats)",
        "tokens (count)",
        "margin over the limit (ratio)",
    ):
        assert label in words
    assert "$" not in words


def test_page_series_differ_without_colour() -> None:
    looks = [plots.look(index) for index in range(8)]
    assert len({marker for marker, _, _ in looks}) == 8
    assert len({str(style) for _, style, _ in looks}) == 8
    assert plots.look(8)[0] == looks[0][0]


def test_page_lists_some_problems_and_counts_the_rest() -> None:
    found = make_report()
    unlike = (replace(t, problem="bad" + "!" * n) for n, t in enumerate(found.tensors))
    bad = plain_report(tensors=tuple(unlike))
    page = Page(html.page(bad))
    assert len(page.of("li")) == html.LISTED
    assert f"And {63 - html.LISTED} more in report.json." in page.words


def captions(found: Report) -> list[str]:
    return [plot.caption for plot in plots.plots(found)]


def hidden_states(*figures: tuple[float, float], first: int = -1) -> tuple[Hidden, ...]:
    """Of a model whose last has been through the final norm, in transformers' order."""
    last = len(figures) - 1
    return tuple(
        Hidden(f"hidden_states.{n}", min(first + n, last - 1), n == last, *pair)
        for n, pair in enumerate(figures)
    )


def drawn_at(plot: plots.Plot) -> list[float]:
    """Where the markers of the first line are, in units of the distance of its first two."""
    groups = re.findall(r'<g clip-path="[^"]*">(.*?)</g>', plot.svg, re.DOTALL)
    places = [[float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)"', group)] for group in groups]
    first = next(found for found in places if len(found) > 1)
    return [(x - first[0]) / (first[1] - first[0]) for x in first]


def test_plots_prefer_hidden_states() -> None:
    hidden = hidden_states((1e-6, 1e-6), (3e-6, 2e-6), (9e-6, 3e-6))
    plot = plots.plots(plain_report(hidden=hidden))[0]
    assert "hidden state after each layer" in plot.caption
    assert "9e-06 at the final norm (error: hidden state)" in plot.caption
    assert "floor: hidden state" in plot.svg


def test_plots_have_each_hidden_state_at_its_layer() -> None:
    # As of OLMoE, which has no value behind its last layer and before the norm.
    found = hidden_states((1e-6, 1e-6), (3e-6, 2e-6), (2e-6, 1e-6))
    plot = plots.plots(plain_report(hidden=found))[0]
    assert "layer (number; -1: the embedding; 2: the final norm)" in plot.svg
    assert "at layer 0 (error" in plot.caption
    assert drawn_at(plot) == pytest.approx([0, 1, 3])
    # As of Mamba2, whose first is the first layer's output.
    both = hidden_states((1e-6, 1e-6), (9e-6, 2e-6), (2e-6, 3e-6), first=0)
    plot = plots.plots(plain_report(hidden=both))[0]
    assert "layer (number; 2: the final norm)" in plot.svg
    assert "at layer 1 (error" in plot.caption
    assert drawn_at(plot) == pytest.approx([0, 1, 2])


def in_float32(found: Report) -> tuple[TensorResult, ...]:
    """Every tensor of a report once more, run in float32."""
    return tuple(
        replace(
            tensor,
            stage=f"{tensor.stage}, in float32",
            error=(tensor.error or 0.0) / 1000,
            floor=(tensor.floor or 0.0) / 3000,
            limit=8.0,
        )
        for tensor in found.tensors
    )


def test_what_was_run_in_float32_stands_for_nothing_else() -> None:
    found = make_report(precision="float16")
    both = replace(found, tensors=(*found.tensors, *in_float32(found)))
    kinds = ["logits", "key", "value"]
    assert list(both.worst) == [*kinds, *(f"{kind}, in float32" for kind in kinds)]
    own, other = both.worst["logits"], both.worst["logits, in float32"]
    assert own == found.worst["logits"] and (own.limit, other.limit) == (4.0, 8.0)
    summary = both.summary()
    assert summary["logits_error"] == own.error == found.summary()["logits_error"]
    assert summary["logits_in_float32_error"] == other.error
    assert summary["logits_in_float32_score"] == pytest.approx(3 * (own.score or 0.0))
    text = texts.markdown_text(both)
    assert "| logits, in float32 | " in text and "there shows what rounding hides" in text
    assert "rounding hides" not in texts.markdown_text(found)
    drawn, alone = plots.plots(both), plots.plots(found)
    assert [plot.svg for plot in drawn] == [plot.svg for plot in alone]


def test_plots_of_a_graph_that_was_run_in_float32_alone() -> None:
    found = make_report(precision="bfloat16", routing={}, distribution=None)
    layers, decode, kl = plots.plots(replace(found, tensors=in_float32(found)))
    assert "error: key" in layers.svg
    assert "in floors; up to 8 are accepted" in decode.caption and "at decode " in decode.caption
    assert kl.caption == "Nothing to draw: no next-token distributions were compared."


def test_plots_say_nothing_of_routers_where_none_were_compared() -> None:
    # Also of a model that has some: one that could not be run has no routing either.
    page = html.page(plain_report(routing={}))
    assert "router" not in Page(page).words


def test_plots_show_the_worst_tensor_of_a_place() -> None:
    plot = plots.plots(failing_report())[0]
    assert "3e-05 at layer 1 (error: key)" in plot.caption
    assert "at decode 8" not in page_of(make_report)
    assert "at decode 8" in plots.plots(with_tensor(make_report(), 56, error=1.0))[1].caption


def test_plots_take_decode_steps_with_the_truths_experts_where_there_are_some() -> None:
    found = make_report()
    replayed = [
        replace(tensor, stage=f"seed 1, {tensor.stage}, replayed", error=2.0)
        for tensor in found.tensors
        if tensor.stage == "decode 3"
    ]
    plot = plots.plots(replace(found, tensors=(*found.tensors, *replayed)))[1]
    assert "at decode 3" in plot.caption and "error over its floor" in plot.svg
    assert plot.svg != plots.plots(found)[1].svg


def test_plots_have_labels_on_axes_of_one_decade_and_of_many() -> None:
    for top in (1.0001e-7, 3e-7, 1e-3):
        words = plots.plots(plain_report(hidden=hidden_states((1e-7, 1e-7), (top, 1e-7))))[0].svg
        assert len(re.findall(r">\de-\d\d<", words)) >= 2, top
    assert plots._widened(1.0, 1.0)[1] / plots._widened(1.0, 1.0)[0] == pytest.approx(10)
    assert plots._widened(1.0, 100.0) == (1.0, 100.0)


def test_plots_keep_a_nan_as_the_worst_of_its_place() -> None:
    tensors = [replace(make_report().tensors[3], error=error) for error in (1.0, math.nan, 2.0)]
    text = plots.plots(plain_report(tensors=tuple(tensors)))[0].caption
    assert "Not drawn: 1 value" in text


def test_plots_leave_out_what_has_no_place_on_a_logarithmic_axis_and_say_so() -> None:
    found = with_tensor(make_report(), 3, error=math.nan)
    assert "Not drawn: 1 value (zero or not finite)." in captions(found)[0]
    hidden = hidden_states((0.0, 0.0), (math.inf, math.nan))
    plot = plots.plots(plain_report(hidden=hidden))[0]
    assert plot.caption.startswith("Nothing to draw on a logarithmic axis. Not drawn: 4 values")
    assert not plot.svg


def test_plots_say_why_they_are_empty() -> None:
    found = plain_report(tensors=())
    texts = captions(found)
    assert all(text.startswith("Nothing to draw: ") for text in texts)
    assert "belongs to a layer" in texts[0]
    assert "decode step" in texts[1]
    assert "no next-token distributions" in texts[2]
    assert len(texts) == 3
    page = Page(html.page(found))
    assert page.of("svg") == []
    assert all(text in page.words for text in texts)
    assert "nothing was compared" in page.words
    agreed = plain_report(routing={"free": Routing((1.0,), ())})
    assert "every token has the truth's experts" in captions(agreed)[3]


def test_plots_of_divergences() -> None:
    found = make_report().distribution
    assert found is not None
    zeros = plain_report(distribution=replace(found, kl=(0.0, 0.0, *found.kl)))
    assert "Not drawn: 2 tokens (zero, negative or not finite)." in captions(zeros)[2]
    nothing = plots.plots(plain_report(distribution=replace(found, kl=(-1e-17, 0.0))))[2]
    assert nothing.caption.startswith("Nothing to draw on a logarithmic axis.")
    assert not nothing.svg
    assert plots.plots(plain_report(distribution=replace(found, kl=(1e-9,) * 5)))[2].svg
    mean = plots.plots(plain_report(distribution=replace(found, kl=(-1.0, 1e-9))))[2]
    assert "mean: " not in mean.svg
    assert "max: 1e-09" in mean.svg


def test_plots_of_margins_tell_failing_flips_apart() -> None:
    plot = plots.plots(failing_report())[3]
    assert "1 of 3 lie above 1 and fail" in plot.caption
    assert "fails: replayed" in plot.svg
    assert "explained: free" in plot.svg
    zero = Flip(0, 0, 0, (1,), (2,), 0.0, 1e-6)
    only = plots.plots(
        plain_report(routing={"free": Routing((0.9,), (zero, replace(zero, explained=0.0)))})
    )
    assert only[3].caption.startswith("Nothing to draw on a logarithmic axis. Not drawn: 2 flips")


def test_writing_the_other_files_needs_no_matplotlib() -> None:
    code = "import sys, ingot.validate.report.files; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- gates


WORSE = ("prefill, logits: score 2, was 1", "kl_max <0.1> nats, was 0.05")


def test_every_report_names_what_got_worse() -> None:
    found = make_report(gate=Gate("old.json", WORSE))
    assert (found.verdict, found.failures) == ("failed", [])
    headline = "WORSE: olmoe, ort, float32, against eager PyTorch, float64: 2 figures are worse"
    summary = texts.markdown_text(found)
    assert summary.startswith(f"## Validation: {headline} than in old.json.")
    assert "PASSED" not in summary
    assert "- WORSE prefill, logits: score 2, was 1\n" in summary
    assert "- **Gate:** 2 figures are worse than in old.json\n" in summary
    suite = junit(found)
    assert (suite.get("tests"), suite.get("failures")) == ("68", "2")
    messages = [failure.get("message") for failure in suite.iter("failure")]
    assert messages == [f"WORSE {problem}" for problem in WORSE]
    page = html.page(plain_report(gate=found.gate))
    assert headline in page and "WORSE kl_max &lt;0.1&gt; nats" in page
    assert 'class="verdict failed"' in page and "PASSED" not in page
    data = strict(texts.json_text(found))
    assert (data["verdict"], data["summary"]["first_worse"]) == ("failed", WORSE[0])
    assert data["gate"] == {"baseline": "old.json", "worse": list(WORSE), "note": ""}


def test_every_report_names_a_gate_that_holds() -> None:
    found = make_report(gate=Gate("old.json", ()))
    assert found.verdict == "passed"
    held = "nothing is worse than in old.json"
    assert held in texts.markdown_text(found) and held in html.page(plain_report(gate=found.gate))
    suite = junit(found)
    assert (suite.get("tests"), suite.get("failures")) == ("66", "0")
    assert strict(texts.json_text(found))["gate"]["worse"] == []


def test_a_report_without_a_gate_says_nothing_of_one() -> None:
    assert "gate" not in strict(texts.json_text(make_report()))
    assert "gate" not in texts.markdown_text(make_report()).lower()


def test_a_failure_and_a_gate_are_both_named() -> None:
    found = replace(failing_report(), gate=Gate("old.json", WORSE[:1]))
    text = texts.markdown_text(found)
    assert "FAILED: " in text and "- WORSE prefill" in text and "### Problems" in text
    assert junit(found).get("failures") == "4"


def test_junit_fails_for_an_error_that_grows() -> None:
    found = make_report(growth=(Growth("key", 1.0, 9.0, 4.0), Growth("value", 1.0, 1.0, 4.0)))
    (failure,) = junit(found).iter("failure")
    assert (failure.get("message") or "").startswith("the error of key grows over decode")
    assert len(found.failures) == 1


# --- the page on a dark screen and on paper


def style_of(page: str) -> str:
    return page.split("<style>")[1].split("</style>")[0]


def test_page_is_legible_on_a_dark_screen() -> None:
    style = style_of(page_of(make_report))
    assert "color-scheme: light dark" in style
    dark = style.split("@media screen and (prefers-color-scheme: dark)")[1].split("@media print")[0]
    light = style.split("@media")[0]
    # Every colour of the page has another there, and no rule names one of its own.
    names = set(re.findall(r"(--[a-z]+): #", light))
    assert names == set(re.findall(r"(--[a-z]+): #", dark))
    assert not re.search(r": #", re.sub(r":root \{.*?\}", "", light, flags=re.DOTALL))
    # Plots are dark ink on nothing, which is turned over.
    assert "figure svg { filter: invert(1)" in dark
    for svg in svgs(page_of(make_report)):
        background = next(e for e in svg.iter() if (e.get("id") or "").endswith("patch_1"))
        assert all("fill: none" in (e.get("style") or "fill: none") for e in background.iter())


def test_page_prints_whole() -> None:
    style = style_of(page_of(make_report))
    paper = style.split("@media print")[1]
    assert ".wide { overflow: visible; }" in paper
    assert "thead { display: table-header-group; }" in paper
    assert "max-width: none" in paper
    # Nothing is folded away that paper could not open.
    assert Page(page_of(covered_report)).of("details") == []


def test_page_says_when_and_by_what_it_was_made() -> None:
    made = plain_report(date="2026-11-26 21:40 UTC", environment={"ingot": "0.1.0"}, plan="quick")
    said = " ".join(Page(html.page(made)).words.split("How it was made")[1].split())
    assert said.startswith("Ingot/tmp/olmoe-ort Date2026-11-26 21:40 UTC Planquick ")
    assert said.endswith("version of Ingot0.1.0")
    assert "Date" not in Page(html.page(plain_report())).words
    assert "Ingot 0.1.0; 2026-11-26 21:40 UTC; plan quick" in texts.markdown_text(made)


def test_page_of_a_model_without_routers_or_logits_has_no_empty_section() -> None:
    bare = Page(html.page(plain_report(environment={})))
    text = " ".join(bare.words.split())
    for heading in ("Figures", "What was asked", "Shapes of use", "Problems", "Not covered"):
        assert f" {heading} " not in text
    assert "None" not in text and "nan" not in text


def test_plots_show_the_limit_of_a_decode_step() -> None:
    plot = plots.plots(make_report())[1]
    assert "up to 4 are accepted." in plot.caption
    assert ">limit<" in plot.svg
    # The axis reaches it.
    assert re.search(r">5<|>1e\+01<|>10<", plot.svg)
