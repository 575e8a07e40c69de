"""The linter of repositories: what it finds, and what it leaves to an operator."""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_ingots import parsed, with_engine

from ingot.export.ingot import ENGINE, GRAPH, LIBRARY
from ingot.runtime.triton_lint import lint
from ingot.runtime.triton_plan import PLUGINS, RECORD, Settings, TritonError
from ingot.runtime.triton_repository import write_repository

# Minutes of exports; `make test-slow` runs them, and so does CI.
pytestmark = pytest.mark.slow


def _edit(repository: Path, file: str, old: str, new: str) -> None:
    path = repository / file
    text = path.read_text()
    assert old in text, f"{old!r} is not in {file}"
    path.write_text(text.replace(old, new, 1))


STATE = 'output_name: "present.0.key"\n      data_type: TYPE_FP32'


EDITS = {
    "state dtype": ("m", STATE, STATE.replace("FP32", "FP16"), "state input past_key_values.0.key"),
    "state output dtype": (
        *("m", STATE, STATE.replace("FP32", "FP16")),
        "state output present.0.key is TYPE_FP16; in model.onnx it is TYPE_FP32",
    ),
    "initial dtype": (
        *("m", 'name: "zero" data_type: TYPE_FP32', 'name: "zero" data_type: TYPE_INT32'),
        "the initial state of past_key_values.0.key is TYPE_INT32 and the state TYPE_FP32",
    ),
    "state dims": ("m", "dims: [ 2, 512, 16 ]", "dims: [ 3, 512, 16 ]", "behind the batch"),
    "state rank": ("m", "dims: [ 2, 512, 16 ]", "dims: [ 2, 512 ]", "has dims [2, 512]"),
    "initial dims": (
        *("m", "dims: [ 2, 512, 16 ] zero_data", "dims: [ 2, 100, 16 ] zero_data"),
        "has dims [2, 100, 16], which do not fit [2, 512, 16]",
    ),
    "initial dims of none": (
        *("m", "dims: [ 2, 512, 16 ] zero_data", "dims: [ 2, 0, 16 ] zero_data"),
        "has dims [2, 0, 16]",
    ),
    "variable cache": ("m", "dims: [ 2, 512, 16 ]", "dims: [ 2, -1, 16 ]", "must be fixed"),
    "initial data": ("m", "zero_data: true", 'data_file: "x"', "is not zero_data"),
    "initial name": ("m", 'initial_state { name: "zero"', "initial_state {", "has no name"),
    "other output": (
        *("m", 'output_name: "present.0.key"', 'output_name: "present.1.key"'),
        "goes on as present.0.key, and not as present.1.key",
    ),
    "unknown state": ("m", "past_key_values.0.key", "past.0", "past.0 is not in model.onnx"),
    "input dtype": ("m", "TYPE_INT64", "TYPE_INT32", "input input_ids is TYPE_INT32"),
    "input gone": (
        *("m", '  { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] },\n', ""),
        "attention_mask, an input of model.onnx, is neither",
    ),
    "output dims": ("m", "dims: [ -1, 512 ]", "dims: [ -1, 513 ]", "output logits has dims"),
    "no batch": ("m", "max_batch_size: 1", "max_batch_size: 0", "max_batch_size is 0"),
    "batch of caches": ("m", "max_batch_size: 1", "max_batch_size: 4", "lengths of a batch's"),
    "warm-up": (
        *("m", "instance_group", 'model_warmup [ { name: "x" batch_size: 1 } ]\ninstance_group'),
        "model_warmup and state exclude each other",
    ),
    "other name": ("m", 'name: "m"', 'name: "n"', "names the model 'n'"),
    "no protobuf": ("m", 'name: "m"', 'nane: "m"', "cannot be read"),
    "no such graph": ("m", "model.onnx", "other.onnx", "1/other.onnx, which it runs, is missing"),
    "not decoupled": ("m_generate", "decoupled: true", "decoupled: false", "must be true"),
    "no streams": ("m_generate", 'string_value: "2"', 'string_value: "0"', "streams is '0'"),
    "ingot moved": ("m_generate", "../m/1", "../n/1", "is '../n/1', where no ingot lies"),
    "batched stream": ("m_generate", "max_batch_size: 0", "max_batch_size: 2", "it must be 0"),
}


def test_finds_nothing_in_a_new_repository(repository: Path) -> None:
    assert lint(repository) == []


@pytest.mark.parametrize("case", EDITS)
def test_finds_a_fault_in_a_config(copied: Path, case: str) -> None:
    model, old, new, sentence = EDITS[case]
    _edit(copied, f"{model}/config.pbtxt", old, new)
    assert any(sentence in problem for problem in lint(copied)), lint(copied)


def test_lets_an_operator_edit_what_is_theirs(copied: Path) -> None:
    _edit(copied, "m_generate/config.pbtxt", 'string_value: "2"', 'string_value: "16"')
    _edit(copied, "m/config.pbtxt", "KIND_CPU count: 1", "KIND_CPU count: 2")
    (copied / "launch.sh").write_text("#!/bin/sh\n")
    assert lint(copied) == []


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("m/1/model.onnx", "model.onnx"),
        ("m/1/weights.safetensors", "weights.safetensors"),
        ("m/1/ingot.json", "ingot.json"),
        ("m/config.pbtxt", "m/config.pbtxt"),
        ("m_generate/1/model.py", "m_generate/1/model.py"),
        ("m_generate/1/ingot/runtime/generate.py", "m_generate/1/ingot/runtime/generate.py"),
    ],
)
@pytest.mark.parametrize("fault", ["gone", "changed"])
def test_finds_a_file_that_is_gone_or_changed(
    copied: Path, file: str, sentence: str, fault: str
) -> None:
    path = copied / file
    if fault == "gone":
        path.unlink()
    elif file.endswith("config.pbtxt"):
        path.write_bytes(b"\x01")
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert any(sentence in problem for problem in lint(copied)), lint(copied)


def test_finds_kernels_that_are_gone_or_others(own_kernels: Path, tmp_path: Path) -> None:
    write_repository(own_kernels, tmp_path / "r", Settings(name="m"))
    library = tmp_path / "r" / "m_generate" / "ingot" / LIBRARY
    right = library.read_bytes()
    library.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    assert any(f"{LIBRARY} is not the file that was validated" in p for p in lint(tmp_path / "r"))
    assert any(
        f"is not the {LIBRARY} that the ingot was made with" in p for p in lint(tmp_path / "r")
    )
    library.unlink()
    assert any(f"where no {LIBRARY} lies" in p for p in lint(tmp_path / "r"))
    library.write_bytes(right)
    assert lint(tmp_path / "r") == []
    _edit(tmp_path / "r", "m_generate/config.pbtxt", f"ingot/{LIBRARY}", f"1/{LIBRARY}")
    (problem,) = lint(tmp_path / "r")
    assert f"the parameter operators is '1/{LIBRARY}', where no {LIBRARY} lies." in problem
    _edit(tmp_path / "r", "m_generate/config.pbtxt", '"operators"', '"operator"')
    assert any("the parameter operators is None" in p for p in lint(tmp_path / "r"))
    (library.parent.parent / "1" / LIBRARY).write_bytes(right)
    assert any(f"1/{LIBRARY} was not written here" in p for p in lint(tmp_path / "r"))


def test_finds_an_engine_or_a_plugin_that_changed(tiny_onnx: Path, tmp_path: Path) -> None:
    ingot = with_engine(tiny_onnx, tmp_path / "ingot")
    write_repository(ingot, tmp_path / "r", Settings(name="m"))
    plugin = tmp_path / "r" / "m" / "1" / PLUGINS
    plugin.write_bytes(b"PLUGINS")
    assert [PLUGINS in problem for problem in lint(tmp_path / "r")] == [True]
    plugin.unlink()
    assert any(f"1/{PLUGINS}, which the engine needs" in p for p in lint(tmp_path / "r"))
    other = with_engine(tiny_onnx, tmp_path / "other", graph_sha256="0" * 64)
    write_repository(other, tmp_path / "s", Settings(name="m"))
    assert lint(tmp_path / "s") == [f"m/config.pbtxt: {ENGINE} was built from another {GRAPH}."]
    _edit(tmp_path / "s", "m/config.pbtxt", 'profile: [ "0", "1" ]', 'profile: [ "0", "2" ]')
    _edit(tmp_path / "s", "m/config.pbtxt", "max_batch_size: 1", "max_batch_size: 5")
    assert any("has no profile 2" in p for p in lint(tmp_path / "s"))
    assert any("the engine was built for 4" in p for p in lint(tmp_path / "s"))


def test_finds_a_growing_cache_in_one_buffer(tiny_onnx: Path, tmp_path: Path) -> None:
    write_repository(tiny_onnx, tmp_path / "r", Settings(name="m"))
    assert parsed(tmp_path / "r" / "m" / "config.pbtxt").max_batch_size == 1
    state = "dims: [ 2, -1, 16 ]"
    _edit(
        *(tmp_path / "r", "m/config.pbtxt", state),
        f"{state}\n      use_same_buffer_for_input_output: true",
    )
    assert any("they cannot be one buffer" in problem for problem in lint(tmp_path / "r"))
    write_repository(tiny_onnx, tmp_path / "r", Settings(name="m"), overwrite=True)
    _edit(tmp_path / "r", "m/config.pbtxt", state, "dims: [ 2, 1, 16 ]")
    assert any("its dims cannot all be fixed" in problem for problem in lint(tmp_path / "r"))


def test_refuses_to_check_what_is_no_repository(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(TritonError, match=f"has no {RECORD}"):
        lint(tmp_path)
    (copied / RECORD).write_text("{")
    with pytest.raises(TritonError, match="is damaged"):
        lint(copied)
    (copied / RECORD).write_text('{"schema_version": 99}')
    with pytest.raises(TritonError, match="has schema version 99"):
        lint(copied)
