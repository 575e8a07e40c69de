"""The file that a later validation is held against: what it holds, and what makes it damaged."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ingot.plugins.errors import IngotError, shown
from ingot.plugins.json_file import JsonError, parse_json
from ingot.plugins.whole import write_whole
from ingot.validate.report.texts import plain
from ingot.validate.result import Distribution, Report, TensorResult

# Of the file. The first had no digest, no plan and no coverage.
VERSION = 2
# Bytes of a file: a hundred for each tensor after each call.
MOST_BYTES = 64 << 20
# A spread beyond it is no measurement: one run would be four times as exact as the other.
MOST_SPREAD = 3.0
# No tensor passes with a score or an error near these, whatever the precision.
MOST_SCORE = 64.0
MOST_ERROR = 10.0
# Nats between two distributions over any vocabulary.
MOST_KL = 1e3

NEW = "save a new one with --save-baseline"
KL = ("kl_mean", "kl_p99", "kl_max")
_IDENTITY = ("model_type", "target", "precision", "against", "seed", "plan", "reason")
_COUNTS = ("calls", "positions", "ids", "chunks")
_SETS = ("rows", "lengths", "paddings")
_DIGEST = "sha256"


class GateError(IngotError):
    """A baseline that a report cannot be held against, so that the gate says nothing."""


@dataclass(frozen=True)
class Entry:
    """One tensor as it was; ``score`` is None where it had no finite one."""

    kind: str
    score: float | None
    error: float


@dataclass(frozen=True)
class Spread:
    """How far figures move where nothing is wrong, relative, such as 0.02.

    Attributes:
        run: between two runs of the same thing, by kind of tensor, and of ``kl``, ``top1`` and
            ``routing``.
        threads: of the target's errors, between counts of threads, by kind; empty where this was
            not measured.
        tensor: of one tensor's error between processors, by kind.
        mean: of the geometric mean over the calls of one tensor, between processors, by kind.
        processors: which were compared; none where that was not measured.
    """

    run: dict[str, float] = field(default_factory=dict)
    threads: dict[str, float] = field(default_factory=dict)
    tensor: dict[str, float] = field(default_factory=dict)
    mean: dict[str, float] = field(default_factory=dict)
    processors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Covered:
    """What was asked, as far as a later validation has to ask it too.

    Attributes:
        counts: of calls, positions, token ids and chunks.
        sets: the batch sizes, lengths and paddings.
        parts: the shapes of use that were covered.
        experts: by router, how many were run.
        checks: by name, how many tensors, nodes or fields were compared; only of checks that left
            nothing out.
    """

    counts: dict[str, float] = field(default_factory=dict)
    sets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    experts: dict[str, float] = field(default_factory=dict)
    checks: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """What the file holds.

    Attributes:
        identity: what was validated, against what, by which plan.
        environment: of the run.
        spread: how far figures move where nothing is wrong.
        tensors: by stage and name.
        distribution: KL figures, tokens and share of right or tied likeliest tokens; may be empty.
        routing: by mode, the agreement of each router.
        covered: what was asked.
        quantisation: figures of what storing the weights costs, see ``cost_figures``; empty where
            nothing was lost.
    """

    identity: dict[str, Any]
    environment: dict[str, str]
    spread: Spread
    tensors: dict[tuple[str, str], Entry]
    distribution: dict[str, float]
    routing: dict[str, list[float]]
    covered: Covered
    quantisation: dict[str, float] = field(default_factory=dict)


def save_baseline(report: Report, path: Path, spread: Spread) -> None:
    """Write what later reports are held against.

    Args:
        report: one that passed.
        path: of the file; it appears whole or not at all.
        spread: of its figures; a kind that was left out takes the largest given.

    Raises:
        GateError: the report failed or compared nothing, or the spread is no measurement.
    """
    if report.failures:
        raise GateError(f"a report that failed is no baseline: {report.failures[0]}.")
    if not report.tensors:
        raise GateError(f"nothing was compared, which is no baseline: {report.reason}.")
    tensors: dict[str, dict[str, Any]] = {}
    for tensor in report.tensors:
        if tensor.error is not None:
            tensors.setdefault(tensor.stage, {})[tensor.name] = _entry(tensor)
    for name in ("run", "threads", "tensor", "mean"):
        for kind, value in getattr(spread, name).items():
            if not 0 <= value <= MOST_SPREAD:
                raise GateError(
                    f"two validations of this ingot differ by {value:.3g} times their own figures "
                    f"in {kind}, and more than {MOST_SPREAD:g} is no spread to hold anything "
                    "against; look why, and validate with --thorough."
                )
    data = plain(
        {
            "schema_version": VERSION,
            "identity": identity(report),
            "environment": report.environment,
            "spread": asdict(spread),
            "tensors": tensors,
            "distribution": gated_figures(report.distribution),
            "routing": {mode: found.agreement for mode, found in report.routing.items()},
            "covered": asdict(covered(report)),
        }
    )
    # Most have none, and an earlier Ingot's file is of the same version.
    if costs := cost_figures(report):
        data["quantisation"] = plain(costs)
    data[_DIGEST] = _digest(data)
    write_whole(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def identity(report: Report) -> dict[str, Any]:
    """What two validations share of which one can be held against the other."""
    return {name: getattr(report, name) for name in _IDENTITY}


def gated_figures(found: Distribution | None) -> dict[str, float]:
    """The figures of next-token distributions that are gated; none where there are none."""
    if found is None or not found.kl:
        return {}
    # A near-tie that turned says nothing, so it counts as agreement.
    share = found.top1_agreement + found.near_ties / found.tokens
    kl = {name: float(getattr(found, name)) for name in KL}
    return {"tokens": found.tokens, "top1": min(1.0, share), **kl}


def cost_figures(report: Report) -> dict[str, float]:
    """What storing the weights costs, as far as it is gated; all but ``top1`` is better if less."""
    found = report.quantisation
    if found is None:
        return {}
    result: dict[str, float] = {}
    if found.recorded is not None:
        kl = {name: float(getattr(found.recorded.found, name)) for name in KL}
        result |= {"top1": found.recorded.found.top1_agreement, **kl}
    for layer in found.layers:
        where = "the final norm" if layer.normed else f"layer {layer.layer}"
        result[f"hidden states behind {where}"] = layer.error
    for weight in found.weights:
        where = "" if weight.layer is None else f"layer {weight.layer}, "
        result[f"weights of {where}{weight.kind}"] = weight.error
    return result


def covered(report: Report) -> Covered:
    """What a validation asked, as a baseline keeps it."""
    checks = {each.name: each.compared for each in report.checks if not each.left_out}
    found = report.coverage
    if found is None:
        return Covered(checks=dict(checks))
    return Covered(
        counts={name: getattr(found, name) for name in _COUNTS},
        sets={name: tuple(map(str, getattr(found, name))) for name in _SETS},
        parts=tuple(part.name for part in found.parts if part.covered),
        experts={each.router: len(each.chosen) + len(each.forced) for each in found.experts},
        checks=dict(checks),
    )


def _entry(tensor: TensorResult) -> dict[str, Any]:
    score = tensor.score
    if tensor.error is None or not math.isfinite(tensor.error):
        raise GateError(
            f"{tensor.stage}, {tensor.name}: an error of {tensor.error} is no baseline."
        )
    finite = score is not None and math.isfinite(score)
    return {"kind": tensor.kind, "score": score if finite else None, "error": tensor.error}


def _digest(data: dict[str, Any]) -> str:
    """SHA-256 of all that a file says but its digest, in the one order and spacing there is."""
    said = {name: value for name, value in data.items() if name != _DIGEST}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_baseline(path: Path) -> Baseline:
    """What ``save_baseline`` wrote.

    Raises:
        GateError: the file cannot be read, is damaged or edited, or is of another version.
    """
    try:
        # A pipe would be waited for.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise GateError(f"cannot read the baseline {path}: it is no file.")
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise GateError(f"there is no baseline {path}; {NEW}.") from None
    except OSError as error:
        raise GateError(f"cannot read the baseline {path}: {error.strerror or error}.") from error
    if len(raw) > MOST_BYTES:
        raise GateError(f"the baseline {path} is damaged: it is over {MOST_BYTES} bytes; {NEW}.")
    try:
        data = parse_json(raw, "it")
    except JsonError as error:
        raise GateError(f"the baseline {path} is damaged: {error}; {NEW}.") from None
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found is None:
        raise GateError(f"the baseline {path} is damaged: it has no schema version; {NEW}.")
    if found != VERSION or isinstance(found, bool):
        raise GateError(
            f"the baseline {path} has schema version {shown(found)}, and this Ingot reads "
            f"{VERSION}; {NEW}."
        )
    try:
        return _parse(data)
    except KeyError as error:
        raise GateError(f"the baseline {path} is damaged: it lacks {error}; {NEW}.") from None
    except ValueError as error:
        raise GateError(f"the baseline {path} is damaged: {error}; {NEW}.") from None


def _parse(data: dict[str, Any]) -> Baseline:
    tensors = {
        (stage, name): _parse_entry(f"{stage}, {name}", entry)
        for stage, entries in _object(data, "tensors").items()
        for name, entry in _object({stage: entries}, stage).items()
    }
    if not tensors:
        raise ValueError("it holds no tensors")
    distribution = _object(data, "distribution")
    routing = _object(data, "routing")
    if not all(isinstance(layers, list) for layers in routing.values()):
        raise ValueError("'routing' is not a list for each mode")
    result = Baseline(
        {name: _object(data, "identity")[name] for name in _IDENTITY},
        {name: str(value) for name, value in _object(data, "environment").items()},
        _parse_spread(_object(data, "spread")),
        tensors,
        _parse_distribution(distribution) if distribution else {},
        {mode: [_number(mode, share, 1.0) for share in each] for mode, each in routing.items()},
        _parse_covered(_object(data, "covered")),
        {
            name: _number(name, value, MOST_KL, -1e-6)
            for name, value in _object({"quantisation": {}} | data, "quantisation").items()
        },
    )
    # Last: of a file that was cut or mistyped, more can be said than that it is not what it was.
    # What was edited with care is refused here.
    if data[_DIGEST] != _digest(data):
        raise ValueError("its digest is of another content, so it was edited or cut")
    return result


def _parse_distribution(data: dict[str, Any]) -> dict[str, float]:
    return {
        "tokens": _number("tokens", data["tokens"]),
        "top1": _number("top1", data["top1"], 1.0),
        # A divergence of nothing may round to just below zero.
        **{name: _number(name, data[name], MOST_KL, -1e-6) for name in KL},
    }


def _parse_spread(data: dict[str, Any]) -> Spread:
    by_kind = {
        name: {
            kind: _number(kind, value, MOST_SPREAD) for kind, value in _object(data, name).items()
        }
        for name in ("run", "threads", "tensor", "mean")
    }
    return Spread(**by_kind, processors=_texts(data, "processors"))


def _parse_covered(data: dict[str, Any]) -> Covered:
    counted = {
        name: {each: _number(each, value) for each, value in _object(data, name).items()}
        for name in ("counts", "experts", "checks")
    }
    sets = _object(data, "sets")
    return Covered(
        counts=counted["counts"],
        sets={name: _texts(sets, name) for name in sets},
        parts=_texts(data, "parts"),
        experts=counted["experts"],
        checks=counted["checks"],
    )


def _parse_entry(where: str, entry: Any) -> Entry:
    fields = _object({where: entry}, where)
    score = fields["score"]
    return Entry(
        str(fields["kind"]),
        None if score is None else _number(where, score, MOST_SCORE),
        _number(where, fields["error"], MOST_ERROR),
    )


def _object(data: dict[str, Any], name: str) -> dict[str, Any]:
    value = data[name]
    if not isinstance(value, dict):
        raise ValueError(f"{shown(name)} is not an object")
    return value


def _texts(data: dict[str, Any], name: str) -> tuple[str, ...]:
    value = data[name]
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{shown(name)} is not a list of texts")
    return tuple(value)


def _number(name: str, value: Any, most: float = 1e18, least: float = 0.0) -> float:
    # bool is an int to Python and a mistake here.
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{shown(value)} of {shown(name)} is not a number")
    if not least <= value <= most:
        raise ValueError(f"{shown(value)} of {shown(name)} is out of range")
    return float(value)
