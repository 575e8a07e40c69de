"""The table that tuning prints to commit."""

from __future__ import annotations

from benchmarks.on_gpu.tuning import steps, tables

TIMES = {
    4: {"built-in": 1.0, "64x64": 1.0, "128x64": 1.5},
    16: {"built-in": 1.0, "64x64": 1.01, "128x64": 1.0},
    64: {"built-in": 0.5, "64x64": 2.0, "128x64": 1.0},
    128: {"built-in": 1.0, "64x64": 2.0, "128x64 b64w8s4": 0.8, "128x64": 1.0},
}


def test_a_tile_stays_until_another_is_clearly_faster() -> None:
    assert steps(TIMES) == [(0, "64x64"), (64, "128x64"), (128, "128x64 b64w8s4")]


def test_prints_lines_of_the_host_layers_tables() -> None:
    chunks = {128: {"built-in": 1.0, "64": 0.5}, 4096: {"built-in": 1.0, "256 k64w8s3": 0.9}}
    found = [{"table": "tiles", "at": at, "seconds_of": times} for at, times in TIMES.items()]
    found += [{"table": "chunks", "at": at, "seconds_of": times} for at, times in chunks.items()]
    lines = tables([*found, {"text": "cut short"}], 90)
    assert lines[1:4] == [
        "{90, 0, {64, 64}},",
        "{90, 64, {128, 64}},",
        "{90, 128, {128, 64}},  // b64w8s4",
    ]
    assert lines[-1] == '{90, 256, "_k64w8s3"},'
    # As far as a run came.
    assert tables(found[:1], 90)[1:] == ["{90, 0, {64, 64}},"]
    assert tables([], 90) == []
