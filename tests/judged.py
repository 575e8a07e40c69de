"""A session, right or with a fault in it, judged as a validation judges an ingot's."""

from __future__ import annotations

from ingot.export.ingot import Manifest
from ingot.export.progress import Stages
from ingot.validate.counting import Recorder
from ingot.validate.judge.judge import Judge
from ingot.validate.result import TensorResult
from ingot.validate.truth.inputs import QUICK
from ingot.validate.truth.material import Material
from ingot.validate.truth.recording import Layout, Stepper
from ingot.validate.truth.reference import Reference
from ingot.validate.truth.runs import Traits, make_runs


def judged(session: Stepper, reference: Reference, manifest: Manifest) -> list[TensorResult]:
    """Every tensor after every call of a quick validation."""
    layout = Layout(manifest, reference.states)
    stateful = bool(manifest.states)
    traits = Traits(
        manifest.vocab_size,
        stateful=stateful,
        cached=any(state.axis is not None for state in manifest.states),
        recurrent=any(state.axis is None for state in manifest.states),
        chunk=reference.facts.chunk_size,
    )
    runs = make_runs(traits, QUICK, 0)
    recorded = [run.inputs for run in runs if run.recorded]
    references = reference.record(layout, recorded, Stages())
    judge = Judge(reference.routers, Material(layout, runs, references))
    judge.judge_session(Recorder(session, stateful))
    return judge.results
