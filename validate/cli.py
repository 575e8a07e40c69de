"""``python -m validate INGOT --checkpoint DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from plugins.errors import IngotError


@click.command("validate")
@click.argument("ingot", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path),
    help="The checkpoint folder the ingot was made from.",
)
@click.option("--seed", default=0, show_default=True, help="Of the token ids.")
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
    folder: Path | None,
    baseline: Path | None,
    gated: Path | None,
) -> None:
    """Compare an ingot with eager PyTorch again.

    Exit status: 0 passed, 1 failed or worse than the baseline, 2 could not run, or only the graph
    of an engine could.
    """
    from export.ingot import Manifest
    from export.progress import RichStages
    from graphs.checkpoint import Checkpoint
    from validate.gate import gate, save_baseline
    from validate.run import (
        CALLS,
        cannot_compare,
        examine,
        load_reference,
        spread,
        validate_ingot,
    )

    try:
        manifest = Manifest.read(ingot)
        stages = RichStages()
        reason = cannot_compare(manifest)
        if reason is not None:
            raise IngotError(f"{ingot} cannot be compared: {reason}.")
        reference = load_reference(manifest, Checkpoint.open(checkpoint), stages)
        report = examine(ingot, reference, stages, seed=seed)
        if folder is not None:
            from validate.report import write

            write(report, folder)
        if baseline is not None:
            with stages.stage("measure the spread", CALLS, "steps") as advance:
                again = validate_ingot(ingot, reference, seed=seed, advance=advance)
            save_baseline(report, baseline, spread(report, again))
        worse = [] if gated is None else gate(report, gated)
    except IngotError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    for name, value in report.summary().items():
        click.echo(f"{name:20} {value}")
    for failure in report.failures:
        click.echo(f"FAILED {failure}")
    for problem in worse:
        click.echo(f"WORSE {problem}")
    if worse:
        sys.exit(1)
    sys.exit({"passed": 0, "failed": 1, "skipped": 2}[report.verdict])
