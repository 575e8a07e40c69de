"""Weights in panels: stored wrong, read as something else, and kernels that compute otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from proof.editing import Array, Edit, Editor, attribute
from proof.fault import By, Fault, InExport, Patch, Where, in_layer, saying
from proof.faults.constants import set_of
from proof.faults.whole_numbers import SWAPPED, nibbles, routers_too
from proof.planting import in_graph, in_kernel, in_weights, manifest
from proof.stored import field, weight

KIND = "panels"
ROWS = 16
GRANITE, JETMOE, MAMBA2 = "granite ingot", "jetmoe bf16 ingot", "mamba2 bf16 ingot"
INT4, ZEROS, UNEVEN = "olmoe int4 ingot", "granite int4 zeros ingot", "olmoe int8 uneven ingot"
ATTENTION = "layers.1.self_attn."
GATE_UP, DOWN = "layers.1.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"
LAYER = Where(1)


class Parts(NamedTuple):
    """Where the parts of a panel lie, by the layout that docs/design.md tells of."""

    columns: int
    block: int
    bits: int
    zeros: bool = False

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.block)

    @property
    def scales(self) -> slice:
        return slice(64, 64 + 2 * ROWS * self.blocks)

    @property
    def zero_points(self) -> slice:
        begin = 64 + -(-2 * ROWS * self.blocks // 64) * 64
        return slice(begin, begin + ROWS * self.blocks * self.zeros)

    @property
    def numbers(self) -> slice:
        begin = self.zero_points.start + (-(-ROWS * self.blocks // 64) * 64 if self.zeros else 0)
        return slice(begin, begin + ROWS * self.blocks * self.block * self.bits // 8)


OF_64 = Parts(64, 32, 4)
OF_32 = Parts(32, 32, 4)
WITH_ZEROS = Parts(64, 32, 4, zeros=True)
OF_72 = Parts(72, 64, 8)


def in_part(part: slice, change: Callable[[Array], Any]) -> Callable[[Array], None]:
    """The same part of every panel."""

    def apply(array: Array) -> None:
        array[..., part] = change(array[..., part].copy())

    return apply


def of_expert(number: int, change: Callable[[Array], Any]) -> Callable[[Array], None]:
    def apply(array: Array) -> None:
        change(array[number])

    return apply


def rolled_blocks(array: Array) -> Array:
    """Scales, or zero points, of the block before; two blocks a panel."""
    halves = array.reshape(*array.shape[:-1], 2, -1)
    return halves[..., ::-1, :].reshape(array.shape)


def rolled_rows(width: int) -> Callable[[Array], Array]:
    """What is of the row before, of so many bytes each."""

    def change(array: Array) -> Array:
        rows = array.reshape(*array.shape[:-1], -1, ROWS, width)
        return np.roll(rows, 1, axis=-2).reshape(array.shape)

    return change


def powers(array: Array) -> None:
    """A row's power of two is the next one."""
    floats = array[..., :64].copy().view(np.float32)
    floats[0, 5] *= 2
    array[..., :64] = floats.view(np.uint8)


def more(array: Array) -> Array:
    return array + np.uint8(1)


def exchanged(array: Array) -> None:
    """Two panels change places."""
    array[[0, 2]] = array[[2, 0]]


def experts(array: Array) -> None:
    array[[2, 5]] = array[[5, 2]]


def one_number(array: Array) -> None:
    """One number of four bits is two more, or less where there is no room."""
    at = OF_64.numbers.start + 77
    array[1, at] += 2 if array[1, at] & 15 < 12 else 254


def last_row(array: Array) -> None:
    """What fills the last panel up is not zero: 251 rows have 5 of their sixteen missing."""
    array[-1].view(np.uint32).reshape(-1, ROWS)[3, ROWS - 1] = 0x3F800000


def last_scale(array: Array) -> None:
    """Nor here: the row's power of two, the scale of its first block, and its numbers."""
    array[-1, 4 * (ROWS - 1) : 4 * ROWS] = np.array([1.0], np.float32).view(np.uint8)
    at = OF_72.scales.start + 2 * (ROWS - 1)
    array[-1, at : at + 2] = np.array([1.0], np.float16).view(np.uint8)
    rows = array[-1, OF_72.numbers].reshape(-1, ROWS, 4).copy()
    rows[:, ROWS - 1] += 1
    array[-1, OF_72.numbers] = rows.reshape(-1)


def not_a_number(array: Array) -> None:
    at = OF_64.scales.start + 6
    array[0, at : at + 2] = np.array([np.nan], np.float16).view(np.uint8)


def pairs(array: Array) -> None:
    """The two columns of a pair change places."""
    halves = array.view(np.uint16).reshape(*array.shape[:-1], -1, 2)
    halves[...] = halves[..., ::-1].copy()


def one_bit(array: Array) -> None:
    """The last bit of one number."""
    array.reshape(-1)[array.size // 2 & ~3] ^= 1


def other_weight(edit: Editor) -> None:
    """A product reads another one's weight of the same size."""
    node, names = edit.reader(f"{ATTENTION}k_proj.weight"), ("k", "v")
    k, v = (at for end in names for at, name in enumerate(node.input) if name.endswith(_of(end)))
    node.input[k] = node.input[v]


def _of(letter: str) -> str:
    return f"{ATTENTION}{letter}_proj.weight"


def gate_for_up(edit: Editor) -> None:
    """A gated MLP reads its first two weights in the other order."""
    node = edit.nodes("Mlp")[1]
    node.input[1], node.input[2] = node.input[2], node.input[1]


def two_outputs(edit: Editor) -> None:
    """What is made by two weights that are read together changes places."""
    node = edit.nodes("Linears")[1]
    node.output[1], node.output[2] = node.output[2], node.output[1]


def other_residual(edit: Editor) -> None:
    """What is added to is what was normed."""
    node = edit.nodes("Mlp")[1]
    node.input[4] = node.input[0]


def read_as(ending: str, **attributes: Any) -> Edit:
    """What reads a weight takes it for something else."""

    def apply(edit: Editor) -> None:
        for node in edit.alike(edit.reader(ending)):
            for name, value in attributes.items():
                attribute(node, name, value)

    return apply


def packing(name: str, change: Callable[[Any], Any]) -> Patch:
    """The packer lays numbers out in another way."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        from ingot.export.passes import pack

        right = getattr(pack, name)
        patch.setattr(pack, name, lambda *given: change(right(*given)))

    return apply


def halves_first(data: Array) -> Array:
    """The low and the high half of every byte of the numbers change places."""
    result = data.copy()
    result[:, OF_64.numbers] = nibbles(data[:, OF_64.numbers])
    return result if data.shape[1] == OF_64.numbers.stop else data


def truncated(patch: pytest.MonkeyPatch) -> None:
    """What is rounded to bfloat16 is cut off."""
    import ml_dtypes

    def cut(wide: Array, _dtype: Any, _name: str) -> Array:
        bits = np.ascontiguousarray(wide).view(np.uint32) >> 16
        return bits.astype(np.uint16).view(ml_dtypes.bfloat16)

    patch.setattr("ingot.export.passes.pack.narrowed", cut)


def rounding_too(patch: pytest.MonkeyPatch) -> None:
    """Products are told to round activations that are asked for as they are."""
    from ingot.export.passes.pack import PackMatrices

    right = PackMatrices.__init__

    def made(self: Any, *given: Any, **options: Any) -> None:
        right(self, *given, **{**options, "round_activations": True})

    patch.setattr(PackMatrices, "__init__", made)


def _at(base: str, name: str, ending: str, change: Callable[[Array], Any], says: str = "") -> Fault:
    return in_weights(name, base, weight(ending, change), saying(says or ending), KIND)


def _export(
    name: str, base: str, patch: Patch, says: str, by: tuple[By, ...] = ("weights",)
) -> Fault:
    return Fault(name, base, KIND, "export", InExport(patch, lasting=True), by, saying(says))


BEFORE = "its scales are of the block"
FAULTS: list[Fault] = [
    _at(
        INT4,
        "swapped nibbles",
        f"{ATTENTION}q_proj.weight",
        in_part(OF_64.numbers, nibbles),
        SWAPPED,
    ),
    _at(
        INT4,
        "swapped nibbles of an expert",
        DOWN,
        of_expert(3, in_part(OF_32.numbers, nibbles)),
        SWAPPED,
    ),
    _at(
        INT4,
        "scales of another block",
        f"{ATTENTION}o_proj.weight",
        in_part(OF_64.scales, rolled_blocks),
        BEFORE,
    ),
    _at(
        INT4,
        "one expert's scales of the row before",
        GATE_UP,
        of_expert(2, in_part(OF_64.scales, rolled_rows(2))),
    ),
    _at(
        ZEROS,
        "zero points one too high",
        f"{ATTENTION}k_proj.weight",
        in_part(WITH_ZEROS.zero_points, more),
        "its zero points are one too high",
    ),
    _at(
        ZEROS,
        "zero points of another block of a tied table",
        "embed_tokens.weight",
        in_part(WITH_ZEROS.zero_points, rolled_blocks),
        "its zero points are of the block",
    ),
    _at(INT4, "the power of two of a row", f"{ATTENTION}v_proj.weight", powers),
    _at(INT4, "two panels", f"{ATTENTION}q_proj.weight", exchanged),
    _at(INT4, "two experts", GATE_UP, experts, "its rows are where those of expert"),
    _at(INT4, "one number two off", f"{ATTENTION}q_proj.weight", one_number),
    _at(INT4, "one scale is NaN", f"{ATTENTION}o_proj.weight", not_a_number, "not finite"),
    _at(UNEVEN, "rows beyond the last", "lm_head.weight", last_scale, "not zero"),
    _at(GRANITE, "the last bit of a number", f"{ATTENTION}q_proj.weight", one_bit),
    _at(GRANITE, "two panels", "layers.0.mlp.up_proj.weight", exchanged),
    _at(JETMOE, "the last bit of a number", "layers.1.mlp.input_linear.weight", one_bit),
    _at(JETMOE, "columns in pairs", "layers.1.self_attention.kv_proj.weight", pairs),
    _at(MAMBA2, "columns in pairs", "layers.1.mixer.out_proj.weight", pairs),
    _at(MAMBA2, "rows beyond the last", "layers.0.mixer.in_proj.weight", last_row, "not zero"),
    in_graph("another's weight", INT4, KIND, other_weight, LAYER, ("weights", "graph")),
    in_graph(
        "blocks of 64",
        INT4,
        KIND,
        read_as(f"{ATTENTION}q_proj.weight", block=64),
        None,
        ("refused", "weights"),
    ),
    in_graph(
        "eight bits",
        INT4,
        KIND,
        read_as(GATE_UP, gate_up_numbers="int8"),
        None,
        ("refused", "weights"),
    ),
    in_graph(
        "activations in int8",
        INT4,
        KIND,
        read_as(GATE_UP, round_activations=1),
        LAYER,
        ("graph",),
    ),
    in_graph("other weights of experts", INT4, KIND, read_as(GATE_UP, normalize=1), LAYER),
    in_graph("fewer experts", INT4, KIND, read_as(GATE_UP, top_k=1), LAYER),
    in_graph("another activation", INT4, KIND, read_as(GATE_UP, activation="gelu"), LAYER),
    in_graph("gate for up", GRANITE, KIND, gate_for_up, LAYER, ("weights", "graph")),
    in_graph("two outputs", GRANITE, KIND, two_outputs, LAYER),
    in_graph("another residual", ZEROS, KIND, other_residual, LAYER),
    in_graph("no factor", ZEROS, KIND, set_of("Mlp", 1, "scale", 1.0), LAYER),
    in_graph("a factor", INT4, KIND, set_of("Linear", 1, "scale", 0.999), LAYER),
    in_kernel("no factor", ZEROS, KIND, set_of("Linear", 1, "scale", 1.0), in_layer(1)),
    in_kernel(
        "another activation", ZEROS, KIND, set_of("Mlp", 1, "activation", "gelu"), in_layer(1)
    ),
    in_kernel(
        "activations in int8",
        INT4,
        KIND,
        set_of("MoeDispatch", 1, "round_activations", 1),
        in_layer(1),
    ),
    in_kernel(
        "activations in int8",
        ZEROS,
        KIND,
        read_as("layers.1.mlp.down_proj.weight", round_activations=1),
        in_layer(1),
    ),
    in_kernel(
        "another activation",
        JETMOE,
        KIND,
        set_of("MoeDispatch", 1, "activation", "gelu"),
        in_layer(1),
    ),
    in_kernel("fewer experts", INT4, KIND, set_of("MoeDispatch", 1, "top_k", 1), in_layer(1)),
    _export("router in panels", INT4, routers_too, "mlp.gate.weight"),
    _export("halves of bytes", INT4, packing("pack_whole", halves_first), SWAPPED),
    _export("bfloat16 that is cut off", MAMBA2, truncated, "mixer.in_proj.weight"),
    Fault(
        "activations in int8",
        INT4,
        KIND,
        "export",
        InExport(rounding_too, lasting=True),
        ("contract", "numbers"),
        saying("quantization.accuracy of ingot.json is exact"),
    ),
    manifest("float32 scales", INT4, field("quantization", "scales", to="float32"), "scales"),
    manifest("blocks of 64", INT4, field("quantization", "block", to=64), "in blocks of 64"),
    manifest("kernels of standard operators", GRANITE, field("kernels", to="portable"), "program"),
]
