"""One validation: the target beside the eager graph, in its own precision and one higher."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from export.ingot import Manifest, StateInfo
from export.progress import Stages
from graphs.checkpoint import Checkpoint
from plugins.device import has_gpu
from runtime.session import Floats, Ids, load
from validate.compare import compare
from validate.eager import EagerSession
from validate.inputs import DECODE, Inputs, make_inputs
from validate.metrics import Array
from validate.result import Report, TensorResult

# One precision higher than the target's.
TRUTH = {"float32": torch.float64, "float16": torch.float32, "bfloat16": torch.float32}
# Calls of one validation: a prefill and each decode step, a split at a chunk's end and off it, and
# each row alone.
CALLS = 1 + DECODE + 4 + 2
LIBRARIES = ("torch", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13")


class Stepper(Protocol):
    """What is compared: anything that takes tokens and has state."""

    def reset(self, batch: int, capacity: int) -> None: ...

    def step(self, input_ids: Ids, attention_mask: Ids) -> Floats: ...

    def state(self) -> dict[str, Floats]: ...


class Reference:
    """The eager graph of a checkpoint twice: the truth, and in the precision of a target.

    A graph that does not fit in half of the free memory is streamed from the checkpoint, layer by
    layer, for every call.

    Args:
        checkpoint: the weights.
        task: a task of the family.
        precision: of the target: ``float32``, ``float16`` or ``bfloat16``.
        advance: told the bytes of each weight that is loaded up front.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        task: str,
        precision: str = "float32",
        *,
        advance: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        self.checkpoint = checkpoint
        self.precision = precision
        self.truth = EagerSession(checkpoint, task, precision=TRUTH[precision], advance=advance)
        own: torch.dtype = getattr(torch, precision)
        self.eager = EagerSession(checkpoint, task, precision=own, advance=advance)
        self.chunk_size: int = getattr(getattr(self.eager.model, "config"), "chunk_size", 0)

    @property
    def against(self) -> str:
        """What the target is compared with, in words."""
        truth = str(TRUTH[self.precision]).removeprefix("torch.")
        return f"eager PyTorch in {truth}, beside eager PyTorch in {self.precision}"

    def inputs(self, manifest: Manifest, seed: int) -> Inputs:
        """What an ingot of this checkpoint is fed."""
        stateful = bool(manifest.states)
        return make_inputs(manifest.vocab_size, seed, chunk_size=self.chunk_size, stateful=stateful)


@dataclass(frozen=True)
class _Call:
    """Rows and columns of the inputs that one call feeds, and what the results are called."""

    stage: str
    rows: slice
    columns: slice
    compared: bool = True


def _runs(inputs: Inputs) -> Iterator[list[_Call]]:
    """Sequences of calls, each from an empty state."""
    every = slice(None)
    yield [_Call(stage, every, columns) for stage, columns in inputs.steps]
    if not inputs.stateful:
        return
    # A state must carry over whatever the call boundaries are.
    for split in inputs.splits:
        rest = inputs.prefill - split
        yield [
            _Call("", every, slice(0, split), compared=False),
            _Call(f"split {split}+{rest}", every, slice(split, inputs.prefill)),
        ]
    # A padded row must compute what it computes alone.
    for row in range(len(inputs.input_ids)):
        first = int((inputs.attention_mask[row] == 0).sum())
        yield [_Call(f"row {row} alone", slice(row, row + 1), slice(first, inputs.prefill))]


def compare_sessions(
    truth: Stepper,
    eager: Stepper,
    target: Stepper,
    inputs: Inputs,
    main_output: str,
    states: Sequence[StateInfo],
    precision: str = "float32",
    advance: Callable[[int], None] = lambda _calls: None,
) -> list[TensorResult]:
    """Feed three sessions the same calls and compare every output after each.

    Padding positions are left out: their values mean nothing, and a target may compute others.
    """
    kinds = {state.output: str(state.kind) for state in states}
    kinds[main_output] = "logits" if main_output == "logits" else "hidden"
    axes = {state.output: state.axis for state in states}
    results = []
    for calls in _runs(inputs):
        first = calls[0].columns.start
        for session in (truth, eager, target):
            rows, total = inputs.input_ids[calls[0].rows].shape
            session.reset(rows, total)
        for call in calls:
            ids = inputs.input_ids[call.rows, call.columns]
            mask = inputs.attention_mask[call.rows, call.columns]
            seen = inputs.attention_mask[call.rows, first : call.columns.stop] != 0
            tensors = []
            for session in (truth, eager, target):
                main = session.step(ids, mask)
                # A classifier has one output a row, and not one a token.
                found: dict[str, Array] = {main_output: main[mask != 0] if main.ndim == 3 else main}
                for name, array in session.state().items():
                    found[name] = _real(array, axes.get(name), seen)
                tensors.append(found)
            if call.compared:
                of_truth, of_eager, of_target = tensors
                results += compare(call.stage, of_truth, of_eager, of_target, kinds, precision)
            advance(1)
    return results


def _real(array: Floats, axis: int | None, seen: npt.NDArray[np.bool_]) -> Floats:
    """The positions of a cache that hold tokens; one of another length is left as it is."""
    if axis is None or array.shape[axis] != seen.shape[1]:
        return array
    result: Floats = np.moveaxis(array, axis, 1)[seen]
    return result


def cannot_compare(manifest: Manifest) -> str | None:
    """Why an ingot cannot be compared with eager PyTorch on this machine; None where it can."""
    if manifest.precision == "float32":
        return None
    return (
        f"this ingot is {manifest.precision}, where a rounding error may change a router's choice "
        "and with it every number after; --precision fp32 compares the same graph"
    )


def validate_ingot(
    folder: Path,
    reference: Reference,
    *,
    seed: int = 0,
    verify: bool = True,
    name: str | None = None,
    advance: Callable[[int], None] = lambda _calls: None,
) -> Report:
    """Compare an ingot with the eager graph of its checkpoint.

    Args:
        folder: the ingot.
        reference: the eager graph of the checkpoint it was made from.
        seed: of the token ids.
        verify: check the folder's hashes first.
        name: of the ingot in the report; by default the folder's.
        advance: told of each finished call.
    """
    manifest = Manifest.read(folder)
    graph_only = manifest.engine is not None and not has_gpu()
    session = load(folder, verify=verify, allow_failed=True, graph_only=graph_only)
    tensors = compare_sessions(
        reference.truth,
        reference.eager,
        session,
        reference.inputs(manifest, seed),
        manifest.main_output,
        manifest.states,
        manifest.precision,
        advance,
    )
    reason = "the engine did not run, for want of a GPU; its graph passed on ONNX Runtime"
    return Report(
        ingot=name or folder.name,
        model_type=manifest.model_type,
        target=manifest.target,
        precision=manifest.precision,
        against=reference.against,
        seed=seed,
        tensors=tuple(tensors),
        router_margin=reference.truth.router_margin,
        environment={**environment(), "checkpoint": manifest.source.get("sha256", "unknown")},
        reason=reason if graph_only else None,
    )


def load_reference(manifest: Manifest, checkpoint: Checkpoint, stages: Stages) -> Reference:
    """The reference of an ingot, as a step that is shown."""
    # The truth is twice as wide.
    with stages.stage("load eager reference", 3 * manifest.weight_bytes) as advance:
        return Reference(checkpoint, manifest.task, manifest.precision, advance=advance)


def examine(
    folder: Path,
    reference: Reference,
    stages: Stages,
    *,
    seed: int = 0,
    verify: bool = True,
    name: str | None = None,
) -> Report:
    """``validate_ingot`` as a step that is shown; a failure is located in a second."""
    with stages.stage("validate against eager PyTorch", CALLS, "steps") as advance:
        report = validate_ingot(
            folder, reference, seed=seed, verify=verify, name=name, advance=advance
        )
    if report.verdict != "failed":
        return report
    with stages.stage("find where it goes wrong"):
        return _located(report, folder, reference)


def _located(report: Report, folder: Path, reference: Reference) -> Report:
    """A failed report with the place where the graph goes wrong, if it is in the graph."""
    from validate.locate import LocateError, locate

    inputs = reference.inputs(Manifest.read(folder), report.seed)
    try:
        return replace(report, location=locate(folder, reference.checkpoint, inputs))
    except LocateError:
        # What failed is reported all the same.
        return report


def spread(first: Report, second: Report) -> dict[str, float]:
    """By kind, how far two runs of one validation are apart, as a share of the score."""
    result: dict[str, float] = {}
    for one, other in zip(first.tensors, second.tensors, strict=True):
        if one.score and other.score:
            apart = abs(one.score - other.score) / min(one.score, other.score)
            result[one.kind] = max(result.get(one.kind, 0.0), apart)
    return result


def environment() -> dict[str, str]:
    """What the figures may depend on: the versions of the libraries, and the processor's kind."""
    found = {"machine": platform.machine(), "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
