"""What only a model with layers of several kinds can have wrong: Granite 4's.

Its tiny preset has Mamba2 in layers 0, 1 and 3 and attention in layer 2, each with experts beside a
shared MLP.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from proof.editing import Edit, Editor, scaled
from proof.fault import Fault, Where, in_layer
from proof.faults.exports import exported, no_multiplier, of_layer
from proof.faults.structure import behind, beside
from proof.planting import in_graph, in_kernel

KIND = "hybrid"
ONNX, ORT, OWN = "granitemoehybrid onnx", "granitemoehybrid ort", "granitemoehybrid ingot"
FP16 = "granitemoehybrid fp16"
MAMBA, ATTENTION = 1, 2


def state_of_another_layer(edit: Editor) -> None:
    """The scan of layer 3 begins with the state of layer 1, which attention lies between."""
    _, second, third = edit.nodes("Mamba2Scan")
    third.input[7] = second.input[7]
    # A graph's input has to be read.
    edit.change("past_states.0.conv", beside("past_states.3.ssm"), rank=3)


def mask_beyond_the_mixers(operator: str, index: int, number: int) -> Edit:
    """A mixer takes padding for tokens, and attention does not."""

    def apply(edit: Editor) -> None:
        node = edit.nodes(operator)[number]
        edit.input_of(node, index, lambda e, value: e("Max", value, e.constant(1, np.float32)))

    return apply


EXPERTS = "layers.{}.block_sparse_moe.experts.down_proj"
SHARED = "layers.{}.shared_mlp.output_linear.weight"


def without_shared(layer: Any) -> None:
    right = layer.shared_mlp.forward
    # An export needs every weight.
    layer.shared_mlp.forward = lambda x: right(x) * 1e-3


def unmasked(layer: Any) -> None:
    right = layer.forward

    def forward(x: Any, step: Any, past: Any) -> Any:
        return right(x, step._replace(real=step.real * 0 + 1), past)

    layer.forward = forward


FAULTS: list[Fault] = [
    in_graph(
        "the state of another layer",
        ONNX,
        KIND,
        state_of_another_layer,
        Where(3),
        ("numbers",),
    ),
    in_graph(
        "padding reaches the scan of one layer",
        ONNX,
        KIND,
        mask_beyond_the_mixers("Mamba2Scan", 8, MAMBA),
        # What is between the mask and the scan.
        Where(MAMBA, also=(None,)),
        ("numbers",),
    ),
    in_kernel(
        "padding reaches the scan of one layer, in its kernel",
        ONNX,
        KIND,
        mask_beyond_the_mixers("Mamba2Scan", 8, MAMBA),
        in_layer(MAMBA),
    ),
    *(
        in_graph(
            f"{what} left out of a layer of {kind}",
            ONNX,
            KIND,
            behind(weight.format(layer), scaled(0.0)),
            Where(layer),
        )
        for what, weight in (("shared MLP", SHARED), ("experts", EXPERTS))
        for kind, layer in (("Mamba2", MAMBA), ("attention", ATTENTION))
    ),
    *(
        exported(
            f"no multiplier in a layer of {kind}",
            base,
            of_layer(no_multiplier, layer),
            Where(layer),
            ("graph", "weights", "numbers"),
            retraced=True,
        )
        for kind, layer in (("Mamba2", MAMBA), ("attention", ATTENTION))
        for base in (ONNX, ORT, OWN, FP16)
    ),
    *(
        exported(
            "no shared MLP",
            base,
            of_layer(without_shared, ATTENTION),
            Where(ATTENTION),
            ("graph", "numbers"),
            retraced=True,
        )
        for base in (ORT, OWN)
    ),
    *(
        exported(
            "padding reaches a mixer",
            base,
            of_layer(unmasked, MAMBA),
            Where(MAMBA, also=(None,)),
            ("graph", "numbers"),
            retraced=True,
        )
        for base in (ONNX, ORT, OWN, FP16)
    ),
]
