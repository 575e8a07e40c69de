"""Wrong in one shape of use alone, such as where exactly one token of one row is computed.

What is planted in the graph's file is seen by what compares graphs, too; what is planted in the
kernels is not. Of both the numbers have to see it, since that is what users will run.
"""

from __future__ import annotations

import numpy as np

from proof import conditions as at
from proof.editing import Condition, Edit, Editor, Make, plus, rolled, scaled
from proof.fault import By, Fault, Where, in_layer
from proof.planting import in_graph, in_kernel

KIND = "shape of use"
# By family: a weight of layer 1 behind whose product [B, T, ...] the fault lies.
BEHIND = {
    "granite": "layers.1.self_attn.o_proj.weight",
    "hybrid": "layers.1.mixer.o_proj.weight",
    "jetmoe": "layers.1.self_attention.kv_proj.weight",
    "mamba2": "layers.1.mixer.out_proj.weight",
    "olmoe": "layers.1.self_attn.o_proj.weight",
}
NUMBERS: tuple[By, ...] = ("numbers",)
ANYWHERE = Where(1)
KERNEL = in_layer(1)
# Positions are no value between layers: what is turned by them is the first.
FIRST = in_layer(0)


HALF = scaled(0.5)


def product(base: str, make: Make, where: Condition) -> Edit:
    """A product of layer 1 is wrong there."""
    weight = BEHIND[base.split()[0]]
    return lambda edit: edit.change(edit.made_of(weight), make, where)


def experts(make: Make, where: Condition) -> Edit:
    """What the last mixture of experts gives is wrong there; its rows are tokens ``[B*T, H]``."""

    def apply(edit: Editor) -> None:
        last = edit.nodes("MoE", "MoeDispatch")[-1]
        edit.change(last.output[0], make, where, rank=2)

    return apply


def state(name: str, make: Make, where: Condition, rank: int = 4) -> Edit:
    """A new state is wrong there."""
    return lambda edit: edit.change(name, make, where, rank)


def place(make: Make, where: Condition) -> Edit:
    """The positions are wrong there."""
    return lambda edit: edit.change("position_ids", make, where, rank=2)


def scores(where: Condition) -> Edit:
    """A classifier's are half of themselves there."""
    return lambda edit: edit.change("logits", HALF, where, rank=2)


def more(edit: Editor, value: str) -> str:
    """A state that is no longer empty."""
    return edit("Add", value, edit.constant(0.01, np.float32))


def any_row(condition: Condition) -> Condition:
    """It holds for one row of the call."""

    def holds(edit: Editor, _rank: int) -> str:
        found = edit("Cast", condition(edit, 1), to=7)
        return edit("Greater", edit("ReduceMax", found, keepdims=0), edit.constant(0))

    return holds


DECODE_OF_ONE = at.both(at.rows(1), at.tokens(1), at.after_a_past)
TURN = at.both(at.rows(1), at.tokens(2, -1), at.after_a_past)
FIRST_OF_ONE = at.both(at.tokens(1), at.first_call)
ONLY_PADDING = any_row(at.nothing_but_padding)

# Of models with caches.
CACHED: dict[str, Condition] = {
    "decode of one row": DECODE_OF_ONE,
    "prefill of one row": at.both(at.rows(1), at.tokens(2, -1), at.first_call),
    "second turn of one row": TURN,
    "second turn of two tokens": at.both(TURN, at.tokens(2)),
    "second turn of three tokens": at.both(TURN, at.tokens(3)),
    "second turn of four to fifteen tokens": at.both(TURN, at.tokens(4, 15)),
    "prompt of one token": FIRST_OF_ONE,
    "row 3 of the batch": at.row(2),
    "row 1 of three or more": at.both(at.rows(3, -1), at.row(0)),
    "decode of three or more rows": at.both(at.rows(3, -1), at.tokens(1)),
    "prefill of two rows": at.both(at.rows(2), at.tokens(2, -1), at.first_call),
    "decode of two rows": at.both(at.rows(2), at.tokens(1), at.after_a_past),
    "eight paddings or more": at.paddings(8),
    "every row padded": at.every_row_padded,
    "a call that is all padding in a row": ONLY_PADDING,
    "a prompt of 64 tokens": at.both(at.tokens(64), at.first_call),
    "decode of the 128th token": at.both(at.tokens(1), at.total(128)),
    "decode of the 257th token": at.both(at.tokens(1), at.total(257)),
    "four rows": at.rows(4),
}
# Of scans, which are told no positions and of the past only by their states.
PAST = at.with_state("past_states.0.ssm")


def recurrent(past: Condition) -> dict[str, Condition]:
    """Where a state that is not empty says of a past."""
    return {
        "decode of one row": at.both(at.rows(1), at.tokens(1), past),
        "second turn of one row": at.both(at.rows(1), at.tokens(2, -1), past),
        "two tokens": at.tokens(2),
        "three tokens": at.tokens(3),
        "two rows": at.rows(2),
        "decode of two rows": at.both(at.rows(2), at.tokens(1), past),
        "more than three chunks": at.tokens(25, -1),
        "row 3 of the batch": at.row(2),
        "every row padded": at.every_row_padded,
        "eight paddings or more": at.paddings(8),
        "a prompt of one chunk of one row": at.both(at.rows(1), at.tokens(8)),
        "decode of four rows": at.both(at.rows(4), at.tokens(1), past),
    }


RECURRENT = recurrent(PAST)


def _both_places(base: str, conditions: dict[str, Condition]) -> list[Fault]:
    """In the kernels of the one target and in the file of the other."""
    made = []
    for name, condition in conditions.items():
        edit = product(base, HALF, condition)
        if base.endswith("onnx"):
            made.append(in_graph(name, base, KIND, edit, ANYWHERE, NUMBERS))
        else:
            made.append(in_kernel(name, base, KIND, edit, KERNEL))
    return made


def _only(names: str, table: dict[str, Condition]) -> dict[str, Condition]:
    return {name: table[name] for name in names.split(", ")}


CONV, SSM = "present_states.1.conv", "present_states.1.ssm"
NARROW = scaled(0.5, np.float16)
# Where buffers are shared such a turn is fed a token at a time.
TURN_OF_TWO = {"second turn of two rows": at.both(at.rows(2), at.tokens(2, -1), at.after_a_past)}
FAULTS = [
    *_both_places("granite onnx", {**CACHED, **TURN_OF_TWO}),
    *_both_places("granite ort", CACHED),
    *_both_places("mamba2 onnx", RECURRENT),
    *_both_places("mamba2 ort", RECURRENT),
    *_both_places(
        "jetmoe onnx",
        _only("decode of one row, second turn of two tokens, row 3 of the batch", CACHED),
    ),
    *_both_places(
        "jetmoe ort",
        _only("prompt of one token, second turn of one row, every row padded", CACHED),
    ),
    *_both_places("hybrid onnx", _only("decode of one row, second turn of one row", CACHED)),
    *_both_places("hybrid ort", _only("row 3 of the batch, prompt of one token", CACHED)),
    *(
        make(f"experts halved in {name}", base, KIND, experts(HALF, condition), where, NUMBERS)
        for base, make, where in (
            ("olmoe onnx", in_graph, ANYWHERE),
            ("olmoe ort", in_kernel, KERNEL),
        )
        for name, condition in (
            ("decode of one row", DECODE_OF_ONE),
            ("exactly one token", at.both(at.rows(1), at.tokens(1))),
            ("second turn of one row", TURN),
            ("three rows or more", at.rows(3, -1)),
            ("64 tokens in all", at.in_all(64)),
        )
    ),
    *(
        make(f"positions off by one in {name}", base, KIND, place(plus(1), condition), where, by)
        for base, make, where, by in (
            ("granite onnx", in_graph, Where(None), NUMBERS),
            ("olmoe ort", in_kernel, FIRST, NUMBERS),
        )
        for name, condition in (
            ("a prompt of one token", FIRST_OF_ONE),
            ("a second turn", TURN),
            ("decode of one row", DECODE_OF_ONE),
        )
    ),
    in_graph(
        "positions off by one from 128 on",
        "granite onnx",
        KIND,
        place(plus(1), at.positions(128)),
        Where(None),
        NUMBERS,
    ),
    in_kernel(
        "positions off by one from 128 on",
        "granite ort",
        KIND,
        place(plus(1), at.positions(128)),
        FIRST,
    ),
    in_graph(
        "conv state loses a tap where T is 2",
        "mamba2 onnx",
        KIND,
        state(CONV, rolled(2), at.tokens(2), 3),
        ANYWHERE,
        NUMBERS,
    ),
    in_kernel(
        "conv state loses a tap where T is 2",
        "mamba2 ort",
        KIND,
        state(CONV, rolled(2), at.tokens(2), 3),
        KERNEL,
    ),
    in_kernel(
        "conv state shifted in decode of one row",
        "mamba2 ort",
        KIND,
        state(CONV, rolled(2), at.both(at.rows(1), at.tokens(1)), 3),
        KERNEL,
    ),
    in_kernel(
        "state grows in a call that is all padding in a row",
        "mamba2 ort",
        KIND,
        state(SSM, more, at.nothing_but_padding),
        KERNEL,
    ),
    in_graph(
        "state grows in a call that is all padding in a row",
        "mamba2 onnx",
        KIND,
        state(SSM, more, at.nothing_but_padding),
        ANYWHERE,
        NUMBERS,
    ),
    in_kernel(
        "scan wrong from three chunks on",
        "mamba2 onnx",
        KIND,
        state(SSM, scaled(1.01), at.tokens(24, -1)),
        KERNEL,
    ),
    in_graph(
        "decode of one row, float16",
        "granite fp16",
        KIND,
        product("granite", NARROW, DECODE_OF_ONE),
        ANYWHERE,
        NUMBERS,
    ),
    in_kernel(
        "second turn of one row, float16",
        "olmoe fp16",
        KIND,
        product("olmoe", NARROW, TURN),
        KERNEL,
    ),
    in_kernel(
        "three tokens, float16",
        "mamba2 fp16",
        KIND,
        product("mamba2", NARROW, at.tokens(3)),
        KERNEL,
    ),
    in_graph(
        "decode of one row, features",
        "granite features ort",
        KIND,
        product("granite", HALF, DECODE_OF_ONE),
        ANYWHERE,
        NUMBERS,
    ),
    in_kernel(
        "padded on the right, features",
        "granite features ort",
        KIND,
        product("granite", HALF, at.padded_behind),
        KERNEL,
    ),
    in_kernel(
        "padded on the right",
        "granite onnx",
        KIND,
        product("granite", HALF, at.padded_behind),
        KERNEL,
    ),
    *(
        in_kernel(
            f"classifier halved where {name}",
            "jetmoe classify " + target,
            KIND,
            scores(condition),
            in_layer(None),
        )
        for target in ("onnx", "ort")
        for name, condition in (
            ("the row is padded on the right", at.padded_behind),
            ("there is one token", at.tokens(1)),
            ("there are three rows", at.rows(3, -1)),
            ("there is one row", at.rows(1)),
            ("there are two rows", at.rows(2)),
            ("there are four rows", at.rows(4)),
            ("there are 64 tokens", at.tokens(64)),
        )
    ),
]
