"""Why the ``ort`` target swaps what it swaps: each kernel against what it replaces, interleaved.

Run with ``.venv/bin/python benchmarks/lower_ort.py olmoe`` (or ``jetmoe``); docs/performance.md has
figures of such runs. One layer of OLMoE-1B-7B's or JetMoE-8B's shape, float32. Every figure is the
median of interleaved repetitions.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from ingot.export.build import build
from ingot.export.passes.attention import AttentionToGroupQueryAttention
from ingot.export.passes.moe import MoeDispatchToMoE
from ingot.export.passes.moe_linear import MoeLinearToMatMuls
from ingot.export.progress import Stages
from ingot.export.request import ExportRequest
from ingot.graphs.family import find_family
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.runtime.loading import load
from ingot.runtime.session import Session

REPETITIONS = 7

# Family -> the columns of its table, and the passes each of them goes without.
WITHOUT: dict[str, dict[str, tuple[type[ir.passes.InPlacePass], ...]]] = {
    "olmoe": {
        "function body, Attention": (MoeDispatchToMoE, AttentionToGroupQueryAttention),
        "MoE, Attention": (AttentionToGroupQueryAttention,),
        "MoE, GroupQueryAttention": (),
    },
    "jetmoe": {
        "function body of MoeLinear": (MoeLinearToMatMuls,),
        "one MatMul per expert": (),
    },
}


def variants(model_type: str, folder: Path) -> dict[str, Session]:
    """The same layer, lowered in each way."""
    family = find_family(model_type)
    config = {**preset_config(family, "full"), "num_hidden_layers": 1, "vocab_size": 1024}
    config.update(eos_token_id=None, max_position_embeddings=16384)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    write_checkpoint(checkpoint, family, config)
    sessions: dict[str, Session] = {}
    for name, passes in WITHOUT[model_type].items():
        out = folder / name.replace(" ", "-")
        patches = [mock.patch.object(p, "call", _nothing) for p in passes]
        for patch in patches:
            patch.start()
        build(ExportRequest(str(checkpoint), "ort", out), Stages(), None)
        for patch in patches:
            patch.stop()
        sessions[name] = load(out, verify=False)
    return sessions


def _nothing(_self: object, model: ir.Model) -> ir.passes.PassResult:
    return ir.passes.PassResult(model, modified=False)


def median_ms(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Milliseconds of each call; the calls take turns, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPETITIONS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def step(session: Session, batch: int, tokens: int) -> Callable[[], None]:
    random = np.random.default_rng(batch)
    ids = random.integers(0, 1024, (batch, tokens))
    return lambda: void(session.step(ids, np.ones_like(ids)))


def prefill(session: Session, batch: int, tokens: int) -> Callable[[], None]:
    call = step(session, batch, tokens)

    def run() -> None:
        session.reset(batch, tokens + REPETITIONS)
        call()

    return run


def void(_result: object) -> None:
    """A call for its duration alone."""


def main() -> None:
    model_type = sys.argv[1] if len(sys.argv) > 1 else "olmoe"
    print(f"{model_type}, onnxruntime {onnxruntime.__version__}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        sessions = variants(model_type, Path(folder))
        print("| batch | tokens | call | " + " | ".join(sessions) + " |")
        print("|---|---|---|" + "---|" * len(sessions))
        for batch, tokens in ((1, 16), (1, 128), (1, 512), (1, 2048), (4, 128), (4, 1024)):
            calls = {name: prefill(session, batch, tokens) for name, session in sessions.items()}
            row(batch, tokens, "prefill", median_ms(calls))
            calls = {name: step(session, batch, 1) for name, session in sessions.items()}
            row(batch, tokens, "decode after it", median_ms(calls))


def row(batch: int, tokens: int, call: str, found: dict[str, float]) -> None:
    cells = " | ".join(f"{value:.1f} ms" for value in found.values())
    print(f"| {batch} | {tokens} | {call} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
