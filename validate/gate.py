"""Whether a validation is as good as the one before, which a baseline file remembers.

On the processor that made the baseline every score and every error is held to it. On another one
the same sums are taken in another order, and eager PyTorch's errors, the floors, are others. So
there the target's errors alone are held, within what was measured between processors: those of each
tensor, and more closely their mean over all calls.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ingot.plugins.errors import shown
from ingot.validate.baseline import (
    KL,
    NEW,
    Baseline,
    Entry,
    GateError,
    cost_figures,
    covered,
    gated_figures,
    identity,
)
from ingot.validate.judge.limits import SCORE_FLOOR
from ingot.validate.processor import HARDWARE, ISA, PROCESSOR, THREADS
from ingot.validate.report.words import LISTED, number
from ingot.validate.result import ROUNDED, Gate, Report, TensorResult
from ingot.validate.truth.inputs import EXPERTS_FORCED

# How many measured spreads a figure may rise: three are chance once in hundreds of runs.
SPREADS = 3.0
# Nats; below it a divergence is rounding of its own sum over the vocabulary.
KL_FLOOR = 1e-14
# Of what storing the weights costs, which is computed in float64 on every processor.
COST_SLACK = 1e-6
# Shares differ by whole tokens; this only absorbs the division.
SHARE_FLOOR = 1e-9
# How the stage of a call ends that was judged with the truth's experts.
REPLAYED = ", replayed"
# How many threads a session has that is given another number depends on the machine.
_THREADS = re.compile(r"\b\d+ threads?\b")
# Characters of an entry that changed, such as a list of versions.
SAID = 200

# What may differ of the environment: this is what the gate is to judge.
MAY_DIFFER = frozenset({"ingot"})


@dataclass(frozen=True)
class Slack:
    """What is chance between a baseline and a run.

    Attributes:
        spread: relative, by kind; a kind that was not measured has the largest.
        mean: the same of the mean of one tensor's errors over all calls; None where those of each
            call are held closely enough.
        floors: whether eager PyTorch's errors are those of the baseline too, and so the scores.
        choices: whether the experts that are chosen are to be the same.
        note: what is held on another processor, in words; empty on the same.
    """

    spread: Mapping[str, float]
    mean: Mapping[str, float] | None = None
    floors: bool = True
    choices: bool = True
    note: str = ""

    def of(self, kind: str) -> float:
        """The relative rise of one figure that is chance."""
        return _slack(self.spread, kind)

    @property
    def by(self) -> str:
        """What it is that is chance."""
        return "run-to-run spread" if self.mean is None else "another processor"

    @property
    def kl(self) -> float:
        """Of a divergence, which goes with the square of the errors of the logits."""
        if self.mean is None:
            return self.of("kl")
        return (1 + self.of("logits")) ** 2 - 1


def _slack(spread: Mapping[str, float], kind: str) -> float:
    return SPREADS * spread.get(kind, max(spread.values(), default=0.0))


def gated(report: Report, baseline: Baseline, path: Path) -> Report:
    """The report with what its baseline says of it.

    Args:
        report: what was found.
        baseline: of ``read_baseline``.
        path: of its file.

    Raises:
        GateError: the baseline is of something else.
    """
    slack = require_comparable(report, baseline, path)
    _require_calls(report, baseline, path)
    worse = (
        *_failed(report),
        *_tensors(report, baseline, slack),
        *_distributions(report, baseline, slack),
        *_routing(report, baseline, slack),
        *_costs(report, baseline),
        *_covered(report, baseline),
    )
    return replace(report, gate=Gate(str(path), worse, slack.note))


def require_comparable(report: Report, baseline: Baseline, path: Path) -> Slack:
    """Refuse a baseline of something else; the report need not have any figures yet.

    Returns:
        What is chance between the two.

    Raises:
        GateError: saying what differs.
    """
    then, now = baseline.identity, identity(report)
    changed = _differences(then, now)
    if changed and then["plan"] != now["plan"]:
        raise GateError(
            f"the baseline {path} is of another plan: it fed {_said(then, 'plan')} and this is "
            f"{_said(now, 'plan')}; validate as then, or {NEW}."
        )
    if changed:
        raise GateError(f"the baseline {path} is of something else: {_few(changed)}; {NEW}.")
    changed = _differences(_kept(baseline.environment), _kept(report.environment))
    if changed:
        raise GateError(
            f"the baseline {path} was made in another environment, which voids the comparison: "
            f"{_few(changed)}; {NEW}."
        )
    return _slack_between(report.environment, baseline, path)


def _slack_between(environment: Mapping[str, str], baseline: Baseline, path: Path) -> Slack:
    """What is chance between the processor of the baseline and this one."""
    then, spread = baseline.environment, baseline.spread
    changed = [name for name in PROCESSOR if then.get(name) != environment.get(name)]
    if not changed:
        return Slack(spread.run)
    if changed == [ISA] or (set(changed) <= {ISA, THREADS} and spread.threads):
        # ONNX Runtime takes the same kernels, so that the target is to be the same.
        kinds = spread.run.keys() | spread.threads.keys()
        run = {k: max(spread.run.get(k, 0.0), spread.threads.get(k, 0.0)) for k in kinds}
        note = f"made with other settings ({_changes(then, environment, changed)}): errors are held"
        return Slack(run, floors=False, choices=THREADS not in changed, note=note)
    if not spread.processors:
        raise GateError(
            f"the baseline {path} was made on another processor "
            f"({_changes(then, environment, changed)}), and how far its figures move between "
            f"processors was not measured; {NEW}."
        )
    note = (
        f"made on another processor ({_changes(then, environment, changed)}): errors are held, "
        f"each within {SPREADS * max(spread.tensor.values(), default=0.0):.0%} and the means of "
        f"all calls within {SPREADS * max(spread.mean.values(), default=0.0):.0%} at most"
    )
    return Slack(spread.tensor, spread.mean, floors=False, choices=False, note=note)


def _changes(then: Mapping[str, str], now: Mapping[str, str], names: Iterable[str]) -> str:
    # The name of a processor says more to people than what it can do.
    listed = [name for name in names if name not in HARDWARE] or list(names)
    if HARDWARE[0] in names:
        listed = [HARDWARE[0]]
    return ", ".join(f"{name} was {_said(then, name)} and is {_said(now, name)}" for name in listed)


def _require_calls(report: Report, baseline: Baseline, path: Path) -> None:
    """Refuse a baseline that lacks what the same plan of the same Ingot runs."""
    if baseline.environment.get("ingot") != report.environment.get("ingot"):
        return
    had = {_call(stage) for stage, _ in baseline.tensors}
    ran = dict.fromkeys(_call(t.stage) for t in report.tensors if t.error is not None)
    lacking = [call for call in ran if call not in had]
    if lacking:
        raise GateError(
            f"the baseline {path} lacks {_few(lacking)}, which its plan has, so it was cut or "
            f"made by another build of Ingot; {NEW}."
        )


def _stage(stage: str) -> str:
    """A stage as machines with more and with fewer processors both have it."""
    return _THREADS.sub("other threads", stage)


def _call(stage: str) -> str:
    """A call, however it was judged: where flips left nothing of it, it is there as replayed."""
    rounded = ROUNDED * stage.endswith(ROUNDED)
    return _stage(stage).removesuffix(ROUNDED).removesuffix(REPLAYED) + rounded


def _kept(environment: Mapping[str, str]) -> dict[str, str]:
    left_out = MAY_DIFFER.union(PROCESSOR)
    return {name: value for name, value in environment.items() if name not in left_out}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Every entry that changed, in words, in alphabetical order."""
    return [
        f"{name} was {_said(then, name)} and is {_said(now, name)}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def _few(changed: list[str]) -> str:
    more = f" and {len(changed) - LISTED} more" if len(changed) > LISTED else ""
    return ", ".join(changed[:LISTED]) + more


def _said(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    text = " ".join(str(value).split())
    return "not given" if value is None else text if len(text) <= SAID else shown(text)


def _failed(report: Report) -> Iterator[str]:
    failures = report.failures
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        yield f"the validation itself failed: {failures[0]}{more}"


def _tensors(report: Report, baseline: Baseline, slack: Slack) -> Iterator[str]:
    then = {(_stage(stage), name): entry for (stage, name), entry in baseline.tensors.items()}
    missing = dict.fromkeys(then)
    rises: dict[tuple[str, str], list[float]] = defaultdict(list)
    for tensor in report.tensors:
        key = (_stage(tensor.stage), tensor.name)
        entry = then.get(key)
        if entry is None or tensor.error is None:
            continue
        missing.pop(key, None)
        if not slack.floors and tensor.stage.startswith(EXPERTS_FORCED):
            # The token counts that is furthest off in floors, which may be another one.
            continue
        if tensor.error > 0 and entry.error > 0:
            rises[entry.kind, tensor.name].append(math.log(tensor.error / entry.error))
        problem = _worse(tensor, tensor.error, entry, slack)
        if problem:
            yield f"{tensor.stage}, {tensor.name}: {problem}"
    if slack.mean is not None:
        yield from _means(rises, slack.mean)
    if not slack.choices:
        # Where a near-tie turned, the tokens after it are judged with the truth's experts alone.
        replayed = {
            (_call(t.stage), t.name)
            for t in report.tensors
            if t.error is not None and t.stage.removesuffix(ROUNDED).endswith(REPLAYED)
        }
        missing = {key: None for key in missing if (_call(key[0]), key[1]) not in replayed}
    if missing:
        names = [" ".join(key) for key in missing]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"the set of compared tensors shrank: without {', '.join(names[:3])}{more}"


def _means(
    rises: Mapping[tuple[str, str], list[float]], spread: Mapping[str, float]
) -> Iterator[str]:
    """Every tensor whose errors rose in the mean of all calls, which chance moves least."""
    for (kind, name), logarithms in rises.items():
        rise = math.expm1(sum(logarithms) / len(logarithms))
        slack = _slack(spread, kind) + SCORE_FLOOR
        if not rise <= slack:
            yield (
                f"{name}: its error rose by {rise:.1%} in the mean of {len(logarithms)} calls "
                f"(another processor explains {slack:.1%})"
            )


def _worse(tensor: TensorResult, error: float, then: Entry, slack: Slack) -> str:
    """What got worse of one tensor; the comparisons are such that NaN is worse."""
    score, room = tensor.score, slack.of(then.kind)
    rise = f"{slack.by} explains {room:.1%}"
    if then.score is not None:
        if score is None:
            return f"it has no score any more, and was {number(then.score)}"
        if slack.floors and not score <= then.score * (1 + room) + SCORE_FLOOR:
            return f"score {number(score)}, was {number(then.score)} ({rise})"
    # Also where the score held: an error that rose together with its floor hides behind it.
    floor = then.error / then.score if then.score else 0.0
    if not error <= then.error * (1 + room) + SCORE_FLOOR * floor:
        return f"error {number(error)}, was {number(then.error)} ({rise})"
    return ""


def _distributions(report: Report, baseline: Baseline, slack: Slack) -> Iterator[str]:
    then, now = baseline.distribution, gated_figures(report.distribution)
    if not then:
        return
    if not now:
        yield "next-token distributions are not compared any more"
        return
    if now["tokens"] < then["tokens"] and slack.choices:
        yield f"distributions of {now['tokens']:.0f} tokens are compared, was {then['tokens']:.0f}"
    for name in KL:
        if not now[name] <= then[name] * (1 + slack.kl) + KL_FLOOR:
            yield (
                f"{name} {number(now[name])} nats, was {number(then[name])} "
                f"({slack.by} explains {slack.kl:.1%})"
            )
    room = slack.of("top1") if slack.mean is None else 0.0
    what = "top-1 agreement, near-ties aside,"
    yield from _share(what, now["top1"], then["top1"], room, slack.by)


def _routing(report: Report, baseline: Baseline, slack: Slack) -> Iterator[str]:
    for mode, then in baseline.routing.items():
        found = report.routing.get(mode)
        now = () if found is None else found.agreement
        if len(now) < len(then):
            yield f"routing ({mode}) of {len(now)} routers is compared, was {len(then)}"
        if not slack.choices:
            # A near-tie turns with the order of a sum; a flip that rounding does not explain is a
            # failure of the validation itself.
            continue
        for router, (new, old) in enumerate(zip(now, then, strict=False)):
            what = f"routing ({mode}), router {router}: agreement"
            yield from _share(what, new, old, slack.of("routing"), slack.by)


def _costs(report: Report, baseline: Baseline) -> Iterator[str]:
    """What storing the weights costs more than it did: no kernel is part of it, and no chance."""
    now = cost_figures(report)
    if not now:
        # Nothing is lost any more.
        return
    for name, then in baseline.quantisation.items():
        what = f"cost of the stored weights, {name}"
        if name not in now:
            yield f"{what}: not measured any more"
        elif name == "top1":
            if not now[name] >= then - SHARE_FLOOR:
                yield f"{what} agreement {now[name]:.2%}, was {then:.2%}"
        elif not now[name] <= then * (1 + COST_SLACK) + KL_FLOOR:
            yield f"{what} {number(now[name])}, was {number(then)}"


def _share(what: str, new: float, old: float, room: float, by: str) -> Iterator[str]:
    if not new >= old * (1 - room) - SHARE_FLOOR:
        yield f"{what} {new:.2%}, was {old:.2%} ({by} explains {room:.1%})"


def _covered(report: Report, baseline: Baseline) -> Iterator[str]:
    """Everything that the baseline asked and the report did not."""
    then, now = baseline.covered, covered(report)
    for name, count in then.checks.items():
        if name not in now.checks:
            yield f"{name}: not compared any more, as a whole"
        elif now.checks[name] < count:
            yield f"{name}: {now.checks[name]:.0f} compared, was {count:.0f}"
    for part in then.parts:
        if part not in now.parts:
            yield f"{part}: not covered any more"
    for name, count in then.counts.items():
        if now.counts.get(name, 0.0) < count:
            yield f"coverage: {now.counts.get(name, 0.0):.0f} {name}, was {count:.0f}"
    for name, values in then.sets.items():
        lost = [value for value in values if value not in now.sets.get(name, ())]
        if lost:
            yield f"coverage: {name} without {_few(lost)}"
    for router, count in then.experts.items():
        if now.experts.get(router, 0.0) < count:
            ran = now.experts.get(router, 0.0)
            yield f"coverage: {ran:.0f} experts of {router} were run, was {count:.0f}"
