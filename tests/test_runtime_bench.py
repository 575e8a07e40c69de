"""``bench`` measures what it says: counted by a session and a clock of known speed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ingot.export.ingot import Manifest
from ingot.runtime.bench import LENGTHS, WARM_UP, Speed, bench, usual_lengths
from ingot.runtime.cli import bench_command
from ingot.runtime.session import Floats, Ids, SessionError


class Clocked:
    """A session whose calls take as long as they have tokens, on a clock that it moves."""

    def __init__(self, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
        self.manifest = manifest
        self.fed: dict[str, Ids] = {}
        self.tapped: dict[str, Floats] = {}
        self.calls: list[tuple[int, int, int]] = []
        self.kept: list[int] = []
        self.now = 0.0
        self.seen = 0
        monkeypatch.setattr("ingot.runtime.bench.time.perf_counter", lambda: self.now)

    def reset(self, batch: int, capacity: int) -> None:
        self.size = batch, capacity
        self.seen = 0

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        assert (attention_mask == 1).all()
        self.calls.append((*input_ids.shape, self.seen))
        self.kept.append(logits_to_keep)
        self.seen += input_ids.shape[1]
        assert input_ids.shape[0] == self.size[0] and self.seen <= self.size[1]
        # The first calls are slow, as everywhere.
        slow = 50.0 if len(self.calls) <= WARM_UP else 1.0
        self.now += slow * input_ids.shape[1]
        return np.zeros((*input_ids.shape, 1), np.float32)[:, -logits_to_keep:]

    def state(self) -> dict[str, Any]:
        return {}

    @property
    def changes(self) -> int:
        return len(self.calls)

    def fork(self) -> Clocked:
        raise AssertionError("one session is measured")


def test_measures_prefill_and_decode(tiny_ort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Clocked(Manifest.read(tiny_ort), monkeypatch)
    rows = list(bench(session, (1, 3), (8, 32), 5))
    # A token takes a second, whatever the batch.
    assert rows == [
        Speed(what, batch, length, float(batch), 0.0)
        for batch in (1, 3)
        for length in (8, 32)
        for what in ("prefill", "decode")
    ]
    repeated = WARM_UP + 5
    first = session.calls[: 2 * repeated]
    assert first[:repeated] == [(1, 8, 0)] * repeated
    # Each step has one token more behind it, from the prefill on.
    assert first[repeated:] == [(1, 1, 8 + n) for n in range(repeated)]


def test_measures_a_long_prompt_as_a_generation_feeds_it(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.read(tiny_onnx)
    generation = {**manifest.generation, "context_length": None}
    session = Clocked(replace(manifest, generation=generation), monkeypatch)
    prefill, _ = bench(session, (1,), (1100,), 3)
    assert prefill.tokens_per_second == 1.0
    assert session.calls[:3] == [(1, 512, 0), (1, 512, 512), (1, 76, 1024)]
    assert set(session.kept) == {1}


def test_refuses_more_than_the_context(tiny_ort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Clocked(Manifest.read(tiny_ort), monkeypatch)
    with pytest.raises(SessionError, match="exceed this model's context of 512"):
        list(bench(session, (1,), (500,), 20))


def test_measures_by_default_what_the_context_takes(
    tiny_ort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Clocked(Manifest.read(tiny_ort), monkeypatch)
    assert usual_lengths(session, 20) == (16, 128, 512 - WARM_UP - 20)
    assert usual_lengths(session, 400) == (16, 110)
    assert len(list(bench(session, (1,), usual_lengths(session, 400), 400))) == 4
    # A state of fixed size has no longest context.
    session.manifest.generation["context_length"] = None
    assert usual_lengths(session, 20) == LENGTHS


def test_prints_a_table(tiny_ort: Path) -> None:
    arguments = [str(tiny_ort), "--batch", "2", "--length", "4", "--repetitions", "3"]
    result = CliRunner().invoke(bench_command, arguments)
    assert result.exit_code == 0, result.output
    assert "prefill" in result.output and "decode" in result.output
    assert re.search(r"peak memory of the process: [\d,]+ MB", result.output)
    missing = CliRunner().invoke(bench_command, ["nowhere"])
    assert missing.exit_code == 2 and "is not an ingot" in missing.output
