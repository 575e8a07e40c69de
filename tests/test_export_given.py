"""The numbers of quantised checkpoints in ingots: the same, and what ONNX Runtime makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from oracle import every_other_is_slow, logits, of_transformers, relative_rms
from packed_cases import CASES, GPTQ, Case, with_head
from packers import Numbers, Quantised, gptq, numbers, quantise
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from ingot.export.codecs.blocks import Blocks
from ingot.export.codecs.given import Given, quantization_of
from ingot.export.ingot import Manifest
from ingot.export.request import ExportError
from ingot.graphs.coded import Coded, Form

# By family a way to quantise: of each format one, with and without zero points, of both bits.
WAYS = {
    "granite": "pack-quantized",
    "jetmoe": "gptq",
    "mamba2": "int-quantized",
    "olmoe": "awq",
}


def split(data: np.ndarray, bits: int) -> np.ndarray:
    """Stored bytes ``[N, ...]`` -> numbers ``[N, n]``, the first in the low half of a byte."""
    flat = data.reshape(len(data), -1)
    return flat if bits == 8 else np.stack([flat & 15, flat >> 4], axis=-1).reshape(len(data), -1)


def check_numbers(ingot: Path, quantised: Quantised, names: dict[str, str]) -> None:
    """Each stored weight has the numbers of its layer.

    Args:
        ingot: an export.
        quantised: of what.
        names: of stored matrices -> the layer of each.
    """
    manifest, held = Manifest.read(ingot), load_file(ingot / "weights.safetensors")
    assert manifest.quantization is not None and names
    size = manifest.quantization.block
    usual = {"int4": 4, "int8": 8}[manifest.weights]
    for name, layer in names.items():
        of = quantised.layers[layer]
        bits, columns = manifest.quantization.bits.get(name, usual), of.codes.shape[1]
        assert bits == of.bits
        np.testing.assert_array_equal(split(held[name], bits)[:, :columns], of.codes, name)
        first = np.arange(0, columns, size)
        scales = held[f"{name}.scales"]
        np.testing.assert_array_equal(scales, of.scales[:, of.order[first]], name)
        if not manifest.quantization.symmetric:
            zeros = split(held[f"{name}.zero_points"], bits)[:, : len(first)]
            np.testing.assert_array_equal(zeros, of.zeros[:, of.order[first]], name)


@pytest.mark.parametrize("family", every_other_is_slow(WAYS))
def test_a_checkpoints_own_numbers_are_stored_and_computed_with(
    family: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(family, num_hidden_layers=1)
    quantised = CASES[WAYS[family]](checkpoint, tmp_path)
    ingot = make_ingot(quantised.packed, "ort", weights="checkpoint", accuracy="exact")
    manifest = Manifest.read(ingot)
    assert manifest.weights == ("int8" if family == "mamba2" else "int4")
    assert manifest.quantization is not None and manifest.quantization.method == "given"
    ours = {f"{layer}.weight": layer for layer in quantised.layers if ".experts." not in layer}
    check_numbers(ingot, quantised, ours)
    assert relative_rms(of_transformers(quantised.plain), logits(ingot)) < 4e-6


def test_experts_have_the_numbers_of_their_layers(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    """Of a stack the experts lie backwards, and rows of gate and of up in turn."""
    checkpoint = make_checkpoint("olmoe", num_hidden_layers=1, num_experts=3)
    quantised = Case({**GPTQ, "sym": True}, gptq, {"symmetric": True})(checkpoint, tmp_path)
    ingot = make_ingot(quantised.packed, "ort", weights="checkpoint", accuracy="exact")
    held = load_file(ingot / "weights.safetensors")
    owner = "model.layers.0.mlp.experts"
    for expert in range(3):
        gate, up, down = (
            quantised.layers[f"{owner}.{expert}.{each}_proj"] for each in ("gate", "up", "down")
        )
        in_turn = np.stack([gate.codes, up.codes], axis=1).reshape(-1, gate.codes.shape[1])
        found = split(held[f"{owner}.gate_up_proj"][2 - expert], 4)
        np.testing.assert_array_equal(found[: len(in_turn), : in_turn.shape[1]], in_turn)
        found = split(held[f"{owner}.down_proj"][2 - expert], 4)
        np.testing.assert_array_equal(found[: len(down.codes), : down.codes.shape[1]], down.codes)
    assert relative_rms(of_transformers(quantised.plain), logits(ingot)) < 4e-6


def mixed(source: Path, folder: Path) -> Quantised:
    """The attention in 8 bits and wide groups, the experts' gates in 8 bits and their ups in 4."""

    def make(module: str, weight: np.ndarray, seed: int) -> Numbers:
        if "self_attn" in module or "gate_proj" in module:
            return numbers(weight, seed, bits=8, group=64)
        return numbers(weight, seed, bits=4, group=32)

    section = {
        **GPTQ,
        "dynamic": {
            ".*(self_attn|gate_proj)": {"bits": 8, "group_size": 64},
            "-:.*o_proj": {},
        },
    }

    def chosen(module: str) -> bool:
        return with_head(module) and not module.endswith("o_proj")

    return quantise(source, folder, section, gptq, chosen, make)


def test_layers_of_several_bits_and_groups(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("olmoe", num_hidden_layers=1, num_experts=2, dtype=torch.bfloat16)
    quantised = mixed(checkpoint, tmp_path)
    ingot = make_ingot(quantised.packed, "ort", weights="checkpoint", accuracy="exact")
    manifest = Manifest.read(ingot)
    assert manifest.weights == "int4" and manifest.quantization is not None
    assert manifest.quantization.block == 32
    bits = manifest.quantization.bits
    layer = "model.layers.0"
    assert bits[f"{layer}.self_attn.q_proj.weight"] == 8
    # Of experts with both the wider, which has the same weights.
    assert bits[f"{layer}.mlp.experts.gate_up_proj"] == 8
    assert bits[f"{layer}.mlp.experts.down_proj"] == 8
    assert "lm_head.weight" not in bits
    assert bits[f"{layer}.self_attn.o_proj.weight"] == 32
    check_numbers(
        ingot,
        quantised,
        {
            f"{layer}.self_attn.q_proj.weight": f"{layer}.self_attn.q_proj",
            "lm_head.weight": "lm_head",
        },
    )
    tensors = load_torch(ingot / "weights.safetensors")
    # What is not packed is as the checkpoint has it.
    assert tensors[f"{layer}.self_attn.o_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    of = quantised.layers[f"{layer}.mlp.experts.0.down_proj"]
    # By products of their own, since QMoE is not exact with 8 bits.
    down = tensors[f"{layer}.mlp.experts.down_proj.0"].flatten(1)
    # A number of 8 bits is as far from its middle as it was with 4.
    np.testing.assert_array_equal(down[:, : of.codes.shape[1]], of.codes + 120)
    assert relative_rms(of_transformers(quantised.plain), logits(ingot)) < 4e-6


@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
def test_every_other_way_to_store_weights_takes_the_decoded_ones(
    target: str,
    weights: str | None,
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    tmp_path: Path,
) -> None:
    if (target, weights) == ("onnx", "int8"):
        pytest.skip("whole numbers are for ort")
    checkpoint = make_checkpoint("granite", num_hidden_layers=1)
    quantised = CASES["gptq in the order of activations"](checkpoint, tmp_path)
    own, plain = (
        logits(make_ingot(folder, target, weights=weights))
        for folder in (quantised.packed, quantised.plain)
    )
    np.testing.assert_array_equal(own, plain)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gptq in the order of activations", ("out of order", "desc_act", "q_proj.weight")),
        ("gptq of wide groups", ("16 columns", "32, 64, 128")),
    ],
)
def test_refuses_numbers_that_no_kernel_reads(
    name: str,
    said: tuple[str, ...],
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint("granite", num_hidden_layers=1)
    quantised = CASES[name](checkpoint, tmp_path)
    with pytest.raises(ExportError) as caught:
        make_ingot(quantised.packed, "ort", weights="checkpoint")
    for part in (*said, "--weights fp32"):
        assert part in str(caught.value)


def test_refuses_an_accuracy_of_a_checkpoint_in_floats(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint("granite", num_hidden_layers=1)
    with pytest.raises(ExportError, match=r"--accuracy exact .* has neither"):
        make_ingot(checkpoint, "ort", weights="checkpoint", accuracy="exact")


def drawn(bits: int, group: int, columns: int, seed: int, *, symmetric: bool) -> Coded:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    zeros = torch.randint(0, 2**bits, (10, groups), generator=generator).to(torch.uint8)
    return Coded(
        torch.randint(0, 2**bits, (10, columns), generator=generator).to(torch.uint8),
        torch.randn(10, groups, generator=generator),
        None if symmetric else zeros,
        bits,
        group,
    )


@pytest.mark.parametrize("columns", [64, 90])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "of"), [(4, 4), (8, 8), (8, 4)])
@pytest.mark.parametrize(("size", "group"), [(32, 32), (32, 64), (32, 96), (64, 64), (128, 90)])
def test_blocks_are_worth_what_the_groups_are(
    size: Any, group: int, bits: Any, of: int, symmetric: bool, columns: int
) -> None:
    """Rows in any order, of a format that has zero points and of one without."""
    parts = [drawn(of, min(group, columns), columns, seed, symmetric=symmetric) for seed in (0, 1)]
    weights = np.concatenate([part.weights().numpy() for part in parts])
    turned = np.random.default_rng(0).permutation(20)
    for blocks in {Blocks(bits, size, symmetric), Blocks(bits, size, False)}:
        given = Given({"w": blocks}.get, lambda _name, _expert: parts)
        for order in (np.arange(20), turned):
            encoded = given.encode("w", 0, weights[order])
            np.testing.assert_array_equal(blocks.decode(encoded, columns), weights[order])


def test_numbers_of_another_matrix_are_no_weights() -> None:
    part = drawn(4, 32, 64, 0, symmetric=False)
    given = Given(lambda _name: Blocks(4, 32, False), lambda _name, _expert: [part])
    with pytest.raises(AssertionError, match="not what the checkpoint has"):
        given.encode("w", 0, part.weights().numpy() * np.float32(1.5))


def form(group: int, columns: int, bits: int = 4, *, symmetric: bool = True) -> Form:
    return Form(bits, group, columns, symmetric, in_order=True)


@pytest.mark.parametrize(
    ("forms", "block"),
    [
        ([form(128, 512)], 128),
        ([form(256, 512), form(128, 512)], 128),
        ([form(64, 512), form(128, 512)], 64),
        ([form(96, 192)], 32),
        # Whole rows: blocks that fill them, where there are such.
        ([form(320, 320), form(256, 256)], 64),
        ([form(90, 90), form(64, 512)], 64),
        ([form(90, 90)], 128),
    ],
)
def test_blocks_are_the_largest_that_groups_are_whole_numbers_of(
    forms: list[Form], block: int
) -> None:
    named = {f"layers.{at}.weight": [each] for at, each in enumerate(forms)}
    weights, found = quantization_of(named, [], None)
    assert (weights, found.block, found.accuracy, found.method) == ("int4", block, "fast", "given")


def test_a_format_is_that_of_most_and_names_the_others() -> None:
    forms = {
        "a.q.weight": [form(64, 64)],
        "a.k.weight": [form(64, 64, 8, symmetric=False)],
        "a.experts.gate_up_proj": [form(64, 64), form(64, 64, 8)],
        "a.experts.down_proj": [form(64, 64), form(64, 64)],
    }
    weights, found = quantization_of(forms, ["embed.weight"], "exact")
    assert weights == "int4" and not found.symmetric and found.accuracy == "exact"
    assert found.bits == {
        "a.k.weight": 8,
        "a.experts.gate_up_proj": 8,
        "a.experts.down_proj": 8,
        "embed.weight": 32,
    }
