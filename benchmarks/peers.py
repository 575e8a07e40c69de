"""``python benchmarks/peers.py``: Ingot beside other programs on the same models and threads.

Makes seeded checkpoints of four families, installs each program in an environment of its own,
converts the checkpoints by each program's own tools, and measures a prompt and decoding in rounds:
in each round every program takes its turn on every model, every second round in reverse order, so
that what slows the machine slows all alike. A measurement is a process of its own that loads,
warms up, measures and ends: sixty models would not fit in memory together, threads of programs
that wait would spin beside the one that is measured, and memory and time of a load are measured as
often as the rest. What a program cannot do is a phrase in its cell. What was made and measured
stays in ``--work``, so a run that was cut goes on where it ended; after a change of the export
remove ``ingots`` there.

    python benchmarks/peers.py
    python benchmarks/peers.py --only 'ingot|llama' --model granite --rounds 3
    python benchmarks/peers.py --quick
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import click  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.on_peers import ceilings, environments, section, shares  # noqa: E402
from benchmarks.on_peers.genai import Genai  # noqa: E402
from benchmarks.on_peers.ingots import NAME as OURS  # noqa: E402
from benchmarks.on_peers.ingots import Ingots  # noqa: E402
from benchmarks.on_peers.llama import Llama  # noqa: E402
from benchmarks.on_peers.mobius import Mobius  # noqa: E402
from benchmarks.on_peers.models import FAMILIES, RELEASED, Model  # noqa: E402
from benchmarks.on_peers.openvino import OpenVino  # noqa: E402
from benchmarks.on_peers.program import Format, Made, PeerError, Program, measured  # noqa: E402
from benchmarks.on_peers.samples import Samples  # noqa: E402
from benchmarks.on_peers.table import (  # noqa: E402
    Row,
    ceilings_lines,
    rates_table,
    shares_table,
)
from benchmarks.on_peers.transformers import NAME as REFERENCE  # noqa: E402
from benchmarks.on_peers.transformers import TRUTH, Transformers  # noqa: E402
from benchmarks.on_weights.figures import Floats, log_softmax  # noqa: E402
from ingot.plugins.errors import IngotError  # noqa: E402
from ingot.plugins.whole import write_whole  # noqa: E402

DOCS = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
CEILINGS = "ceilings"


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: in which all take turns.
        prompt: tokens of the prompt that is timed.
        past: tokens before those that are decoded.
        new: tokens that are decoded.
        seconds: that each of both is repeated for, in each process.
        ceiling_seconds: of each loop over a ceiling.
        ceiling_mebibytes: that are read over.
    """

    rounds: int
    prompt: int = 512
    past: int = 128
    new: int = 64
    seconds: float = 1.5
    ceiling_seconds: float = 1.0
    ceiling_mebibytes: int = 512


QUICK = Plan(1, 32, 8, 4, 0.0, 0.1, 128)


@dataclass
class Turn:
    """What takes its turn in every round: a row, and what its process loads."""

    row: Row
    made: Made
    model: Model


def programs(work: Path, threads: int) -> list[Program]:
    """All that are compared, ours first."""
    return [
        Ingots.here(work),
        Transformers(),
        Llama(work, threads),
        Genai(work),
        Mobius(work),
        OpenVino(work),
    ]


def wanted(only: str, program: str, chosen: str) -> bool:
    """Whether a row is measured: the yardstick always is."""
    if (program, chosen) == (REFERENCE, TRUTH):
        return True
    return re.search(only, f"{program} {chosen}") is not None


def prepared(
    compared: Sequence[Program], models: Sequence[Model], only: str
) -> tuple[list[Row], list[Turn]]:
    """Install and convert all that is wanted.

    Returns:
        Every row, those that were refused too, and what can be measured.
    """
    rows: list[Row] = []
    turns: list[Turn] = []
    refused: dict[str, PeerError] = {}
    for program in compared:
        chosen = [each for each in program.formats if wanted(only, program.name, each.name)]
        if not chosen:
            continue
        click.echo(f"{program.name}: set up", err=True)
        try:
            program.prepare()
        except PeerError as error:
            refused[program.name] = error
        for model in models:
            for each in chosen:
                if model.released and program.name == REFERENCE:
                    continue
                row = Row(model.family, program.name, each.name, each.exact, each.arithmetic)
                rows.append(row)
                try:
                    if program.name in refused:
                        raise refused[program.name]
                    click.echo(f"{row.key}: convert", err=True)
                    turns.append(converted(program, model, each, row))
                except PeerError as error:
                    row.refusal, row.details = error.phrase, error.details
                    click.echo(f"{row.key}: {error}", err=True)
    return rows, turns


def converted(program: Program, model: Model, chosen: Format, row: Row) -> Turn:
    """One model in one format, and what is known of it before it runs."""
    made = program.make(model, chosen)
    row.bytes = made.bytes
    return Turn(row, made, model)


def measure(
    turns: list[Turn], plan: Plan, threads: int, work: Path, samples: Samples, ceiling: Path | None
) -> None:
    """All rounds; those that are there already are not repeated.

    Args:
        turns: what takes turns.
        plan: how much.
        threads: of every process.
        work: where logits are kept.
        samples: gains one of each row and round.
        ceiling: the program that measures the ceilings, if there is one.
    """
    for turn in range(plan.rounds):
        if ceiling is not None and len(samples.of(CEILINGS)) <= turn:
            click.echo(f"round {turn + 1} of {plan.rounds}: {CEILINGS}", err=True)
            asked = (threads, plan.ceiling_seconds, plan.ceiling_mebibytes)
            with pinned(threads):
                samples.add(CEILINGS, dict(ceilings.measure(ceiling, *asked)))
        for each in turns if turn % 2 == 0 else turns[::-1]:
            row = each.row
            if row.refusal or len(samples.of(row.key)) > turn:
                continue
            click.echo(f"round {turn + 1} of {plan.rounds}: {row.key}", err=True)
            try:
                samples.add(row.key, one(each, plan, threads, work))
            except PeerError as error:
                row.refusal, row.details = error.phrase, error.details
                click.echo(f"{row.key}: {error}", err=True)
    for each in turns:
        each.row.samples = samples.of(each.row.key)[: plan.rounds]


def one(turn: Turn, plan: Plan, threads: int, work: Path) -> dict[str, Any]:
    """One process of one row.

    Raises:
        PeerError: it fails.
    """
    ids = work / f"{turn.model.family}-ids.npy"
    length = max(plan.prompt, plan.past + plan.new)
    np.save(ids, np.random.default_rng(0).integers(0, turn.model.vocabulary, length))
    logits = logits_of(turn.row, work)
    logits.parent.mkdir(exist_ok=True)
    given = {"ids": str(ids), "logits": str(logits), "threads": threads}
    given |= {name: getattr(plan, name) for name in ("prompt", "past", "new", "seconds")}
    for file in turn.made.weights:
        read_through(file)
    with pinned(threads):
        return measured(turn.made, given)


def logits_of(row: Row, work: Path) -> Path:
    """Where a row's last logits are kept, ``[2, V]``: of the prompt, and of what was decoded."""
    return work / "logits" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', row.key)}.npy"


def read_through(file: Path) -> None:
    """So that every load finds its file in the system's cache, and none waits for the disk."""
    with file.open("rb") as stream:
        while stream.read(1 << 24):
            pass


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Processes that are started here run on as many processors as they have threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def check(rows: Sequence[Row], work: Path) -> None:
    """Note how far each row's distributions are from transformers' in float32."""
    truths = {
        row.family: np.load(logits_of(row, work))
        for row in rows
        if (row.program, row.format) == (REFERENCE, TRUTH) and row.samples
    }
    for row in rows:
        if row.samples and row.family in truths:
            row.kl = divergence(truths[row.family], np.load(logits_of(row, work)))


def divergence(truth: Floats, found: Floats) -> float:
    """The larger KL divergence of two positions, in nats; infinite where another vocabulary is.

    Args:
        truth: ``[2, V]`` logits.
        found: ``[2, V]`` logits.
    """
    if truth.shape != found.shape or not np.isfinite(found).all():
        return float("inf")
    expected, given = log_softmax(truth), log_softmax(found)
    return float((np.exp(expected) * (expected - given)).sum(axis=-1).max())


def add_needs(turns: Sequence[Turn], plan: Plan) -> None:
    """What ours computes of a token of the prompt, and reads for one in the middle of decoding."""
    for turn in turns:
        if turn.row.program == OURS:
            (file,) = turn.made.weights
            tensors = shares.tensor_bytes(file)
            past = plan.past + plan.new // 2
            turn.row.read = shares.bytes_per_token(tensors, turn.model, past)
            head = 1 / plan.prompt if turn.made.given["last"] else 1.0
            turn.row.products = shares.products_per_token(turn.model.shapes, turn.model, head)


def report(
    rows: Sequence[Row],
    models: Sequence[Model],
    found: dict[str, ceilings.Best],
    facts: dict[str, Any],
    plan: Plan,
) -> Iterator[str]:
    """What is printed, and stands in the document."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    yield (
        f"{facts['machine']}, {facts['threads']} threads; Python {facts['python']}, {versions}. "
        f"Medians of {plan.rounds} rounds, with the least and the most. The machine's ceilings, "
        "each the best of several loops and of all rounds:"
    )
    yield ""
    yield from ceilings_lines(found)
    for model in models:
        mine = [row for row in rows if row.family == model.family]
        yield ""
        yield f"**{model.family}**, {model.parameters / 1e6:.0f} M parameters:"
        yield ""
        yield from rates_table(mine, truth_of(mine), plan.prompt, plan.past, plan.new)
    if any(row.read is not None and row.samples for row in rows):
        yield ""
        yield "Ours beside the ceilings:"
        yield ""
        yield from shares_table(rows, found)
    for note in facts["notes"]:
        yield ""
        yield f"Left out: {note}."


def truth_of(rows: Sequence[Row]) -> Row | None:
    """The row that a model's rates are multiples of."""
    return next((row for row in rows if (row.program, row.format) == (REFERENCE, TRUTH)), None)


def machine() -> str:
    """The processor, by its own name."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.processor() or "an unknown processor"


def prepared_ceilings(work: Path) -> Path | None:
    """The program that measures them; None, with a word on it, where no compiler makes it."""
    try:
        return ceilings.build(work / "bin")
    except PeerError as error:
        click.echo(f"{CEILINGS}: {error}", err=True)
        return None


@click.command(help=__doc__, context_settings={"max_content_width": 100})
@click.option(
    "--only",
    default="",
    help="Rows whose program and format, as in 'llama.cpp Q8_0', hold this regular expression; "
    "transformers in float32 is measured in any case.",
)
@click.option(
    "--model",
    "families",
    multiple=True,
    type=click.Choice([*FAMILIES, *RELEASED]),
    help="By default those that are small.",
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option(
    "--threads", default=os.cpu_count(), show_default=True, type=click.IntRange(1), help="Of each."
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "build" / "peers",
    help="Where what was made is kept; 35 GB.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"JSON of it all; by default {RESULTS.relative_to(ROOT)}, of a whole run alone.",
)
@click.option(
    "--docs",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help=f"The document that gets the tables; by default {DOCS.relative_to(ROOT)}, of a whole run "
    "alone.",
)
@click.option("--quick", is_flag=True, help="A few tokens once, to see that all runs; no figures.")
def main(
    only: str,
    families: tuple[str, ...],
    rounds: int,
    threads: int,
    work: Path,
    out: Path | None,
    docs: Path | None,
    quick: bool,
) -> None:
    plan = QUICK if quick else Plan(rounds)
    out, docs = destinations(out, docs, whole=not (only or families or quick))
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        if docs is not None:
            # Hours later it would be late to refuse it.
            section.replaced(docs.read_text(), "")
        models = [made_model(family, work) for family in families or FAMILIES]
        compared = programs(work, threads)
        rows, turns = prepared(compared, models, only)
        ceiling = prepared_ceilings(work)
        kept = work / ("quick.json" if quick else "samples.json")
        settings = {**asdict(plan), "threads": threads, "machine": machine()}
        # More rounds of the same go on from those that are there.
        del settings["rounds"]
        samples = Samples.open(kept, settings)
        measure(turns, plan, threads, work, samples, ceiling)
        check(rows, work)
        add_needs(turns, plan)
        found = ceilings.best(samples.of(CEILINGS)[: plan.rounds])
        facts = facts_of(compared, threads)
        text = "\n".join(report(rows, models, found, facts, plan))
        click.echo(text)
        if out is not None:
            figures = figures_of(rows, models, samples.of(CEILINGS), found)
            everything = {**facts, "plan": asdict(plan), **figures}
            write_whole(out, json.dumps(everything, indent=1) + "\n")
        if docs is not None:
            write_whole(docs, section.replaced(docs.read_text(), text))
    except IngotError as error:
        raise click.ClickException(str(error)) from error
    samples.forget([CEILINGS, *(row.key for row in rows)])


def destinations(
    out: Path | None, docs: Path | None, *, whole: bool
) -> tuple[Path | None, Path | None]:
    """Where the JSON and the tables go; a part of a run takes no whole one's place unasked."""
    if whole:
        return out or RESULTS, docs or DOCS
    return out, docs


def made_model(family: str, work: Path) -> Model:
    """A checkpoint, made where it is not there."""
    click.echo(f"{family}: checkpoint", err=True)
    return Model.prepare(family, work)


def facts_of(compared: Sequence[Program], threads: int) -> dict[str, Any]:
    """What the figures are of, beside themselves."""
    versions: dict[str, str] = {}
    for program in compared:
        versions |= program.versions()
    return {
        "machine": machine(),
        "threads": threads,
        "python": platform.python_version(),
        "compiler": environments.compiler(),
        "versions": versions,
        "notes": [note for each in compared if isinstance(each, Ingots) for note in each.notes],
    }


def figures_of(
    rows: Sequence[Row],
    models: Sequence[Model],
    rounds: Sequence[ceilings.Rates],
    found: dict[str, ceilings.Best],
) -> dict[str, Any]:
    """All that was measured, for JSON."""

    def of(model: Model) -> list[Row]:
        return [row for row in rows if row.family == model.family]

    return {
        "ceilings": {kind: asdict(best) for kind, best in found.items()},
        "ceiling_rounds": list(rounds),
        "models": [
            {
                "model": model.family,
                "parameters": model.parameters,
                "config": model.config,
                "rows": [row.figures(truth_of(of(model)), found) for row in of(model)],
            }
            for model in models
        ],
    }


if __name__ == "__main__":
    main()
