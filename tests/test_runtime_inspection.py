"""``inspect`` says what is in the folder, and what follows from it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from conftest import MakeCheckpoint, MakeIngot
from damage import copied

from ingot.export.ingot import GRAPH, LIBRARY, WEIGHTS, Manifest
from ingot.export.progress import Stages
from ingot.export.summary import print_summary
from ingot.runtime.inspection import States, _rows, inspect, inspect_command


def test_counts_what_one_token_touches(tiny_ort: Path) -> None:
    found = inspect(tiny_ort)
    # 2 layers, key and value of 2 heads of 16, in float32.
    assert found.state_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert found.state_bytes_per_sequence == 0 and found.shared_buffers
    # Of 8 experts 2 are touched: [8, 2 * 32, 64] and [8, 64, 32] in two layers.
    experts = 2 * (8 * 64 * 64 + 8 * 64 * 32)
    assert found.active_parameters == found.parameters - experts * 6 // 8
    # Of the table of 512 embeddings one row of 64 is read, and the whole output projection.
    assert found.active_bytes == 4 * (found.active_parameters - 511 * 64)
    assert found.decode_bytes(100) == found.active_bytes + 100 * found.state_bytes_per_token
    assert found.sequence_bytes(100) == 100 * found.state_bytes_per_token
    # The caches by kind: half of the bytes each, [B, 2, P, 16] of both layers.
    half = found.state_bytes_per_token // 2
    shape = ("batch", 2, "past_sequence", 16)
    assert found.states == tuple(
        States(kind, 2, "float32", shape, half, True, True) for kind in ("key", "value")
    )
    assert found.lowered == {
        "GroupQueryAttention": "ONNX Runtime's kernel, for Attention and its caches",
        "MoE": "ONNX Runtime's kernel, for MoeDispatch",
    }


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_also_the_output_projection_is_read_whole(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tied: bool
) -> None:
    config = make_checkpoint("granite", tie_word_embeddings=tied)
    found = inspect(make_ingot(config, "ort"))
    table = {each.name: each.bytes for each in found.weights}["model.embed_tokens.weight"]
    row = table // 512
    assert found.active_bytes == found.weight_bytes - (0 if tied else table - row)


def test_weighs_every_tensor_once(tiny_onnx: Path) -> None:
    found = inspect(tiny_onnx)
    assert sum(each.bytes for each in found.weights) == found.weight_bytes
    named = {each.name: each for each in found.weights}
    router = named["model.layers.*.mlp.gate.weight"]
    assert (router.count, router.dtype, router.bytes) == (2, "F32", 2 * 8 * 64 * 4)
    assert found.lowered == {"MoeDispatch": "function body of standard operators"}
    assert not found.shared_buffers


def test_knows_a_state_of_fixed_size_and_half_precision(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    folder = make_ingot(make_checkpoint("mamba2"), "trt", builder="none", precision="fp16")
    found = inspect(folder)
    assert (found.precision, found.context_length, found.engine) == ("float16", None, None)
    assert found.state_bytes_per_token == 0
    sizes = {"float16": 2, "float32": 4}
    expected = 0
    for state in Manifest.read(folder).states:
        elements = sizes[state.dtype]
        for size in state.input_shape[1:]:
            elements *= int(size)
        expected += elements
    assert found.state_bytes_per_sequence == expected > 0
    # The convolution's state is in the graph's precision, the scan's always in float32.
    assert {state.kind: state.dtype for state in found.states} == {
        "conv": "float16",
        "ssm": "float32",
    }
    assert sum(state.bytes for state in found.states) == found.sequence_bytes(9) == expected
    # Written and read.
    assert found.decode_bytes(7) == found.active_bytes + 2 * expected
    # A_log, D and dt_bias stay in float32.
    assert {each.dtype for each in found.weights} == {"F16", "F32"}
    assert found.lowered["Mamba2Scan"] == "function body of standard operators"


def test_counts_kernels_inside_of_branches(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    folder = make_ingot(make_checkpoint("mamba2"), "ort")

    def nodes(graph: onnx.GraphProto) -> Iterator[str]:
        for node in graph.node:
            yield node.op_type
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    yield from nodes(attribute.g)

    graph = onnx.load(folder / GRAPH, load_external_data=False).graph
    found = inspect(folder)
    assert found.operators == Counter(nodes(graph))
    # One branch for one token, one for several, in each of two layers; and nowhere else.
    assert found.operators["LinearAttention"] == 4
    assert "LinearAttention" not in {node.op_type for node in graph.node}
    how = "ONNX Runtime's kernel, for Mamba2Scan"
    assert found.lowered == {"LinearAttention": how}
    shown = CliRunner().invoke(inspect_command, [str(folder)]).output
    assert "4 LinearAttention" in shown and how in shown
    printed = json.loads(CliRunner().invoke(inspect_command, [str(folder), "--json"]).output)
    assert printed["operators"]["LinearAttention"] == 4
    assert printed["lowered"] == {"LinearAttention": how}
    table = io.StringIO()
    stages = Stages()
    with stages.stage("all"):
        pass
    with contextlib.redirect_stdout(table):
        print_summary(folder, folder, Manifest.read(folder), stages)
    assert f"{sum(found.operators.values())} (4 LinearAttention)" in table.getvalue()


def test_shows_and_prints_json(tiny_ort: Path) -> None:
    shown = CliRunner().invoke(inspect_command, [str(tiny_ort)])
    assert shown.exit_code == 0
    for text in ("olmoe, generate, float32, for ort", "model.norm.weight", "model.onnx", "MoE"):
        assert text in shown.output
    # Never a length that the model does not take.
    assert "decode after 512" in shown.output and "1024" not in shown.output
    words = " ".join(re.sub(r"[^\w,.;]", " ", shown.output).split())
    assert "[batch, 2, past_sequence, 16]" in shown.output
    assert "262,144 a sequence of 512 tokens" in words
    printed = CliRunner().invoke(inspect_command, [str(tiny_ort), "--json"])
    data = json.loads(printed.output)
    assert data["files"] == {
        name: {"bytes": info.bytes, "sha256": info.sha256}
        for name, info in Manifest.read(tiny_ort).files.items()
    }


def test_knows_what_products_took_along(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, cpu_library: object
) -> None:
    found = inspect(make_ingot(make_checkpoint("granite"), "ort", kernels="ingot"))
    own = {name for name, said in found.lowered.items() if said == "Ingot's own kernel"}
    assert own == {"Attention", "Embedding", "Linear", "Linears", "Mlp"}


def test_says_whose_kernels_run_it(
    own_kernels: Path,
    tiny_ort: Path,
    tiny_onnx: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = inspect(own_kernels)
    library = Manifest.read(own_kernels).files[LIBRARY].sha256
    said = f"Ingot's own, in {LIBRARY} with the SHA-256 {library}"
    assert ("kernels", said) in list(_rows(found)) and found.kernels == said
    assert found.lowered == dict.fromkeys(
        ("Embedding", "Linear", "Mamba2Mixer"), "Ingot's own kernel"
    )
    # They read weights as they are stored, which others widen as they load them.
    half = found.weight_bytes // 2
    stored = copied(own_kernels, tmp_path / "ingot", weights="bfloat16", weight_bytes=half)
    assert inspect(stored).active_bytes == half
    assert ("kernels", "ONNX Runtime's") in list(_rows(inspect(tiny_ort)))
    assert "kernels" not in dict(_rows(inspect(tiny_onnx)))
    stages = Stages()
    with stages.stage("all"):
        pass
    print_summary(own_kernels, own_kernels, Manifest.read(own_kernels), stages)
    assert library in "".join(re.findall("[0-9a-f]+", capsys.readouterr().out))


def test_shows_a_cache_whose_length_nothing_limits(tiny_ort: Path, tmp_path: Path) -> None:
    """As of a model with caches and no positions."""
    generation = {**Manifest.read(tiny_ort).generation, "context_length": None}
    ingot = copied(tiny_ort, tmp_path / "ingot", generation=generation)
    rows = dict(_rows(inspect(ingot)))
    shared = "in buffers that past and present share"
    assert rows["cache"] == f"512 bytes a token and sequence, {shared}"
    assert "context" not in rows and "state" not in rows


@pytest.mark.parametrize("damage", ["missing", "short", "garbage", "pipe"])
def test_refuses_weights_without_a_header(tiny_ort: Path, tmp_path: Path, damage: str) -> None:
    for name in ("ingot.json",):
        (tmp_path / name).write_bytes((tiny_ort / name).read_bytes())
    if damage == "pipe":
        os.mkfifo(tmp_path / WEIGHTS)
    elif damage != "missing":
        (tmp_path / WEIGHTS).write_bytes(b"1234" if damage == "short" else b"\x08" * 40)
    result = CliRunner().invoke(inspect_command, [str(tmp_path)])
    assert result.exit_code == 2
    assert "has no readable header" in result.output and "export again" in result.output


def test_refuses_a_folder_that_is_no_ingot(tmp_path: Path) -> None:
    result = CliRunner().invoke(inspect_command, [str(tmp_path)])
    assert result.exit_code == 2 and "is not an ingot" in result.output


def test_shows_what_the_passes_took_from_the_canonical_graph(
    tiny_ort: Path, tmp_path: Path
) -> None:
    assert inspect(tiny_ort).passes[0] == "MoeDispatchToMoE (2 MoeDispatch)"
    odd: list[Any] = [None, 3, [3], [{}], [{"name": 4}], [{"name": "Idle"}]]
    for number, recorded in enumerate(odd):
        graph = {**Manifest.read(tiny_ort).graph, "lowering": recorded}
        assert inspect(copied(tiny_ort, tmp_path / str(number), graph=graph)).passes == ()
    graph = {
        "lowering": [{"name": "Odd\x1b[31m", "removed": 3}, {"name": "Neat", "added": {"Mul": 1}}]
    }
    graph = {**Manifest.read(tiny_ort).graph, **graph}
    found = inspect(copied(tiny_ort, tmp_path / "odd", graph=graph)).passes
    assert found == ("Odd\ufffd[31m", "Neat")
