"""What can be refused of a validation before PyTorch is imported, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from ingot.export.ingot import TARGETS, Manifest
from ingot.graphs.adapter import read_adapter
from ingot.graphs.folder import is_folder
from ingot.graphs.hub import resolve_adapter
from ingot.graphs.names import nearest
from ingot.plugins.device import has_gpu
from ingot.plugins.errors import IngotError, shown
from ingot.plugins.whole import check_file, keep_out
from ingot.runtime.session import Ids
from ingot.validate.judge.distribution import read_text, read_tokens
from ingot.validate.truth.inputs import QUICK, STANDARD, THOROUGH

EAGER = "eager"
PLANS = {"quick": QUICK, "standard": STANDARD, "thorough": THOROUGH}
# Tokens of ``--length``, where the model has no limit; a day of eager PyTorch.
MOST_LENGTH = 1 << 20


def cannot_compare(manifest: Manifest) -> str | None:
    """Why an ingot cannot be run on this machine in its own precision; None where it can."""
    if manifest.precision != "bfloat16" or (manifest.engine is not None and has_gpu()):
        return None
    return (
        "this ingot is bfloat16, an engine needs a GPU, and ONNX Runtime's CPU provider computes "
        "no bfloat16; its graph was compared in float32 over its own weights"
    )


def check_request(
    ingot: Path, *, plan: str, against: str, adapter: str | None = None
) -> tuple[Manifest, Path | None]:
    """Refuse what cannot be validated, as far as it shows without a graph or a checkpoint.

    Args:
        ingot: the ingot folder.
        plan: of ``PLANS``.
        against: ``EAGER``, a target or the folder of another ingot.
        adapter: what was merged into the checkpoint, if anything was.

    Returns:
        The manifest of the ingot, and the adapter's folder.

    Raises:
        IngotError: no such ingot, plan, other ingot or adapter.
    """
    if plan not in PLANS:
        raise IngotError(f"{shown(plan)} is no plan; give one of: {', '.join(PLANS)}.")
    manifest = Manifest.read(ingot)
    if against not in (EAGER, *TARGETS):
        if not is_folder(against):
            known = (EAGER, *TARGETS)
            meant = nearest(against, known)
            raise IngotError(
                f"{shown(against)} is not an ingot to compare with, nor one of {', '.join(known)}"
                f"{f'; did you mean {meant}?' if meant else '.'}"
            )
        Manifest.read(Path(against))
    merged = manifest.source.get("adapter")
    if merged is not None and adapter is None:
        raise IngotError(
            f"{ingot} was made with the adapter {shown(merged['name'])} merged into its "
            "checkpoint; give its folder with --adapter."
        )
    found = None if adapter is None else resolve_adapter(adapter)
    if found is not None:
        read_adapter(found)
    return manifest, found


def check_seed(seed: int) -> None:
    """Refuse a seed that no generator of random numbers takes.

    Raises:
        IngotError: it is negative, or no whole number.
    """
    if type(seed) is not int or seed < 0:
        raise IngotError(f"--seed is {shown(seed)}; it must be a whole number of at least 0.")


def check_length(length: int | None, manifest: Manifest) -> None:
    """Refuse a length of a long sequence that the ingot does not take.

    Raises:
        IngotError: it is no whole number, or beyond the context, the engine or any measure.
    """
    if length is None:
        return
    context, most, why = manifest.generation.get("context_length"), MOST_LENGTH, "the most there is"
    if context is not None and context < most:
        most, why = context, "the longest that the model is meant for"
    if manifest.engine is not None:
        longest = manifest.engine.profiles[0].shapes["input_ids"][2][1]
        if longest < most:
            most, why = longest, "the longest that its engine takes"
    if type(length) is not int or not 2 <= length <= most:
        raise IngotError(f"--length is {shown(length)}; it must be 2 to {most}, {why}.")


def plan_words(plan: str, length: int | None) -> str:
    """What a report calls the plan and the sequence that it was told to feed."""
    return plan if length is None else f"{plan}, and one sequence of {length} tokens"


def check_baseline(path: Path, ingot: Path, checkpoint: Path, adapter: str | None) -> None:
    """Refuse a baseline that could not be written.

    Raises:
        WriteError: naming it.
    """
    keep_out(path, ingot, checkpoint, *([] if adapter is None else [Path(adapter)]))
    check_file(path)


def read_words(
    manifest: Manifest, ingot: Path, tokens: str | Path | None, text: str | Path | None
) -> Ids | None:
    """The tokens whose perplexity is asked for.

    Raises:
        IngotError: both are given, neither can be read, or the ingot predicts nothing.
    """
    if tokens is None and text is None:
        return None
    if tokens is not None and text is not None:
        raise IngotError("--tokens and --text were both given; give one.")
    if manifest.main_output != "logits" or not manifest.states:
        raise IngotError(f"{ingot} predicts no tokens, so there is no perplexity to measure.")
    if tokens is not None:
        return read_tokens(Path(tokens), manifest.vocab_size)
    assert text is not None
    return read_text(Path(text), ingot, manifest.vocab_size)
