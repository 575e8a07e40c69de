"""``python benchmarks/weights.py``: what weights in fewer bits cost, beside llama.cpp's formats.

Every format is made of the same checkpoint and fed the same tokens of a text that no weights were
chosen by, and held against transformers in float32: mean KL divergence with its standard error,
perplexity and how often the likeliest token stays the same, at the bytes that were measured.
llama.cpp is fetched, built and run in processes of its own; its float32 file goes first, and where
that computes something else than transformers nothing of it counts. What was made stays in
``--work``, so a run that was cut goes on where it ended; remove it after a change
of the export.

    python benchmarks/weights.py --model tests/data/trained/olmoe --model smollm2
    python benchmarks/weights.py --only 'int4|Q4' --rates 5 --model tests/data/trained/granite
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The tests' memory of traced graphs serves the many exports of one checkpoint as well.
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import click  # noqa: E402
import numpy as np  # noqa: E402
from traces import Traces  # noqa: E402

from benchmarks import smollm2  # noqa: E402
from benchmarks.llama.library import SOURCE, LlamaCpp, LlamaCppError  # noqa: E402
from benchmarks.on_weights import heads, importance, ingots, llama_cpp, truth  # noqa: E402
from benchmarks.on_weights.figures import Floats, Ids, Mean, Scores  # noqa: E402
from benchmarks.on_weights.table import (  # noqa: E402
    OURS,
    THEIRS,
    Row,
    equal_bytes_table,
    formats_table,
    kinds_table,
)
from benchmarks.on_weights.text import windows_of  # noqa: E402
from ingot.graphs.checkpoint import Checkpoint  # noqa: E402
from ingot.plugins.errors import IngotError  # noqa: E402
from ingot.plugins.whole import sha256, write_whole  # noqa: E402

TRAINED = ROOT / "tests" / "data" / "trained"
SMOLLM2 = "smollm2"
LLAMA_FORMATS = ("F32", "Q8_0", "Q4_K_M", "Q4_0")
# What a name ends with where scales were chosen by the calibration's text.
IMPORTANCE = "-importance"
# Windows of the calibration's text at most.
CALIBRATION = 64
# Two programs that compute the same in float32 differ by less: seen were 1e-10 to 1e-8.
SAME_KL = 1e-6


@dataclass(frozen=True)
class Subject:
    """One checkpoint on one text.

    Attributes:
        name: in the tables.
        checkpoint: a Hugging Face folder.
        model_type: of its config.
        parameters: its numbers, each once where it is tied.
        work: what is made of it, kept for the next run.
        windows: ``[W, L]`` token ids.
        truth: ``[W, L, V]`` logits, mapped from ``truth_file``.
    """

    name: str
    checkpoint: Path
    model_type: str
    parameters: int
    work: Path
    windows: Ids
    truth: Floats

    @property
    def truth_file(self) -> Path:
        return self.work / "truth.npy"

    @classmethod
    def open(cls, name: str, checkpoint: Path, work: Path, windows: Ids) -> Subject:
        """Record the truth where that was not done for these windows."""
        work.mkdir(parents=True, exist_ok=True)
        fed, recorded = work / "windows.npy", work / "truth.npy"
        if fed.is_file() and np.array_equal(np.load(fed), windows):
            logits = np.load(recorded, mmap_mode="r")
        else:
            shutil.rmtree(work / "scores", ignore_errors=True)
            logits = truth.record(checkpoint, windows, recorded)
            np.save(fed, windows)
        (work / "scores").mkdir(exist_ok=True)
        opened = Checkpoint.open(checkpoint)
        parameters = sum(math.prod(entry.shape) for entry in opened.entries.values())
        kind = str(opened.config["model_type"])
        return cls(name, checkpoint, kind, parameters, work, windows, logits)

    def scored(self, name: str, compute: Callable[[], Scores]) -> Scores:
        """What was kept of an earlier run, or computed now."""
        path = self.work / "scores" / f"{name}.npz"
        if not path.is_file():
            compute().save(path)
        return Scores.read(path)


def our_rows(subject: Subject, formats: list[ingots.Format], threads: int) -> Iterator[Row]:
    """Export what is not there yet, and compare it as it runs and with float32 activations."""
    traces = Traces()

    def made(chosen: ingots.Format) -> Path:
        out = subject.work / "ingots" / chosen.folder
        if not out.is_dir():
            ingots.export(subject.checkpoint, chosen, out, traces)
        return out

    def scored(chosen: ingots.Format) -> Scores:
        return subject.scored(
            f"{OURS}-{chosen.folder}",
            lambda: ingots.score_ingot(made(chosen), subject.windows, subject.truth, threads),
        )

    for chosen in formats:
        click.echo(f"{subject.name}: {OURS} {chosen.name}", err=True)
        as_run, exact = scored(chosen), scored(chosen.exact or chosen)
        out = made(chosen)
        weights, files = ingots.weight_bytes(out), ingots.file_bytes(out)
        yield Row(OURS, chosen.name, out, weights, files, as_run, exact)


def their_rows(
    subject: Subject, llama: LlamaCpp, formats: list[str], calibration: Ids | None
) -> Iterator[Row]:
    """Quantise by llama.cpp's own functions, and compare the file and what it decodes to.

    Args:
        subject: what is quantised.
        llama: by whom.
        formats: of ``LLAMA_FORMATS``, and the same with ``IMPORTANCE`` behind.
        calibration: ``[W, L]`` token ids for an importance matrix.

    Raises:
        LlamaCppError: it computes something else than transformers of this checkpoint.
    """
    whole = subject.work / "F32.gguf"
    if not whole.is_file():
        llama.convert(subject.checkpoint, whole)

    def scored(file: Path) -> Scores:
        return subject.scored(
            f"{THEIRS}-{file.stem}",
            lambda: llama_cpp.score(llama, file, subject.windows, subject.truth_file, subject.work),
        )

    same = Mean.of(scored(whole).kl)
    if not same.value < SAME_KL:
        raise LlamaCppError(
            f"llama.cpp's float32 of {subject.name} is {same.value:.2g} nats from transformers', "
            f"and less than {SAME_KL:g} is expected: it computes something else."
        )
    matrix = subject.work / "importance.npz"
    if calibration is not None and not matrix.is_file():
        importance.record(subject.checkpoint, calibration, matrix)
    for name in formats:
        click.echo(f"{subject.name}: {THEIRS} {name}", err=True)
        file, decoded = (subject.work / f"{name}{end}.gguf" for end in ("", "-decoded"))
        if not file.is_file():
            kind = name.removesuffix(IMPORTANCE)
            llama.quantise(whole, file, kind, None if kind == name else matrix)
        as_run = exact = scored(file)
        if file != whole:
            if not (subject.work / "scores" / f"{THEIRS}-{decoded.stem}.npz").is_file():
                llama.quantise(file, decoded, "F32")
            exact = scored(decoded)
            decoded.unlink(missing_ok=True)
        kinds: Counter[str] = Counter()
        for tensor in llama.tensors(file):
            kinds[tensor.kind] += tensor.size
        yield Row(THEIRS, name, file, kinds.total(), file.stat().st_size, as_run, exact, kinds)


def budget_rows(
    subject: Subject, rows: list[Row], calibration: Path, threads: int
) -> Iterator[Row]:
    """For each format of llama.cpp that fits between int4 and int8, ours of as many bytes."""
    like = next((row for row in rows if row.name.startswith("int4")), None)
    least = min((row.weights for row in rows if row.program == OURS), default=0)
    most = max((row.weights for row in rows if row.name.startswith("int8")), default=0)
    done: set[int] = set()
    for row in rows:
        fits = row.program == THEIRS and least < row.weights < most
        if like is not None and fits and row.weights not in done:
            done.add(row.weights)
            chosen = ingots.at_the_bytes_of(row.name, row.weights, like.made, calibration)
            yield from our_rows(subject, [chosen], threads)


def time_rows(
    subject: Subject, rows: list[Row], llama: LlamaCpp | None, threads: int, rounds: int
) -> None:
    """Rates of every format, which take turns, so that what slows the machine slows all alike."""
    length = subject.windows.shape[1]
    prompt, new = length // 2, length // 2
    for turn in range(rounds):
        click.echo(f"{subject.name}: tokens a second, round {turn + 1} of {rounds}", err=True)
        for row in rows:
            if row.program == OURS:
                row.rates.append(ingots.rates(row.made, prompt, new, threads))
            elif llama is not None:
                row.rates.append(llama_cpp.rates(llama, row.made, prompt, new))


def machine() -> str:
    """The processor, by its own name."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else "an unknown processor"


def report(subject: Subject, rows: list[Row]) -> Iterator[str]:
    """What is printed of one model."""
    windows, length = subject.windows.shape
    yield f"## {subject.name}: {subject.parameters:,} parameters, {windows} windows of {length}"
    yield ""
    yield from formats_table(rows, subject.parameters)
    if any(row.program == THEIRS for row in rows):
        for table in (equal_bytes_table, kinds_table):
            yield ""
            yield from table(rows)


@click.command(help=__doc__, context_settings={"max_content_width": 100})
@click.option(
    "--model",
    "models",
    multiple=True,
    help=f"A checkpoint folder, or {SMOLLM2}, which is fetched; all trained ones by default.",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=TRAINED / "sample.txt",
    help="What is fed; no text that weights were trained or chosen by.",
)
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text to choose numbers on: our methods, our budgets at llama.cpp's bytes, and its "
    "importance matrix.",
)
@click.option(
    "--format",
    "more",
    multiple=True,
    help="One more of ours, by fields of an export: 'weights=int4 block=64 symmetric=false'.",
)
@click.option("--length", default=256, show_default=True, help="Tokens of a window.")
@click.option("--windows", default=16, show_default=True, help="Windows at most.")
@click.option("--only", default="", help="Formats whose name holds this regular expression.")
@click.option("--without-llama-cpp", is_flag=True, help="Our formats alone.")
@click.option("--rates", default=0, help="Rounds of tokens a second; on a quiet machine.")
@click.option("--threads", default=os.cpu_count(), show_default=True, help="Of both programs.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "build" / "weights",
    help="Where what was made is kept.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON of it all.")
def main(
    models: tuple[str, ...],
    text: Path,
    calibration: Path | None,
    more: tuple[str, ...],
    length: int,
    windows: int,
    only: str,
    without_llama_cpp: bool,
    rates: int,
    threads: int,
    work: Path,
    out: Path | None,
) -> None:
    try:
        llama = (
            None
            if without_llama_cpp
            else LlamaCpp.prepare(work / "llama.cpp", smollm2.DOWNLOADS, threads)
        )
        ours = [f for f in ingots.formats(calibration) if re.search(only, f.name)]
        ours += [ingots.Format.parse(said) for said in more]
        names = [name for name in LLAMA_FORMATS for name in with_importance(name, calibration)]
        theirs = [name for name in names if re.search(only, name)]
        results = []
        for folder in [checkpoint_of(name, work) for name in models or trained()]:
            fed = windows_of(text.read_text(), folder / "tokenizer.json", length, windows)
            subject = Subject.open(folder.name, folder, work / kept_as(folder), fed)
            rows = list(our_rows(subject, ours, threads))
            refusal = ""
            if llama is not None:
                try:
                    taken = calibration and windows_of(
                        calibration.read_text(), folder / "tokenizer.json", length, CALIBRATION
                    )
                    rows += their_rows(subject, llama, theirs, taken)
                except LlamaCppError as error:
                    refusal = str(error)
            if calibration is not None:
                rows += list(budget_rows(subject, rows, calibration, threads))
            time_rows(subject, rows, llama, threads, rates)
            click.echo("\n".join([*report(subject, rows), refusal, ""]))
            results.append(
                {
                    "model": subject.name,
                    "parameters": subject.parameters,
                    "windows": list(subject.windows.shape),
                    "formats": [row.figures(subject.parameters) for row in rows],
                }
            )
    except IngotError as error:
        raise click.ClickException(str(error)) from error
    if out is not None:
        facts = {
            "machine": machine(),
            "threads": threads,
            "versions": {name: version(name) for name in ("onnxruntime", "torch", "transformers")}
            | {SOURCE.name: SOURCE.version},
            "text": text.name,
            "models": results,
        }
        write_whole(out, json.dumps(facts, indent=1) + "\n")


def with_importance(name: str, calibration: Path | None) -> list[str]:
    """A format of llama.cpp's, and the same by an importance matrix where that says anything."""
    if calibration is None or name in ("F32", "Q8_0"):
        return [name]
    return [name, f"{name}{IMPORTANCE}"]


def trained() -> list[str]:
    """The trained checkpoints that come with the tests."""
    return sorted(str(folder.parent) for folder in TRAINED.glob("*/config.json"))


def kept_as(checkpoint: Path) -> str:
    """The folder of what is made of a checkpoint: another one once its weights are others."""
    files = sorted(checkpoint.glob("*.safetensors"))
    digests = "".join(sha256(file) for file in files)
    return f"{checkpoint.name}-{hashlib.sha256(digests.encode()).hexdigest()[:12]}"


def checkpoint_of(name: str, work: Path) -> Path:
    """The folder that was named, SmolLM2's, or one that llama.cpp takes as well.

    What is not there yet is made; both programs are given the same.
    """
    named = Path(name).resolve()
    if name != SMOLLM2 and not heads.needs_repeated_heads(named):
        return named
    folder = work / "checkpoints" / named.name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        if name == SMOLLM2:
            smollm2.convert(smollm2.fetch_gguf(), folder)
        else:
            heads.repeat_heads(named, folder)
    return folder


if __name__ == "__main__":
    main()
