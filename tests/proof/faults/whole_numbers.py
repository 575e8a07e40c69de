"""Weights in blocks of whole numbers: stored wrong, read wrong, and where they should not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ingot.export.codecs.blocks import Blocks, Encoded
from proof.editing import Array, Edit, Editor, attribute
from proof.fault import By, Fault, InExport, Patch, Where, in_layer, saying
from proof.faults.constants import set_of
from proof.planting import in_graph, in_kernel, in_weights, manifest
from proof.stored import field, weight, weights

KIND = "whole numbers"
ATTENTION = "layers.1.self_attn."
GATE_UP, DOWN = "layers.1.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"
LAYER = Where(1)
SCALES, ZEROS = ".scales", ".zero_points"


def nibbles(array: Array) -> Array:
    """The first of two numbers is where the second should be."""
    return array >> 4 | array << 4


def of_expert(number: int, change: Callable[[Array], Array]) -> Callable[[Array], None]:
    """One expert of a stack, by its place."""

    def apply(array: Array) -> None:
        array[number] = change(array[number])

    return apply


def rolled(axis: int, by: int = 1) -> Callable[[Array], Array]:
    return lambda array: np.roll(array, by, axis)


def more(by: int, bits: int) -> Callable[[Array], Array]:
    """Every zero point is so much more."""
    each = by % 16 * 0x11 if bits == 4 else by
    return lambda array: array + np.uint8(each % 256)


def times(factor: float) -> Callable[[Array], Array]:
    return lambda array: array * np.float32(factor)


def one_code(array: Array) -> None:
    """One number of four bits is two more, or less where there is no room."""
    flat = array.reshape(-1)
    flat[array.size // 2] += 2 if flat[array.size // 2] & 15 < 12 else 254


def one_scale(value: float) -> Callable[[Array], None]:
    def change(array: Array) -> None:
        array.reshape(-1)[array.size // 3] = value

    return change


def narrowed(array: Array) -> Array:
    """The lower four bits of eight are lost."""
    return array & np.uint8(0xF0) | np.uint8(8)


def exchanged(*arrays: Array) -> None:
    """Two of a stack change places in each of its tensors."""
    for array in arrays:
        array[[2, 5]] = array[[5, 2]]


def turned(*arrays: Array) -> None:
    """Experts lie in the router's order, and the kernel counts them from the last."""
    for array in arrays:
        array[...] = array[::-1].copy()


def pairs(*arrays: Array) -> None:
    """Gate and up change places."""
    for array in arrays:
        even = array[:, ::2].copy()
        array[:, ::2] = array[:, 1::2]
        array[:, 1::2] = even


def without(operator: str, number: int, index: int) -> Edit:
    """An input of the n-th node of an operator is left out, and what reads it beside it too."""

    def apply(edit: Editor) -> None:
        for node in edit.alike(edit.nodes(operator)[number]):
            node.input[index] = ""

    return apply


def other_logits(edit: Editor) -> None:
    """The experts' outputs are mixed by the logits themselves."""
    node = edit.nodes("QMoE")[1]
    for each in edit.alike(node):
        each.input[14] = each.input[1]


def other_table(edit: Editor) -> None:
    """A product reads another one's scales."""
    first, second = (edit.reader(f"{ATTENTION}{name}_proj.weight") for name in ("k", "v"))
    first.input[2] = second.input[2]


def read_as(number: int, **attributes: int) -> Edit:
    """The n-th product takes its numbers for something else."""

    def apply(edit: Editor) -> None:
        for name, value in attributes.items():
            attribute(edit.nodes("MatMulNBits")[number], name, value)

    return apply


def routers_too(patch: pytest.MonkeyPatch) -> None:
    """Routers are taken for any other product."""
    patch.setattr("ingot.export.passes.store._routes", lambda _node: False)


def packing(change: Callable[[Array], Array]) -> Patch:
    """The codec packs numbers in another way."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        right = Blocks.encode

        def encode(self: Blocks, *arguments: Any) -> Encoded:
            found = right(self, *arguments)
            return Encoded(change(found.data), found.scales, found.zero_points)

        patch.setattr(Blocks, "encode", encode)

    return apply


def high_zero_points(patch: pytest.MonkeyPatch) -> None:
    """Zero points are those of formats that keep them less one."""
    right = Blocks.encode

    def encode(self: Blocks, *arguments: Any) -> Encoded:
        found = right(self, *arguments)
        zeros = found.zero_points
        each = np.uint8(0x11 if self.bits == 4 else 1)
        return Encoded(found.data, found.scales, None if zeros is None else zeros - each)

    patch.setattr(Blocks, "encode", encode)


def experts_in_order(patch: pytest.MonkeyPatch) -> None:
    """Experts are not turned round for the kernel that counts them from the last."""
    patch.setattr(
        "ingot.export.passes.moe._reversed", lambda change, _experts, read: _each(change, read)
    )


def _each(change: Any, read: Any) -> Any:
    return lambda block: change(read(block))


def _at(base: str, name: str, ending: str, change: Callable[[Array], Any], says: str = "") -> Fault:
    """A tensor of a weight is wrong; says what explains it, or else the weight's name."""
    of_weight = ending.removesuffix(SCALES).removesuffix(ZEROS)
    where = saying(says or of_weight)
    return in_weights(name, base, weight(ending, change), where, KIND)


def _stack(base: str, name: str, stack: str, change: Callable[..., None], says: str) -> Fault:
    """All tensors of a stack are wrong together."""
    ends = (stack, stack + SCALES, *([stack + ZEROS] if "zeros" in base else []))
    return in_weights(name, base, weights(ends, change), saying(says), KIND)


def _export(
    name: str, base: str, patch: Patch, says: str, by: tuple[By, ...] = ("weights",)
) -> Fault:
    return Fault(name, base, KIND, "export", InExport(patch, lasting=True), by, saying(says))


SWAPPED, HIGH = "its nibbles are swapped", "its zero points are one too high"
BEFORE = "its scales are of the block before"
INT4, INT4_ZEROS, INT4_UNEVEN = "olmoe int4 ort", "olmoe int4 zeros ort", "olmoe int4 uneven ort"
GRANITE, JETMOE, MAMBA2 = "granite int4 zeros ort", "jetmoe int8 ort", "mamba2 int4 ort"
GIVEN_GRANITE, GIVEN_OLMOE = "granite gptq ort", "olmoe awq ort"
# Truth and ingot have the same weights, so wrong ones are seen by the comparison of weights alone.
FAULTS: list[Fault] = [
    _at(INT4, "swapped nibbles", f"{ATTENTION}q_proj.weight", nibbles, SWAPPED),
    _at(INT4, "swapped nibbles of an expert", GATE_UP, of_expert(3, nibbles), SWAPPED),
    _at(INT4_ZEROS, "swapped nibbles of an expert", DOWN, of_expert(0, nibbles), SWAPPED),
    _at(GRANITE, "swapped nibbles of a tied table", "embed_tokens.weight", nibbles, SWAPPED),
    _at(MAMBA2, "swapped nibbles", "layers.1.mixer.in_proj.weight", nibbles, SWAPPED),
    _at(
        GRANITE,
        "swapped nibbles of zero points",
        f"layers.1.mlp.down_proj.weight{ZEROS}",
        nibbles,
        "the nibbles of its zero points are swapped",
    ),
    _at(INT4, "scales of the block before", f"{ATTENTION}o_proj.weight{SCALES}", rolled(1), BEFORE),
    _at(
        JETMOE,
        "scales of the block before",
        f"layers.1.self_attention.kv_proj.weight{SCALES}",
        rolled(1),
        BEFORE,
    ),
    _at(
        INT4,
        "scales of the row before",
        f"layers.0.self_attn.v_proj.weight{SCALES}",
        rolled(0),
        "its scales are of the row before",
    ),
    _at(
        GRANITE,
        "a row's zero points of the row before",
        f"{ATTENTION}q_proj.weight{ZEROS}",
        rolled(0),
        "its zero points are of the row before",
    ),
    _at(
        INT4,
        "one expert's scales rotated",
        GATE_UP + SCALES,
        of_expert(2, rolled(1)),
        BEFORE,
    ),
    _at(
        INT4_ZEROS,
        "experts' scales rotated",
        DOWN + SCALES,
        rolled(0),
        "its scales are where those of expert",
    ),
    _at(
        JETMOE,
        "one expert's scales rotated",
        f"layers.1.self_attention.experts.input_linear.weight.2{SCALES}",
        rolled(1),
        BEFORE,
    ),
    _at(
        INT4_ZEROS, "zero points one too high", f"{ATTENTION}k_proj.weight{ZEROS}", more(1, 4), HIGH
    ),
    _at(
        INT4_ZEROS,
        "an expert's zero points one too high",
        GATE_UP + ZEROS,
        of_expert(6, more(1, 4)),
        HIGH,
    ),
    _at(
        GRANITE,
        "zero points of a tied table one too low",
        f"embed_tokens.weight{ZEROS}",
        more(-1, 4),
        "its zero points are one too low",
    ),
    _at(
        INT4,
        "scales doubled",
        f"{ATTENTION}v_proj.weight{SCALES}",
        times(2.0),
        "all of it is 2 times",
    ),
    _at(MAMBA2, "scales 5 % too large", f"layers.1.mixer.out_proj.weight{SCALES}", times(1.05)),
    _at(INT4, "one number two off", f"{ATTENTION}q_proj.weight", one_code),
    _at(GRANITE, "one number two off", "layers.1.mlp.gate_proj.weight", one_code),
    _at(INT4_UNEVEN, "one number two off", GATE_UP, one_code),
    _at(INT4, "one scale is NaN", f"{ATTENTION}o_proj.weight{SCALES}", one_scale(np.nan)),
    _at(INT4_UNEVEN, "one scale is zero", f"lm_head.weight{SCALES}", one_scale(0.0)),
    _at(JETMOE, "int8 that is int4", "layers.1.self_attention.kv_proj.weight", narrowed),
    _at(GIVEN_GRANITE, "given numbers, swapped", f"{ATTENTION}q_proj.weight", nibbles, SWAPPED),
    _at(GIVEN_GRANITE, "one given number two off", "layers.1.mlp.up_proj.weight", one_code),
    _at(
        GIVEN_GRANITE, "a given scale is zero", f"{ATTENTION}o_proj.weight{SCALES}", one_scale(0.0)
    ),
    _at(
        GIVEN_OLMOE, "given numbers of an expert, swapped", GATE_UP, of_expert(3, nibbles), SWAPPED
    ),
    _at(GIVEN_OLMOE, "one given number of an expert two off", DOWN, one_code),
    _at(
        GIVEN_OLMOE,
        "given zero points one too high",
        f"{ATTENTION}v_proj.weight{ZEROS}",
        more(1, 4),
        HIGH,
    ),
    _at(
        GIVEN_OLMOE,
        "given scales of the block before",
        f"layers.0.self_attn.q_proj.weight{SCALES}",
        rolled(1),
        BEFORE,
    ),
    _stack(INT4, "two experts", DOWN, exchanged, "its rows are where those of expert"),
    _stack(
        INT4_ZEROS, "experts in the router's order", GATE_UP, turned, "its rows are where those of"
    ),
    _stack(INT4_ZEROS, "gate for up", GATE_UP, pairs, "gate and up are exchanged"),
    in_graph("input 14 missing", INT4, KIND, without("QMoE", 1, 14), LAYER, ("numbers",)),
    in_graph("input 14 missing", INT4_ZEROS, KIND, without("QMoE", 0, 14), Where(0), ("numbers",)),
    in_graph("logits for weights", INT4, KIND, other_logits, LAYER, ("numbers",)),
    in_graph(
        "accuracy level 4",
        INT4,
        KIND,
        set_of("QMoE", 1, "accuracy_level", 4),
        LAYER,
        ("graph",),
    ),
    in_graph(
        "accuracy level 4",
        GRANITE,
        KIND,
        set_of("MatMulNBits", 9, "accuracy_level", 4),
        LAYER,
        ("graph",),
    ),
    in_graph("another's scales", INT4, KIND, other_table, LAYER, ("weights", "refused", "graph")),
    in_graph(
        "no zero points",
        INT4_ZEROS,
        KIND,
        without("QMoE", 1, 11),
        Where(words="it is stored as int4 in blocks of 32 and should be"),
        ("weights",),
    ),
    in_graph("blocks of 64", INT4, KIND, read_as(3, block_size=64), None, ("refused", "weights")),
    in_graph("eight bits", INT4, KIND, read_as(3, bits=8), None, ("refused", "weights")),
    in_kernel("input 14 not read", INT4, KIND, without("QMoE", 1, 14), in_layer(1)),
    in_kernel(
        "activations in int8", INT4, KIND, set_of("QMoE", 1, "accuracy_level", 4), in_layer(1)
    ),
    in_kernel(
        "activations in int8",
        MAMBA2,
        KIND,
        set_of("MatMulNBits", 2, "accuracy_level", 4),
        in_layer(1),
    ),
    _export("router in whole numbers", INT4, routers_too, "layers.0.mlp.gate.weight"),
    _export("router in whole numbers", JETMOE, routers_too, "router.layer.weight"),
    Fault(
        "router in whole numbers, in one export",
        INT4,
        KIND,
        "export",
        InExport(routers_too),
        ("weights",),
        saying("mlp.gate.weight: it is stored as int4 in blocks of 32 and should be F32"),
    ),
    _export("nibbles packed the other way", GRANITE, packing(nibbles), SWAPPED),
    _export("zero points that are kept less one", GRANITE, high_zero_points, "one too low"),
    _export(
        "experts in the router's order",
        INT4,
        experts_in_order,
        "its rows are where those of expert",
    ),
    manifest("blocks of 64", INT4, field("quantization", "block", to=64), "in blocks of 64"),
    manifest(
        "one weight in blocks of 64",
        INT4,
        field("quantization", "blocks", to={"lm_head.weight": 64}),
        "in blocks of 64",
    ),
    manifest("other bits", JETMOE, field("weights", to="int4"), "should be int4"),
    manifest(
        "activations in int8",
        INT4,
        field("quantization", "accuracy", to="fast"),
        "quantization.accuracy of ingot.json is fast",
    ),
]
