"""What storing the weights costs, in every kind of report, apart from what kernels do."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from test_validate_report import Page, junit, make_report, strict, svgs

from ingot.validate.distribution import Distribution
from ingot.validate.quantisation import (
    Activations,
    Divergence,
    LayerError,
    Limits,
    Quantisation,
    WeightError,
)
from ingot.validate.report import html, plots, texts, words
from ingot.validate.report.costs import cost_tables, costs
from ingot.validate.result import ROUNDED, Report

KL = tuple(0.001 * n for n in range(1, 101))


def stored_report(**changes: Any) -> Report:
    """A passing report of int4 weights in two layers."""
    found = Quantisation(
        "int4",
        Limits(0.5, 1.5),
        Divergence(Distribution(100, KL, 0.9, 0), 2.0),
        Divergence(Distribution(100, tuple(2 * kl for kl in KL), 0.8, 0), 2.0),
        layers=(
            LayerError(-1, False, 0.081, 0.1),
            LayerError(0, False, 0.123, 0.15),
            LayerError(1, True, 0.234, 0.3),
        ),
        routing=(1.0, 0.95),
        weights=(
            WeightError(None, "lm_head", 1, 0.08, 0.08, "lm_head.weight", 0.1),
            WeightError(0, "mlp.down_proj", 4, 0.081, 0.0877, "layers.0.mlp.down_proj", 0.1),
            WeightError(1, "mixer.in_proj", 1, 0.082, 0.082, "layers.1.mixer.in_proj", 0.1),
        ),
    )
    return make_report(quantisation=replace(found, **changes))


def over_a_text(**changes: Any) -> Report:
    text = Distribution(50, (0.25,) * 50, 0.7, 0, 33.25, 30.0, (1.05, 1.15))
    return stored_report(text=Divergence(text, 4.0), **changes)


def said(report: Report) -> dict[str, str]:
    return {name.removeprefix("Cost of int4 weights, "): text for name, text in costs(report)}


def test_says_every_figure_beside_its_limit() -> None:
    found = said(stored_report())
    assert found["KL divergence in nats"] == (
        "mean 0.0505, median 0.051, p99 0.1, max 0.1 over 100 tokens; 2.53% of what the model "
        "knows of the next token, up to 50% (1) is accepted; in the median 0.5 times what plain "
        "rounding costs, up to 1.5 times are accepted"
    )
    assert found["top-1 agreement"] == "90.00%; with plain rounding 80.00%"
    assert found["experts"] == "at least 95.00% (router 1) of tokens have those of the " + (
        "checkpoint's weights"
    )
    assert found["hidden states"] == (
        "off by 0.081 behind the embedding, 0.123 behind layer 0, 0.234 behind the final norm"
    )
    assert found["the weights themselves"] == (
        "a relative RMS error of up to 0.0877, of layers.0.mlp.down_proj"
    )
    assert costs(make_report()) == [] == cost_tables(make_report())


def test_a_text_has_figures_of_its_own_and_the_limit() -> None:
    rows = dict(costs(over_a_text()))
    title = "Cost of int4 weights over the text, "
    assert "12.5" not in rows["Cost of int4 weights, KL divergence in nats"]
    assert (
        "6.25% of what the model knows of the next token, up to 50% (2) is accepted"
        in (rows[title + "KL divergence in nats"])
    )
    assert rows[title + "perplexity"] == (
        "33.25, of the checkpoint's weights 30, ratio 1.1083 (95 % interval 1.05 to 1.15)"
    )
    least = dict(costs(over_a_text(limits=Limits(0.01, 1.5, nats=0.5))))
    assert "a mean of up to 0.5 is accepted of any model" in least[title + "KL divergence in nats"]
    given = dict(costs(over_a_text(limits=Limits(0.5, 1.5, max_kl=0.3))))
    assert "a mean of up to 0.3 is accepted, as was asked" in given[title + "KL divergence in nats"]


def test_of_many_layers_some_are_named_the_last_one_included() -> None:
    layers = tuple(LayerError(n, False, n / 100, None) for n in range(41))
    text = said(stored_report(layers=layers))["hidden states"]
    assert text.count("behind") <= 8 and text.endswith("0.4 behind layer 40")


def test_tables_have_a_row_a_layer_and_a_cell_for_what_is_not_there() -> None:
    states, outside, inside = cost_tables(stored_report())
    assert states.rows[0] == ("the embedding", "0.081", "0.1")
    assert outside.columns == ("Where", "lm_head") and outside.rows[0][1] == "0.08"
    assert inside.columns == ("Where", "mlp.down_proj", "mixer.in_proj")
    assert inside.rows == (("Layer 0", "0.081", "none"), ("Layer 1", "none", "0.082"))
    assert all(len(row) == len(t.columns) for t in cost_tables(stored_report()) for row in t.rows)


def test_every_report_has_them() -> None:
    report = stored_report()
    page = Page(html.page(report))
    markdown = texts.markdown_text(report)
    for text in (" ".join(page.words.split()), re.sub(r"\\", "", markdown)):
        assert "What storing the weights costs" in text
        for name, figure in costs(report):
            assert name in text and figure in text
        assert "Relative RMS error of hidden states" in text and "mixer.in_proj" in text
    # A table's lines are one behind the other, with a cell of every column.
    lines = [line for line in markdown.splitlines() if line.startswith("| Layer ")]
    assert [line.count("|") for line in lines] == [4, 4]
    data = strict(texts.json_text(report))
    assert data["quantisation"]["layers"][1]["plain"] == 0.15
    assert data["summary"]["quantisation"]["kl_mean"] == pytest.approx(0.0505)
    assert "quantisation" not in strict(texts.json_text(make_report()))
    (case,) = [c for c in junit(report).iter("testcase") if "quantisation" in str(c.attrib)]
    assert case.get("name") == "int4" and not len(case)
    (drawn,) = [plot for plot in plots.plots(report) if plot.title.startswith("Cost of int4")]
    (svg,) = svgs(str(drawn.svg))
    assert "plain rounding" in drawn.svg and svg.tag.endswith("svg")


def test_what_costs_too_much_fails_in_words_of_its_own() -> None:
    report = stored_report(limits=Limits(0.01, 1.5))
    assert report.verdict == "failed" and report.failures == report.costly
    headline = words.headline(report)
    assert "it computes what its weights say, and storing them in int4 costs too much" in headline
    (failure,) = junit(report).iter("failure")
    assert (failure.get("message") or "").startswith("int4 costs KL 0.0505 nats a token")
    # Beside a fault of a kernel it is one problem of several.
    tensor = replace(report.tensors[0], problem="score 141 above 4")
    both = replace(report, tensors=(tensor, *report.tensors[1:]))
    assert words.headline(both).endswith("2 problems.")


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (
            Activations((32,), True),
            "and the rest is the same graph without it, held to that of float",
        ),
        (Activations((32, 64), False, "QMoE rounds"), "to that of float32, for QMoE rounds."),
    ],
)
def test_says_which_proof_there_is_of_kernels_that_round(found: Activations, text: str) -> None:
    report = make_report()
    rounded = [replace(t, stage=t.stage + ROUNDED, error=0.01) for t in report.tensors]
    tensors = (*report.tensors, *rounded) if found.twin else tuple(rounded)
    report = replace(report, activations=found, tensors=tensors)
    sizes = " or ".join(map(str, found.blocks))
    assert text in words.scores(report) and f"{sizes} numbers a scale" in words.scores(report)
    assert report.summary()["activations"]["twin"] is found.twin
    assert report.summary()["logits_rounded_error"] == 0.01
    assert ("logits_error" in report.summary()) is found.twin
    assert set(report.worst) >= {f"logits{ROUNDED}", f"key{ROUNDED}"}
    # Nothing of it is drawn beside errors that are a millionth of its own.
    layers, decode, *_ = plots.plots(report)
    assert "0.01" not in decode.caption if found.twin else decode.svg
    assert layers.svg
