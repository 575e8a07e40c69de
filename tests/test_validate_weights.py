"""Weights of an ingot against its checkpoint: right ones pass, and every small wrong is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import toy_hybrid
from conftest import MakeCheckpoint, MakeIngot
from damage import copied, with_weight
from safetensors.torch import load_file, save_file
from test_graphs_merge import fused

from ingot.export.capture import capture
from ingot.export.ingot import GRAPH, WEIGHTS, Manifest
from ingot.export.passes import moe, moe_linear, scales, weights
from ingot.export.progress import Stages
from ingot.graphs import checkpoint as checkpoints
from ingot.graphs import olmoe
from ingot.graphs.merge import open_checkpoint
from ingot.validate.identity.subject import Subject
from ingot.validate.identity.weights import check_weights
from ingot.validate.identity.weights_files import rounded, widen
from ingot.validate.result import Check, Location

FAMILIES = ("granite", "jetmoe", "mamba2", "olmoe")
ODD = {
    "embedding_multiplier": 1.7,
    "residual_multiplier": 0.3,
    "logits_scaling": 0.3,
    "attention_multiplier": 0.1,
}
Make = Callable[[str], tuple[Path, Path]]


def checked(ingot: Path, checkpoint: Path, adapter: Path | None = None) -> Check:
    opened = open_checkpoint(checkpoint, adapter)
    return check_weights(Subject(ingot, Manifest.read(ingot), opened, Stages()))


def passes(ingot: Path, checkpoint: Path) -> bool:
    check = checked(ingot, checkpoint)
    assert check.compared > 10
    assert (check.problems, check.location, check.left_out) == ((), None, "")
    return True


@pytest.fixture(scope="module")
def both(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> Make:
    """An ``ort`` ingot of a family, and its checkpoint; read only."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in made:
            checkpoint = make_checkpoint(family)
            made[family] = make_ingot(checkpoint, "ort"), checkpoint
        return made[family]

    return make


# What is right


def test_passes_a_right_ingot(tiny: Path, tiny_ort: Path, tiny_onnx: Path) -> None:
    assert passes(tiny_ort, tiny) and passes(tiny_onnx, tiny)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_passes_every_precision_of_a_target_and_of_a_checkpoint(
    family: str, dtype: torch.dtype, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint(family, dtype=dtype)
    assert passes(make_ingot(checkpoint, "onnx"), checkpoint)
    assert passes(make_ingot(checkpoint, "ort"), checkpoint)
    for precision in ("fp32", "fp16", "bf16"):
        ingot = make_ingot(checkpoint, "trt", precision=precision, builder="none")
        assert passes(ingot, checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}],
    ids=["tied", "untied", "biases"],
)
@pytest.mark.parametrize(
    "request_fields",
    [
        {"target": "ort"},
        {"target": "onnx", "extra_outputs": ("hidden_states",)},
        {"target": "onnx", "task": "features"},
        {"target": "trt", "precision": "fp16", "builder": "none"},
        {"target": "trt", "precision": "bf16", "builder": "none"},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_passes_factors_that_are_no_round_numbers(
    fields: dict[str, Any],
    request_fields: dict[str, Any],
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
) -> None:
    checkpoint = make_checkpoint("granite", **ODD, **fields)
    target, *_ = request_fields.values()
    rest = {name: value for name, value in request_fields.items() if name != "target"}
    assert passes(make_ingot(checkpoint, target, **rest), checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("olmoe", {"num_experts": 1, "num_experts_per_tok": 1}),
        ("olmoe", {"hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": True}),
        ("jetmoe", {"activation_function": "gelu", "tie_word_embeddings": False}),
        ("jetmoe", {"num_local_experts": 2}),
        ("mamba2", {"use_bias": True, "conv_kernel": 2, "tie_word_embeddings": False}),
        ("mamba2", {"use_conv_bias": False, "rms_norm": False, "n_groups": 8}),
    ],
    ids=str,
)
def test_passes_unusual_configs(
    family: str, fields: dict[str, Any], make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint(family, **fields)
    for target in ("onnx", "ort"):
        assert passes(make_ingot(checkpoint, target), checkpoint)


def respelled(
    checkpoint: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> Path:
    """A copy of a checkpoint with its tensors under other names."""
    shutil.copytree(checkpoint, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    return out


def head_instead(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def both_names(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def without_prefix(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def with_buffers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["model.layers.1.self_attn.masked_bias"] = torch.tensor(-1e9)


@pytest.mark.slow
@pytest.mark.parametrize("change", [head_instead, both_names, without_prefix, with_buffers])
def test_finds_a_checkpoint_s_tensors_by_their_other_names(
    change: Callable[[dict[str, torch.Tensor]], object], both: Make, tmp_path: Path
) -> None:
    ingot, checkpoint = both("granite")
    assert passes(ingot, respelled(checkpoint, tmp_path / "other", change))


def test_finds_experts_that_are_stored_in_one_tensor(
    tiny: Path, tiny_ort: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    base = fused(tiny, tmp_path)
    assert passes(tiny_ort, base) and passes(tiny_onnx, base)


@pytest.mark.slow
def test_finds_tensors_in_shards(both: Make, tmp_path: Path) -> None:
    ingot, checkpoint = both("jetmoe")
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(names)}
    for shard in set(weight_map.values()):
        own = {name: tensors[name] for name in names if weight_map[name] == shard}
        save_file(own, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(checkpoint / "config.json", tmp_path)
    assert passes(ingot, tmp_path)


@pytest.mark.slow
def test_finds_the_tensors_of_mamba_ssm(both: Make, tmp_path: Path) -> None:
    ingot, checkpoint = both("mamba2")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    mixer = {"layer": "Mamba2", "d_state": 16, "headdim": 16, "ngroups": 2, "chunk_size": 8}
    config = {"d_model": 64, "n_layer": 2, "vocab_size": 512, "ssm_cfg": mixer}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert passes(ingot, tmp_path)


# What is wrong in the files


def test_names_rows_of_an_embedding_that_are_zero(
    tiny: Path, tiny_ort: Path, tmp_path: Path
) -> None:
    def zero(table: Any) -> None:
        table[94:] = 0

    ingot = with_weight(tiny_ort, tmp_path / "ingot", "embed_tokens.weight", zero)
    check = checked(ingot, tiny)
    (problem,) = check.problems
    assert re.fullmatch(
        r"model\.embed_tokens\.weight: 26752 of 32768 elements differ, the first at \[94, 0\] is "
        r"0\.0 and should be -?\d\.\d+",
        problem,
    )
    assert check.location is not None and check.location.layer is None
    assert check.location.operator == "Gather"


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_names_an_expert_with_the_weights_of_another(
    target: str, tiny: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ingot = request.getfixturevalue(f"tiny_{target}")

    def stale(down: Any) -> None:
        # The last expert, in the order of either target.
        down[0 if target == "ort" else 7] = down[3]

    check = checked(
        with_weight(ingot, tmp_path / "ingot", "layers.1.mlp.experts.down_proj", stale), tiny
    )
    (problem,) = check.problems
    name = "model.layers.1.mlp.experts.7.down_proj.weight"
    assert problem.startswith(f"layer 1, {name}: 2048 of 2048 elements differ, the first at [0, 0]")
    assert problem.endswith("(stored in model.layers.1.mlp.experts.down_proj)")
    operator = "MoE" if target == "ort" else "MoeDispatch"
    stored = "model.layers.1.mlp.experts.down_proj"
    location = check.location
    assert location is not None and location.ratio > 1e6
    assert location == Location(1, operator, stored, location.ratio, is_weight=True)
    assert location.node == f"layer 1, {operator} weight {stored}"


def test_names_a_row_of_gate_or_up_by_the_expert_s_own_index(
    tiny: Path, tiny_ort: Path, tmp_path: Path
) -> None:
    def one(gate_up: Any) -> None:
        # Expert 5 of 8 from behind, row 9 of up, among rows of gate.
        gate_up[2, 2 * 9 + 1, 4] += 1

    ingot = with_weight(tiny_ort, tmp_path / "i", "layers.0.mlp.experts.gate_up_proj", one)
    (problem,) = checked(ingot, tiny).problems
    name = "layer 0, model.layers.0.mlp.experts.5.up_proj.weight"
    assert problem.startswith(f"{name}: 1 of 2048 elements differs, the first at [9, 4] is ")


def through(dtype: torch.dtype) -> Callable[[Any], None]:
    def change(weight: Any) -> None:
        weight[:] = torch.from_numpy(weight.copy()).to(dtype).float().numpy()

    return change


def to_int8(weight: Any) -> None:
    scale = np.abs(weight).max(axis=0) / 127
    weight[:] = np.round(weight / scale) * scale


def a_bit(weight: Any) -> None:
    weight[3] = np.nextafter(weight[3], np.float32(9))


def swap_rows(weight: Any) -> None:
    weight[[0, 1]] = weight[[1, 0]]


def minus_zero(weight: Any) -> None:
    weight[0] = -weight[0]


FAULTS: list[tuple[str, str, Callable[[Any], None], str]] = [
    ("granite", "layers.1.mlp.up_proj.weight", through(torch.bfloat16), "MatMul"),
    ("granite", "layers.0.self_attn.q_proj.weight", through(torch.float16), "MatMul"),
    ("granite", "layers.0.self_attn.o_proj.weight", to_int8, "MatMul"),
    ("granite", "layers.1.input_layernorm.weight", a_bit, "RMSNormalization"),
    ("granite", "model.norm.weight", a_bit, "RMSNormalization"),
    ("granite", "layers.1.mlp.down_proj.weight", swap_rows, "MatMul"),
    ("mamba2", "layers.0.mixer.A_log", a_bit, "Exp"),
    ("mamba2", "layers.1.mixer.D", a_bit, "Unsqueeze"),
    ("mamba2", "layers.1.mixer.dt_bias", minus_zero, "Add"),
    ("mamba2", "layers.0.mixer.conv1d.weight", swap_rows, "Unsqueeze"),
    ("mamba2", "layers.1.mixer.conv1d.bias", a_bit, "Conv"),
    ("mamba2", "layers.1.mixer.in_proj.weight", swap_rows, "MatMul"),
    ("mamba2", "layers.0.mixer.norm.weight", a_bit, "Mul"),
    ("jetmoe", "layers.0.self_attention.experts.output_linear.weight.3", to_int8, "MatMul"),
    ("jetmoe", "layers.1.self_attention.experts.input_linear.weight.1", swap_rows, "MatMul"),
    ("jetmoe", "layers.1.mlp.router.layer.weight", a_bit, "Gemm"),
    ("jetmoe", "layers.1.mlp.input_linear.weight", swap_rows, "MoE"),
    ("jetmoe", "layers.0.mlp.output_linear.weight", swap_rows, "MoE"),
    ("jetmoe", "layers.1.self_attention.experts.bias", a_bit, "Add"),
]


@pytest.mark.parametrize(
    ("family", "name", "change", "operator"), FAULTS, ids=[f"{f[0]} {f[1]}" for f in FAULTS]
)
def test_names_a_weight_that_was_changed(
    family: str,
    name: str,
    change: Callable[[Any], None],
    operator: str,
    both: Make,
    tmp_path: Path,
) -> None:
    ingot, checkpoint = both(family)
    check = checked(with_weight(ingot, tmp_path / "ingot", name, change), checkpoint)
    location = check.location
    assert check.problems and location is not None
    assert location.value.endswith(name) and location.operator == operator
    layer = re.search(r"layers\.(\d)", name)
    assert location.layer == (int(layer[1]) if layer else None)


@pytest.mark.parametrize("factor", [1.05, 1.003, 2.0])
def test_says_where_all_of_a_weight_is_times_one_number(
    factor: float, both: Make, tmp_path: Path
) -> None:
    ingot, checkpoint = both("granite")

    def larger(weight: Any) -> None:
        weight *= np.float32(factor)

    changed = with_weight(ingot, tmp_path / "i", "layers.1.mlp.gate_proj.weight", larger)
    (problem,) = checked(changed, checkpoint).problems
    assert problem.endswith(f", and all are {factor:g} times what they should be")


@pytest.mark.parametrize("change", [a_bit, minus_zero, through(torch.bfloat16)])
def test_says_so_of_products_alone(
    change: Callable[[Any], None], both: Make, tmp_path: Path
) -> None:
    ingot, checkpoint = both("granite")
    changed = with_weight(ingot, tmp_path / "i", "layers.1.mlp.gate_proj.weight", change)
    (problem,) = checked(changed, checkpoint).problems
    assert "times" not in problem


def edited(ingot: Path, out: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    copied(ingot, out)
    model = onnx.load(str(out / GRAPH), load_external_data=False)
    change(model)
    (out / GRAPH).write_bytes(model.SerializeToString())
    return out


def external(model: onnx.ModelProto, end: str) -> tuple[onnx.TensorProto, dict[str, Any]]:
    (found,) = [each for each in model.graph.initializer if each.name.endswith(end)]
    return found, {entry.key: entry for entry in found.external_data}


def elsewhere(model: onnx.ModelProto) -> None:
    one, other = (
        external(model, f"layers.{n}.self_attn.q_proj.weight")[1]["offset"] for n in (0, 1)
    )
    one.value = other.value


def transposed_shape(model: onnx.ModelProto) -> None:
    weight, _ = external(model, "layers.0.mlp.up_proj.weight")
    weight.dims[:] = weight.dims[::-1]


def other_file(model: onnx.ModelProto) -> None:
    external(model, "model.norm.weight")[1]["location"].value = "other.safetensors"


def renamed(model: onnx.ModelProto) -> None:
    weight, _ = external(model, "model.norm.weight")
    for node in model.graph.node:
        node.input[:] = ["w" if name == weight.name else name for name in node.input]
    weight.name = "w"


def inline(model: onnx.ModelProto) -> None:
    weight, _ = external(model, "model.norm.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(np.ones(64, np.float32), weight.name))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (elsewhere, "model.layers.0.self_attn.q_proj.weight: its first byte is "),
        (transposed_shape, "it is stored as [128, 64] and should be [64, 128]"),
        (other_file, "the graph has weights in other.safetensors, which is no file of the ingot"),
        (renamed, "weights.safetensors holds model.norm.weight, which the graph does not use"),
        (renamed, "model.norm.weight of the checkpoint is in no weight of the graph"),
        (inline, "model.norm.weight: 64 of 64 elements differ, the first at [0] is 1.0"),
    ],
)
def test_names_what_the_graph_says_otherwise_than_the_file(
    change: Callable[[onnx.ModelProto], object], says: str, both: Make, tmp_path: Path
) -> None:
    ingot, checkpoint = both("granite")
    problems = checked(edited(ingot, tmp_path / "ingot", change), checkpoint).problems
    assert any(says in problem for problem in problems), problems


def header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a safetensors header, and not where the tensors begin."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    read = json.loads(data[8 : 8 + length])
    change(read)
    text = json.dumps(read, separators=(",", ":")).encode()
    assert len(text) <= length
    file.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])


def test_names_a_header_that_the_graph_does_not_agree_with(both: Make, tmp_path: Path) -> None:
    ingot, checkpoint = both("granite")
    name = "model.layers.1.mlp.up_proj.weight"

    def other_dtype(read: dict[str, Any]) -> None:
        read[name].update(dtype="I32")

    def overlapping(read: dict[str, Any]) -> None:
        read[name]["data_offsets"] = [n - 64 for n in read[name]["data_offsets"]]

    def gone(read: dict[str, Any]) -> None:
        del read[name]

    for number, (change, says) in enumerate(
        [
            (other_dtype, f"{name}: its dtype is F32 in the graph and I32 in {WEIGHTS}"),
            (overlapping, f"{WEIGHTS}: {name} overlaps model.layers.1.mlp.gate_proj.weight"),
            (gone, f"{WEIGHTS} has no {name}, which the graph has there"),
        ]
    ):
        changed = copied(ingot, tmp_path / str(number))
        header(changed / WEIGHTS, change)
        assert says in checked(changed, checkpoint).problems


@pytest.mark.parametrize("data", [b"", b"\x08" + bytes(7) + b"no json ", b"\xff" * 16])
def test_a_file_that_is_none_is_a_problem_and_no_trace(
    data: bytes, both: Make, tmp_path: Path
) -> None:
    ingot, checkpoint = both("granite")
    changed = copied(ingot, tmp_path / "ingot")
    (changed / WEIGHTS).write_bytes(data)
    (problem,) = checked(changed, checkpoint).problems
    assert problem.startswith(f"{WEIGHTS} has no header of a safetensors file (")


def test_a_file_that_is_cut_short_is_a_problem_and_no_trace(both: Make, tmp_path: Path) -> None:
    ingot, checkpoint = both("granite")
    changed = copied(ingot, tmp_path / "ingot")
    (changed / WEIGHTS).write_bytes((ingot / WEIGHTS).read_bytes()[:-100])
    problem = checked(changed, checkpoint).problems[-1]
    assert problem.startswith(f"{WEIGHTS} ends before the last element of model.norm.weight")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_dtype_is_the_one_of_the_ingot_s_precision(
    precision: str, both: Make, tmp_path: Path
) -> None:
    ingot, checkpoint = both("granite")
    check = checked(copied(ingot, tmp_path / "ingot", precision=precision), checkpoint)
    short = {"float16": "F16", "bfloat16": "BF16"}[precision]
    assert check.problems[0].endswith(f"it is stored as F32 and should be {short}")


def test_names_tensors_of_the_checkpoint_that_the_ingot_lacks(both: Make, tmp_path: Path) -> None:
    ingot, checkpoint = both("granite")

    def more(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(16)

    def other_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]

    found = [
        checked(ingot, respelled(checkpoint, tmp_path / change.__name__, change)).problems
        for change in (more, other_head)
    ]
    name = "model.layers.1.self_attn.q_norm.weight"
    assert found[0] == (f"{name} of the checkpoint is in no weight of the graph",)
    (problem,) = found[1]
    assert "is not equal to model.embed_tokens.weight" in problem


# What is wrong in the export itself


Patch = pytest.MonkeyPatch


def nudged(array: Any) -> Any:
    """A copy with one element changed."""
    array = array.clone() if isinstance(array, torch.Tensor) else array.copy()
    array.reshape(-1)[0] += 1
    return array


def turned_wrong(patch: Patch) -> None:
    right = weights._transposed
    patch.setattr(weights, "_transposed", lambda read: lambda block: nudged(right(read)(block)))


def square_not_turned(patch: Patch) -> None:
    right = weights._transposed

    def transposed(read: Any) -> Any:
        def block(number: int) -> Any:
            array = read(number)
            return array if array.shape[0] == array.shape[1] else right(read)(number)

        return block

    patch.setattr(weights, "_transposed", transposed)


def scaled_wrong(patch: Patch) -> None:
    right = weights.scale
    patch.setattr(scales, "scale", lambda value, factor: right(value, factor * 1.000001))


def not_scaled(patch: Patch) -> None:
    patch.setattr(scales, "scale", lambda value, factor: None)


def not_interleaved(patch: Patch) -> None:
    patch.setattr(moe, "_interleaved", lambda gate_up: gate_up)


def up_before_gate(patch: Patch) -> None:
    right = moe._interleaved
    patch.setattr(
        moe, "_interleaved", lambda gate_up: right(np.roll(gate_up, len(gate_up) // 2, 0))
    )


def not_reversed(patch: Patch) -> None:
    patch.setattr(moe, "_reversed", lambda change, _, read: lambda block: change(read(block)))


def one_expert_twice(patch: Patch) -> None:
    right = moe._reversed
    patch.setattr(moe, "_reversed", lambda c, n, read: lambda b: right(c, n, read)(max(b, 1)))


def other_expert(patch: Patch) -> None:
    right = moe_linear._transposed
    patch.setattr(moe_linear, "_transposed", lambda read, e, out, b: right(read, e ^ 1, out, b))


def wrong_tensor(patch: Patch) -> None:
    right = checkpoints.assemble
    patch.setattr(checkpoints, "assemble", lambda *given: nudged(right(*given)))


def wrong_row(patch: Patch) -> None:
    right = checkpoints.assemble_row
    patch.setattr(checkpoints, "assemble_row", lambda *given: nudged(right(*given)))


def up_for_gate(patch: Patch) -> None:
    right = olmoe.FAMILY.other_spelling

    def parts(name: str, shape: tuple[int, ...]) -> Any:
        found = list(right(name, shape))
        if name.endswith("gate_up_proj"):
            found[::2], found[1::2] = found[1::2], found[::2]
        return tuple(found)

    patch.setattr(olmoe, "FAMILY", replace(olmoe.FAMILY, other_spelling=parts))


def through_bfloat16(patch: Patch) -> None:
    right = checkpoints.Checkpoint.read
    patch.setattr(
        checkpoints.Checkpoint, "read", lambda self, name: right(self, name).bfloat16().float()
    )


def later_bytes(patch: Patch) -> None:
    right = checkpoints.read_header

    def read_header(file: Path) -> Any:
        found = right(file)
        # The last tensor has no bytes after it.
        first, *_ = sorted(found, key=lambda name: found[name].begin)
        entry = found[first]
        return {**found, first: replace(entry, begin=entry.begin + 4, end=entry.end + 4)}

    patch.setattr(checkpoints, "read_header", read_header)


Plant = Callable[[Patch], None]
# Of the code after a capture, and of what reads a checkpoint.
READING: tuple[Plant, ...] = (wrong_tensor, through_bfloat16, later_bytes)
LATE: list[tuple[str, Plant]] = [
    *((family, plant) for family in FAMILIES for plant in READING),
    *((family, wrong_row) for family in ("jetmoe", "olmoe")),
    *(
        (family, plant)
        for family in ("jetmoe", "olmoe")
        for plant in (not_interleaved, up_before_gate, not_reversed, one_expert_twice)
    ),
    ("jetmoe", other_expert),
    ("olmoe", up_for_gate),
]
# Of the passes of a capture.
EARLY: list[tuple[str, Plant]] = [
    *((family, turned_wrong) for family in FAMILIES),
    # No matrix of the tiny Mamba2 is square.
    *((family, square_not_turned) for family in FAMILIES if family != "mamba2"),
    *(("granite", plant) for plant in (scaled_wrong, not_scaled)),
]


# Each fault once in the fast set.
FIRST = {plant: number for number, (_, plant) in reversed(list(enumerate(LATE)))}


@pytest.mark.parametrize(
    ("family", "plant"),
    [
        pytest.param(
            *(family, plant),
            id=f"{family} {plant.__name__}",
            marks=() if FIRST[plant] == number else pytest.mark.slow,
        )
        for number, (family, plant) in enumerate(LATE)
    ],
)
def test_names_what_an_export_itself_does_wrong(
    family: str,
    plant: Plant,
    both: Make,
    make_ingot: MakeIngot,
    monkeypatch: Patch,
) -> None:
    _, checkpoint = both(family)
    with monkeypatch.context() as patch:
        plant(patch)
        ingot = make_ingot(checkpoint, "ort")
        # What is planted is there while the weights are compared as well.
        check = checked(ingot, checkpoint)
    assert check.problems and check.location is not None


@pytest.mark.slow
@pytest.mark.parametrize(("family", "plant"), EARLY, ids=[f"{f} {p.__name__}" for f, p in EARLY])
def test_names_what_a_capture_does_wrong(
    family: str,
    plant: Plant,
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    monkeypatch: Patch,
) -> None:
    checkpoint = make_checkpoint(family)
    with monkeypatch.context() as patch:
        plant(patch)
        ingot = make_ingot(checkpoint, "onnx", capture=capture)
    check = checked(ingot, checkpoint)
    assert check.problems and check.location is not None


# What it is made of


def test_rounds_as_ieee_754_does() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    # Halves between two numbers of either type, the smallest, and the first that overflow.
    bits[:6] = 0x3F808000, 0x3F818000, 0x3F801000, 0x00000001, 0x477FF000, 0x7F7F8000
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        for dtype, oracle in (("F16", torch.float16), ("BF16", torch.bfloat16)):
            expected = torch.from_numpy(values).to(oracle)
            found = rounded(values, dtype)
            assert np.array_equal(found, expected.view(torch.int16).numpy().view(np.uint16))
            assert np.array_equal(widen(found, dtype), expected.float().numpy())


@pytest.mark.slow
def test_a_user_s_own_architecture_is_compared_as_far_as_its_names_go(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    with toy_hybrid.registered():
        checkpoint = make_checkpoint("toy_hybrid")
        ingot = make_ingot(checkpoint, "ort")
        assert passes(ingot, checkpoint)
        name = "layers.1.moes.0.down"
        names = [n for n in load_file(ingot / WEIGHTS) if "down" in n or "norm" in n]
        assert names, name

        def half(weight: Any) -> None:
            weight *= np.float32(0.5)

        changed = with_weight(ingot, tmp_path / "half", names[0], half)
        check = checked(changed, checkpoint)
        assert check.problems == () and "is stored times 0.5, and no rule says" in check.left_out
        changed = with_weight(ingot, tmp_path / "other", names[0], minus_zero)
        assert checked(changed, checkpoint).problems
