"""A prompt in pieces: the columns of each call, and what a long one adds to a session's memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint, MakeIngot

from ingot.export.ingot import Manifest
from ingot.runtime.prompt import PREFILL_CHUNK, chunk_of, pieces
from ingot.runtime.session import SessionError


def cut(manifest: Manifest, rows: int, tokens: int, *chunk: int) -> list[tuple[int, int]]:
    return [(part.start, part.stop) for part in pieces(manifest, rows, tokens, *chunk)]


def test_cuts_a_prompt_into_equal_pieces_and_a_rest(tiny_onnx: Path) -> None:
    manifest = Manifest.read(tiny_onnx)
    assert cut(manifest, 2, 7, 3) == [(0, 3), (3, 6), (6, 7)]
    assert cut(manifest, 2, 6, 3) == [(0, 3), (3, 6)]
    assert cut(manifest, 2, 2, 3) == [(0, 2)]
    assert cut(manifest, 2, 7, 0) == [(0, 7)]
    assert cut(manifest, 1, 1200) == [(0, PREFILL_CHUNK), (512, 1024), (1024, 1200)]


def test_leaves_a_prompt_whole_where_pieces_are_something_else(
    ingots: Callable[..., Path], tiny_onnx: Path, tiny_ort: Path
) -> None:
    manifest = Manifest.read(tiny_onnx)
    turned = replace(manifest, generation={**manifest.generation, "switch_length": 6})
    assert cut(turned, 1, 6, 4) == [(0, 4), (4, 6)]
    assert cut(turned, 1, 7, 4) == [(0, 7)]
    shared = Manifest.read(tiny_ort)
    assert cut(shared, 1, 7, 4) == [(0, 4), (4, 7)]
    assert cut(shared, 2, 7, 4) == [(0, 7)]
    assert cut(Manifest.read(ingots("mamba2", "ort")), 2, 7, 4) == [(0, 4), (4, 7)]
    lowered = Manifest.read(ingots("olmoe", "trt", builder="none"))
    assert cut(lowered, 1, 7, 4) == [(0, 7)]


@pytest.mark.parametrize("given", [-1, 1.5, "4", None, True])
def test_refuses_what_is_no_number_of_tokens(given: Any) -> None:
    with pytest.raises(SessionError, match=r"prefill_chunk is .*; it must be a whole number"):
        chunk_of(given)


# What a process holds, beside the peak that it had since it was asked to forget it.
GROWTH = """
import json, sys
from pathlib import Path
from ingot.runtime.generate import generate
from ingot.runtime.loading import load

def held(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1000

session = load(sys.argv[1])
list(generate(session, [[1, 2, 3]], max_new_tokens=2, stop_ids=()))
before = held("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
prompt = [n * 7919 % 49152 for n in range(8000)]
made = list(generate(session, [prompt], max_new_tokens=2, stop_ids=(), **json.loads(sys.argv[2])))
print(json.dumps([held("VmHWM") - before, made]))
"""


def growth(ingot: Path, **options: Any) -> tuple[float, list[list[int]]]:
    """The megabytes that a prompt of 8,000 tokens adds to a session, and what follows it."""
    command = [sys.executable, "-c", GROWTH, str(ingot), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    megabytes, made = json.loads(done.stdout)
    return megabytes, made


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="Linux counts so")
@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_adds_little_to_a_session_s_memory(
    target: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint(
        "granite",
        vocab_size=49152,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    ingot = make_ingot(checkpoint, target)
    megabytes, made = growth(ingot)
    # Measured: 75 and 360; with the logits of all tokens they alone were 1,600, and copied once.
    assert megabytes < 400
    whole, same = growth(ingot, prefill_chunk=0)
    assert made == same
    assert whole > 2 * megabytes
