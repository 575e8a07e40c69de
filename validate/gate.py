"""Whether a validation is as good as the one before: a baseline file and what is held to it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ingot.plugins.errors import IngotError, shown
from ingot.plugins.json_file import JsonError, parse_json
from ingot.plugins.whole import write_whole
from ingot.validate.judge.limits import SCORE_FLOOR
from ingot.validate.report.texts import plain
from ingot.validate.report.words import LISTED, number
from ingot.validate.result import SCHEMA_VERSION, Distribution, Gate, Report, TensorResult

# How many measured run-to-run spreads a figure may rise: three are chance once in hundreds of runs.
SPREADS = 3.0
# Nats; below it a divergence is rounding of its own sum over the vocabulary.
KL_FLOOR = 1e-14
# Shares differ by whole tokens; this only absorbs the division.
SHARE_FLOOR = 1e-9

# Bytes of a baseline: a hundred for each tensor after each call.
MOST_BYTES = 64 << 20
MOST = sys.float_info.max
# Characters of an entry that changed, such as a list of versions.
SAID = 200

# Environment entries that may differ: the ingot is what the gate is to judge, and the host's name
# says nothing about its kind.
MAY_DIFFER = frozenset({"ingot", "hostname"})

_IDENTITY = ("model_type", "target", "precision", "against", "seed", "reason")
_KL = ("kl_mean", "kl_p99", "kl_max")
_NEW = "save a new one with --save-baseline"


class GateError(IngotError):
    """A baseline that a report cannot be held against, so that the gate says nothing."""


@dataclass(frozen=True)
class Entry:
    """One tensor as it was; ``score`` is None where it had no finite one."""

    kind: str
    score: float | None
    error: float


@dataclass(frozen=True)
class Baseline:
    """What the file holds.

    Attributes:
        identity: what was validated, against what.
        environment: of the run.
        spread: by kind, ``kl``, ``top1`` or ``routing``: relative run-to-run spread.
        tensors: by stage and name.
        distribution: KL figures, tokens and share of right or tied likeliest tokens; may be empty.
        routing: by mode, the agreement of each router.
    """

    identity: dict[str, Any]
    environment: dict[str, str]
    spread: dict[str, float]
    tensors: dict[tuple[str, str], Entry]
    distribution: dict[str, float]
    routing: dict[str, list[float]]

    def slack(self, kind: str) -> float:
        """The relative rise that is chance; a kind that was not measured has the largest."""
        return SPREADS * self.spread.get(kind, max(self.spread.values(), default=0.0))


def save_baseline(report: Report, path: Path, spread: Mapping[str, float]) -> None:
    """Write what later reports are held against.

    Args:
        report: one that passed.
        path: of the file; it appears whole or not at all.
        spread: by kind of tensor, and of ``kl``, ``top1`` and ``routing``: how far two runs of the
            same thing differ, relative, such as 0.02. One left out takes the largest given.

    Raises:
        GateError: the report failed or compared nothing.
    """
    if report.failures:
        raise GateError(f"a report that failed is no baseline: {report.failures[0]}.")
    if not report.tensors:
        raise GateError(f"nothing was compared, which is no baseline: {report.reason}.")
    tensors: dict[str, dict[str, Any]] = {}
    for tensor in report.tensors:
        if tensor.error is not None:
            tensors.setdefault(tensor.stage, {})[tensor.name] = _entry(tensor)
    if any(not (math.isfinite(value) and value >= 0) for value in spread.values()):
        raise GateError(f"a run-to-run spread is not a number of at least 0: {dict(spread)}.")
    data = {
        "schema_version": report.schema_version,
        "identity": _identity(report),
        "environment": report.environment,
        "spread": spread,
        "tensors": tensors,
        "distribution": _distribution(report.distribution),
        "routing": {mode: found.agreement for mode, found in report.routing.items()},
    }
    write_whole(path, json.dumps(plain(data), indent=1, allow_nan=False) + "\n")


def gated(report: Report, baseline: Baseline, path: Path) -> Report:
    """The report with what its baseline says of it.

    Args:
        report: what was found.
        baseline: of ``read_baseline``.
        path: of its file.

    Raises:
        GateError: the baseline is of something else.
    """
    require_comparable(report, baseline, path)
    return replace(report, gate=Gate(str(path), tuple(_regressions(report, baseline))))


def _regressions(report: Report, baseline: Baseline) -> list[str]:
    return [
        *_failed(report),
        *_tensors(report, baseline),
        *_distributions(report, baseline),
        *_routing(report, baseline),
    ]


def _identity(report: Report) -> dict[str, Any]:
    return {name: getattr(report, name) for name in _IDENTITY}


def _entry(tensor: TensorResult) -> dict[str, Any]:
    score = tensor.score
    if tensor.error is None or not math.isfinite(tensor.error):
        raise GateError(
            f"{tensor.stage}, {tensor.name}: an error of {tensor.error} is no baseline."
        )
    finite = score is not None and math.isfinite(score)
    return {"kind": tensor.kind, "score": score if finite else None, "error": tensor.error}


def _distribution(found: Distribution | None) -> dict[str, float]:
    """The figures that are gated."""
    if found is None or not found.kl:
        return {}
    # A near-tie that turned says nothing, so it counts as agreement.
    share = found.top1_agreement + found.near_ties / found.tokens
    kl = {name: float(getattr(found, name)) for name in _KL}
    return {"tokens": found.tokens, "top1": min(1.0, share), **kl}


def read_baseline(path: Path, version: int = SCHEMA_VERSION) -> Baseline:
    """What ``save_baseline`` wrote.

    Raises:
        GateError: the file cannot be read, is damaged, or has another schema version.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise GateError(f"there is no baseline {path}; {_NEW}.") from None
    except OSError as error:
        raise GateError(f"cannot read the baseline {path}: {error.strerror or error}.") from error
    if len(raw) > MOST_BYTES:
        raise GateError(f"the baseline {path} is damaged: it is over {MOST_BYTES} bytes; {_NEW}.")
    try:
        data = parse_json(raw, "it")
    except JsonError as error:
        raise GateError(f"the baseline {path} is damaged: {error}; {_NEW}.") from None
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found is None:
        raise GateError(f"the baseline {path} is damaged: it has no schema version; {_NEW}.")
    if found != version:
        raise GateError(
            f"the baseline {path} has schema version {shown(found)} and the report {version}; "
            f"{_NEW}."
        )
    try:
        return _parse(data)
    except KeyError as error:
        raise GateError(f"the baseline {path} is damaged: it lacks {error}; {_NEW}.") from None
    except ValueError as error:
        raise GateError(f"the baseline {path} is damaged: {error}; {_NEW}.") from None


def _parse(data: dict[str, Any]) -> Baseline:
    tensors = {
        (stage, name): _parse_entry(f"{stage}, {name}", entry)
        for stage, entries in _object(data, "tensors").items()
        for name, entry in _object({stage: entries}, stage).items()
    }
    if not tensors:
        raise ValueError("it holds no tensors")
    distribution = _object(data, "distribution")
    names = ("tokens", "top1", *_KL) if distribution else ()
    routing = _object(data, "routing")
    if not all(isinstance(layers, list) for layers in routing.values()):
        raise ValueError("'routing' is not a list for each mode")
    return Baseline(
        {name: _object(data, "identity")[name] for name in _IDENTITY},
        {name: str(value) for name, value in _object(data, "environment").items()},
        {kind: _number(kind, value) for kind, value in _object(data, "spread").items()},
        tensors,
        {name: _number(name, distribution[name]) for name in names},
        {mode: [_number(mode, share) for share in layers] for mode, layers in routing.items()},
    )


def _parse_entry(where: str, entry: Any) -> Entry:
    fields = _object({where: entry}, where)
    score = fields["score"]
    return Entry(
        str(fields["kind"]),
        None if score is None else _number(where, score),
        _number(where, fields["error"]),
    )


def _object(data: dict[str, Any], name: str) -> dict[str, Any]:
    value = data[name]
    if not isinstance(value, dict):
        raise ValueError(f"{shown(name)} is not an object")
    return value


def _number(name: str, value: Any) -> float:
    # bool is an int to Python and a mistake here.
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{shown(value)} of {shown(name)} is not a number")
    # A KL divergence of nothing may round to just below zero; an integer may be no float.
    if not -1e-6 < value <= MOST:
        raise ValueError(f"{shown(value)} of {shown(name)} is out of range")
    return float(value)


def require_comparable(report: Report, baseline: Baseline, path: Path) -> None:
    """Refuse a baseline of something else; the report need not have any figures yet.

    Raises:
        GateError: saying what differs.
    """
    changed = _differences(baseline.identity, _identity(report))
    if changed:
        raise GateError(f"the baseline {path} is of something else: {_few(changed)}; {_NEW}.")
    changed = _differences(_kept(baseline.environment), _kept(report.environment))
    if changed:
        raise GateError(
            f"the baseline {path} was made in another environment, which voids the comparison: "
            f"{_few(changed)}; {_NEW}."
        )


def _kept(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in MAY_DIFFER}


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


def _tensors(report: Report, baseline: Baseline) -> Iterator[str]:
    missing = dict.fromkeys(baseline.tensors)
    for tensor in report.tensors:
        key = (tensor.stage, tensor.name)
        entry = baseline.tensors.get(key)
        if entry is None or tensor.error is None:
            continue
        missing.pop(key, None)
        problem = _worse(tensor, tensor.error, entry, baseline.slack(entry.kind))
        if problem:
            yield f"{tensor.stage}, {tensor.name}: {problem}"
    if missing:
        names = [" ".join(key) for key in missing]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"the set of compared tensors shrank: without {', '.join(names[:3])}{more}"


def _worse(tensor: TensorResult, error: float, then: Entry, slack: float) -> str:
    """What got worse of one tensor; the comparisons are such that NaN is worse."""
    score = tensor.score
    rise = f"run-to-run spread explains {slack:.1%}"
    if then.score is not None:
        if score is None:
            return f"it has no score any more, and was {number(then.score)}"
        if not score <= then.score * (1 + slack) + SCORE_FLOOR:
            return f"score {number(score)}, was {number(then.score)} ({rise})"
    # Also where the score held: an error that rose together with its floor hides behind it.
    floor = then.error / then.score if then.score else 0.0
    if not error <= then.error * (1 + slack) + SCORE_FLOOR * floor:
        return f"error {number(error)}, was {number(then.error)} ({rise})"
    return ""


def _distributions(report: Report, baseline: Baseline) -> Iterator[str]:
    then, now = baseline.distribution, _distribution(report.distribution)
    if not then:
        return
    if not now:
        yield "next-token distributions are not compared any more"
        return
    if now["tokens"] < then["tokens"]:
        yield f"distributions of {now['tokens']:.0f} tokens are compared, was {then['tokens']:.0f}"
    slack = baseline.slack("kl")
    for name in _KL:
        if not now[name] <= then[name] * (1 + slack) + KL_FLOOR:
            yield (
                f"{name} {number(now[name])} nats, was {number(then[name])} "
                f"(run-to-run spread explains {slack:.1%})"
            )
    slack = baseline.slack("top1")
    yield from _share("top-1 agreement, near-ties aside,", now["top1"], then["top1"], slack)


def _routing(report: Report, baseline: Baseline) -> Iterator[str]:
    for mode, then in baseline.routing.items():
        found = report.routing.get(mode)
        now = () if found is None else found.agreement
        if len(now) < len(then):
            yield f"routing ({mode}) of {len(now)} routers is compared, was {len(then)}"
        for router, (new, old) in enumerate(zip(now, then, strict=False)):
            what = f"routing ({mode}), router {router}: agreement"
            yield from _share(what, new, old, baseline.slack("routing"))


def _share(what: str, new: float, old: float, slack: float) -> Iterator[str]:
    if not new >= old * (1 - slack) - SHARE_FLOOR:
        yield f"{what} {new:.2%}, was {old:.2%} (run-to-run spread explains {slack:.1%})"
