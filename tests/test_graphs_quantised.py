"""Quantised checkpoints, read: the numbers that were packed, and the weights they make."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_adapter
from conftest import MakeCheckpoint
from oracle import relative_rms, tokens
from packed_cases import AWQ, CASES, GPTQ, compressed, group
from packers import (
    Numbers,
    Quantised,
    gptq,
    is_linear,
    numbers,
    one_by_one,
    pack_quantized,
    quantise,
    words,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ingot.graphs.coded import Coded
from ingot.graphs.merge import open_checkpoint
from ingot.graphs.quantised import QuantisedCheckpoint, quantisation
from ingot.plugins.errors import IngotError
from ingot.validate.truth.eager import EagerSession

DATA = Path(__file__).parent / "data" / "quantised"
# Of each family one case by itself, beside all of one family.
OF_FAMILIES = {
    "granite": "gptq symmetric",
    "jetmoe": "pack-quantized with zero points",
    "mamba2": "gptq_v2 of 8 bits",
}
Make = Callable[[str], Quantised]


@pytest.fixture(scope="module")
def sources(make_checkpoint: MakeCheckpoint) -> dict[str, Path]:
    # Two experts and one layer, for numbers are packed one by one.
    few = {"num_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    made = {"olmoe": make_checkpoint("olmoe", dtype=torch.bfloat16, **few)}
    for family in OF_FAMILIES:
        made[family] = make_checkpoint(family, num_hidden_layers=1)
    return made


@pytest.fixture(scope="module")
def olmoe(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """OLMoE, quantised by a case, once; read only."""
    made: dict[str, Quantised] = {}

    def make(name: str) -> Quantised:
        if name not in made:
            folder = tmp_path_factory.mktemp("quantised")
            made[name] = CASES[name](sources["olmoe"], folder)
        return made[name]

    return make


def edit(quantised: Quantised, folder: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy with other tensors, by name; None takes one away."""
    shutil.copytree(quantised.packed, folder)
    held = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            del held[name]
        else:
            held[name] = tensor.contiguous()
    save_file(held, folder / "model.safetensors")
    return folder


def configured(quantised: Quantised, folder: Path, section: Any) -> Path:
    """A copy with another ``quantization_config``."""
    shutil.copytree(quantised.packed, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = section
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(folder: Path, *said: str) -> None:
    """Opening a folder and reading all of it ends in one sentence that says so."""

    def read() -> None:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.entries:
            checkpoint.read(name)

    with pytest.raises(IngotError) as caught:
        read()
    for part in said:
        assert part in str(caught.value), caught.value


def same_numbers(coded: Coded, of: Numbers) -> None:
    middle = torch.full(of.zeros.shape, 2 ** (of.bits - 1))
    zeros = middle if coded.zero_points is None else coded.zero_points
    order = torch.arange(coded.codes.shape[1]) // coded.group
    assert coded.bits == of.bits
    np.testing.assert_array_equal(coded.codes.numpy(), of.codes)
    np.testing.assert_array_equal(zeros.numpy(), of.zeros)
    np.testing.assert_array_equal(coded.scales.numpy(), of.scales)
    np.testing.assert_array_equal((order if coded.order is None else coded.order).numpy(), of.order)


# What is read


@pytest.mark.parametrize("name", CASES)
def test_gives_the_numbers_that_were_packed(name: str, olmoe: Make) -> None:
    quantised = olmoe(name)
    checkpoint = open_checkpoint(quantised.packed)
    plain = load_file(quantised.plain / "model.safetensors")
    assert checkpoint.entries.keys() == plain.keys()
    for tensor, expected in plain.items():
        coded = checkpoint.coded(tensor)
        of = quantised.layers.get(tensor.removesuffix(".weight"))
        assert (coded is None) == (of is None), tensor
        if coded is not None and of is not None:
            same_numbers(coded, of)
        # The product of a scale and a difference of numbers is exact in float32.
        assert torch.equal(checkpoint.read(tensor), expected), tensor
        assert checkpoint.entries[tensor].shape == tuple(expected.shape)
        assert checkpoint.dtype(tensor) == expected.dtype


@pytest.mark.parametrize("family", OF_FAMILIES)
def test_a_model_computes_what_transformers_does_of_the_plain_weights(
    family: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    quantised = CASES[OF_FAMILIES[family]](sources[family], tmp_path)
    assert quantised.layers
    model = AutoModelForCausalLM.from_pretrained(quantised.plain, dtype=torch.float32)
    ids, mask = tokens(model.config.vocab_size)
    with torch.inference_mode():
        expected = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    session = EagerSession(open_checkpoint(quantised.packed), "generate")
    session.reset(len(ids), ids.shape[1])
    found = np.asarray(session.step(ids, mask))
    real = mask != 0
    assert relative_rms(expected.logits.numpy()[real], found[real]) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_that_words_do_not_fill(bits: int, sources: dict[str, Path], tmp_path: Path) -> None:
    config = {"hidden_size": 60, "num_attention_heads": 4, "intermediate_size": 42}
    rows = {"in": (36, 42), "out": (60, 36)}
    random = np.random.default_rng(0)
    made = {
        name: numbers(random.normal(size=shape), 1, bits=bits, group=6, dtype=torch.float32)
        for name, shape in rows.items()
    }
    tensors = {}
    for name, of in made.items():
        tensors.update(pack_quantized(name, of, symmetric=False, dtype=torch.float32))
    section = compressed("pack-quantized", group(bits, 6, symmetric=False))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "granite", **config, "quantization_config": section})
    )
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    for name, of in made.items():
        coded = checkpoint.coded(f"{name}.weight")
        assert coded is not None
        same_numbers(coded, of)


def test_a_last_group_that_is_smaller(olmoe: Make, tmp_path: Path) -> None:
    of = numbers(np.random.default_rng(0).normal(size=(32, 80)), 1, group=32)
    save_file(gptq("layer", of), tmp_path / "model.safetensors")
    config = {"model_type": "granite", "quantization_config": GPTQ}
    (tmp_path / "config.json").write_text(json.dumps(config))
    coded = open_checkpoint(tmp_path).coded("layer.weight")
    assert coded is not None and coded.scales.shape == (32, 3)
    same_numbers(coded, of)
    np.testing.assert_array_equal(coded.weights().numpy(), of.weights().astype(np.float32))


@pytest.mark.parametrize("case", sorted(DATA.glob("*.safetensors")), ids=lambda path: path.stem)
def test_rounds_to_what_the_library_unpacks(case: Path, tmp_path: Path) -> None:
    """Files of compressed-tensors 0.20.0: what it packed, and what it made of that again.

    They are made by ``data/quantised/make.py``. Its weights have the scales' dtype, in which it
    computes; ours, rounded to that, are the same to the bit.
    """
    held = load_file(case)
    expected = {name: held.pop(name) for name in list(held) if name.startswith("unpacked.")}
    section = json.loads((DATA / f"{case.stem}.json").read_text())
    save_file(held, tmp_path / "model.safetensors")
    config = {"model_type": "granite", "quantization_config": section}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    assert len(expected) == len(checkpoint.entries)
    for name, weight in expected.items():
        found = checkpoint.read(name.removeprefix("unpacked."))
        assert torch.equal(found.to(weight.dtype), weight), name


# What is kept of it


def test_the_digest_is_of_every_packed_tensor(olmoe: Make, tmp_path: Path) -> None:
    quantised = olmoe("gptq")
    layer = "model.layers.0.self_attn.q_proj"

    def digest(folder: Path) -> str:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.entries:
            checkpoint.read(name)
        return checkpoint.digest()

    before = digest(quantised.packed)
    assert digest(quantised.packed) == before
    held = load_file(quantised.packed / "model.safetensors")
    seen = {before}
    for role in ("qweight", "qzeros", "scales", "g_idx"):
        tensor = held[f"{layer}.{role}"].clone()
        # Numbers of the same group, so that what is read is still right.
        tensor.view(-1)[0] = tensor.view(-1)[0] * 0 + tensor.view(-1)[1]
        if role == "g_idx":
            tensor[[0, 40]] = tensor[[40, 0]]
        seen.add(digest(edit(quantised, tmp_path / role, **{f"{layer}.{role}": tensor})))
    assert len(seen) == 5


def test_a_form_is_known_without_the_numbers(olmoe: Make) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    for case, expected in {
        "gptq": (4, 32, 64, False, True),
        "gptq symmetric": (4, 64, 64, True, True),
        "gptq in the order of activations": (4, 32, 64, False, False),
        "pack-quantized in the order of activations": (4, 32, 64, True, False),
        "int-quantized": (8, 64, 64, True, True),
    }.items():
        form = open_checkpoint(olmoe(case).packed).form(name)
        assert form is not None
        found = (form.bits, form.group, form.columns, form.symmetric, form.in_order)
        assert found == expected, case
    assert open_checkpoint(olmoe("gptq").packed).form("lm_head.weight") is None


def test_an_adapter_is_added_to_what_is_unpacked(sources: dict[str, Path], tmp_path: Path) -> None:
    quantised = CASES["gptq symmetric"](sources["granite"], tmp_path)
    adapter = make_adapter(quantised.plain, tmp_path / "adapter", target_modules=["q_proj"])
    own, plain = (open_checkpoint(each, adapter) for each in (quantised.packed, quantised.plain))
    for name in plain.entries:
        assert torch.equal(own.read(name), plain.read(name)), name
    layer = "model.layers.0.self_attn"
    # What is a sum is in no whole numbers.
    assert (
        own.coded(f"{layer}.q_proj.weight") is None and own.form(f"{layer}.q_proj.weight") is None
    )
    kept = own.coded(f"{layer}.k_proj.weight")
    assert kept is not None and own.form(f"{layer}.k_proj.weight") is not None
    same_numbers(kept, quantised.layers[f"{layer}.k_proj"])


# Zero points of GPTQ


def zero(quantised: Quantised, folder: Path, meta: Any, *, by_words: bool) -> Path:
    """A copy in which one zero point of a layer is 0, made smaller in one of two ways."""
    layer = "model.layers.0.self_attn.q_proj"
    zeros = quantised.layers[layer].zeros.T.copy()
    zeros[0, 1] = 0
    one = zeros - 1
    if by_words:
        flat = zeros.reshape(len(zeros), -1, 8)
        totals = [[sum(int(n) << 4 * i for i, n in enumerate(w)) for w in row] for row in flat]
        ones = sum(1 << 4 * i for i in range(8))
        wrapped = np.array([[(t - ones) % 2**32 for t in row] for row in totals], np.uint32)
        packed = torch.from_numpy(wrapped.view(np.int32))
    else:
        packed = words(one % 16, 4)
    copy = edit(quantised, folder, **{f"{layer}.qzeros": packed})
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["meta"] = meta
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_a_zero_point_that_wrapped_is_read_where_one_program_wrote_it(
    olmoe: Make, tmp_path: Path
) -> None:
    quantised = olmoe("gptq")
    layer = "model.layers.0.self_attn.q_proj"
    expected = quantised.layers[layer].zeros.copy()
    expected[1, 0] = 0
    for at, meta in enumerate(({"quantizer": ["gptqmodel:2.0"]}, {"quantizer": "gptqmodel:1"})):
        folder = zero(quantised, tmp_path / str(at), meta, by_words=True)
        coded = open_checkpoint(folder).coded(f"{layer}.weight")
        assert coded is not None and coded.zero_points is not None
        np.testing.assert_array_equal(coded.zero_points.numpy(), expected)


@pytest.mark.parametrize("meta", [None, {"quantizer": ["optimum:1.0"]}])
def test_a_zero_point_that_wrapped_is_refused_where_readers_differ(
    meta: Any, olmoe: Make, tmp_path: Path
) -> None:
    folder = zero(olmoe("gptq"), tmp_path / "copy", meta, by_words=False)
    refused(folder, "q_proj.qzeros", "stored as 15", "for 0 and others for 16", "gptq_v2")


def test_a_group_index_of_zeros_is_none(olmoe: Make, tmp_path: Path) -> None:
    quantised = olmoe("gptq")
    layer = "model.layers.0.self_attn.q_proj"
    copy = edit(
        quantised, tmp_path / "copy", **{f"{layer}.g_idx": torch.zeros(64, dtype=torch.int32)}
    )
    coded = open_checkpoint(copy).coded(f"{layer}.weight")
    assert coded is not None
    same_numbers(coded, quantised.layers[layer])


# Which layers


def test_gptqs_dynamic_gives_layers_settings_of_their_own(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    def make(module: str, weight: np.ndarray, seed: int) -> Numbers:
        if module.endswith("down_proj"):
            return numbers(weight, seed, bits=8, group=16)
        return numbers(weight, seed, group=32)

    def chosen(module: str) -> bool:
        return is_linear(module) and not module.endswith("v_proj")

    section = {
        **GPTQ,
        "dynamic": {
            r"-:.*\.v_proj$": {},
            r"+:.*experts\.\d+\.down_": {"bits": 8, "group_size": 16},
            r".*down_proj": {"bits": 4, "group_size": 64},
        },
    }
    quantised = quantise(sources["olmoe"], tmp_path, section, gptq, chosen, make)
    checkpoint = open_checkpoint(quantised.packed)
    for module, of in quantised.layers.items():
        coded = checkpoint.coded(f"{module}.weight")
        assert coded is not None
        same_numbers(coded, of)


@pytest.mark.parametrize(
    "change",
    [
        {"dynamic": {r"-:.*q_proj": {}}},
        {"modules_in_block_to_quantize": [["self_attn.k_proj"], ["self_attn.v_proj"]]},
    ],
)
def test_refuses_a_packed_layer_that_gptqs_config_leaves_out(
    change: dict[str, Any], olmoe: Make, tmp_path: Path
) -> None:
    folder = configured(olmoe("gptq"), tmp_path / "copy", {**GPTQ, **change})
    refused(folder, "is packed", "says that it is not quantised")


def test_awqs_modules_to_not_convert_are_whole_parts_of_a_name(olmoe: Make, tmp_path: Path) -> None:
    quantised = olmoe("awq")
    # gate is left, and gate_proj is not.
    assert any(module.endswith("gate_proj") for module in quantised.layers)
    section = {**AWQ, "modules_to_not_convert": ["self_attn"]}
    folder = configured(quantised, tmp_path / "copy", section)
    refused(folder, "self_attn", "says that it is not quantised")


def test_targets_of_compressed_tensors(sources: dict[str, Path], tmp_path: Path) -> None:
    """Names count before patterns, and those before classes, whatever the order of the groups."""
    by_class = {**group(4, 32), "targets": ["Linear"]}
    by_pattern = {**group(8, 32), "targets": [r"re:.*self_attn\."]}
    by_name = {**group(4, 64), "targets": ["model.layers.0.self_attn.o_proj"]}
    section = compressed("pack-quantized", by_class, by_pattern, by_name)

    def make(module: str, weight: np.ndarray, seed: int) -> Numbers:
        named = module.endswith("o_proj")
        bits, size = 8 if "self_attn" in module and not named else 4, 64 if named else 32
        settings: dict[str, Any] = {"symmetric": True, "dtype": torch.bfloat16}
        return numbers(weight, seed, bits=bits, group=size, **settings)

    pack = partial(pack_quantized, symmetric=True)
    quantised = quantise(sources["olmoe"], tmp_path, section, pack, is_linear, make)
    checkpoint = open_checkpoint(quantised.packed)
    for module, of in quantised.layers.items():
        coded = checkpoint.coded(f"{module}.weight")
        assert coded is not None
        same_numbers(coded, of)
    for ignored in ("model.layers.0.self_attn.o_proj", r"re:.*o_proj", "Linear"):
        folder = tmp_path / "copy"
        configured(quantised, folder, {**section, "ignore": [ignored]})
        refused(folder, "is packed", "says that it is not quantised")
        shutil.rmtree(folder)


def test_a_preset_is_a_scheme(olmoe: Make) -> None:
    section = compressed("pack-quantized", config_groups={"W4A16": ["Linear"]})
    found = quantisation({"quantization_config": section})
    assert found is not None
    settings = found.settings(["model.layers.0.q_proj", "lm_head"])
    assert settings["lm_head"] is None
    of = settings["model.layers.0.q_proj"]
    assert of is not None and (of.bits, of.group, of.symmetric) == (4, 128, True)


# What is refused of a config


def changed(section: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**section, **fields}


ACTIVATIONS = {**group(8, None), "input_activations": {"num_bits": 8, "dynamic": True}}
SECTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "3 bits": (changed(GPTQ, bits=3), ("bits is 3", "4 and of 8")),
    "no bits": ({"quant_method": "gptq"}, ("bits is 0",)),
    "a group of 0": (changed(GPTQ, group_size=0), ("group_size is 0",)),
    "a kernel's layout": (
        changed(GPTQ, checkpoint_format="marlin"),
        ("checkpoint_format", "'marlin'", "gptq_v2"),
    ),
    "two formats": (
        changed(GPTQ, checkpoint_format="gptq_v2", format="gptq"),
        ("format is 'gptq'", "gptq_v2"),
    ),
    "an adapter beside it": (changed(GPTQ, adapter={"rank": 4}), ("adapter",)),
    "rotation": (changed(GPTQ, rotation="hadamard"), ("rotation",)),
    "a pattern that is none": (changed(GPTQ, dynamic={"(": {}}), ("dynamic", "missing )")),
    "3 bits of a layer": (changed(GPTQ, dynamic={"x": {"bits": 3}}), ("bits", "dynamic")),
    "8 bits of awq": (changed(AWQ, bits=8), ("bits is 8",)),
    "another packing": (changed(AWQ, version="gemv"), ("'gemv'", "gemm")),
    "another program": (changed(AWQ, backend="llm-awq"), ("llm-awq",)),
    "activations": (compressed("int-quantized", ACTIVATIONS), ("group_0", "input_activations")),
    "caches": (
        compressed("pack-quantized", group(), kv_cache_scheme={"num_bits": 8}),
        ("kv_cache_scheme",),
    ),
    "weights to be rounded": (
        compressed("pack-quantized", group(), quantization_status="frozen"),
        ("quantization_status", "frozen"),
    ),
    "floats of 8 bits": (
        compressed("float-quantized", group(8, None, type="float")),
        ("float-quantized",),
    ),
    "floats of 4 bits": (
        compressed("pack-quantized", group(4, 16, type="float")),
        ("type is 'float'",),
    ),
    "blocks of rows": (
        compressed("naive-quantized", group(8, None, strategy="block", block_structure=[2, 2])),
        ("block_structure",),
    ),
    "sparse": (
        compressed("pack-quantized", group(), sparsity_config={"format": "sparse-24-bitmask"}),
        ("sparsity_config", "sparse-24-bitmask"),
    ),
    "turned": (
        compressed("pack-quantized", group(), transform_config={"config_groups": {"u": {}}}),
        ("transform_config",),
    ),
    "a preset with activations": (
        compressed("int-quantized", config_groups={"W8A8": ["Linear"]}),
        ("W8A8", "W4A16"),
    ),
    "no groups": (compressed("pack-quantized"), ("config_groups",)),
    "no group size": (
        compressed("pack-quantized", group(4, None, strategy="group")),
        ("group_size", "strategy"),
    ),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("bitsandbytes",)),
    **{
        method: ({"quant_method": method}, (method, "gptq, awq, compressed-tensors"))
        for method in ("fp8", "hqq", "eetq", "mxfp4", "torchao", "quark", "aqlm", "fbgemm_fp8")
    },
}


@pytest.mark.parametrize("name", SECTIONS)
def test_refuses_a_config(name: str, olmoe: Make, tmp_path: Path) -> None:
    section, said = SECTIONS[name]
    refused(configured(olmoe("gptq"), tmp_path / "copy", section), "config.json", *said)


def test_refuses_packing_of_mamba_ssms_layout(tmp_path: Path) -> None:
    config = {"d_model": 64, "n_layer": 1, "vocab_size": 64, "ssm_cfg": {"layer": "Mamba2"}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": GPTQ}))
    refused(tmp_path, "quantization_config", "transformers' layout")


# What is refused of tensors


LAYER = "model.layers.0.self_attn.q_proj"
DAMAGES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "zero points missing": ("gptq", {"qzeros": None}, ("q_proj.qzeros is missing",)),
    "scales missing": ("awq", {"scales": None}, ("q_proj.scales is missing",)),
    "numbers missing": ("gptq", {"qweight": None}, ("without", "q_proj.qweight")),
    "shape missing": ("pack-quantized", {"weight_shape": None}, ("weight_shape is missing",)),
    "zero points of another width": (
        "gptq",
        {"qzeros": torch.zeros(2, 4, dtype=torch.int32)},
        ("q_proj.qzeros", "[2, 4]", "it is [2, 8]"),
    ),
    "scales of other groups": (
        "gptq",
        {"scales": torch.ones(4, 64).half()},
        ("q_proj.scales", "[4, 64]", "groups of 32 columns", "[2, 64]"),
    ),
    "a scale that is no number": (
        "awq",
        {"scales": torch.full((2, 64), float("nan")).half()},
        ("q_proj", "scale that is no number"),
    ),
    "an infinite scale": (
        "pack-quantized",
        {"weight_scale": torch.full((64, 2), float("inf")).bfloat16()},
        ("q_proj", "scale that is no number"),
    ),
    "a scale beyond float32": (
        "pack-quantized",
        {"weight_scale": torch.full((64, 2), 3e38).bfloat16()},
        ("q_proj", "beyond float32"),
    ),
    "a group that is not there": (
        "gptq",
        {"g_idx": torch.full((64,), 2, dtype=torch.int32)},
        ("q_proj.g_idx", "there are 2"),
    ),
    "an order of another length": (
        "gptq",
        {"g_idx": torch.zeros(32, dtype=torch.int32)},
        ("q_proj.g_idx", "[32]", "[64]"),
    ),
    "a group of an order that is not there": (
        "pack-quantized in the order of activations",
        {"weight_g_idx": torch.full((64,), 2, dtype=torch.int32)},
        ("weight_g_idx", "there are 2"),
    ),
    "zero points of symmetric ones": (
        "gptq symmetric",
        {"qzeros": torch.zeros(1, 8, dtype=torch.int32)},
        ("q_proj.qzeros", "other than 8", "sym"),
    ),
    "a shape that does not fit": (
        "pack-quantized",
        {"weight_shape": torch.tensor([64, 128])},
        ("weight_shape", "[64, 128]"),
    ),
    "no size at all": (
        "pack-quantized",
        {"weight_shape": torch.tensor([64, -8])},
        ("weight_shape", "-8"),
    ),
    "numbers of another type": (
        "gptq",
        {"qweight": torch.zeros(8, 64)},
        ("q_proj.qweight", "F32", "I32"),
    ),
    "numbers too large": (
        "naive-quantized with zero points",
        {"weight_zero_point": torch.zeros(2, 2, dtype=torch.int8)},
        ("weight_zero_point", "[2, 2]"),
    ),
    "a plain one as well": (
        "gptq",
        {"weight": torch.zeros(64, 64)},
        ("q_proj", "plain", "as well"),
    ),
    "a scale of a plain one": (
        "pack-quantized",
        {"weight_packed": None, "weight": torch.zeros(64, 64)},
        ("is there without", "weight_packed"),
    ),
    "a stack": (
        "pack-quantized",
        {"weight_packed": torch.zeros(2, 64, 8, dtype=torch.int32)},
        ("weight_packed", "2 axes"),
    ),
    "what is no tensor of it": (
        "gptq",
        {"other": torch.zeros(2, dtype=torch.int32)},
        ("q_proj.other", "I32"),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_refuses_tensors_that_are_damaged(name: str, olmoe: Make, tmp_path: Path) -> None:
    case, tensors, said = DAMAGES[name]
    named = {f"{LAYER}.{role}": tensor for role, tensor in tensors.items()}
    refused(edit(olmoe(case), tmp_path / "copy", **named), "model.safetensors", *said)


def test_refuses_numbers_of_more_bits_than_the_config_says(olmoe: Make, tmp_path: Path) -> None:
    section = compressed("int-quantized", group(4, None))
    folder = configured(olmoe("int-quantized"), tmp_path / "copy", section)
    refused(folder, "weight holds numbers of more than 4 bits")


def test_refuses_groups_that_do_not_divide_a_row(olmoe: Make, tmp_path: Path) -> None:
    section = compressed("pack-quantized", group(4, 24))
    folder = configured(olmoe("pack-quantized"), tmp_path / "copy", section)
    refused(folder, "weight_scale", "24 do not divide")


def test_refuses_a_config_without_packed_weights(olmoe: Make, tmp_path: Path) -> None:
    quantised = olmoe("gptq")
    folder = tmp_path / "copy"
    shutil.copytree(quantised.plain, folder)
    config = json.loads((quantised.packed / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "gptq", "no weight is packed", "remove quantization_config")


def test_refuses_packed_weights_without_a_config(olmoe: Make, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(olmoe("gptq").packed, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "I32", "quantization_config")


def test_experts_of_the_shape_that_the_config_makes(olmoe: Make, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(olmoe("gptq").packed, folder)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, QuantisedCheckpoint)
    with pytest.raises(IngotError, match=r"gate_proj\.weight has shape"):
        EagerSession(checkpoint, "generate")


def test_one_by_one_is_what_transformers_4_writes() -> None:
    """Of the packers: the rows of gate come before those of up."""
    stack = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    found = one_by_one({"a.experts.gate_up_proj": stack})
    assert torch.equal(found["a.experts.1.gate_proj.weight"], stack[1, :2])
    assert torch.equal(found["a.experts.1.up_proj.weight"], stack[1, 2:])


# What damage may do

SEED, ATTEMPTS = 0, 40
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 4, 7, 8, 16, 32, 10**400, 1.5, 1e308, float("nan"), "", "x"),
    *(
        "int",
        "float",
        "gptq_v2",
        "group",
        "channel",
        "tensor",
        "re:(",
        "re:.*",
        "\ud800",
        "z" * 9999,
    ),
    *(
        [],
        [1],
        ["x"],
        [["self_attn.q_proj"]],
        [None],
        {},
        {"a": 1},
        {"(": {}},
        {"W4A16": ["Linear"]},
    ),
    {"group_0": None},
    {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 1}}},
)


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The places of all fields, the objects among them."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, each in value.items():
            found += leaves(each, (*path, key))
    return found


def damage(random: np.random.Generator, folder: Path) -> str:
    """One field of the config is another, or one tensor of another shape, type or content."""
    if random.random() < 0.5:
        config = json.loads((folder / "config.json").read_text())
        section = config["quantization_config"]
        places = leaves(section)
        *path, last = places[random.integers(len(places))]
        for key in path:
            section = section[key]
        section[last] = VALUES[random.integers(len(VALUES))]
        (folder / "config.json").write_text(json.dumps(config))
        return f"{last} is {section[last]!r:.60}"
    held = load_file(folder / "model.safetensors")
    names = sorted(name for name in held if "q_proj" in name or "down_proj" in name)
    name = names[random.integers(len(names))]
    tensor = held.pop(name)
    kind = random.integers(6)
    if kind == 0:
        held[name] = tensor.reshape(-1)[: random.integers(tensor.numel())].clone()
    elif kind == 1:
        held[name] = tensor.to((torch.float16, torch.int32, torch.int8)[random.integers(3)])
    elif kind == 2:
        held[name] = torch.full_like(tensor, int(random.integers(-9, 99)))
    elif kind == 3:
        held[name] = tensor[None]
    elif kind == 4:
        held[f"{name}_"] = tensor
    save_file(
        {each: tensor.contiguous() for each, tensor in held.items()}, folder / "model.safetensors"
    )
    return f"{name} damaged in way {kind}"


@pytest.mark.parametrize(
    "case", ["gptq", "awq", "pack-quantized with zero points", "int-quantized"]
)
def test_damage_is_refused_in_a_sentence_or_read(case: str, olmoe: Make, tmp_path: Path) -> None:
    random = np.random.default_rng(SEED)
    quantised = olmoe(case)
    refusals = []
    for attempt in range(ATTEMPTS):
        folder = tmp_path / str(attempt)
        shutil.copytree(quantised.packed, folder)
        told = damage(random, folder)
        try:
            checkpoint = open_checkpoint(folder)
            for name in checkpoint.entries:
                assert torch.isfinite(checkpoint.read(name)).all(), told
                checkpoint.form(name)
        except IngotError as error:
            refusals.append(str(error))
        except Exception as error:
            raise AssertionError(told) from error
        shutil.rmtree(folder)
    assert ATTEMPTS / 6 < len(refusals) < ATTEMPTS
    assert all(len(said) < 1000 and "\n" not in said for said in refusals)
