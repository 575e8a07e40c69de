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
def validate_command(ingot: Path, checkpoint: Path, seed: int) -> None:
    """Compare an ingot with eager PyTorch again.

    Exit status: 0 passed, 1 failed, 2 could not run, or only the graph of an engine could.
    """
    from export.ingot import Manifest
    from export.progress import RichStages
    from validate.run import CALLS, cannot_compare, validate_ingot

    try:
        manifest = Manifest.read(ingot)
        stages = RichStages()
        reason = cannot_compare(manifest)
        if reason is not None:
            raise IngotError(f"{ingot} cannot be compared: {reason}.")
        with stages.stage("load eager reference", manifest.weight_bytes) as advance:
            from graphs.checkpoint import Checkpoint
            from validate.eager import EagerSession

            opened = Checkpoint.open(checkpoint)
            expected = EagerSession(opened, manifest.task, advance=advance)
        with stages.stage("validate against eager PyTorch", CALLS, "steps") as advance:
            validation = validate_ingot(ingot, expected, seed=seed, advance=advance)
    except IngotError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    for name, value in validation.summary().items():
        click.echo(f"{name:20} {value}")
    for failure in validation.failures:
        click.echo(f"FAILED {failure.step}, {failure.name}: {failure.problem}")
    sys.exit({"passed": 0, "failed": 1, "skipped": 2}[validation.verdict])
