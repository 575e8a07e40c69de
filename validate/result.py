"""What one validation found: plain data, from which every report is made.

A *score* is the target's error over the *floor*, the error that eager PyTorch itself makes in the
target's precision; both are against the truth, the eager graph one precision higher. A score of 1
is as good as the precision allows.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ingot.export.ingot import Verdict
from ingot.validate.coverage import Coverage
from ingot.validate.distribution import Distribution as Distribution
from ingot.validate.quantisation import Activations, Quantisation

# The mode of routing in which every expert in turn is given.
FORCED = "forced"
# How the stage of a half-precision graph ends that was run in float32, over its own weights.
IN_FLOAT32 = ", in float32"
# How the stage ends of what kernels computed that round activations; the rest of such a
# report is of the same graph without that rounding.
ROUNDED = ", rounded"
SCHEMA_VERSION = 1
# The operator of a location that is in no node of the graph.
SESSION, KERNELS = "session", "kernels"
# A score: an error no larger than eager's own is no fault, whatever it rose from.
HARMLESS = 1.0


@dataclass(frozen=True)
class TensorResult:
    """One tensor after one call.

    Attributes:
        stage: the call, such as ``prefill`` or ``decode 3``.
        name: of the graph output, such as ``logits`` or ``present.2.key``.
        kind: ``logits``, ``hidden``, or the kind of a state.
        layer: whose state it is; None for the main output.
        error: RMS of the target's difference from the truth, over the truth's RMS; None where the
            tensors could not be compared at all.
        floor: the same of eager PyTorch in the target's precision.
        norm_ratio: RMS of the target over RMS of the truth.
        limit: largest score accepted.
        problem: what is wrong in one sentence; empty where it passed.
        top1: share of agreeing likeliest tokens, for logits.
        not_finite: which sides hold NaN or infinity, of ``reference``, ``eager`` and ``target``.
    """

    stage: str
    name: str
    kind: str
    layer: int | None
    error: float | None
    floor: float | None
    norm_ratio: float | None
    limit: float
    problem: str = ""
    top1: float | None = None
    not_finite: tuple[str, ...] = ()

    @property
    def in_float32(self) -> bool:
        """Whether a half-precision graph made it in float32, where errors are others."""
        return self.stage.endswith(IN_FLOAT32)

    @property
    def rounded(self) -> bool:
        """Whether kernels made it that round activations."""
        return self.stage.endswith(ROUNDED)

    @property
    def score(self) -> float | None:
        """Error over floor; None where there is neither."""
        if self.error is None or self.floor is None:
            return None
        return self.error / self.floor if self.floor else float("inf") if self.error else 0.0


@dataclass(frozen=True)
class Hidden:
    """One hidden state over all calls.

    Attributes:
        name: of the graph's value, such as ``hidden_states.3``; transformers numbers them from what
            enters the first layer in some models, and from the first layer's output in others.
        layer: that it leaves; -1 for what enters the first.
        normed: whether it has been through the final norm too.
        error: RMS of the errors of all calls; NaN where one could not be compared.
        floor: the same of eager PyTorch in the target's precision.
    """

    name: str
    layer: int
    normed: bool
    error: float
    floor: float


@dataclass(frozen=True)
class Flip:
    """One token whose experts differ from the truth's at one router.

    Attributes:
        router: its number, in the order they run.
        row: of the batch.
        token: position in the row.
        expected: the truth's experts, in ascending order.
        chosen: the target's.
        margin: the truth's K-th logit less the next one.
        explained: largest margin that rounding in this precision explains.
        follows: whether an earlier flip of the same row changed what this router saw, so that the
            margin says nothing.
    """

    router: int
    row: int
    token: int
    expected: tuple[int, ...]
    chosen: tuple[int, ...]
    margin: float
    explained: float
    follows: bool = False

    @property
    def fails(self) -> bool:
        """Whether rounding cannot have done it."""
        return not self.follows and not self.margin <= self.explained


@dataclass(frozen=True)
class Ignored:
    """Experts that were forced and not used: the first token of one router.

    Attributes:
        router: its number, in the order they run.
        row: of the batch.
        token: position in the row.
        forced: the experts that were to be used, in ascending order.
        used: those that were.
        tokens: how many of this router it is true of.
    """

    router: int
    row: int
    token: int
    forced: tuple[int, ...]
    used: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Routing:
    """Expert choices of every router against the truth's.

    Attributes:
        agreement: by router, share of tokens with the same experts.
        flips: the tokens with others.
        names: of the routers, such as ``layer 3``.
        ignored: the routers whose experts were forced and not used.
    """

    agreement: tuple[float, ...]
    flips: tuple[Flip, ...]
    names: tuple[str, ...] = ()
    ignored: tuple[Ignored, ...] = ()

    @property
    def problems(self) -> list[str]:
        """What is wrong, one sentence each."""
        return [
            f"{self.name(each.router)}: token {each.token} of row {each.row} used experts "
            f"{list(each.used)} where its logits were made to say {list(each.forced)}, and so did "
            f"{each.tokens} tokens in all; what chooses there goes by other numbers"
            for each in self.ignored
        ] + [
            f"{self.name(flip.router)}: token {flip.token} of row {flip.row} chose "
            f"{list(flip.chosen)} over {list(flip.expected)} at a margin of {flip.margin:.2g}, and "
            f"rounding explains {flip.explained:.2g}"
            for flip in self.flips
            if flip.fails
        ]

    def name(self, router: int) -> str:
        """What a router is called."""
        return self.names[router] if self.names else f"router {router}"


@dataclass(frozen=True)
class Growth:
    """The score of one kind of tensor at the begin and at the end of decode.

    Attributes:
        kind: of ``TensorResult``.
        first: geometric mean of the scores of the first quarter of the steps.
        last: of the last quarter; where any step's score is NaN or infinite, that.
        limit: largest ratio accepted.
    """

    kind: str
    first: float
    last: float
    limit: float

    @property
    def ratio(self) -> float:
        """Last over first; NaN or infinite where a score was."""
        return self.last / self.first

    @property
    def problem(self) -> str:
        """What is wrong in one sentence; empty where it is fine."""
        if not math.isfinite(self.ratio):
            return f"the error of {self.kind} over decode is not a number at every step"
        if self.ratio <= self.limit or self.last <= HARMLESS:
            return ""
        return (
            f"the error of {self.kind} grows over decode from {self.first:.3g} to {self.last:.3g} "
            f"times eager PyTorch's, {self.ratio:.3g}-fold; up to {self.limit:g}-fold is accepted"
        )


@dataclass(frozen=True)
class Location:
    """Where a failure begins.

    Attributes:
        layer: the first layer beyond its floor; None before the first or after the last.
        operator: of the first node beyond it there, such as ``MoeDispatch``; ``session`` where the
            graph is right, and what feeds it is not; ``kernels`` where what computes it is not.
        value: the node's output; of a session the input it fed wrong, or the tensor it handed out
            wrong, and the call, such as ``position_ids at decode 1``; of kernels the first value
            between the layers that is wrong, and the call; a weight that it reads, where that is.
        ratio: its error over the floor; infinite where ``detail`` or ``overflow`` says what is
            wrong, and 0 where the node is another than it should be without an effect on the
            numbers that were fed.
        inside: the first wrong operator of the node's branches or of the function that it calls,
            such as ``then_branch: Mul output val_3``; empty where nothing inside is wrong.
        detail: what is wrong with it, where that is no error, or what else there is to say; of an
            overflow, what eager PyTorch does.
        overflow: the largest number that it should hold, where that is beyond float16.
        run: the stage that shows it, where that is not one of the main run.
        is_weight: whether ``value`` is a weight.
    """

    layer: int | None
    operator: str
    value: str
    ratio: float
    inside: str = ""
    detail: str = ""
    overflow: float | None = None
    run: str = ""
    is_weight: bool = False

    @property
    def node(self) -> str:
        """The layer, the node and what is inside of it, in words."""
        where = "outside of the layers" if self.layer is None else f"layer {self.layer}"
        inside = f", in its {self.inside}" if self.inside else ""
        what = "weight" if self.is_weight else "output"
        return f"{where}, {self.operator} {what} {self.value}{inside}"

    def __str__(self) -> str:
        run = f", at {self.run}" if self.run else ""
        if self.overflow is not None:
            eager = f"; {self.detail}" if self.detail else ""
            beyond = f"{self.overflow:.2g} is beyond float16's 65504"
            preposition = "" if self.layer is None else "in "
            return f"overflow {preposition}{self.node}: {beyond}{eager}{run}"
        if self.operator == SESSION:
            found = f"not in the graph but in the session, {self.value}"
        elif self.operator == KERNELS:
            layer = "outside of the layers" if self.layer is None else f"in layer {self.layer}"
            found = f"not in the graph but in what computes it, {layer}, {self.value}"
        else:
            found = self.node
        if self.ratio == 0:
            found += ", another node than it should be"
        elif not math.isinf(self.ratio):
            found += f", {self.ratio:.3g}x floor"
        return f"{found}{', ' if self.detail else ''}{self.detail}{run}"


@dataclass(frozen=True)
class Check:
    """One comparison that needs no run: of the weights, the graph or the contract.

    Attributes:
        name: ``weights``, ``graph`` or ``contract``.
        compared: how many tensors, nodes or fields.
        problems: what is not as it should be, one sentence each.
        location: where the first of them is, as far as there is a layer.
        left_out: why all or some of it was not compared, in one sentence without a full stop;
            empty where all was.
    """

    name: str
    compared: int
    problems: tuple[str, ...] = ()
    location: Location | None = None
    left_out: str = ""


@dataclass(frozen=True)
class Gate:
    """What a baseline says of a validation.

    Attributes:
        baseline: the file.
        worse: what got worse since, one sentence each.
        note: what was held and how closely, where the baseline is of another processor; else empty.
    """

    baseline: str
    worse: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """One validation.

    Attributes:
        ingot: the folder.
        model_type: of the manifest, as are ``target`` and ``precision``.
        against: what the truth and the floor are, in words.
        seed: of the token ids.
        tensors: every tensor after every call, in order.
        routing: by mode, ``free``, ``replayed`` and ``forced``; empty for a model without routers.
        growth: of the errors over decode, by kind; empty where there were too few steps.
        distribution: None for a target without logits.
        location: where it went wrong, where it did.
        unlocated: why that could not be found, in one sentence, if it could not.
        environment: versions and machine, by name.
        hidden: error and floor of every hidden state by its layer, where there were such values.
        reason: why passing says nothing about the ingot itself, if it does not.
        seconds: the whole took.
        router_margin: smallest difference between the truth's K-th and next router logit.
        gate: what a baseline says, where the validation was held against one.
        checks: of the weights, the graph and the contract.
        coverage: what was asked; None where nothing was.
        plan: how much was fed, in a word or two.
        date: when, in UTC; empty in an ingot, in which nothing depends on the day.
        quantisation: what storing the weights costs; None where nothing is lost, or where another
            ingot stands in the truth's place.
        activations: of kernels that round activations; None where none does.
    """

    ingot: str
    model_type: str
    target: str
    precision: str
    against: str
    seed: int
    tensors: tuple[TensorResult, ...]
    routing: dict[str, Routing] = field(default_factory=dict)
    growth: tuple[Growth, ...] = ()
    distribution: Distribution | None = None
    location: Location | None = None
    unlocated: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    hidden: tuple[Hidden, ...] = ()
    reason: str | None = None
    seconds: float = 0.0
    router_margin: float | None = None
    gate: Gate | None = None
    checks: tuple[Check, ...] = ()
    coverage: Coverage | None = None
    plan: str = "standard"
    date: str = ""
    quantisation: Quantisation | None = None
    activations: Activations | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def failures(self) -> list[str]:
        """Every problem in one sentence, in the order they arose."""
        found = [f"{t.stage}, {t.name}: {t.problem}" for t in self.tensors if t.problem]
        proven = any(tensor.error is not None for tensor in self.tensors)
        if not proven and not found and self.reason is None:
            found.append("nothing was compared")
        for mode, routing in self.routing.items():
            found += [f"routing ({mode}), {problem}" for problem in routing.problems]
        found += [f"decode: {growth.problem}" for growth in self.growth if growth.problem]
        found += [f"{check.name}: {each}" for check in self.checks for each in check.problems]
        return found + self.costly

    @property
    def costly(self) -> list[str]:
        """What storing the weights costs beyond its limits, of all failures those of no kernel."""
        found = () if self.quantisation is None else self.quantisation.problems
        return [f"quantisation: {each}" for each in found]

    @property
    def short(self) -> tuple[str, ...]:
        """What the proof lacks, one sentence each: shapes of use, and checks that were not made."""
        parts = () if self.coverage is None else self.coverage.short
        checks = [f"{check.name}: {check.left_out}" for check in self.checks if check.left_out]
        return (*parts, *checks)

    @property
    def worse(self) -> tuple[str, ...]:
        """What got worse since the baseline, one sentence each."""
        return () if self.gate is None else self.gate.worse

    @property
    def verdict(self) -> Verdict:
        if self.failures or self.worse:
            return "failed"
        if self.reason is not None:
            return "skipped"
        return "passed, in part" if self.short else "passed"

    @property
    def place(self) -> str | None:
        """Where it went wrong, in words; None where it did not, or where no single place did."""
        if self.unlocated is not None:
            return f"a place that could not be found: {self.unlocated}"
        return None if self.location is None else str(self.location)

    @property
    def worst(self) -> dict[str, TensorResult]:
        """The tensor of the highest score, by kind.

        What was run in float32, or with activations rounded, is a kind of its own: its errors are a
        thousandth of those of the rest, or a thousand times as large.
        """
        result: dict[str, TensorResult] = {}
        for tensor in self.tensors:
            score = tensor.score
            if score is None:
                continue
            kind = tensor.kind + IN_FLOAT32 * tensor.in_float32 + ROUNDED * tensor.rounded
            before = result.get(kind)
            # No comparison with NaN is true; it is worse than any number.
            if before is None or math.isnan(score) or score > (before.score or 0.0):
                result[kind] = tensor
        return result

    def summary(self) -> dict[str, Any]:
        """What ``ingot.json`` keeps: the verdict and the figures behind it."""
        result: dict[str, Any] = {
            "verdict": self.verdict,
            "against": self.against,
            "seed": self.seed,
            "stages": len({tensor.stage for tensor in self.tensors}),
            "compared": sum(tensor.error is not None for tensor in self.tensors),
        }
        if self.activations is not None:
            result["activations"] = asdict(self.activations)
        if self.reason is not None:
            result["reason"] = self.reason
        if self.short:
            result["short"] = list(self.short)
        if self.checks:
            result["checks"] = {check.name: check.compared for check in self.checks}
        if self.coverage is not None:
            result["coverage"] = self.coverage.summary()
        for kind, tensor in self.worst.items():
            name = kind.replace(IN_FLOAT32, "_in_float32").replace(ROUNDED, "_rounded")
            result[f"{name}_score"] = tensor.score
            result[f"{name}_error"] = tensor.error
        for growth in self.growth:
            result[f"{growth.kind}_growth"] = growth.ratio
        if self.distribution is not None:
            result["kl_mean"] = self.distribution.kl_mean
            result["kl_max"] = self.distribution.kl_max
            result["top1_agreement"] = self.distribution.top1_agreement
        elif agreements := [t.top1 for t in self.tensors if t.top1 is not None]:
            result["top1_agreement"] = min(agreements)
        if self.quantisation is not None:
            result["quantisation"] = self.quantisation.summary()
        if self.router_margin is not None:
            result["router_margin"] = self.router_margin
        for mode, routing in self.routing.items():
            mode = mode.replace(ROUNDED, "_rounded")
            result[f"routing_agreement_{mode}"] = min(routing.agreement, default=1.0)
        if self.failures:
            result["first_failure"] = self.failures[0]
        if self.place is not None:
            result["location"] = self.place
        if self.worse:
            result["first_worse"] = self.worse[0]
        return result
