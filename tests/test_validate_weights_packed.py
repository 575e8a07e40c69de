"""Packed weights of a checkpoint as the comparison of weights reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from packed_cases import CASES, GPTQ
from packers import Numbers, Quantised, gptq, is_linear, numbers, quantise
from safetensors.torch import load_file, save_file

from ingot.export.ingot import Manifest
from ingot.export.progress import Stages
from ingot.graphs.merge import open_checkpoint
from ingot.validate.identity.contract import check_contract
from ingot.validate.identity.subject import Subject
from ingot.validate.identity.weights import check_weights
from ingot.validate.identity.weights_files import (
    FileFormatError,
    Reader,
    Tensor,
    read_checkpoint,
    read_header,
    read_object,
)
from ingot.validate.identity.weights_packed import unpacked
from ingot.validate.result import Check

DATA = Path(__file__).parent / "data" / "quantised"


@pytest.fixture(scope="module")
def source(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("olmoe", num_hidden_layers=1, num_experts=2, dtype=torch.bfloat16)


def stored(folder: Path) -> dict[str, Tensor]:
    return unpacked(read_checkpoint(folder), read_object(folder / "config.json"))


def whole(tensor: Tensor) -> np.ndarray:
    """All elements of a float32 tensor, read in two pieces."""
    with Reader() as reader:
        half = tensor.size // 2
        pieces = [reader.elements(tensor, 0, half)]
        pieces.append(reader.elements(tensor, half, tensor.size - half))
    return np.concatenate(pieces).view(np.float32).reshape(tensor.shape)


@pytest.mark.parametrize("name", CASES)
def test_unpacks_what_was_packed(name: str, source: Path, tmp_path: Path) -> None:
    quantised = CASES[name](source, tmp_path)
    found = stored(quantised.packed)
    plain = load_file(quantised.plain / "model.safetensors")
    assert found.keys() == plain.keys()
    for module in quantised.layers:
        weight = f"{module}.weight"
        np.testing.assert_array_equal(whole(found[weight]), plain[weight].numpy(), weight)


@pytest.mark.parametrize("case", sorted(DATA.glob("*.safetensors")), ids=lambda path: path.stem)
def test_rounds_to_what_the_library_unpacks(case: Path, tmp_path: Path) -> None:
    held = load_file(case)
    expected = {name: held.pop(name) for name in list(held) if name.startswith("unpacked.")}
    save_file(held, tmp_path / "model.safetensors")
    section = json.loads((DATA / f"{case.stem}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    found = stored(tmp_path)
    assert len(found) == len(expected)
    for name, weight in expected.items():
        own = torch.from_numpy(whole(found[name.removeprefix("unpacked.")]).copy())
        assert torch.equal(own.to(weight.dtype), weight), name


def test_layers_of_several_bits_and_an_uneven_last_group(tmp_path: Path, source: Path) -> None:
    def make(module: str, weight: np.ndarray, seed: int) -> Numbers:
        down = module.endswith("down_proj")
        return numbers(weight, seed, bits=8 if down else 4, group=24 if down else 48)

    section = {**GPTQ, "group_size": 48, "dynamic": {".*down_proj": {"bits": 8, "group_size": 24}}}
    quantised = quantise(source, tmp_path, section, gptq, is_linear, make)
    found = stored(quantised.packed)
    for module, of in quantised.layers.items():
        expected = of.weights().astype(np.float32)
        np.testing.assert_array_equal(whole(found[f"{module}.weight"]), expected)


def test_zero_points_that_wrapped_in_whole_words(source: Path, tmp_path: Path) -> None:
    quantised = CASES["gptq"](source, tmp_path)
    module = "model.layers.0.self_attn.q_proj"
    held = load_file(quantised.packed / "model.safetensors")
    # All of a word are 0, and 1 was taken of each.
    ones = sum(1 << 4 * at for at in range(8))
    word = torch.tensor((-ones) % 2**32 - 2**32, dtype=torch.int32)
    held[f"{module}.qzeros"][0, 0] = word
    save_file(held, quantised.packed / "model.safetensors")
    config = json.loads((quantised.packed / "config.json").read_text())
    config["quantization_config"]["meta"] = {"quantizer": ["gptqmodel:4.0"]}
    (quantised.packed / "config.json").write_text(json.dumps(config))
    of = quantised.layers[module]
    of.zeros[:8, 0] = 0
    found = whole(stored(quantised.packed)[f"{module}.weight"])
    np.testing.assert_array_equal(found, of.weights().astype(np.float32))


def test_says_what_does_not_fit_together(source: Path, tmp_path: Path) -> None:
    quantised = CASES["pack-quantized"](source, tmp_path)
    held = load_file(quantised.packed / "model.safetensors")
    del held["model.layers.0.self_attn.q_proj.weight_shape"]
    save_file(held, quantised.packed / "model.safetensors")
    with pytest.raises(FileFormatError, match=r"q_proj\.weight .* do not fit together"):
        stored(quantised.packed)


# An ingot with a checkpoint's own numbers


@pytest.fixture(scope="module")
def given(
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Quantised, Path]:
    """Both are read only."""
    checkpoint = make_checkpoint("olmoe", num_hidden_layers=1, num_experts=2, dtype=torch.bfloat16)
    quantised = CASES["gptq"](checkpoint, tmp_path_factory.mktemp("given"))
    return quantised, make_ingot(quantised.packed, "ort", weights="checkpoint", accuracy="exact")


def subject(folder: Path, quantised: Quantised) -> Subject:
    checkpoint = open_checkpoint(quantised.packed)
    return Subject(folder, Manifest.read(folder), checkpoint, Stages())


def changed(ingot: Path, folder: Path, name: str, at: tuple[int, ...], by: Any) -> Path:
    """A copy with one element of one tensor changed in place."""
    shutil.copytree(ingot, folder)
    file = folder / "weights.safetensors"
    tensor = read_header(file)[name]
    width = 4 if tensor.dtype == "F32" else 1
    place = tensor.begin + int(np.ravel_multi_index(at, tensor.shape)) * width
    data = bytearray(file.read_bytes())
    dtype = np.uint32 if width == 4 else np.uint8
    element = np.frombuffer(data, dtype, 1, place)
    data[place : place + width] = by(element.copy()).astype(dtype).tobytes()
    file.write_bytes(bytes(data))
    return folder


def checked(folder: Path, quantised: Quantised) -> Check:
    return check_weights(subject(folder, quantised))


def test_a_checkpoints_own_numbers_pass(given: tuple[Quantised, Path]) -> None:
    quantised, ingot = given
    found = checked(ingot, quantised)
    assert found.problems == () and found.compared > 10
    assert check_contract(subject(ingot, quantised)).problems == ()


Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("name", "at", "by", "of"),
    [
        (Q, (3, 1, 5), lambda byte: byte ^ 1, Q),
        (f"{Q}.scales", (3, 1), lambda bits: bits + 1, Q),
        (f"{Q}.zero_points", (3, 0), lambda byte: byte ^ 16, Q),
        (UP, (1, 3, 7), lambda byte: byte ^ 16, "experts.0.up_proj"),
        (f"{UP}.scales", (0, 2, 1), lambda bits: bits - 1, "experts.1.gate_proj"),
    ],
    ids=["a number", "a bit of a scale", "a zero point", "of an expert", "a scale of an expert"],
)
def test_one_bit_of_them_is_found(
    name: str, at: tuple[int, ...], by: Any, of: str, given: tuple[Quantised, Path], tmp_path: Path
) -> None:
    quantised, ingot = given
    found = checked(changed(ingot, tmp_path / "ingot", name, at, by), quantised)
    assert len(found.problems) == 1
    assert "1 of" in found.problems[0] and "not the checkpoint's" in found.problems[0]
    assert of.rpartition(".experts.")[2] in found.problems[0]


def test_a_format_that_is_not_the_checkpoints_is_found(
    given: tuple[Quantised, Path], tmp_path: Path
) -> None:
    quantised, ingot = given
    folder = tmp_path / "ingot"
    shutil.copytree(ingot, folder)
    raw = json.loads((folder / "ingot.json").read_text())
    del raw["quantization"]["bits"]["lm_head.weight"]
    (folder / "ingot.json").write_text(json.dumps(raw))
    found = check_contract(subject(folder, quantised))
    assert any("quantization.bits.lm_head.weight" in problem for problem in found.problems)
