"""Stored weights that are not the checkpoint's, those that no call reads included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from proof.editing import Array
from proof.fault import Fault, Where
from proof.planting import in_weights
from proof.stored import every_weight, weight, weights

# In place, or to what it returns.
Alter = Callable[[Array], Any]


def element(amount: float) -> Alter:
    """One element is further by a share of the whole's size."""

    def change(array: Array) -> None:
        array.reshape(-1)[array.size // 2] += np.asarray(amount, array.dtype)

    return change


def zero_rows(begin: int, end: int) -> Alter:
    def change(array: Array) -> None:
        array[begin:end] = 0

    return change


def swapped_rows(array: Array) -> Array:
    array[[2, 5]] = array[[5, 2]]
    return array


def stale(array: Array) -> None:
    """The last of a stack is as it was before the last epoch."""
    array[-1] = np.random.default_rng(3).normal(0, 0.1, array[-1].shape)


def stale_first(array: Array) -> None:
    array[0] = np.random.default_rng(4).normal(0, 0.1, array[0].shape)


def by_row(array: Array) -> Array:
    """Int8 with a scale for each row."""
    wide = array.astype(np.float32)
    scale = np.abs(wide).max(axis=-1, keepdims=True) / 127
    result: Array = (np.round(wide / scale) * scale).astype(array.dtype)
    return result


def through(dtype: Any) -> Alter:
    return lambda array: array.astype(dtype).astype(array.dtype)


def halves(array: Array) -> None:
    """Gate and up change places."""
    middle = array.shape[1] // 2
    first = array[:, :middle].copy()
    array[:, :middle] = array[:, middle:]
    array[:, middle:] = first


def pairs(array: Array) -> None:
    """The same where their rows alternate."""
    even = array[:, ::2].copy()
    array[:, ::2] = array[:, 1::2]
    array[:, 1::2] = even


def exchanged(first: Array, second: Array) -> None:
    kept = first.copy()
    first[...] = second
    second[...] = kept


def times(factor: float) -> Alter:
    return lambda array: (array.astype(np.float32) * np.float32(factor)).astype(array.dtype)


def with_nan(array: Array) -> None:
    array.reshape(-1)[7] = math.nan


def bit(array: Array) -> None:
    """The lowest bit of one element."""
    array.reshape(-1).view(f"u{array.itemsize}")[11] ^= 1


def shifted(array: Array) -> Array:
    return np.roll(array, 1, axis=-1)


def reversed_taps(array: Array) -> Array:
    return array[..., ::-1].copy()


ATTENTION = "layers.1.self_attn."
EMBEDDING = Where(words="embed")
LAYER = Where(1)


def _at(base: str, name: str, ending: str, change: Alter, where: Where | None = LAYER) -> Fault:
    found = where if where is not LAYER else Where(words=ending.strip("."))
    return in_weights(name, base, weight(ending, change), found)


FAULTS: list[Fault] = [
    _at(
        "olmoe onnx", "rows 100 to 120 of the embedding", "embed_tokens.weight", zero_rows(100, 120)
    ),
    _at("olmoe onnx", "the last row of the embedding", "embed_tokens.weight", zero_rows(511, 512)),
    _at("olmoe ort", "most rows of the embedding", "embed_tokens.weight", zero_rows(94, 512)),
    _at("olmoe ort", "two rows of the embedding", "embed_tokens.weight", swapped_rows),
    _at("olmoe ort", "a row of the head", "lm_head.weight", zero_rows(17, 18)),
    _at("granite ort", "a row of a tied embedding", "embed_tokens.weight", zero_rows(300, 301)),
    _at("mamba2 onnx", "a row of a tied embedding", "embeddings.weight", zero_rows(77, 78)),
    _at("jetmoe fp16", "rows of the embedding", "embed_tokens.weight", zero_rows(500, 510)),
    _at(
        "olmoe 64 experts onnx",
        "the last expert's gate and up",
        "layers.1.mlp.experts.gate_up_proj",
        stale,
    ),
    _at(
        "olmoe 64 experts onnx",
        "the first expert's down",
        "layers.0.mlp.experts.down_proj",
        stale_first,
    ),
    _at(
        "olmoe 64 experts ort",
        "the last stored expert's down",
        "layers.1.mlp.experts.down_proj",
        stale,
    ),
    _at(
        "olmoe 64 experts ort",
        "the first stored expert's gate and up",
        "layers.1.mlp.experts.gate_up_proj",
        stale_first,
    ),
    _at("olmoe onnx", "two experts", "layers.1.mlp.experts.down_proj", swapped_rows),
    _at("olmoe fp16", "two experts", "layers.0.mlp.experts.gate_up_proj", swapped_rows),
    _at("jetmoe ort", "a stale expert", "layers.1.mlp.input_linear.weight", stale),
    _at(
        "jetmoe onnx",
        "a stale attention expert",
        "layers.1.self_attention.experts.input_linear.weight",
        stale,
    ),
    _at(
        "jetmoe ort",
        "an attention expert 1 % off",
        "layers.1.self_attention.experts.output_linear.weight.3",
        times(1.01),
    ),
    _at("olmoe onnx", "gate for up", "layers.1.mlp.experts.gate_up_proj", halves),
    _at("olmoe ort", "gate for up", "layers.0.mlp.experts.gate_up_proj", pairs),
    in_weights(
        "gate for up",
        "granite ort",
        weights(("layers.1.mlp.gate_proj.weight", "layers.1.mlp.up_proj.weight"), exchanged),
        Where(words="layers.1.mlp."),
    ),
    in_weights(
        "keys for values",
        "granite onnx",
        weights((f"{ATTENTION}k_proj.weight", f"{ATTENTION}v_proj.weight"), exchanged),
        Where(words=ATTENTION),
    ),
    in_weights(
        "layers exchanged",
        "mamba2 ort",
        weights(("layers.0.mixer.out_proj.weight", "layers.1.mixer.out_proj.weight"), exchanged),
        Where(words="mixer.out_proj.weight"),
    ),
    _at("granite onnx", "turned", f"{ATTENTION}o_proj.weight", lambda a: a.T.copy()),
    _at("olmoe ort", "turned", f"{ATTENTION}q_proj.weight", lambda a: a.T.copy()),
    _at("granite fp16", "turned", f"{ATTENTION}q_proj.weight", lambda a: a.T.copy()),
    _at("granite onnx", "one element 1e-3 off", f"{ATTENTION}q_proj.weight", element(1e-3)),
    _at("granite ort", "one element 1e-5 off", "layers.1.mlp.down_proj.weight", element(1e-5)),
    _at("granite ort", "the lowest bit of one element", "layers.1.mlp.up_proj.weight", bit),
    _at("mamba2 fp16", "the lowest bit of one element", "layers.1.mixer.in_proj.weight", bit),
    _at("olmoe onnx", "the lowest bit of a norm", f"{ATTENTION}k_norm.weight", bit),
    _at(
        "granite onnx",
        "norm +1e-5",
        "layers.1.input_layernorm.weight",
        lambda a: a + np.float32(1e-5),
    ),
    _at("mamba2 ort", "one element of a norm +1e-5", "layers.1.norm.weight", element(1e-5)),
    _at(
        "granite fp16",
        "one element of a norm 2 % off",
        "layers.1.input_layernorm.weight",
        element(0.02),
    ),
    _at("granite fp16", "int8 by row", f"{ATTENTION}v_proj.weight", by_row),
    _at("olmoe fp16", "int8 by row", f"{ATTENTION}o_proj.weight", by_row),
    _at("granite ort", "int8 by row", "layers.1.mlp.gate_proj.weight", by_row),
    _at("olmoe ort", "through bfloat16", "layers.1.mlp.gate.weight", through(ml_dtypes.bfloat16)),
    _at(
        "jetmoe onnx",
        "through float16",
        "layers.1.self_attention.kv_proj.weight",
        through(np.float16),
    ),
    in_weights(
        "all through bfloat16",
        "granite onnx",
        every_weight(through(ml_dtypes.bfloat16)),
        Where(words="weight"),
    ),
    in_weights(
        "all through bfloat16",
        "mamba2 fp16",
        every_weight(through(ml_dtypes.bfloat16)),
        Where(words="weight"),
    ),
    _at("granite ort", "a scale folded twice", "layers.1.mlp.down_proj.weight", times(0.22)),
    _at("granite onnx", "a scale folded not at all", f"{ATTENTION}o_proj.weight", times(1 / 0.22)),
    _at("granite ort", "the head's scale folded twice", "model.norm.weight", times(1 / 8)),
    _at("granite onnx", "the embedding's scale not folded", "embed_tokens.weight", times(1 / 12)),
    _at("olmoe ort", "NaN", f"{ATTENTION}v_proj.weight", with_nan),
    _at("mamba2 onnx", "A_log 0.1 % off", "layers.1.mixer.A_log", times(1.001)),
    _at("mamba2 fp16", "D in bfloat16", "layers.1.mixer.D", through(ml_dtypes.bfloat16)),
    _at("mamba2 ort", "dt_bias rolled", "layers.1.mixer.dt_bias", shifted),
    _at("mamba2 ort", "taps reversed", "layers.1.mixer.conv1d.weight", reversed_taps),
    _at("mamba2 onnx", "conv bias zero", "layers.1.mixer.conv1d.bias", lambda a: a * 0),
    _at("jetmoe ort", "bias zero", "layers.1.mlp.bias", lambda a: a * 0),
    _at("jetmoe classify ort", "rows of the score", "score.weight", lambda a: a[::-1].copy()),
    _at("jetmoe classify onnx", "an embedding row", "embed_tokens.weight", zero_rows(11, 12)),
    _at("granite features ort", "an embedding row", "embed_tokens.weight", zero_rows(11, 12)),
    _at("mamba2 features onnx", "an embedding row", "embeddings.weight", zero_rows(400, 401)),
    _at(
        "granite bf16 weights ort",
        "the lowest bit of one element",
        f"{ATTENTION}q_proj.weight",
        bit,
    ),
    _at("granite bf16 weights ort", "a scale folded", "layers.1.mlp.down_proj.weight", times(0.22)),
    _at(
        "granite bf16 weights ort",
        "a row of the embedding",
        "embed_tokens.weight",
        zero_rows(9, 10),
    ),
    _at("olmoe bf16 weights ort", "two experts", "layers.1.mlp.experts.down_proj", swapped_rows),
    _at("olmoe bf16 weights ort", "gate for up", "layers.0.mlp.experts.gate_up_proj", pairs),
    _at("olmoe bf16 weights ort", "int8 by row", f"{ATTENTION}o_proj.weight", by_row),
    _at(
        "olmoe bf16 weights ort",
        "router in bfloat16",
        "layers.1.mlp.gate.weight",
        through(ml_dtypes.bfloat16),
    ),
    _at(
        "jetmoe bf16 weights onnx",
        "the lowest bit of one element",
        "layers.1.self_attention.experts.input_linear.weight",
        bit,
    ),
    _at(
        "mamba2 fp16 weights ort",
        "through bfloat16",
        "layers.1.mixer.in_proj.weight",
        through(ml_dtypes.bfloat16),
    ),
    _at("hybrid ort", "a stale expert", "layers.1.experts.1.down", stale),
    _at("hybrid onnx", "one element", "layers.2.mixer.in_proj.weight", element(1e-4)),
    _at("olmoe clipped onnx", "one element", f"{ATTENTION}k_proj.weight", element(1e-4)),
    _at("granite dynamic onnx", "one element", f"{ATTENTION}k_proj.weight", element(1e-4)),
]
