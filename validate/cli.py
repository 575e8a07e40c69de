"""``python -m validate INGOT --checkpoint DIR``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ingot.plugins.errors import IngotError

if TYPE_CHECKING:
    from ingot.export.ingot import Manifest
    from ingot.runtime.session import Ids
    from ingot.validate.result import Report
    from ingot.validate.truth.inputs import Plan

EAGER = "eager"
STATUS = {"passed": 0, "failed": 1, "skipped": 2}


@click.command("validate")
@click.argument("ingot", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path),
    help="The checkpoint folder the ingot was made from.",
)
@click.option("--seed", default=0, show_default=True, help="Of the token ids.")
@click.option("--quick", "plan", flag_value="quick", help="8 decode steps in place of 32.")
@click.option("--thorough", "plan", flag_value="thorough", help="3 seeds, 128 decode steps each.")
@click.option(
    "--against",
    default=EAGER,
    show_default=True,
    help="What the ingot is compared with: eager, onnx, ort, trt, trt-rtx or another ingot.",
)
@click.option(
    "--tokens",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Measure perplexity over these token ids, an .npy file of integers [n].",
)
@click.option(
    "--text",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Measure perplexity over this text, encoded by the ingot's tokenizer.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
@click.option(
    "--report",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write report.json, junit.xml, summary.md and report.html into this folder.",
)
@click.option(
    "--save-baseline",
    "baseline",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Remember this result; the validation runs twice, to measure its spread.",
)
@click.option(
    "--gate",
    "gated",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Fail where anything is worse than in this baseline.",
)
def validate_command(
    ingot: Path,
    checkpoint: Path,
    seed: int,
    plan: str | None,
    against: str,
    tokens: Path | None,
    text: Path | None,
    as_json: bool,
    folder: Path | None,
    baseline: Path | None,
    gated: Path | None,
) -> None:
    """Compare an ingot with eager PyTorch again.

    Exit status: 0 passed, 1 failed or worse than the baseline, 2 could not run, or only the graph
    of an engine could.
    """
    from ingot.export.ingot import Manifest
    from ingot.validate.gate import gate
    from ingot.validate.report.files import write
    from ingot.validate.report.terminal import print_report
    from ingot.validate.report.texts import json_text

    try:
        manifest = Manifest.read(ingot)
        words = _words(manifest, ingot, tokens, text)
        report = _validate(manifest, ingot, checkpoint, seed, _plan(plan), against, words, baseline)
        if folder is not None:
            write(report, folder)
        worse = [] if gated is None else gate(report, gated)
    except IngotError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    if as_json:
        click.echo(json_text(report), nl=False)
        for problem in worse:
            click.echo(f"WORSE {problem}", err=True)
    else:
        print_report(report, worse)
    sys.exit(1 if worse else STATUS[report.verdict])


def _plan(name: str | None) -> Plan:
    from ingot.validate.truth.inputs import QUICK, STANDARD, THOROUGH

    return {None: STANDARD, "quick": QUICK, "thorough": THOROUGH}[name]


def _words(manifest: Manifest, ingot: Path, tokens: Path | None, text: Path | None) -> Ids | None:
    """The tokens whose perplexity is asked for."""
    from ingot.validate.judge.distribution import read_text, read_tokens

    if tokens is None and text is None:
        return None
    if tokens is not None and text is not None:
        raise IngotError("--tokens and --text were both given; give one.")
    if manifest.main_output != "logits" or not manifest.states:
        raise IngotError(f"{ingot} predicts no tokens, so there is no perplexity to measure.")
    if tokens is not None:
        return read_tokens(tokens, manifest.vocab_size)
    assert text is not None
    return read_text(text, ingot, manifest.vocab_size)


def _validate(
    manifest: Manifest,
    ingot: Path,
    folder: Path,
    seed: int,
    plan: Plan,
    against: str,
    words: Ids | None,
    baseline: Path | None,
) -> Report:
    from ingot.export.progress import RichStages
    from ingot.graphs.checkpoint import Checkpoint
    from ingot.validate.gate import save_baseline
    from ingot.validate.run import cannot_compare, examine, spread, validate_ingot
    from ingot.validate.truth.against import OtherReference, other_ingot
    from ingot.validate.truth.cache import default_cache
    from ingot.validate.truth.reference import Reference

    reason = cannot_compare(manifest)
    if reason is not None:
        raise IngotError(f"{ingot} cannot be compared: {reason}.")
    stages = RichStages()
    checkpoint = Checkpoint.open(folder)
    reference = Reference(checkpoint, manifest.task, manifest.precision, default_cache())
    made_from, given = manifest.source.get("sha256"), reference.hash(stages)
    if given != made_from:
        raise IngotError(
            f"{ingot} was made from another checkpoint than {folder}: its SHA-256 is "
            f"{given[:12]}… and the ingot's {str(made_from)[:12]}…; give the "
            "folder it was made from, or export again."
        )
    with contextlib.ExitStack() as stack:
        if against != EAGER:
            other, name = stack.enter_context(other_ingot(against, manifest, checkpoint, stages))
            reference = OtherReference(reference, other, name)
        report = examine(ingot, reference, stages, plan=plan, seed=seed, text=words)
        if baseline is not None and report.verdict == "failed":
            click.echo(f"{baseline} was not written: what failed is no baseline", err=True)
        elif baseline is not None:
            again = validate_ingot(
                ingot, reference, stages, plan=plan, seed=seed, verify=False, text=words
            )
            save_baseline(report, baseline, spread(report, again))
    return report
