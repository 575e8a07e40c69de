"""A session, right or with a fault in it, judged as a validation judges an ingot's."""

from __future__ import annotations

from ingot.export.ingot import Manifest
from ingot.export.progress import Stages
from ingot.validate.judge.judge import Judge
from ingot.validate.result import TensorResult
from ingot.validate.truth.inputs import QUICK, make_inputs
from ingot.validate.truth.recording import Layout, Stepper
from ingot.validate.truth.reference import Reference


def judged(session: Stepper, reference: Reference, manifest: Manifest) -> list[TensorResult]:
    """Every tensor after every call of a quick validation."""
    layout = Layout(manifest, reference.states)
    inputs = make_inputs(
        manifest.vocab_size,
        plan=QUICK,
        chunk_size=reference.chunk_size,
        stateful=bool(manifest.states),
    )
    (references,) = reference.record(layout, [inputs], Stages())
    judge = Judge(reference.routers, references, layout, inputs)
    judge.judge_session(judge.run(session))
    return judge.results
