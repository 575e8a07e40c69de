"""Attention and the Mamba2 block as Ingot's own kernels: said otherwise, wired otherwise, wrong.

Both write their states where the old ones are, and take several rows of several tokens after a past
in one call, so that what is wrong in one shape of use has to be seen of them as of others' kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from proof import conditions as at
from proof.editing import Condition, Edit, Editor, Make, rolled, scaled
from proof.fault import By, Fault, Where, in_layer, saying
from proof.faults import shapes
from proof.faults.constants import set_of
from proof.faults.kernels import through_float16
from proof.faults.structure import swapped
from proof.planting import in_graph, in_kernel, manifest
from proof.stored import manifest as changed

KIND = "own kernels"
GRANITE, OLMOE, JETMOE = "granite ingot", "olmoe int4 ingot", "jetmoe bf16 ingot"
MAMBA2, HYBRID = "mamba2 bf16 ingot", "hybrid ingot"
ATTENTION, MIXER = "Attention", "Mamba2Mixer"
LAYER, KERNEL, FIRST = Where(1), in_layer(1), in_layer(0)
IN_PLACE = saying("in the session, present_states.1.ssm")
OF_TWO = Where(0, also=(1,))
UNFITTING: tuple[By, ...] = ("refused", "graph", "weights")
# Inputs.
VISIBLE, COS, SIN = 5, 6, 7
MASK, WINDOW, STATE = 1, 2, 3
SSM, CONV = "present_states.1.ssm", "present_states.1.conv"

NOTHING = scaled(0.0)
HALF = scaled(0.5)
# What is read of a state has to be read before it is written over: of a copy that the kernel gets.
KEPT = "planted_state"
PAST = at.with_state(KEPT)
DECODE = at.both(at.tokens(1), at.after_a_past)
SEVERAL = at.both(at.rows(2, -1), at.tokens(2, -1), at.after_a_past)
LONG_PADDED = at.both(at.padded_row, at.total(65, -1))
# More rows of a head of keys than are few, where two heads of queries share one; and fewer.
MANY, FEW = at.tokens(3, -1), at.tokens(1, 2)


def given(operator: str, number: int, index: int, make: Make) -> Edit:
    """An input of one node is another value."""
    return lambda edit: edit.input_of(edit.nodes(operator)[number], index, make)


def where(condition: Condition, make: Make, rank: int) -> Make:
    """Another value there, and the right one elsewhere."""
    return lambda edit, value: edit("Where", condition(edit, rank), make(edit, value), value)


def result(operator: str, number: int, make: Make, condition: Condition | None = None) -> Edit:
    """What a node gives is another value there."""
    return lambda edit: edit.change(edit.nodes(operator)[number].output[0], make, condition)


def copied(name: str = "") -> Make:
    """The same numbers in a buffer of their own; not by what an optimiser leaves out."""
    return lambda edit, value: edit("Max", value, _float(edit, -3e38), output=name)


def after_state(edit_of: Edit) -> Edit:
    """What may ask for the state of layer 1 as it was."""
    return both_of(given(MIXER, 1, STATE, copied(KEPT)), edit_of)


def crossed_caches(edit: Editor) -> None:
    """The kernel takes the old keys for values, and those for keys; where it writes is right."""
    for index in (3, 4):
        edit.input_of(edit.nodes(ATTENTION)[1], index, copied())
    swapped(ATTENTION, 1, 3, 4)(edit)


def both_of(first: Edit, second: Edit) -> Edit:
    def apply(edit: Editor) -> None:
        first(edit)
        second(edit)

    return apply


def states_of_two(operator: str, index: int) -> Edit:
    """Two layers read each other's state."""

    def apply(edit: Editor) -> None:
        one, other = edit.nodes(operator)[:2]
        one.input[index], other.input[index] = other.input[index], one.input[index]

    return apply


def ones(edit: Editor, value: str) -> str:
    return edit("Add", edit("Mul", value, _float(edit, 0)), _float(edit, 1))


def _float(edit: Editor, value: float) -> str:
    return edit.constant(value, np.float32)


def as_any_row(edit: Editor, value: str) -> str:
    """A row sees what any row does, such as its padding."""
    numbers = edit("Cast", value, to=onnx.TensorProto.INT32)
    most = edit("ReduceMax", numbers, edit.constant([0]))
    return edit("Or", value, edit("Cast", most, to=onnx.TensorProto.BOOL))


def without_key(number: int) -> Make:
    """Nobody sees one key, from 0."""

    def make(edit: Editor, value: str) -> str:
        zeros = edit("ConstantOfShape", edit("Shape", value, start=3))
        order = edit(
            "CumSum", edit("Add", edit("Cast", zeros, to=7), edit.constant(1)), edit.constant(0)
        )
        other = edit("Not", edit("Equal", order, edit.constant(number + 1)))
        return edit("And", value, other)

    return make


def old(name: str) -> Make:
    """The state as it was before."""
    return lambda edit, _value: edit("Identity", name)


def through(to: int) -> Make:
    return lambda edit, value: edit("Cast", edit("Cast", value, to=to), to=1)


def unshared(kinds: tuple[str, ...]) -> Callable[[dict[str, Any]], None]:
    """States of these kinds are said to be apart."""

    def apply(raw: dict[str, Any]) -> None:
        for state in raw["states"]:
            if state["kind"] in kinds:
                state["shared"] = False

    return apply


GRAPHS = [
    ("scale of the head's width", GRANITE, set_of(ATTENTION, 1, "scale", 0.25)),
    ("scale 0.1 % off", GRANITE, set_of(ATTENTION, 1, "scale", 0.0625625)),
    ("key and value caches", GRANITE, swapped(ATTENTION, 1, 3, 4)),
    ("keys and values", GRANITE, swapped(ATTENTION, 1, 1, 2)),
    ("cosines and sines", OLMOE, swapped(ATTENTION, 1, COS, SIN)),
    ("norm over all", MAMBA2, set_of(MIXER, 1, "norm_groups", 1)),
    ("norm of each head", MAMBA2, set_of(MIXER, 1, "norm_groups", 8)),
    ("eps 1.1e-5", MAMBA2, set_of(MIXER, 1, "epsilon", 1.1e-5)),
    ("time step at most 100", MAMBA2, set_of(MIXER, 1, "dt_max", 100.0)),
    ("time step at least 1e-3", MAMBA2, set_of(MIXER, 1, "dt_min", 1e-3)),
    ("another activation", MAMBA2, set_of(MIXER, 1, "activation", "gelu")),
    ("no activation", MAMBA2, set_of(MIXER, 1, "activation", "identity")),
    ("A and D", MAMBA2, swapped(MIXER, 1, 6, 7)),
    ("D and the bias of time steps", MAMBA2, swapped(MIXER, 1, 7, 8)),
]
# Where sizes do not fit, the kernel says so.
UNFIT = [
    ("half of the heads", GRANITE, set_of(ATTENTION, 1, "num_heads", 2)),
    ("more heads of keys", GRANITE, set_of(ATTENTION, 1, "kv_num_heads", 4)),
    ("fewer groups", MAMBA2, set_of(MIXER, 1, "groups", 1)),
    ("norm of three groups", MAMBA2, set_of(MIXER, 1, "norm_groups", 3)),
    ("norm that no group has", MAMBA2, set_of(MIXER, 1, "norm_groups", 0)),
]
KERNELS = [
    ("another scale", GRANITE, set_of(ATTENTION, 1, "scale", 0.07)),
    ("cosines and sines", GRANITE, swapped(ATTENTION, 1, COS, SIN)),
    ("keys in float16", GRANITE, given(ATTENTION, 1, 1, through(onnx.TensorProto.FLOAT16))),
    ("the old caches swapped", OLMOE, crossed_caches),
    ("padding is seen", GRANITE, given(ATTENTION, 1, VISIBLE, as_any_row)),
    ("padding is seen", JETMOE, given(ATTENTION, 1, VISIBLE, as_any_row)),
    ("the 65th key is not seen", GRANITE, given(ATTENTION, 1, VISIBLE, without_key(64))),
    ("the 64th key is not seen", OLMOE, given(ATTENTION, 1, VISIBLE, without_key(63))),
    (
        "not rotated at decode",
        GRANITE,
        both_of(
            given(ATTENTION, 1, COS, where(DECODE, ones, 3)),
            given(ATTENTION, 1, SIN, where(DECODE, NOTHING, 3)),
        ),
    ),
    (
        "the cache of the row before",
        GRANITE,
        given(ATTENTION, 1, 3, where(at.both(at.rows(2, -1), at.after_a_past), rolled(0), 4)),
    ),
    (
        "values of the row before in several tokens of several rows",
        GRANITE,
        given(ATTENTION, 1, 4, where(SEVERAL, rolled(0), 4)),
    ),
    (
        "the cache of the head before at decode",
        OLMOE,
        given(ATTENTION, 1, 4, where(DECODE, rolled(1), 4)),
    ),
    *(
        (f"half of attention in {name}", base, result(ATTENTION, 1, HALF, condition))
        for name, base, condition in (
            ("a padded row", GRANITE, at.padded_row),
            ("a padded row behind a past", GRANITE, at.both(at.padded_row, at.after_a_past)),
            ("what is behind a past", GRANITE, at.after_a_past),
            ("several rows of several tokens after a past", GRANITE, SEVERAL),
            ("few rows of a head", GRANITE, FEW),
            ("more rows of a head than are few", GRANITE, MANY),
            ("more than 64 keys", GRANITE, at.total(65, -1)),
            ("more than 64 keys at decode", OLMOE, at.both(at.total(65, -1), DECODE)),
            ("more than 128 keys at decode", GRANITE, at.both(at.total(129, -1), DECODE)),
            ("a padded row of more than 64 keys", GRANITE, LONG_PADDED),
            ("decode of a padded row of more than 64 keys", OLMOE, at.both(LONG_PADDED, DECODE)),
            ("more paddings than a block has keys", GRANITE, at.paddings(65)),
            (
                "several rows of several tokens behind more than 64 keys",
                GRANITE,
                at.both(SEVERAL, at.total(68, -1)),
            ),
            ("several tokens of a first call of 97 or more", OLMOE, at.tokens(97, -1)),
            ("several rows of several tokens after a past", JETMOE, SEVERAL),
        )
    ),
    ("norm over all", MAMBA2, set_of(MIXER, 1, "norm_groups", 1)),
    ("eps 1e-4", MAMBA2, set_of(MIXER, 1, "epsilon", 1e-4)),
    ("time step at most 0.5", MAMBA2, set_of(MIXER, 1, "dt_max", 0.5)),
    ("time step at least 0.1", MAMBA2, set_of(MIXER, 1, "dt_min", 0.1)),
    ("another activation", MAMBA2, set_of(MIXER, 1, "activation", "gelu")),
    ("A and D", MAMBA2, swapped(MIXER, 1, 6, 7)),
    ("the mask is ignored", MAMBA2, given(MIXER, 1, MASK, ones)),
    (
        "the mask is ignored in a call that is all padding in a row",
        MAMBA2,
        given(MIXER, 1, MASK, where(at.nothing_but_padding, ones, 2)),
    ),
    (
        "the state is not read at decode",
        MAMBA2,
        given(MIXER, 1, STATE, where(at.tokens(1), NOTHING, 4)),
    ),
    (
        "the window is not read at decode",
        MAMBA2,
        given(MIXER, 1, WINDOW, where(at.tokens(1), NOTHING, 3)),
    ),
    (
        "the window is not read in a second turn",
        MAMBA2,
        given(MIXER, 1, WINDOW, where(at.tokens(2, -1), NOTHING, 3)),
    ),
    ("the state of the row before", MAMBA2, given(MIXER, 1, STATE, rolled(0))),
    ("the window of the row before", MAMBA2, given(MIXER, 1, WINDOW, rolled(0))),
    (
        "the state of the head before at decode",
        MAMBA2,
        given(MIXER, 1, STATE, where(at.tokens(1), rolled(1), 4)),
    ),
    (
        "the state is not written at decode",
        MAMBA2,
        shapes.state(SSM, old("past_states.1.ssm"), at.tokens(1)),
    ),
    (
        "the window is not written at decode",
        MAMBA2,
        shapes.state(CONV, old("past_states.1.conv"), at.tokens(1), 3),
    ),
    (
        "the window loses a tap where T is 2",
        MAMBA2,
        shapes.state(CONV, rolled(2), at.tokens(2), 3),
    ),
    (
        "the state behind a past is one hundredth larger",
        MAMBA2,
        after_state(shapes.state(SSM, scaled(1.01), PAST)),
    ),
    (
        "half of the block in a padded row",
        MAMBA2,
        result(MIXER, 1, HALF, at.padded_row),
    ),
]
FAULTS: list[Fault] = [
    *(in_graph(name, base, KIND, edit, LAYER) for name, base, edit in GRAPHS),
    *(in_graph(name, base, KIND, edit, None, UNFITTING) for name, base, edit in UNFIT),
    in_graph("conv states of two layers", MAMBA2, KIND, states_of_two(MIXER, WINDOW), OF_TWO),
    in_graph("states of two layers", MAMBA2, KIND, states_of_two(MIXER, STATE), OF_TWO),
    in_graph("caches of two layers", GRANITE, KIND, states_of_two(ATTENTION, 3), OF_TWO),
    *(in_kernel(name, base, KIND, edit, KERNEL) for name, base, edit in KERNELS),
    manifest("windows that are apart", MAMBA2, changed(unshared(("conv",))), "shared"),
    manifest("caches that are apart", GRANITE, changed(unshared(("key", "value"))), "shared"),
    # Right wherever states are apart: what layer 0 wrote is what layer 1 reads.
    in_kernel("states of two layers in place", MAMBA2, KIND, states_of_two(MIXER, STATE), IN_PLACE),
    in_kernel("queries read in float16", GRANITE, KIND, through_float16(ATTENTION, 0), FIRST),
    # Where keys are more than a kernel takes at once, which is beyond what the standard plan feeds.
    *(
        in_kernel(
            f"half of attention, {name}",
            "granite 640 ingot",
            KIND,
            result(ATTENTION, 1, HALF, condition),
            KERNEL,
            plan="thorough",
        )
        for name, condition in (
            ("more than 512 keys", at.total(513, -1)),
            ("decode behind more than 512 keys", at.both(DECODE, at.total(513, -1))),
        )
    ),
    *(
        in_kernel(
            f"half of attention, {name}",
            GRANITE,
            KIND,
            result(ATTENTION, 1, HALF, condition),
            KERNEL,
        )
        for name, condition in {**shapes.CACHED, **shapes.TURN_OF_TWO}.items()
    ),
    *(
        in_kernel(
            f"half of the block, {name}",
            MAMBA2,
            KIND,
            after_state(result(MIXER, 1, HALF, condition)),
            KERNEL,
        )
        for name, condition in shapes.recurrent(PAST).items()
    ),
    *(
        in_kernel(
            f"half of {operator}, {name}",
            HYBRID,
            KIND,
            result(operator, 0, HALF, condition),
            in_layer(layer),
        )
        for operator, layer, name, condition in (
            (ATTENTION, 1, "decode of one row", shapes.DECODE_OF_ONE),
            (ATTENTION, 1, "several tokens of several rows after a past", SEVERAL),
            (MIXER, 0, "decode of a padded row", at.both(at.padded_row, DECODE)),
            (MIXER, 0, "several tokens of several rows after a past", SEVERAL),
        )
    ),
]
