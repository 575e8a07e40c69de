"""One validation: the target and the eager graph side by side through prefill and decode."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from export.ingot import REPORT, Manifest, StateInfo, Verdict
from plugins.device import has_gpu
from runtime.session import Floats, Ids, load
from validate.compare import Comparison, compare
from validate.eager import EagerSession
from validate.inputs import DECODE, Inputs, make_inputs

# Calls of one validation: the prefill and each decode step.
CALLS = 1 + DECODE


class Stepper(Protocol):
    """What is compared: anything that takes tokens and has state."""

    def reset(self, batch: int, capacity: int) -> None: ...

    def step(self, input_ids: Ids, attention_mask: Ids) -> Floats: ...

    def state(self) -> dict[str, Floats]: ...


@dataclass(frozen=True)
class Validation:
    """The outcome.

    Attributes:
        comparisons: every tensor at every step.
        inputs: what was fed.
        router_margin: of the eager graph; see ``EagerSession``.
        reason: why passing says nothing about the ingot itself, if it does not.
    """

    comparisons: list[Comparison]
    inputs: Inputs
    seed: int
    router_margin: float | None
    reason: str | None = None

    @property
    def failures(self) -> list[Comparison]:
        return [comparison for comparison in self.comparisons if comparison.problem]

    @property
    def verdict(self) -> Verdict:
        if self.failures:
            return "failed"
        return "passed" if self.reason is None else "skipped"

    def summary(self) -> dict[str, Any]:
        """What ``ingot.json`` keeps: the verdict and the figures behind it."""
        if self.verdict == "skipped":
            figures = {**self._figures(), "verdict": "passed"}
            return {"verdict": "skipped", "reason": self.reason, "graph": figures}
        return self._figures()

    def _figures(self) -> dict[str, Any]:
        """The worst of the main output and of the states."""
        batch, total = self.inputs.input_ids.shape
        result: dict[str, Any] = {
            "verdict": self.verdict,
            "against": "eager PyTorch, float32",
            "seed": self.seed,
            "batch": batch,
            "prefill_tokens": self.inputs.prefill,
            "decode_steps": total - self.inputs.prefill if self.inputs.stateful else 0,
            "calls": len(self.inputs.steps),
            "compared": sum(comparison.errors is not None for comparison in self.comparisons),
            "router_margin": self.router_margin,
        }
        main = [c for c in self.comparisons if c.name in ("logits", "last_hidden_state")]
        states = [c for c in self.comparisons if c not in main]
        for name, group in (("main", main), ("states", states)):
            figures = [c.errors for c in group if c.errors]
            if figures:
                result[f"{name}_max_abs"] = max(f.max_abs for f in figures)
                result[f"{name}_relative_rms"] = max(f.relative_rms for f in figures)
        agreements = [c.top1 for c in main if c.top1 is not None]
        if agreements:
            result["top1_agreement"] = min(agreements)
        if self.failures:
            first = self.failures[0]
            result["first_failure"] = f"{first.step}, {first.name}: {first.problem}"
        return result

    def write(self, folder: Path) -> None:
        """Write ``report/validation.json`` into an ingot."""
        rows = [asdict(comparison) for comparison in self.comparisons]
        (folder / REPORT).mkdir(exist_ok=True)
        text = json.dumps({**self.summary(), "comparisons": rows}, indent=1)
        (folder / REPORT / "validation.json").write_text(text + "\n")


def compare_sessions(
    expected: Stepper,
    actual: Stepper,
    inputs: Inputs,
    main_output: str,
    states: Sequence[StateInfo],
    advance: Callable[[int], None] = lambda _steps: None,
) -> list[Comparison]:
    """Feed both sessions the same calls and compare every output after each.

    Padding positions are left out: their values mean nothing, and a target may compute others.
    """
    kinds = {state.output: str(state.kind) for state in states}
    kinds[main_output] = "logits" if main_output == "logits" else "hidden"
    axes = {state.output: state.axis for state in states}
    batch, total = inputs.input_ids.shape
    for session in (expected, actual):
        session.reset(batch, total)
    results = []
    for step, columns in inputs.steps:
        ids, mask = inputs.input_ids[:, columns], inputs.attention_mask[:, columns]
        seen = inputs.attention_mask[:, : columns.stop] != 0
        tensors = []
        for session in (expected, actual):
            main = session.step(ids, mask)
            # A classifier has one output a row, and not one a token.
            found = {main_output: main[mask != 0] if main.ndim == 3 else main}
            for name, array in session.state().items():
                axis = axes.get(name)
                found[name] = array if axis is None else np.moveaxis(array, axis, 1)[seen]
            tensors.append(found)
        results += compare(step, tensors[0], tensors[1], kinds)
        advance(1)
    return results


def cannot_compare(manifest: Manifest) -> str | None:
    """Why an ingot cannot be compared with eager PyTorch; None where it can."""
    if manifest.precision == "float32":
        return None
    return (
        f"there are limits for float32 only, and this ingot is {manifest.precision}; "
        "--precision fp32 compares the same graph"
    )


def validate_ingot(
    folder: Path,
    expected: EagerSession,
    *,
    seed: int = 0,
    verify: bool = True,
    advance: Callable[[int], None] = lambda _steps: None,
) -> Validation:
    """Compare an ingot with the eager graph of its checkpoint.

    Args:
        folder: the ingot.
        expected: the eager graph of the checkpoint it was made from.
        seed: of the token ids.
        verify: check the folder's hashes first.
        advance: told of each finished call.
    """
    manifest = Manifest.read(folder)
    graph_only = manifest.engine is not None and not has_gpu()
    session = load(folder, verify=verify, allow_failed=True, graph_only=graph_only)
    chunk_size = getattr(getattr(expected.model, "config"), "chunk_size", 0)
    inputs = make_inputs(
        manifest.vocab_size, seed, chunk_size=chunk_size, stateful=bool(manifest.states)
    )
    comparisons = compare_sessions(
        expected, session, inputs, manifest.main_output, manifest.states, advance
    )
    reason = "the engine did not run, for want of a GPU; its graph passed on ONNX Runtime"
    return Validation(
        comparisons, inputs, seed, expected.router_margin, reason if graph_only else None
    )
