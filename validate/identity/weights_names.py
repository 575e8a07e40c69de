"""Which tensors of a checkpoint make a weight of a graph, by Hugging Face's names for them.

A weight of a graph has the name that transformers gives the parameter. In a checkpoint the same
numbers may have other names: with or without what stands before a bare model's, an expert at a
time, under the name of what they are tied to, or as mamba_ssm spells an embedding.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ingot.validate.identity.weights_files import Tensor

# What may stand before the names of a bare model, in a whole one.
PREFIXES = ("model.", "backbone.")
# How the names of an embedding's table end, and the head that may share it.
EMBEDDINGS = ("embed_tokens.weight", "embeddings.weight")
HEAD = "lm_head.weight"
# The ends of names that are spelled in another way elsewhere; see github.com/state-spaces/mamba.
SPELLINGS = {"embeddings.weight": "embedding.weight"}
# Parts of names that are spelled in another way elsewhere, each with the other ways: what the hub's
# checkpoints call Mixtral's and Granite's experts.
WITHIN = {
    ".mlp.gate.": (".block_sparse_moe.gate.",),
    ".mlp.experts.": (".block_sparse_moe.experts.",),
    ".block_sparse_moe.experts.gate_up_proj": (".block_sparse_moe.input_linear.weight",),
    ".block_sparse_moe.experts.down_proj": (".block_sparse_moe.output_linear.weight",),
    ".block_sparse_moe.router.weight": (".block_sparse_moe.router.layer.weight",),
}
# The last part of a name of all experts' weights -> of each expert's, in the order of their rows.
EXPERTS = {
    "gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
    "down_proj": ("down_proj.weight",),
}
# The same as Mixtral's checkpoints on the hub have them.
NUMBERED = {"gate_up_proj": ("w1.weight", "w3.weight"), "down_proj": ("w2.weight",)}
# What of a whole model a task has no use for, and why.
HEADS = {HEAD: "generate", "score.weight": "classify"}
# Tensors that are no weights, by the end of their name: why they are left aside.
BUFFERS = {
    ("inv_freq", "original_inv_freq", "long_inv_freq", "freqs"): "rotary frequencies",
    ("cos_cached", "sin_cached"): "rotary tables",
    ("attn.bias", "attention.bias", "causal_mask"): "a causal mask",
    ("masked_bias",): "what masked scores were set to",
    ("position_ids",): "positions",
}
# A bias of attention has one axis, the mask of the same name four.
MASK_AXES = 4

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
OF_ONE_EXPERT = re.compile(r"(?P<stack>.+)\.(?P<expert>\d+)")


@dataclass(frozen=True)
class Part:
    """Rows of a weight that follow each other in a tensor of the checkpoint.

    Attributes:
        tensor: of the checkpoint.
        first: element of the tensor that the first row begins with.
        matrix: of the parameter, that the rows are of.
        row: of that matrix, the first.
        rows: how many.
    """

    tensor: Tensor
    first: int
    matrix: int
    row: int
    rows: int


@dataclass(frozen=True)
class Made:
    """A weight as its checkpoint has it: one matrix, or a stack of them.

    Attributes:
        parameter: what it is of, by transformers' name in a bare model.
        shape: of the weight, by Hugging Face.
        parts: all of its rows, each once.
        begin: number of the first of its matrices among those of the parameter.
        of_stack: whether it is one matrix of a stack.
    """

    parameter: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    begin: int = 0
    of_stack: bool = False

    @property
    def matrices(self) -> tuple[int, int, int]:
        """How many matrices, and rows and columns of each."""
        return as_matrices(self.shape)


def as_matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A shape as that of a stack ``[E, rows, columns]``; a vector is one of a single column."""
    if len(shape) < 2:
        return 1, math.prod(shape), 1
    # The kernel [C, 1, W] of a depthwise convolution is no stack of C matrices.
    if len(shape) == 3 and shape[1] > 1:
        return shape[0], shape[1], shape[2]
    return 1, math.prod(shape[:-1]), shape[-1]


def layer_of(name: str) -> int | None:
    """The number of the layer that a name is of."""
    found = LAYER.search(name)
    return None if found is None else int(found[1])


def bare(name: str) -> str:
    """A name without what stands before it in a whole model."""
    return next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)


def canonical(name: str) -> str:
    """A name without what stands before it in a whole model, in transformers' spelling."""
    name = bare(name)
    return next((end for end, other in SPELLINGS.items() if name == other), name)


def is_embedding(name: str) -> bool:
    """Whether it is the table of the embedding."""
    return bare(name) in EMBEDDINGS


def buffer(tensor: Tensor) -> str | None:
    """What a tensor is that is no weight; None for a weight."""
    for ends, what in BUFFERS.items():
        if any(tensor.name == end or tensor.name.endswith(end) for end in ends):
            if "bias" in tensor.name and len(tensor.shape) not in (0, MASK_AXES):
                return None
            return what
    return None


def make(name: str, stored: Mapping[str, Tensor], tied: bool) -> Made | None:
    """What a weight of a graph is made of.

    Args:
        name: of the weight.
        stored: tensors of the checkpoint, by name.
        tied: whether the head is the embedding.

    Returns:
        None where no tensors of the checkpoint have a name for it.
    """
    for spelled in spellings(name, tied):
        whole = stored.get(spelled)
        if whole is not None:
            return Made(bare(name), whole.shape, tuple(_whole(whole)))
        parts = list(_split(spelled, stored))
        if parts:
            height = sum(part.rows for part in parts if part.matrix == 0)
            shape = (parts[-1].matrix + 1, height, parts[0].tensor.shape[1])
            return Made(bare(name), shape, tuple(parts))
    one = OF_ONE_EXPERT.fullmatch(name)
    stack = make(one["stack"], stored, tied) if one is not None else None
    if one is None or stack is None or len(stack.shape) != 3:
        return None
    expert = int(one["expert"])
    parts = [part for part in stack.parts if part.matrix == expert]
    return Made(stack.parameter, stack.shape[1:], tuple(parts), expert, True) if parts else None


def spellings(name: str, tied: bool) -> Iterator[str]:
    """What a weight may be called in a checkpoint, the likeliest first.

    Args:
        name: of the weight.
        tied: whether the head is the embedding, so that either may have the other's name.
    """
    names = [name, bare(name), *(prefix + bare(name) for prefix in PREFIXES)]
    for part, others in WITHIN.items():
        names += [each.replace(part, other) for each in names for other in others if part in each]
    yield from names
    for end, other in SPELLINGS.items():
        yield from (each.removesuffix(end) + other for each in names if each.endswith(end))
    if tied and is_embedding(name):
        yield HEAD
    elif tied and name == HEAD:
        yield from (p + end for end in (*EMBEDDINGS, *SPELLINGS.values()) for p in (*PREFIXES, ""))


def experts_of(name: str, expert: int) -> Iterator[tuple[str, ...]]:
    """The tensors that rows of one expert's matrix may be split into, in their order; each way."""
    owner, _, leaf = name.rpartition(".")
    for ends in (EXPERTS, NUMBERED):
        yield tuple(f"{owner}.{expert}.{each}" for each in ends.get(leaf, ()))


def _whole(tensor: Tensor) -> Iterator[Part]:
    count, rows, columns = as_matrices(tensor.shape)
    for number in range(count):
        yield Part(tensor, number * rows * columns, number, 0, rows)


def _split(name: str, stored: Mapping[str, Tensor]) -> Iterator[Part]:
    for expert in itertools.count():
        tensors = _of_one(name, expert, stored)
        if not tensors:
            return
        row = 0
        for tensor in tensors:
            yield Part(tensor, 0, expert, row, tensor.shape[0])
            row += tensor.shape[0]


def _of_one(name: str, expert: int, stored: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors of one expert's matrix, all of them or none."""
    for names in experts_of(name, expert):
        found = [stored[each] for each in names if each in stored]
        if found and len(found) == len(names) and all(len(each.shape) == 2 for each in found):
            return found
    return []
