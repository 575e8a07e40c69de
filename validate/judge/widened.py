"""Half-precision graphs held against the truth once more, in float32 arithmetic.

In half precision a right graph's error is some thousandths, and what is wrong by less hides behind
it. In float32, over the weights as the graph holds them, both sides are right to seven digits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ingot.export.ingot import GRAPH, Manifest
from ingot.export.progress import Stages
from ingot.validate.judge.compare import compare
from ingot.validate.judge.floors import usual_floors
from ingot.validate.judge.judge import is_no_tap
from ingot.validate.locate.widen import HALVES
from ingot.validate.result import IN_FLOAT32, TensorResult
from ingot.validate.truth.inputs import QUICK, make_inputs
from ingot.validate.truth.recording import CHOSEN_EXPERTS, Layout, main_run, record
from ingot.validate.truth.reference import Reference
from ingot.validate.truth.rounded import rounded
from ingot.validate.truth.widened import WidenedSession


def against_in_float32(precision: str) -> str:
    """What a graph of half precision is compared with here, in words."""
    return (
        "eager PyTorch in float64, beside eager PyTorch in float32, all over the weights as they "
        f"are in {precision}"
    )


def judge_widened(
    folder: Path, manifest: Manifest, reference: Reference, seed: int, stages: Stages
) -> list[TensorResult]:
    """Every tensor of a prefill and some decode steps, with the truth's experts.

    Args:
        folder: an ingot of half precision.
        manifest: the ingot's.
        reference: of its checkpoint.
        seed: of the token ids.
        stages: shows the steps.

    Returns:
        Results whose stages end in ``IN_FLOAT32``; none of a float32 graph, nor where another ingot
        stands in the truth's place.

    Raises:
        IngotError: a graph that ONNX Runtime does not run.
    """
    if manifest.precision not in HALVES or not reference.is_eager:
        return []
    half: torch.dtype = getattr(torch, manifest.precision)
    checkpoint = rounded(reference.checkpoint, reference.task, half, folder / GRAPH)
    exact = Reference(checkpoint, reference.task, "float32", reference.cache)
    layout = Layout(manifest, reference.states)
    # Of the checkpoint's vocabulary, whatever the ingot says of it.
    manifest = replace(manifest, vocab_size=reference.vocab_size)
    inputs = make_inputs(
        manifest.vocab_size,
        seed,
        QUICK,
        chunk_size=reference.chunk_size,
        stateful=bool(manifest.states),
    )
    (references,) = exact.record(layout, [inputs], stages)
    session = WidenedSession(folder, manifest)

    def choose(number: int) -> None:
        session.choose(reference.routers.chosen(references.truth[number], inputs, number))

    with stages.stage("run the graph in float32", len(inputs.steps), "steps") as advance:
        found = record(session, layout, inputs, choose, advance)
    usual = usual_floors(references)
    results = []
    for number, call in enumerate(main_run(inputs)):
        target = {n: a for n, a in found[number].items() if not n.startswith(CHOSEN_EXPERTS)}
        # A graph need not have every value in it by name.
        truth = {n: a for n, a in references.truth[number].items() if n in target or is_no_tap(n)}
        results += compare(
            call.stage + IN_FLOAT32,
            truth,
            references.eager[number],
            target,
            {name: layout.kind(name) for name in truth},
            "float32",
            usual,
            noise=references.noise[number],
        )
    return results
