"""Validations from Python: the one function that does what ``ingot validate`` does."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ingot.export.early import check_max_kl
from ingot.export.progress import Stages
from ingot.plugins.errors import IngotError
from ingot.validate.baseline import GateError, read_baseline, save_baseline
from ingot.validate.early import (
    EAGER,
    PLANS,
    cannot_compare,
    check_baseline,
    check_length,
    check_request,
    check_seed,
    plan_words,
    read_words,
)
from ingot.validate.gate import gated, require_comparable
from ingot.validate.result import Report
from ingot.validate.source import find_checkpoint
from ingot.validate.truth.cache import default_cache


def validate(
    ingot: str | Path,
    checkpoint: str | Path,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    plan: Literal["quick", "standard", "thorough"] = "standard",
    length: int | None = None,
    seed: int = 0,
    against: str | Path = EAGER,
    tokens: str | Path | None = None,
    text: str | Path | None = None,
    max_kl: float | None = None,
    baseline: str | Path | None = None,
    gate: str | Path | None = None,
    stages: Stages | None = None,
) -> Report:
    """A comparison of an ingot with eager PyTorch, as ``ingot validate`` makes it.

    Args:
        ingot: the ingot folder.
        checkpoint: what it was made from, a folder or ``org/name`` on the hub.
        revision: branch, tag or commit on the hub; by default the one that the ingot names.
        adapter: the adapter that was merged into it, its folder or ``org/name`` on the hub.
        plan: how much is fed: ``quick`` 8 decode steps, ``standard`` 32, ``thorough`` 3 seeds of
            128 each.
        length: also feed one sequence of so many tokens, in pieces and in bounded memory;
            ``thorough`` by itself feeds one of the model's context, up to 4096.
        seed: of the token ids.
        against: what the ingot is compared with: ``eager``, a target (``onnx``, ``ort``, ``trt`` or
            ``trt-rtx``) or the folder of another ingot.
        tokens: an ``.npy`` file of integer token ids ``[n]`` whose perplexity is measured.
        text: a text file whose perplexity is measured, encoded by the ingot's tokenizer.
        max_kl: the largest mean KL divergence that storing the weights in fewer bits may cost, in
            nats, in place of the limits of the format.
        baseline: a file to remember the result in; the validation runs up to five times, to measure
            how far its figures move by themselves and between processors. What failed is no
            baseline, and writes none.
        gate: a file of an earlier ``baseline``: where anything is worse, the verdict is ``failed``,
            and the report says what.
        stages: shows the steps; where absent, nothing is shown.

    Returns:
        What was found: ``verdict`` is ``passed``; ``passed, in part`` where the proof lacks what
        ``short`` names; ``failed``; or ``skipped`` where nothing of the ingot, or only the graph of
        an engine, could run on this machine, as an export says it. ``write``, imported from
        ``ingot.validate.report.files``, makes files of it.

    Raises:
        IngotError: a damaged ingot, another checkpoint than it was made from, or a baseline of
            something else.
    """
    folder = Path(ingot)
    stages = stages or Stages()
    named = None if adapter is None else str(adapter)
    manifest, merged = check_request(folder, plan=plan, against=str(against), adapter=named)
    check_seed(seed)
    check_length(length, manifest)
    check_max_kl(max_kl)
    if baseline is not None:
        check_baseline(Path(baseline), folder, Path(checkpoint), named)
    words = read_words(manifest, folder, tokens, text)
    earlier = None if gate is None else read_baseline(Path(gate))
    # Last of what needs no PyTorch: it may have to be downloaded.
    source = find_checkpoint(str(checkpoint), manifest, revision, merged).fetch()
    # Here: what is refused above answers at once.
    from ingot.graphs.merge import open_checkpoint
    from ingot.validate.run import empty_report, examine, examine_unrun, validate_ingot
    from ingot.validate.spread import Task, elsewhere, measure
    from ingot.validate.truth.against import OtherReference, other_ingot
    from ingot.validate.truth.reference import Reference

    opened = open_checkpoint(source, merged)
    reference = Reference.of_ingot(folder, manifest, opened, default_cache())
    fed = plan_words(plan, length)
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    reason = cannot_compare(manifest)
    if reason is not None and (earlier is not None or baseline is not None):
        raise GateError(f"{folder} cannot be compared, so there is nothing to gate: {reason}.")
    made_from, given = manifest.source.get("sha256"), reference.hash(stages)
    if given != made_from:
        adapted = "" if adapter is None else f" with the adapter {adapter}"
        raise IngotError(
            f"{folder} was made from another checkpoint than {checkpoint}{adapted}: its SHA-256 is "
            f"{given[:12]}… and the ingot's {str(made_from)[:12]}…; give the one it was made from, "
            "or export again."
        )
    if reason is not None:
        report = examine_unrun(folder, reference, stages, reason, seed=seed)
        return replace(report, plan=fed, date=now)
    chosen, other = replace(PLANS[plan], length=length), None
    with contextlib.ExitStack() as stack:
        if str(against) != EAGER:
            other, name = stack.enter_context(other_ingot(str(against), manifest, opened, stages))
            reference = OtherReference(reference, other, name)
        if earlier is not None and gate is not None:
            # Before minutes of work; whether an engine runs, only these show.
            expected = empty_report(manifest, reference.against, folder.name, seed)
            expected = replace(expected, reason=earlier.identity["reason"], plan=fed)
            require_comparable(expected, earlier, Path(gate))
        report = examine(
            folder, reference, stages, plan=chosen, seed=seed, text=words, max_kl=max_kl
        )
        report = replace(report, plan=fed, date=now)
        if earlier is not None and gate is not None:
            report = gated(report, earlier, Path(gate))
        if baseline is not None and report.verdict != "failed":
            again = validate_ingot(
                folder, reference, stages, plan=chosen, seed=seed, verify=False, costs=False
            )
            task = Task(
                ingot=str(folder),
                checkpoint=str(source),
                adapter=None if merged is None else str(merged),
                against=None if other is None else str(other),
                plan=asdict(chosen),
                seed=seed,
            )
            spread = measure(report, again, task, stages, elsewhere)
            save_baseline(report, Path(baseline), spread)
    return report
