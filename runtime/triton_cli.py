"""``ingot triton INGOT --out REPO``, and ``ingot triton --check REPO``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ingot.export.ingot import LIBRARY
from ingot.plugins.command_line import Command, told
from ingot.runtime.triton_lint import lint
from ingot.runtime.triton_plan import MOST_CAPACITY, Settings, TritonError
from ingot.runtime.triton_repository import write_repository


@click.command("triton", cls=Command)
@click.argument("ingot", type=click.Path(path_type=Path), required=False)
@click.option("--out", type=click.Path(path_type=Path), help="The repository to make.")
@click.option("--name", default="", help="Of the model; by default its type.")
@click.option("--streams", default=Settings.streams, show_default=True, help="Served at once.")
@click.option("--threads", default=Settings.threads, show_default=True, help="0: runtime's choice.")
@click.option(
    "--capacity",
    default=0,
    help=f"Most tokens of a sequence; by default the model's context, at most {MOST_CAPACITY}.",
)
@click.option("--max-batch", default=Settings.max_batch, show_default=True, help="Of the graph.")
@click.option(
    "--operators",
    type=click.Path(path_type=Path),
    help=f"{LIBRARY} of Ingot's own kernels, a program that you vouch for; it is served with.",
)
@click.option("--overwrite", is_flag=True, help="Replace a repository that is at --out.")
@click.option(
    "--check", type=click.Path(path_type=Path), help="Check this repository, and make none."
)
def triton_command(
    ingot: Path | None,
    out: Path | None,
    name: str,
    streams: int,
    threads: int,
    capacity: int,
    max_batch: int,
    operators: Path | None,
    overwrite: bool,
    check: Path | None,
) -> None:
    """Make a model repository for NVIDIA Triton Inference Server from an ingot, or check one.

    Exit status: 0 it is there, or nothing is wrong with it; 1 --check found something, one line
    each; 2 it could not be made and nothing was left behind.
    """
    if check is not None:
        if ingot is not None or out is not None:
            raise TritonError("--check takes neither INGOT nor --out.")
        _check(check)
        return
    if ingot is None or out is None:
        raise TritonError("give an INGOT and --out REPO, or --check REPO.")
    settings = Settings(name, streams, threads, capacity, max_batch)
    plan = write_repository(ingot, out, settings, overwrite=overwrite, operators=operators)
    with told(out):
        click.echo(f"{out}: {', '.join(plan.models)}")
        if plan.why:
            click.echo(f"one model only: {plan.why}")
        click.echo(f"serve it: {out / 'launch.sh'}; more in {out / 'README.md'}")


def _check(repository: Path) -> None:
    problems = lint(repository)
    for problem in problems:
        click.echo(problem)
    if problems:
        sys.exit(1)
    click.echo(f"{repository}: nothing found")
