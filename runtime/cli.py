"""``python -m runtime``: generate, classify and bench here, and the commands of other files."""

from __future__ import annotations

import re
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ingot.export.ingot import LIBRARY, Manifest
from ingot.plugins.command_line import Command, Group, console, note
from ingot.plugins.errors import IngotError, shown
from ingot.runtime.chat import chat_text
from ingot.runtime.inspection import inspect_command
from ingot.runtime.tokenizer import decode_ids, encode_text, load_tokenizer
from ingot.runtime.triton_cli import triton_command

# numpy and ONNX Runtime are imported when a command runs, so that --help works without them.
if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ingot.runtime.generate import Sampling
    from ingot.runtime.session import Session


def _ids(text: str) -> list[int]:
    pieces = text.replace(",", " ").split()
    # `int` takes more than numbers as they are written: 1_000, other scripts' digits.
    if not all(re.fullmatch("[+-]?[0-9]{1,100}", piece) for piece in pieces):
        raise IngotError(f"--prompt-ids {shown(text)} is not a list of token ids such as 1,2,3.")
    return [int(piece) for piece in pieces]


def _one_of(**given: tuple[str, ...]) -> None:
    """Refuse a command line without a prompt, or with prompts of several kinds."""
    if sum(map(bool, given.values())) != 1:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise IngotError(f"give one of {names}; it may be repeated, for a batch.")


_operators = click.option(
    "--operators",
    type=click.Path(path_type=Path),
    help=f"{LIBRARY} of Ingot's own kernels, a program that you vouch for.",
)


def _load(
    folder: Path,
    threads: int,
    operators: Path | None,
    *,
    verify: bool = True,
    allow_failed: bool = False,
) -> Session:
    """``load`` with a progress bar over the hashes, on a terminal."""
    from rich.progress import Progress

    from ingot.runtime.loading import load

    errors = console(stderr=True)
    # Elsewhere than on a terminal, Progress would leave an empty line.
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        size = sum(file.bytes for file in Manifest.read(folder).files.values())
        task = bar.add_task("checking hashes", total=size, visible=verify)
        return load(
            folder,
            threads=threads,
            verify=verify,
            allow_failed=allow_failed,
            operators=operators,
            advance=lambda done: bar.advance(task, done),
        )


@click.command("generate", cls=Command)
@click.argument("ingot", type=click.Path(path_type=Path))
@click.option("--prompt", multiple=True, help="Text; give it several times for a batch.")
@click.option("--prompt-ids", multiple=True, help="Token ids such as 1,2,3, instead of text.")
@click.option("--chat", multiple=True, help="What a user says, put into the model's template.")
@click.option("--max-new-tokens", default=64, show_default=True)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="0 is off.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--stop-id", multiple=True, type=int, help="Instead of the model's own.")
@click.option(
    "--prefill-chunk", type=int, help="Tokens of a prompt fed at once, 0 for all; default 512."
)
@click.option("--threads", default=0, show_default=True, help="0 lets the runtime choose.")
@click.option("--no-verify", is_flag=True, help="Check file sizes only, not their SHA-256.")
@click.option("--allow-failed", is_flag=True, help="Run an ingot that failed its validation.")
@_operators
def generate_command(
    ingot: Path,
    prompt: tuple[str, ...],
    prompt_ids: tuple[str, ...],
    chat: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop_id: tuple[int, ...],
    prefill_chunk: int | None,
    threads: int,
    no_verify: bool,
    allow_failed: bool,
    operators: Path | None,
) -> None:
    """Generate from an ingot folder; tokens appear as they are made."""
    from ingot.runtime.generate import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    _one_of(prompt=prompt, prompt_ids=prompt_ids, chat=chat)
    prompts = [_ids(text) for text in prompt_ids]
    session = _load(ingot, threads, operators, verify=not no_verify, allow_failed=allow_failed)
    tokenizer = None if prompt_ids else load_tokenizer(ingot)
    if tokenizer is not None:
        # A template writes the special tokens itself.
        texts = [chat_text(ingot, [{"role": "user", "content": said}]) for said in chat]
        whole = [encode_text(tokenizer, text, add_special_tokens=False) for text in texts]
        prompts = whole or [encode_text(tokenizer, text) for text in prompt]
    chunk = {} if prefill_chunk is None else {"prefill_chunk": prefill_chunk}
    options = {"stop_ids": list(stop_id) or None, **chunk}
    _stream(session, prompts, tokenizer, max_new_tokens, sampling, options)


def _stream(
    session: Session,
    prompts: list[list[int]],
    tokenizer: Tokenizer | None,
    max_new_tokens: int,
    sampling: Sampling,
    options: dict[str, Any],
) -> None:
    from ingot.runtime.generate import generate

    made: list[list[int]] = [[] for _ in prompts]
    shown = ""
    marks = [time.perf_counter()]
    for step in generate(
        session, prompts, max_new_tokens=max_new_tokens, sampling=sampling, **options
    ):
        marks.append(time.perf_counter())
        for row, token in zip(made, step, strict=True):
            if token is not None:
                row.append(token)
        # One prompt streams; several would interleave, so they are printed when all are done.
        if len(prompts) == 1 and made[0]:
            if tokenizer is None:
                click.echo(f"{made[0][-1]} ", nl=False)
                continue
            text = decode_ids(tokenizer, made[0])
            # A character may need several tokens; hold back what is not whole yet.
            if not text.endswith("\ufffd"):
                click.echo(text[len(shown) :], nl=False)
                shown = text
    if len(prompts) == 1:
        click.echo("" if tokenizer is None else decode_ids(tokenizer, made[0])[len(shown) :])
    else:
        for row in made:
            click.echo(" ".join(map(str, row)) if tokenizer is None else decode_ids(tokenizer, row))
    prefill, decode = marks[1] - marks[0], marks[-1] - marks[1]
    tokens = sum(map(len, made)) - len(made)
    speed = f", decode {tokens / decode:.1f} tokens/s" if tokens and decode else ""
    note(f"prefill {prefill:.3f} s{speed}")


@click.command("classify", cls=Command)
@click.argument("ingot", type=click.Path(path_type=Path))
@click.option("--prompt", multiple=True, help="Text; give it several times for a batch.")
@click.option("--prompt-ids", multiple=True, help="Token ids such as 1,2,3, instead of text.")
@click.option("--threads", default=0, show_default=True, help="0 lets the runtime choose.")
@click.option("--no-verify", is_flag=True, help="Check file sizes only, not their SHA-256.")
@click.option("--allow-failed", is_flag=True, help="Run an ingot that failed its validation.")
@_operators
def classify_command(
    ingot: Path,
    prompt: tuple[str, ...],
    prompt_ids: tuple[str, ...],
    threads: int,
    no_verify: bool,
    allow_failed: bool,
    operators: Path | None,
) -> None:
    """Class scores of an ingot exported with --task classify: a line for each prompt."""
    from ingot.runtime.classify import classify, probabilities

    _one_of(prompt=prompt, prompt_ids=prompt_ids)
    prompts = [_ids(text) for text in prompt_ids]
    session = _load(ingot, threads, operators, verify=not no_verify, allow_failed=allow_failed)
    if prompt:
        tokenizer = load_tokenizer(ingot)
        prompts = [encode_text(tokenizer, text) for text in prompt]
    logits = classify(session, prompts)
    labels = session.manifest.labels
    # One class is a regression: its number is the answer.
    scores = probabilities(logits) if len(labels) > 1 else logits
    for row in scores:
        order = sorted(range(len(labels)), key=lambda n: -row[n])
        click.echo("  ".join(f"{labels[n]} {row[n]:.4f}" for n in order))


@click.command("bench", cls=Command)
@click.argument("ingot", type=click.Path(path_type=Path))
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), help="Default 1, 4.")
@click.option(
    "--length", "lengths", multiple=True, type=click.IntRange(1), help="Default 16, 128, 1024."
)
@click.option("--repetitions", default=20, show_default=True, type=click.IntRange(1))
@click.option("--threads", default=0, show_default=True, help="0 lets the runtime choose.")
@_operators
def bench_command(
    ingot: Path,
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    repetitions: int,
    threads: int,
    operators: Path | None,
) -> None:
    """Measure prefill and decode at several lengths and batch sizes."""
    from rich.progress import Progress
    from rich.table import Table

    from ingot.runtime.bench import bench, usual_lengths

    batches = batches or (1, 4)
    table = Table(
        *("phase", "batch", "length", "tokens/s", "spread"),
        title=f"{ingot}, median of {repetitions}",
        title_justify="left",
    )
    errors = console(stderr=True)
    session = _load(ingot, threads, operators)
    lengths = lengths or usual_lengths(session, repetitions)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("measuring", total=2 * len(batches) * len(lengths))
        for row in bench(session, batches, lengths, repetitions, lambda n: bar.advance(task, n)):
            cells = (str(row.batch), str(row.length), f"{row.tokens_per_second:,.1f}")
            table.add_row(row.what, *cells, f"±{row.spread:.0%}")
    console().print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    click.echo(f"peak memory of the process: {peak / 1e6:,.0f} MB")


@click.group(cls=Group)
def main() -> None:
    """Run an ingot."""


main.add_command(generate_command)
main.add_command(classify_command)
main.add_command(triton_command)
main.add_command(inspect_command)
main.add_command(bench_command)
