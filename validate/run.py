"""One validation: the target beside the eager graph, in its own precision and one higher."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ingot.export.graph import Capture
from ingot.export.ingot import Manifest
from ingot.export.manifest import ONNX_RUNTIME, TENSORRT, versions
from ingot.export.progress import Stages
from ingot.graphs.state import LOGITS_TO_KEEP
from ingot.plugins.device import has_gpu
from ingot.runtime.loading import load
from ingot.runtime.onnxruntime_session import said
from ingot.runtime.session import Ids, Session
from ingot.validate.counting import Fed, Recorder
from ingot.validate.covered import coverage
from ingot.validate.identity.checks import Subject, checks
from ingot.validate.judge import totals
from ingot.validate.judge.again import (
    judge_repeats,
    judge_threads,
    other_threads,
    repeated_calls,
    threads_calls,
)
from ingot.validate.judge.distribution import negative_log_likelihoods, perplexities
from ingot.validate.judge.forced import ForcedJudge
from ingot.validate.judge.judge import Judge
from ingot.validate.judge.kept import judge_kept, kept_calls
from ingot.validate.judge.quantisation import Recorded, judge_quantisation
from ingot.validate.judge.widened import against_in_float32, judge_widened
from ingot.validate.processor import processor
from ingot.validate.quantisation import Activations, Quantisation
from ingot.validate.result import ROUNDED, Check, Distribution, Report, Routing, TensorResult
from ingot.validate.truth.forced import forced_runs
from ingot.validate.truth.inputs import STANDARD, Inputs, Plan
from ingot.validate.truth.material import Material
from ingot.validate.truth.recording import Layout
from ingot.validate.truth.reference import TRUTH, Reference
from ingot.validate.truth.runs import CONTEXT, LONG, MAIN, Traits, make_runs
from ingot.validate.truth.runs import Run as FedRun
from ingot.validate.truth.taps import TappedSession
from ingot.validate.truth.twin import ExactSession, no_twin
from ingot.version import __version__

if TYPE_CHECKING:
    from ingot.validate.locate.find import Run

LIBRARIES = ("torch", "numpy", *ONNX_RUNTIME, *TENSORRT)
# Tokens of a text that see each other where perplexity is measured.
WINDOW = 256
ALL_DOUBTFUL = (
    "at every token some router is nearer to a tie than rounding explains, and the experts of an "
    "engine cannot be forced; --precision fp32 compares the same graph"
)
NO_GPU = (
    "the engine did not run, for want of a GPU; its graph passed on ONNX Runtime; validate it on a "
    "machine with one"
)


class Target:
    """The ingot that is judged: as it is delivered, and its graph with taps.

    Args:
        folder: the ingot; its hashes are not checked.
        reference: of its checkpoint.
    """

    def __init__(self, folder: Path, reference: Reference) -> None:
        self.folder = folder
        # What is fed is of the checkpoint's vocabulary, whatever the ingot says of it: one that
        # says too little would choose its own questions.
        self.manifest = replace(Manifest.read(folder), vocab_size=reference.vocab_size)
        self.layout = Layout(self.manifest, reference.states)
        self.engine = self.manifest.engine is not None and has_gpu()
        # For TensorRT a graph is delivered, where no engine can run; how ONNX Runtime fuses it is
        # no part of it.
        self.graph_only = not self.engine and self.manifest.target not in ("onnx", "ort")
        quantization = self.manifest.quantization
        # What kernels round activations to; empty where they do not.
        self.rounded = self.manifest.activations
        # Numbers of a row that share a scale then.
        self.blocks: tuple[int, ...] = ()
        if quantization is not None and quantization.accuracy == "fast":
            self.rounded, self.blocks = "int8", quantization.sizes
        self._exact = False

    @property
    def keeps(self) -> bool:
        """Whether the graph may be asked for the last logits alone."""
        return any(each.name == LOGITS_TO_KEEP for each in self.manifest.inputs)

    def twin(self) -> Target | None:
        """The same, whose kernels leave activations as they are; None where there is no such."""
        if not self.rounded or no_twin(self.folder) is not None:
            return None
        result = copy.copy(self)
        result.rounded, result._exact = "", True
        return result

    def delivered(self, threads: int = 0) -> Session:
        """A session as a user gets it; over the graph, where an engine cannot run."""
        if self._exact:
            return ExactSession(self.folder, self.manifest, threads=threads)
        return load(
            self.folder,
            threads=threads,
            verify=False,
            allow_failed=True,
            graph_only=not self.engine,
        )

    def tapped(self, threads: int = 0) -> TappedSession:
        """The graph on ONNX Runtime with its routers and hidden states."""
        return TappedSession(self.folder, self.manifest, threads=threads, exact=self._exact)

    def traits(self, reference: Reference) -> Traits:
        """What decides which shapes of use there are."""
        manifest, states, facts = self.manifest, reference.states, reference.facts
        rows, longest = None, None
        if self.engine and manifest.engine is not None:
            rows, longest = manifest.engine.profiles[0].shapes["input_ids"][2]
        convolutions = [state.input_shape[-1] for state in states if state.kind == "conv"]
        return Traits(
            vocab_size=manifest.vocab_size,
            stateful=bool(manifest.states),
            cached=any(state.axis is not None for state in states),
            recurrent=any(state.axis is None for state in states),
            chunk=facts.chunk_size,
            width=max((1 + size for size in convolutions if isinstance(size, int)), default=0),
            context=facts.context_length,
            switch=facts.switch_length,
            most_rows=rows,
            longest=longest,
            threads=not self.engine,
            by_token=not self.engine and manifest.by_token,
            keeps=self.keeps,
        )


def validate_ingot(
    folder: Path,
    reference: Reference,
    stages: Stages | None = None,
    *,
    plan: Plan = STANDARD,
    seed: int = 0,
    verify: bool = True,
    name: str | None = None,
    text: Ids | None = None,
    max_kl: float | None = None,
    costs: bool = True,
) -> Report:
    """Compare an ingot with eager PyTorch; what does not match is in the report.

    Args:
        folder: the ingot.
        reference: the eager graph of the checkpoint it was made from.
        stages: shows the steps.
        plan: how much is fed.
        seed: of the first set of token ids.
        verify: check the folder's hashes first.
        name: of the ingot in the report; by default the folder's.
        text: tokens ``[n]`` whose perplexity is measured.
        max_kl: the largest mean divergence that storing the weights may cost, in nats.
        costs: whether what storing the weights costs is measured, where something is lost.

    Raises:
        IngotError: a damaged ingot, or one that cannot be run.
    """
    began = time.perf_counter()
    stages = stages or Stages()
    target = Target(folder, reference)
    target.manifest.check_files(folder, hashes=verify)
    seeds = range(seed, seed + plan.seeds)
    traits = target.traits(reference)
    twin = target.twin()
    # What is delivered, and before it the twin that does not round, where there is one.
    judged = [_Judged(twin), _Judged(target)] if twin is not None else [_Judged(target)]
    every = [] if target.engine else _forced_runs(target, reference, seed)
    for each in seeds:
        runs = make_runs(traits, plan, each, context=each == seed)
        recorded = [run.inputs for run in runs if run.recorded]
        # One set of calls runs every expert; their truth is computed with that of the first runs.
        inputs = [*recorded, *(every if each == seed else [])]
        references = reference.record(target.layout, inputs, stages)
        for one in judged:
            found = references
            if one.target.rounded:
                found = reference.rounding(target.layout, inputs, references, stages)
            own, of_forced = found[: len(recorded)], found[len(recorded) :]
            one.judges.append(Judge(reference.routers, Material(target.layout, runs, own)))
            if each == seed:
                one.forced = ForcedJudge(reference.routers, target.layout, every, of_forced)
    in_float32 = judge_widened(folder, target.manifest, reference, seed, stages)
    for one in judged:
        session, calls = _observe(one, stages, reference.name)
        if one is not judged[-1]:
            # Each session goes before another takes as much memory.
            del session
    delivered, first = judged[-1], judged[0]
    judges = first.judges
    report = replace(
        empty_report(target.manifest, reference.against, name or folder.name, seed),
        tensors=(
            *(tensor for one in judged for tensor in one.tensors(seeds)),
            *totals.constant_main(judges),
            *in_float32,
        ),
        routing={mode: found for one in judged for mode, found in one.routing().items()},
        growth=totals.worst_growth(judges),
        hidden=totals.hidden(judges, reference.layers, reference.layer_count),
        router_margin=totals.margin(judges),
        reason=_reason(target, calls),
        coverage=coverage(
            traits,
            calls,
            delivered.judges,
            None if target.engine else delivered.forced.experts,
            delivered.forced.unread,
        ),
        activations=_activations(target, twin),
    )
    if target.manifest.main_output == "logits" and target.manifest.states:
        tokens = totals.next_tokens(delivered.judges)
        if tokens is not None and text is not None:
            tokens = _with_perplexity(tokens, session, reference, text, stages)
        report = replace(report, distribution=tokens)
    if costs and reference.is_eager:
        # The session goes before as much is read again.
        del session
        cost = _quantisation(target, reference, judges, stages, text, max_kl)
        report = replace(report, quantisation=cost)
    return replace(report, seconds=time.perf_counter() - began)


def empty_report(manifest: Manifest, against: str, name: str, seed: int) -> Report:
    """What a report says before anything is compared.

    Args:
        manifest: of the ingot.
        against: what it is compared with, in words.
        name: of the ingot.
        seed: of the first set of token ids.
    """
    return Report(
        ingot=name,
        model_type=manifest.model_type,
        target=manifest.target,
        precision=manifest.precision,
        against=against,
        seed=seed,
        tensors=(),
        environment={**environment(), "checkpoint": manifest.source.get("sha256", "unknown")},
    )


def _reason(target: Target, calls: Sequence[Fed]) -> str | None:
    """Why passing proves nothing about the ingot itself, if it does not."""
    if target.engine and not any(call.free for call in calls if call.purpose == "compare"):
        return ALL_DOUBTFUL
    return NO_GPU if target.graph_only and target.manifest.engine is not None else None


def _forced_runs(target: Target, reference: Reference, seed: int) -> list[Inputs]:
    """What is fed so that every expert is run."""
    stateful, top_k = bool(target.manifest.states), reference.routers.top_k
    vocabulary = target.manifest.vocab_size
    return forced_runs(reference.experts, top_k, vocabulary, seed, stateful=stateful)


@dataclass
class _Judged:
    """A target and what its numbers are held against.

    Attributes:
        target: the ingot, or its exact twin.
        judges: of each set of token ids.
        forced: of the calls that run every expert.
    """

    target: Target
    judges: list[Judge] = field(default_factory=list)
    forced: ForcedJudge = field(init=False)

    @property
    def _suffix(self) -> str:
        return ROUNDED if self.target.rounded else ""

    def tensors(self, seeds: Sequence[int]) -> list[TensorResult]:
        """Every result; where activations were rounded the stage says so."""
        results = [*totals.tensors(self.judges, seeds), *self.forced.results]
        return [replace(each, stage=f"{each.stage}{self._suffix}") for each in results]

    def routing(self) -> dict[str, Routing]:
        """The choices by mode; where activations were rounded the mode says so."""
        found = {**totals.routing(self.judges), **self.forced.routing}
        return {f"{mode}{self._suffix}": each for mode, each in found.items()}


def _activations(target: Target, twin: Target | None) -> Activations | None:
    """What is said of activations that kernels round; None where none does."""
    if not target.rounded:
        return None
    why = None if twin is not None else no_twin(target.folder)
    return Activations(target.blocks, twin is not None, why or "", target.rounded)


def _observe(one: _Judged, stages: Stages, other: str) -> tuple[Session, list[Fed]]:
    """The session of the target, all of it judged, and the calls that it was given."""
    target, judges, forced = one.target, one.judges, one.forced
    stateful = bool(target.manifest.states)
    calls: list[Fed] = []
    if target.engine:
        for judge in judges:
            judge.exclude_doubtful()
    else:
        # Each session goes before another takes as much memory.
        _judge_threads(target, judges, stages, calls)
        tapped = _judge_graph(target, judges, forced, stages, calls)
        if target.graph_only:
            return tapped, calls
        del tapped
    session = target.delivered()
    recorder = Recorder(session, stateful, calls)
    count = sum(judge.calls for judge in judges) + repeated_calls(judges[0])
    count += kept_calls(judges[0]) if target.keeps else 0
    with stages.stage(f"validate against {other}", count, "steps") as advance:
        for judge in judges:
            judge.judge_session(recorder, advance)
        judge_repeats(judges[0], recorder)
        advance(repeated_calls(judges[0]))
        if target.keeps:
            judge_kept(judges[0], recorder)
            advance(kept_calls(judges[0]))
    return session, calls


def _judge_graph(
    target: Target,
    judges: Sequence[Judge],
    forced: ForcedJudge,
    stages: Stages,
    calls: list[Fed],
) -> TappedSession:
    """The session of the graph with taps, whose hidden states and routers are judged.

    With the truth's experts every tensor is, and with every expert in turn; and what it gives when
    it chooses itself, where no other session is to be judged.
    """
    session = target.tapped()
    recorder = Recorder(session, bool(target.manifest.states), calls)
    count = sum(judge.calls for judge in judges) + forced.calls
    inside = "routers" if judges[0].routers.names() else "hidden states"
    with stages.stage(f"run the graph with its {inside}", count, "steps") as advance:
        for judge in judges:
            judge.judge_graph(session, advance, recorder if target.graph_only else None)
        forced.judge(session, advance)
        if target.graph_only:
            judge_repeats(judges[0], recorder)
    return session


def _judge_threads(
    target: Target, judges: Sequence[Judge], stages: Stages, calls: list[Fed]
) -> None:
    """A session with another number of threads, for the first calls."""
    judge, threads = judges[0], other_threads()
    with stages.stage("run with other threads", len(threads_calls(judge)), "steps") as advance:
        routed = bool(judge.routers.names())
        session = target.tapped(threads) if routed else target.delivered(threads)
        judge_threads(judge, Recorder(session, bool(target.manifest.states), calls), threads)
        advance(len(threads_calls(judge)))


def _quantisation(
    target: Target,
    reference: Reference,
    judges: Sequence[Judge],
    stages: Stages,
    text: Ids | None,
    max_kl: float | None,
) -> Quantisation | None:
    """What storing the weights costs, over the recorded runs and a text."""
    runs = [
        Recorded(run.inputs, references.truth)
        for judge in judges
        for run, references in judge.material.recorded
        if run.name in (MAIN, LONG, CONTEXT)
    ]
    weights, layout = target.manifest.weights, target.layout
    return judge_quantisation(weights, reference, layout, runs, stages, text=text, max_kl=max_kl)


def _with_perplexity(
    found: Distribution, session: Session, reference: Reference, text: Ids, stages: Stages
) -> Distribution:
    """A distribution with the perplexity of a text, of the target and of the truth."""
    truth = reference.session(TRUTH[reference.precision], stages)
    likelihoods = []
    for name, side in (("truth", truth), ("target", session)):
        with stages.stage(f"perplexity of the {name}", len(text), "steps") as advance:
            likelihoods.append(negative_log_likelihoods(side, text, WINDOW, advance))
    of_truth, of_target = likelihoods
    perplexity, truth_perplexity, interval = perplexities(of_truth, of_target, WINDOW)
    return replace(
        found,
        perplexity=perplexity,
        truth_perplexity=truth_perplexity,
        ratio_interval=interval,
    )


def examine(
    folder: Path,
    reference: Reference,
    stages: Stages,
    *,
    plan: Plan = STANDARD,
    seed: int = 0,
    verify: bool = True,
    name: str | None = None,
    text: Ids | None = None,
    capture: Capture | None = None,
    max_kl: float | None = None,
) -> Report:
    """``validate_ingot``, and what needs no run: the weights, the graph and the contract.

    A failure is located in a step of its own. Where the place cannot be found, the report says why
    (``Report.unlocated``).

    Args:
        capture: traces the eager graph once more, ``export.capture.capture`` by default.
        max_kl: as for ``validate_ingot``.
    """
    began = time.perf_counter()
    manifest = Manifest.read(folder)
    manifest.check_files(folder, hashes=verify)
    subject = Subject(folder, manifest, reference.checkpoint, stages, capture)
    # First: where an ingot cannot be run, they say why.
    found = checks(subject)
    try:
        report = validate_ingot(
            folder,
            reference,
            stages,
            plan=plan,
            seed=seed,
            verify=False,
            name=name,
            text=text,
            max_kl=max_kl,
        )
    # ONNX Runtime's exceptions share no public base class.
    except Exception as error:
        if not any(check.problems for check in found):
            raise
        report = empty_report(manifest, reference.against, name or folder.name, seed)
        found += (Check("session", 0, (f"the ingot cannot be run: {said(error)}",)),)
    report = replace(report, checks=found, seconds=time.perf_counter() - began)
    if len(report.failures) == len(report.costly):
        # What the format costs is wrong at no place of the graph.
        return report
    from ingot.validate.locate.find import located

    with stages.stage("find where it goes wrong"):
        return located(report, subject, _Again(Target(folder, reference), reference, plan, seed))


class _Again:
    """See ``validate.locate.find.Again``.

    Args:
        target: that failed.
        reference: of its checkpoint.
        plan: that was fed.
        seed: of the first set of token ids.
        runs_here: whether this machine runs it in its own precision.
    """

    def __init__(
        self,
        target: Target,
        reference: Reference,
        plan: Plan,
        seed: int,
        *,
        runs_here: bool = True,
    ) -> None:
        self._runs_here = runs_here
        self._target = target
        self._reference = reference
        self._plan = plan
        self._seed = seed

    @property
    def is_eager(self) -> bool:
        return self._reference.is_eager

    @property
    def layers(self) -> Mapping[str, int]:
        return self._reference.layers

    @property
    def count(self) -> int:
        return self._reference.layer_count

    def _fed(self, seed: int) -> list[FedRun]:
        traits = self._target.traits(self._reference)
        return make_runs(traits, self._plan, seed, context=seed == self._seed)

    def runs(self) -> list[Run]:
        from ingot.validate.locate.find import runs_of

        result: list[Run] = []
        for seed in range(self._seed, self._seed + self._plan.seeds):
            stage = f"seed {seed}, " if self._plan.seeds > 1 else ""
            result += runs_of(self._fed(seed), stage, seed=seed, first=seed == self._seed)
        return result

    def session(self) -> Session | None:
        return self._target.delivered() if self._runs_here else None

    def inside(self, run: Run) -> list[TensorResult]:
        fed, layout = self._fed(run.seed), self._target.layout
        recorded = [one.inputs for one in fed if one.recorded]
        references = self._reference.record(layout, recorded, Stages())
        judge = Judge(self._reference.routers, Material(layout, fed, references))
        return judge.judge_inside(self._target.tapped(), fed[run.number])


def examine_unrun(
    folder: Path,
    reference: Reference,
    stages: Stages,
    reason: str,
    *,
    seed: int = 0,
    verify: bool = True,
    name: str | None = None,
    capture: Capture | None = None,
) -> Report:
    """What ``examine`` finds of an ingot that this machine cannot run in its own precision.

    That is what needs no run, and what the graph computes in float32.

    Args:
        reason: why it cannot be run, in one sentence without a full stop.
    """
    began = time.perf_counter()
    manifest = Manifest.read(folder)
    manifest.check_files(folder, hashes=verify)
    subject = Subject(folder, manifest, reference.checkpoint, stages, capture)
    found = checks(subject)
    against = against_in_float32(manifest.precision)
    report = empty_report(manifest, against, name or folder.name, seed)
    try:
        tensors = judge_widened(folder, manifest, reference, seed, stages)
        report = replace(report, tensors=tuple(tensors))
    # As in ``examine``.
    except Exception as error:
        if not any(check.problems for check in found):
            raise
        found += (Check("session", 0, (f"the graph cannot be run: {said(error)}",)),)
    report = replace(report, reason=reason, checks=found, seconds=time.perf_counter() - began)
    if report.verdict != "failed":
        return report
    from ingot.validate.locate.find import located

    with stages.stage("find where it goes wrong"):
        again = _Again(Target(folder, reference), reference, STANDARD, seed, runs_here=False)
        return located(report, subject, again)


def environment() -> dict[str, str]:
    """What the figures may depend on: versions, and the processor with the instructions it used."""
    found = {"machine": platform.machine(), "python": platform.python_version()}
    return {"ingot": __version__, **found, **versions(LIBRARIES), **processor()}
