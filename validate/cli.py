"""``python -m validate INGOT --checkpoint DIR``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

from ingot.plugins.command_line import Command, note

# As an export has it: of an ingot that this machine cannot run, nothing is known to be wrong.
STATUS = {"passed": 0, "passed, in part": 0, "failed": 1, "skipped": 0}


@click.command("validate", cls=Command)
@click.argument("ingot", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    required=True,
    help="What the ingot was made from: a folder, or org/name on the hub.",
)
@click.option(
    "--revision",
    help="Of a hub name: branch, tag or commit; by default the one that the ingot names.",
)
@click.option("--adapter", help="The adapter that was merged into it: its folder, or a hub name.")
@click.option("--seed", default=0, show_default=True, help="Of the token ids.")
@click.option("--quick", "plan", flag_value="quick", help="8 decode steps in place of 32.")
@click.option("--thorough", "plan", flag_value="thorough", help="3 seeds, 128 decode steps each.")
@click.option(
    "--length",
    type=int,
    help="Also feed one sequence of so many tokens; --thorough feeds the context, up to 4096.",
)
@click.option(
    "--against",
    default="eager",
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
@click.option(
    "--max-kl",
    type=float,
    help="Accept what storing the weights costs up to this mean KL divergence, in nats.",
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
    help="Remember this result; the validation runs again, to measure how far its figures move.",
)
@click.option(
    "--gate",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Fail where anything is worse than in this baseline.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 for any verdict but passed.")
def validate_command(
    ingot: Path,
    checkpoint: str,
    revision: str | None,
    adapter: str | None,
    seed: int,
    plan: Literal["quick", "thorough"] | None,
    length: int | None,
    against: str,
    tokens: Path | None,
    text: Path | None,
    max_kl: float | None,
    as_json: bool,
    folder: Path | None,
    baseline: Path | None,
    gate: Path | None,
    strict: bool,
) -> None:
    """Compare an ingot with eager PyTorch again.

    Exit status: 0 passed, wholly or in part, or skipped: this machine cannot run the ingot, and the
    verdict says so; 1 failed, or worse than the baseline, and with --strict whatever did not pass
    wholly; 2 could not be done.
    """
    from ingot.export.progress import RichStages
    from ingot.validate.api import validate
    from ingot.validate.report import files
    from ingot.validate.report.terminal import print_report
    from ingot.validate.report.texts import json_text

    if folder is not None:
        files.check_folder(folder, ingot, Path(checkpoint), *([Path(adapter)] if adapter else []))
        if lacking := files.missing():
            note(f"note: {lacking}")
    report = validate(
        ingot,
        checkpoint,
        revision=revision,
        adapter=adapter,
        plan=plan or "standard",
        length=length,
        seed=seed,
        against=against,
        tokens=tokens,
        text=text,
        max_kl=max_kl,
        baseline=baseline,
        gate=gate,
        stages=RichStages(),
    )
    if baseline is not None:
        failed = report.verdict == "failed"
        note(f"{baseline} was {'not written: what failed is no baseline' * failed or 'written'}")
    try:
        if as_json:
            click.echo(json_text(report), nl=False)
            for problem in report.worse:
                note(f"WORSE {problem}")
        else:
            print_report(report)
        sys.stdout.flush()
    finally:
        # Last: a disk that is full takes nothing of what was printed, and an output that is full
        # or gone nothing of the files.
        if folder is not None:
            files.write(report, folder)
            note(f"the report was written to {folder}")
    sys.exit(1 if strict and report.verdict != "passed" else STATUS[report.verdict])
