"""What ``ingot.json`` may say; every folder here could have come from anybody."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from ingot.export.external_data import GraphError, external_files
from ingot.export.ingot import GRAPH, LIBRARY, MANIFEST, WEIGHTS, Manifest, ManifestError
from ingot.export.ingot_schema import SIZES, TASKS
from ingot.export.quantization import Quantization
from ingot.export.request import TASKS as REQUESTED
from ingot.plugins.errors import IngotError
from ingot.plugins.whole import sha256
from ingot.runtime.inspection import inspect
from ingot.runtime.loading import load

DATA = Path(__file__).parent / "data" / "schema1"


@pytest.fixture
def ingot(tmp_path: Path) -> Path:
    """A copy of a real ingot with two caches."""
    return Path(shutil.copytree(DATA / "granite-ort", tmp_path / "ingot"))


def change(ingot: Path, place: str, value: Any) -> None:
    """Put a value at a place such as ``states.0.axis``; ``...`` takes what is there out."""
    raw = json.loads((ingot / MANIFEST).read_text())
    held = raw
    *above, last = [int(part) if part.isdigit() else part for part in place.split("/")]
    for part in above:
        held = held[part]
    if value is ...:
        del held[last]
    else:
        held[last] = value
    (ingot / MANIFEST).write_text(json.dumps(raw))


def listed(ingot: Path, name: str) -> None:
    """Let the manifest list a file that is there."""
    path = ingot / name
    raw = json.loads((ingot / MANIFEST).read_text())
    raw["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (ingot / MANIFEST).write_text(json.dumps(raw))


ADAPTER = {"name": "tuned", "revision": None, "sha256": "0" * 64}
CACHE = ["batch", 1, "past_sequence", 16]
REFUSED: list[tuple[str, Any, str]] = [
    ("model_type", "$(reboot)", "model_type"),
    ("model_type", "../../x", "model_type"),
    ("model_type", "gpt2", "one of bamba"),
    ("model_type", ["granite"], "model_type"),
    ("model_type", None, "model_type"),
    ("task", "Generate", "task"),
    ("target", "trt\n", "target"),
    ("precision", "float64", "precision"),
    ("vocab_size", 0, "vocab_size"),
    ("vocab_size", -1, "vocab_size"),
    ("vocab_size", True, "vocab_size"),
    ("vocab_size", 96.0, "vocab_size"),
    ("vocab_size", "96", "vocab_size"),
    ("vocab_size", 10**400, "vocab_size"),
    ("vocab_size", 97, "the main output"),
    ("main_output", "present.0.key", "the main output"),
    ("main_output", "none", "main_output"),
    ("inputs", [], "inputs"),
    ("inputs", {}, "inputs"),
    ("inputs/0", ..., "input_ids"),
    ("inputs/1", ..., "attention_mask"),
    ("inputs/0/name", "input_ids\n", "inputs[0].name"),
    ("inputs/0/name", "a" * 10**6, "inputs[0].name"),
    ("inputs/0/dtype", "object", "inputs[0].dtype"),
    ("inputs/0/dtype", "int32", "inputs[0].dtype"),
    ("inputs/0/dtype", "float32", "input_ids"),
    ("inputs/0/shape", [], "inputs[0].shape"),
    ("inputs/0/shape", ["batch"], "input_ids"),
    ("inputs/0/shape", ["batch", -1], "inputs[0].shape[1]"),
    ("inputs/0/shape", ["batch", 1.5], "inputs[0].shape[1]"),
    ("inputs/0/shape", ["batch", 2**63], "inputs[0].shape[1]"),
    ("inputs/0/shape", ["batch", ["sequence"]], "inputs[0].shape[1]"),
    ("inputs/0/shape", 2, "inputs[0].shape"),
    ("inputs/0/shape", [1] * 9, "inputs[0].shape"),
    ("inputs/0/colour", "red", "colour"),
    ("inputs/1/name", "input_ids", "inputs[0].name"),
    ("outputs/0/shape", ["batch", "sequence"], "the main output"),
    ("outputs/0/shape", ["batch", "sequence", 0], "the main output"),
    ("outputs/0/dtype", "int64", "the main output"),
    ("states/0", ..., "past_key_values.0.key"),
    ("states/0", None, "states[0]"),
    ("states/0/kind", "conv", "states[0]"),
    ("states/0/kind", "other", "states[0].kind"),
    ("states/0/input", "input_ids", "states[0].input"),
    ("states/0/input", "past_key_values.0.value", "states[1].input"),
    ("states/0/output", "logits", "states[0].output"),
    ("states/0/dtype", "int64", "states[0].dtype"),
    ("states/0/dtype", "float16", "states[0].input"),
    ("states/0/axis", 0, "states[0].axis"),
    ("states/0/axis", -2, "states[0].axis"),
    ("states/0/axis", None, "states[0].axis"),
    ("states/0/axis", 2.0, "states[0].axis"),
    ("states/0/shared", 1, "states[0].shared"),
    ("states/0/shared", "yes", "states[0].shared"),
    ("states/0/shared", ..., "states[0].shared"),
    ("target", "onnx", "states[0].shared"),
    ("source", [], "source"),
    ("source/checkpoint", 3, "source.checkpoint"),
    ("source/checkpoint", "a\nb", "source.checkpoint"),
    ("source/checkpoint", "\x1b[31mred", "source.checkpoint"),
    ("source/checkpoint", "gpj.\u202eexe", "source.checkpoint"),
    ("source/checkpoint", "\ud800", "source.checkpoint"),
    ("source/checkpoint", "x" * 10**6, "source.checkpoint"),
    ("source/revision", {}, "source.revision"),
    ("source/sha256", "0" * 63, "source.sha256"),
    ("source/adapter", "tuned", "source.adapter"),
    ("source/adapter", {**ADAPTER, "name": "a\nb"}, "source.adapter.name"),
    ("source/adapter", {**ADAPTER, "revision": 3}, "source.adapter.revision"),
    ("source/adapter", {**ADAPTER, "sha256": "0"}, "source.adapter.sha256"),
    ("source/adapter", {"name": "tuned"}, "source.adapter"),
    ("generation", None, "generation"),
    ("generation/eos_token_ids", 2, "generation.eos_token_ids"),
    ("generation/eos_token_ids", "</s>", "generation.eos_token_ids"),
    ("generation/eos_token_ids", [96], "generation.eos_token_ids[0]"),
    ("generation/eos_token_ids", [2, -1], "generation.eos_token_ids[1]"),
    ("generation/eos_token_ids", [True], "generation.eos_token_ids[0]"),
    ("generation/pad_token_id", None, "generation.pad_token_id"),
    ("generation/pad_token_id", 96, "generation.pad_token_id"),
    ("generation/context_length", 0, "generation.context_length"),
    ("generation/context_length", "512", "generation.context_length"),
    ("generation/context_length", ..., "generation.context_length"),
    ("graph/operators", ["Add"], "graph.operators"),
    ("graph/operators/Add", "3", "graph.operators['Add']"),
    ("graph/operators/`id`", 1, "`id`"),
    ("graph/unread_bytes", -1, "graph.unread_bytes"),
    ("parameters", 0, "parameters"),
    ("active_parameters", 10**9, "active_parameters"),
    ("weight_bytes", 2**70, "weight_bytes"),
    ("tools/onnxruntime", "1.31 && reboot", "tools['onnxruntime']"),
    ("tools/onnxruntime", 1.31, "tools['onnxruntime']"),
    ("tools/$(id)", "1", "$(id)"),
    ("labels", "ab", "labels"),
    ("labels", [1], "labels[0]"),
    ("labels", ["a\nb"], "labels[0]"),
    ("engine", {}, "engine"),
    ("engine", 0, "engine"),
    ("engine", ..., "engine"),
    ("files", [], "files"),
    ("files/model.onnx", ..., "lists no 'model.onnx'"),
    ("files/model.onnx/sha256", "A" * 64, "sha256"),
    ("files/model.onnx/bytes", -1, "bytes"),
    ("files/model.onnx/bytes", 2.5, "bytes"),
    ("files/model.onnx/mode", 511, "mode"),
    ("validation", None, "validation"),
    ("validation/verdict", "PASSED", "validation.verdict"),
    ("validation/verdict", None, "validation.verdict"),
    ("weights", "float8", "weights"),
    ("weights", "", "weights"),
    ("weights", None, "weights"),
    ("weights", ["bfloat16"], "weights"),
    ("weights", "int4", "quantization goes with weights"),
    ("quantization", {}, "quantization goes with weights"),
    ("kernels", "ort", "kernels"),
    ("kernels", "", "kernels"),
    ("kernels", None, "kernels"),
    ("kernels", ["ingot"], "kernels"),
    ("kernels", "ingot", "files lacks libingot_ort.so"),
    ("schema_version", True, "schema version True"),
    ("schema_version", 1.0, "schema version 1.0"),
]


@pytest.mark.parametrize(
    ("place", "value", "named"), REFUSED, ids=[f"{each[0]}-{n}" for n, each in enumerate(REFUSED)]
)
def test_refuses_a_field_by_its_name(ingot: Path, place: str, value: Any, named: str) -> None:
    change(ingot, place, value)
    with pytest.raises(ManifestError) as refused:
        Manifest.read(ingot)
    assert named in str(refused.value)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        (["batch", 1, 16, 16], "batch and further on past_sequence"),
        (["batch", "past_sequence", "past_sequence", 16], "batch and further on past_sequence"),
        ([1, "batch", "past_sequence", 16], "batch and further on past_sequence"),
        (["batch", 1, "sequence", 16], "batch and further on past_sequence"),
        (["batch", 2**20, "past_sequence", 2**20], "elements"),
        (["batch", 1, 16, "past_sequence"], "output_shape"),
    ],
)
def test_refuses_a_cache_that_does_not_grow_along_one_axis(
    ingot: Path, shape: list[Any], named: str
) -> None:
    """Said alike of the state and of the graph's input, so that only the shape is wrong."""
    change(ingot, "states/0/input_shape", shape)
    (at,) = [
        n
        for n, each in enumerate(json.loads((ingot / MANIFEST).read_text())["inputs"])
        if each["name"] == "past_key_values.0.key"
    ]
    change(ingot, f"inputs/{at}/shape", shape)
    if named == "elements":
        grown = ["total_sequence" if each == "past_sequence" else each for each in shape]
        change(ingot, "states/0/output_shape", grown)
        change(ingot, "outputs/1/shape", grown)
    with pytest.raises(ManifestError, match=named):
        Manifest.read(ingot)


NAMES = (
    *(
        "",
        ".",
        "..",
        "../x",
        "a/../../x",
        "/etc/passwd",
        "a//b",
        "a/",
        "./a",
        "a/./b",
        "~/x",
        "-rf",
    ),
    *("a\\b", "C:\\x", "C:x", "c:/x", "nul\0", "a\nb", "\x7f", "a.", "a ", " a", "a/ b", "a./b"),
    *(
        ".ssh/x",
        "caf\u00e9",
        "gpj\u202exe",
        "\ud800",
        "$(id)",
        "`id`",
        "a;b",
        "a|b",
        "a*",
        "a?",
        "a:b",
    ),
    *("x" * 129, "/".join("abcdefghi"), "a/" * 300 + "b", '"', "'", "{{x}}", "%00", "a#b", "a&b"),
)


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_refuses_a_file_that_has_no_plain_relative_name(ingot: Path, name: str) -> None:
    raw = json.loads((ingot / MANIFEST).read_text())
    raw["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    (ingot / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ManifestError, match="must be the name of a file in the folder"):
        Manifest.read(ingot)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Model.onnx", "and so is"),
        ("model.onnx/x", "cannot be a folder too"),
        ("numpy.py", "is a program"),
        ("report/x.PY", "is a program"),
        ("numpy.cpython-311-x86_64-linux-gnu.so", "is a program"),
        ("libingot_trt.so", "is a program"),
    ],
)
def test_refuses_a_file_that_another_one_hides_or_that_runs(
    ingot: Path, name: str, why: str
) -> None:
    raw = json.loads((ingot / MANIFEST).read_text())
    raw["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    (ingot / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ManifestError, match=why):
        Manifest.read(ingot)


def test_takes_every_plain_name_of_a_file(ingot: Path) -> None:
    for name in ("report/a b.json", "chat_templates/tool-use_v2.jinja", "x+y=z@1,(2).bin"):
        (ingot / name).parent.mkdir(exist_ok=True)
        (ingot / name).write_text("x")
        listed(ingot, name)
    load(ingot)


def test_takes_facts_that_a_later_version_adds_and_no_other_field(ingot: Path) -> None:
    """An older Ingot does not run by a field that it does not know; figures are for people."""
    for place in ("source/licence", "generation/bos_token_id", "graph/depth", "validation/figure"):
        change(ingot, place, 1)
    load(ingot)
    change(ingot, "quantised", True)
    with pytest.raises(ManifestError, match="'quantised', which is not known here"):
        load(ingot)


@pytest.mark.parametrize(
    "text",
    [
        '{"schema_version": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"schema_version": 1' + "0" * 5000 + "}",
        '{"schema_version": "' + "x" * 9_000_000 + '"}',
        "\ufeff{}",
        "[" * 70 + "]" * 70,
        "nul",
    ],
    ids=["deep", "digits", "large", "mark", "lists", "cut"],
)
def test_refuses_json_that_is_none_or_that_nobody_needs(ingot: Path, text: str) -> None:
    (ingot / MANIFEST).write_text(text, encoding="utf-8")
    for opened in (load, inspect):
        with pytest.raises(IngotError) as refused:
            opened(ingot)
        assert len(str(refused.value)) < 1000


def test_runs_no_graph_that_is_not_listed(ingot: Path) -> None:
    change(ingot, "files/model.onnx", ...)
    for verify in (True, False):
        with pytest.raises(ManifestError, match=r"lists no 'model\.onnx'"):
            load(ingot, verify=verify)


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
        *(
            "added_tokens.json",
            "chat_template.jinja",
            "additional_chat_templates/default.jinja",
            "merges.txt",
        ),
        *("tokenizer.model", "generation_config.json"),
    ],
)
def test_reads_no_tokenizer_that_is_not_listed(ingot: Path, name: str) -> None:
    (ingot / "notes.md").write_text("what nobody reads may lie there")
    load(ingot)
    (ingot / name).parent.mkdir(exist_ok=True)
    (ingot / name).write_text("{}")
    with pytest.raises(ManifestError, match=f"lists no '{name}'"):
        load(ingot, verify=False)
    listed(ingot, name)
    load(ingot)


def _weights_elsewhere(ingot: Path, location: str) -> None:
    model = onnx.load(ingot / GRAPH, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, ingot / GRAPH)
    listed(ingot, GRAPH)


@pytest.mark.parametrize(
    "location", ["other.bin", "../w.bin", "/w.bin", "./weights.safetensors", "", "\u202e"]
)
def test_reads_no_weights_that_are_not_listed(ingot: Path, location: str) -> None:
    shutil.copyfile(ingot / WEIGHTS, ingot / "other.bin")
    _weights_elsewhere(ingot, location)
    for verify in (True, False):
        with pytest.raises(ManifestError, match="lists no"):
            load(ingot, verify=verify)


def test_reads_weights_of_any_name_that_is_listed(ingot: Path) -> None:
    shutil.copyfile(ingot / WEIGHTS, ingot / "other.bin")
    _weights_elsewhere(ingot, "other.bin")
    listed(ingot, "other.bin")
    load(ingot)


def _external(name: str, **also: Any) -> TensorProto:
    tensor = TensorProto(
        name=name, data_type=1, dims=(1,), data_location=TensorProto.EXTERNAL, **also
    )
    for key, value in (("offset", "0"), ("location", f"{name}.bin")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def _every_place() -> onnx.ModelProto:
    """A model with an external tensor in each place that can hold one."""

    def sparse(name: str) -> onnx.SparseTensorProto:
        return onnx.SparseTensorProto(values=_external(name), indices=_external(f"{name}_at"))

    def node(kind: str, value: Any) -> onnx.NodeProto:
        made = helper.make_node("Constant", [], ["x"])
        attribute = made.attribute.add()
        attribute.name = "a"
        held = getattr(attribute, kind)
        if kind in ("tensors", "graphs", "sparse_tensors"):
            held.append(value)
        else:
            held.CopyFrom(value)
        return made

    def graph(name: str) -> onnx.GraphProto:
        return onnx.GraphProto(initializer=[_external(name)])

    top = onnx.GraphProto(
        initializer=[_external("a")],
        sparse_initializer=[sparse("b")],
        node=[
            node("t", _external("c")),
            node("tensors", _external("d")),
            node("g", onnx.GraphProto(node=[node("g", graph("e"))])),
            node("graphs", graph("f")),
            node("sparse_tensor", sparse("g")),
            node("sparse_tensors", sparse("h")),
        ],
    )
    model = onnx.ModelProto(ir_version=10, graph=top)
    function = model.functions.add()
    function.node.append(node("t", _external("i")))
    default = function.attribute_proto.add()
    default.t.CopyFrom(_external("j"))
    training = model.training_info.add()
    training.initialization.CopyFrom(graph("k"))
    training.algorithm.CopyFrom(graph("l"))
    return model


def test_finds_external_data_wherever_a_graph_can_have_it() -> None:
    expected = {f"{letter}.bin" for letter in "abcdefghijkl"} | {"b_at.bin", "g_at.bin", "h_at.bin"}
    data = _every_place().SerializeToString()
    assert external_files(data) == expected
    # Two messages of one field are merged by protobuf, and the last name of an entry counts.
    more = onnx.ModelProto(graph=onnx.GraphProto(initializer=[_external("m")])).SerializeToString()
    assert external_files(data + more) == expected | {"m.bin"}


def test_reads_a_tag_as_protobuf_does() -> None:
    """Bits above the thirty-second are dropped, so this is the field 7 of a model, its graph."""
    graph = onnx.GraphProto(initializer=[_external("a")]).SerializeToString()
    size = bytes([len(graph)])
    assert external_files(b"\x3a" + size + graph) == {"a.bin"}
    assert external_files(b"\xba\x80\x80\x80\x10" + size + graph) == {"a.bin"}


@pytest.mark.parametrize(
    "data", [b"\x3a\x05\x00", b"\x3a", b"\xff" * 20, b"\x3b", b"\x0d\x00", b"\x3f\x00"]
)
def test_refuses_bytes_that_are_no_graph(ingot: Path, data: bytes) -> None:
    with pytest.raises(GraphError):
        external_files(data)
    (ingot / GRAPH).write_bytes(data)
    listed(ingot, GRAPH)
    with pytest.raises(ManifestError, match=r"model\.onnx is damaged"):
        load(ingot)


def test_refuses_graphs_in_graphs_without_end() -> None:
    data = b""
    for _ in range(60):
        # A node's attribute's graph.
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            size = len(data)
            data = tag + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14]) + data
    size = len(data)
    whole = b"\x3a" + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14]) + data
    with pytest.raises(GraphError, match="nested"):
        external_files(whole)


def _to_a_secret(ingot: Path, secret: Path) -> None:
    (ingot / "notes.txt").symlink_to(secret)
    listed(ingot, "notes.txt")


def _below_a_link(ingot: Path, secret: Path) -> None:
    (ingot / "more").symlink_to(secret.parent)
    listed(ingot, f"more/{secret.name}")


def _to_the_folder_above(ingot: Path, secret: Path) -> None:
    shutil.move(ingot / WEIGHTS, ingot.parent / "w")
    (ingot / WEIGHTS).symlink_to("../w")


def _of_the_manifest(ingot: Path, secret: Path) -> None:
    shutil.move(ingot / MANIFEST, ingot.parent / "m")
    (ingot / MANIFEST).symlink_to("../m")


def _in_a_circle(ingot: Path, secret: Path) -> None:
    (ingot / "a").symlink_to("b")
    (ingot / "b").symlink_to("a")
    change(ingot, "files/a", {"bytes": 0, "sha256": "0" * 64})


@pytest.mark.parametrize(
    "made", [_to_a_secret, _below_a_link, _to_the_folder_above, _of_the_manifest, _in_a_circle]
)
def test_follows_no_link_out_of_the_folder(
    ingot: Path, tmp_path: Path, made: Callable[[Path, Path], None]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("key")
    made(ingot, tmp_path / "elsewhere" / "secret")
    for verify in (True, False):
        with pytest.raises(IngotError, match=r"is a link out of its folder|cannot be followed"):
            load(ingot, verify=verify)


def test_follows_links_that_stay_and_one_to_the_folder(ingot: Path, tmp_path: Path) -> None:
    (ingot / "notes.txt").write_text("x")
    (ingot / "same.txt").symlink_to("notes.txt")
    listed(ingot, "same.txt")
    (tmp_path / "link").symlink_to(ingot)
    load(tmp_path / "link")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_says_which_file_may_not_be_read(ingot: Path) -> None:
    (ingot / GRAPH).chmod(0)
    with pytest.raises(ManifestError, match="cannot be read: Permission denied"):
        load(ingot)


def test_says_that_a_path_is_too_long() -> None:
    with pytest.raises(IngotError, match="cannot be followed"):
        load("x" * 5000)


def test_knows_the_tasks_and_types_that_exports_know() -> None:
    assert TASKS == REQUESTED
    assert set(SIZES) == {"float32", "float16", "bfloat16", "int64"}


IN_NUMBERS = {"block": 64, "symmetric": True, "accuracy": "fast", "method": "nearest", "bits": {}}


def test_reads_how_weights_are_stored_in_whole_numbers(ingot: Path) -> None:
    change(ingot, "weights", "int4")
    change(ingot, "quantization", {**IN_NUMBERS, "bits": {"lm_head.weight": 8}})
    found = Manifest.read(ingot)
    assert found.quantization == Quantization(64, True, "fast", "nearest", {"lm_head.weight": 8})
    found.write(ingot)
    assert Manifest.read(ingot) == found
    calibration = {"sha256": "a" * 64, "tokens": 4096, "effects": {"lm_head.weight": 0.01}}
    change(ingot, "quantization", {**IN_NUMBERS, "calibration": calibration})
    found = Manifest.read(ingot)
    assert found.quantization is not None and found.quantization.calibration == calibration
    found.write(ingot)
    assert Manifest.read(ingot) == found
    assert found.quantization.blocks == {} and found.quantization.sizes == (64,)
    blocks = {"lm_head.weight": 32, "model.embed_tokens.weight": 128}
    change(ingot, "quantization", {**IN_NUMBERS, "blocks": blocks})
    found = Manifest.read(ingot)
    assert found.quantization == Quantization(64, True, blocks=blocks)
    assert found.quantization.sizes == (32, 64, 128)
    assert str(found.quantization) == (
        "blocks of 64 (2 weights in others) without zero points, numbers by nearest; activations "
        "of products in int8"
    )
    found.write(ingot)
    assert Manifest.read(ingot) == found


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("blocks", []),
        ("blocks", {"lm_head.weight": 48}),
        ("blocks", {"lm_head.weight": True}),
        ("blocks", {"lm_head.weight": "32"}),
        ("blocks", {"$(id)": 32}),
        ("calibration", {"tokens": 4096}),
        ("calibration", {"sha256": "a" * 64, "tokens": 0}),
        ("calibration", {"sha256": "x", "tokens": 1}),
        ("block", 48),
        ("block", "64"),
        ("block", True),
        ("block", ...),
        ("symmetric", 1),
        ("accuracy", "exakt"),
        ("method", None),
        ("bits", []),
        ("bits/lm_head.weight", 5),
        ("bits/$(id)", 8),
        ("groups", 1),
        ("scales", "float16"),
        ("scales", "bfloat16"),
        ("scales", 16),
        ("scales", None),
    ],
)
def test_refuses_another_way_to_store_whole_numbers(ingot: Path, place: str, value: Any) -> None:
    change(ingot, "weights", "int4")
    change(ingot, "quantization", IN_NUMBERS)
    change(ingot, f"quantization/{place}", value)
    with pytest.raises(ManifestError, match=re.escape(place.split("/")[-1])):
        Manifest.read(ingot)


def test_whole_numbers_are_of_onnx_runtime(ingot: Path) -> None:
    change(ingot, "weights", "int8")
    change(ingot, "quantization", IN_NUMBERS)
    change(ingot, "target", "onnx")
    with pytest.raises(ManifestError, match="weights"):
        Manifest.read(ingot)


def on_own_kernels(ingot: Path) -> None:
    """What a manifest says of Ingot's own kernels, whose library is a stand-in here."""
    (ingot / LIBRARY).write_bytes(b"program")
    listed(ingot, LIBRARY)
    change(ingot, "kernels", "ingot")


def test_reads_whose_kernels_run_a_graph(ingot: Path) -> None:
    assert Manifest.read(ingot).kernels == "" and Manifest.read(ingot).run_by == "ONNX Runtime's"
    change(ingot, "kernels", "portable")
    found = Manifest.read(ingot)
    assert found.run_by == "standard operators alone" and LIBRARY not in found.loaded
    on_own_kernels(ingot)
    found = Manifest.read(ingot)
    assert found.run_by == f"Ingot's own, in {LIBRARY} with the SHA-256 {sha256(ingot / LIBRARY)}"
    assert LIBRARY in found.loaded
    found.write(ingot)
    assert Manifest.read(ingot) == found
    change(ingot, "kernels", ...)
    with pytest.raises(ManifestError, match=f"files holds {LIBRARY}, which is a program"):
        Manifest.read(ingot)


def test_own_kernels_have_scales_of_half_the_size(ingot: Path) -> None:
    on_own_kernels(ingot)
    change(ingot, "weights", "int4")
    change(ingot, "quantization", IN_NUMBERS)
    with pytest.raises(ManifestError, match=r"scales in float32, and the kernels .* float16"):
        Manifest.read(ingot)
    change(ingot, "quantization/scales", "float16")
    found = Manifest.read(ingot)
    assert found.quantization is not None and found.quantization.scales == "float16"
    found.write(ingot)
    assert Manifest.read(ingot) == found


def test_own_kernels_may_round_activations_to_bfloat16(ingot: Path) -> None:
    change(ingot, "weights", "bfloat16")
    change(ingot, "activations", "bfloat16")
    with pytest.raises(ManifestError, match=r"activations is .* left out, but for kernels ingot"):
        Manifest.read(ingot)
    on_own_kernels(ingot)
    found = Manifest.read(ingot)
    assert found.activations == "bfloat16"
    found.write(ingot)
    assert Manifest.read(ingot) == found
    change(ingot, "activations", "int8")
    with pytest.raises(ManifestError, match=r"activations is .*int8"):
        Manifest.read(ingot)
    change(ingot, "activations", "bfloat16")
    change(ingot, "weights", "float16")
    with pytest.raises(ManifestError, match=r"activations is .* weights in bfloat16"):
        Manifest.read(ingot)


@pytest.mark.parametrize("kernels", ["portable", "ingot"])
def test_kernels_are_of_the_target_ort(ingot: Path, kernels: str) -> None:
    on_own_kernels(ingot)
    change(ingot, "kernels", kernels)
    change(ingot, "target", "onnx")
    with pytest.raises(ManifestError, match=r"kernels is .* left out, but for the target ort"):
        Manifest.read(ingot)


# Whose kernels, and which kinds of states they may write where the old ones are.
BUFFERS = [
    ("ort", "ingot", {"key", "value", "conv", "ssm"}),
    ("ort", "portable", {"key", "value"}),
    ("ort", None, {"key", "value"}),
    ("onnx", None, set()),
]


def one_buffer(ingot: Path, target: str, kernels: str | None, kind: str) -> None:
    """Let the first state of a kind, of any folder here, be one buffer with what replaces it."""
    (ingot / LIBRARY).unlink(missing_ok=True)
    if kernels == "ingot":
        on_own_kernels(ingot)
    elif kernels is not None:
        change(ingot, "kernels", kernels)
    change(ingot, "target", target)
    states = json.loads((ingot / MANIFEST).read_text())["states"]
    for at, state in enumerate(states):
        change(ingot, f"states/{at}/shared", state["kind"] == kind)


def with_states(folder: Path, kind: str) -> Path:
    """A copy of a real ingot that has states of a kind."""
    name = "granite-ort" if kind in ("key", "value") else "mamba2-onnx"
    return Path(shutil.copytree(DATA / name, folder / "ingot"))


@pytest.mark.parametrize("kind", ["key", "value", "conv", "ssm"])
@pytest.mark.parametrize(("target", "kernels", "kinds"), BUFFERS)
def test_states_are_one_buffer_where_kernels_write_in_place(
    target: str, kernels: str | None, kinds: set[str], kind: str, tmp_path: Path
) -> None:
    ingot = with_states(tmp_path, kind)
    one_buffer(ingot, target, kernels, kind)
    if kind in kinds:
        found = Manifest.read(ingot)
        assert {state.kind for state in found.states if state.shared} == {kind}
        # ONNX Runtime's kernel alone takes several rows a token at a time.
        assert found.by_token == (kernels != "ingot" and kind in ("key", "value"))
        found.write(ingot)
        assert Manifest.read(ingot) == found
    else:
        with pytest.raises(ManifestError, match=r"states\[\d\]\.shared .* write in place"):
            Manifest.read(ingot)
    one_buffer(ingot, target, kernels, "none")
    assert not Manifest.read(ingot).by_token


def test_standard_operators_read_no_whole_numbers(ingot: Path) -> None:
    change(ingot, "kernels", "portable")
    change(ingot, "weights", "int8")
    change(ingot, "quantization", IN_NUMBERS)
    with pytest.raises(ManifestError, match="read no weights in whole numbers"):
        Manifest.read(ingot)


KEPT = {"name": "logits_to_keep", "dtype": "int64", "shape": [1]}


@pytest.fixture
def asking(ingot: Path) -> Path:
    """An ingot whose calls may ask for the last logits alone."""
    inputs = json.loads((ingot / MANIFEST).read_text())["inputs"]
    change(ingot, "inputs", [*inputs[:2], KEPT, *inputs[2:]])
    change(ingot, "outputs/0/shape/1", "kept_sequence")
    Manifest.read(ingot)
    return ingot


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ("inputs/2/dtype", "float32", "logits_to_keep of inputs must be int64 [1]"),
        ("inputs/2/shape", [2], "logits_to_keep of inputs must be int64 [1]"),
        ("inputs/2/shape", ["batch"], "logits_to_keep of inputs must be int64 [1]"),
        ("inputs/2", ..., "the main output"),
        ("outputs/0/shape/1", "sequence", "the main output"),
        ("outputs/0/shape/1", 1, "the main output"),
        ("task", "features", "logits_to_keep"),
        ("task", "classify", "logits_to_keep"),
        ("states/0/input", "logits_to_keep", "states[0].input"),
    ],
)
def test_refuses_a_graph_that_is_asked_in_another_way(
    asking: Path, place: str, value: Any, named: str
) -> None:
    change(asking, place, value)
    with pytest.raises(ManifestError, match=re.escape(named)):
        Manifest.read(asking)


def test_asks_no_graph_for_tensorrt(asking: Path) -> None:
    for at in (0, 1):
        change(asking, f"states/{at}/shared", False)
    change(asking, "target", "onnx")
    Manifest.read(asking)
    change(asking, "target", "trt")
    with pytest.raises(ManifestError, match="logits_to_keep, which is for --task generate and the"):
        Manifest.read(asking)


def test_takes_the_length_at_which_positions_turn(ingot: Path) -> None:
    assert "switch_length" not in Manifest.read(ingot).generation
    change(ingot, "generation/switch_length", 64)
    assert Manifest.read(ingot).generation["switch_length"] == 64
    for wrong in (0, -1, 1.5, "64", None, 2**31):
        change(ingot, "generation/switch_length", wrong)
        with pytest.raises(ManifestError, match="switch_length"):
            Manifest.read(ingot)
