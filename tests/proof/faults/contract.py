"""Fields of ``ingot.json`` that are not what the checkpoint and the graph say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ingot.export.ingot import TRTEXEC
from proof.fault import Change, Fault
from proof.planting import manifest
from proof.stored import field, sealed
from proof.stored import manifest as changed


def said(name: str, base: str, *path: str | int, to: Any, words: str = "") -> Fault:
    """A field has another value; the report names it."""
    return manifest(name, base, field(*path, to=to), words or str(path[0]))


def crosswise(first: int, second: int, *keys: str) -> Callable[[dict[str, Any]], None]:
    """Fields of two states change places."""

    def change(held: dict[str, Any]) -> None:
        one, other = held["states"][first], held["states"][second]
        for key in keys:
            one[key], other[key] = other[key], one[key]

    return change


def dropped(held: dict[str, Any]) -> None:
    """The last state is not told of."""
    held["states"].pop()


def narrowed(held: dict[str, Any]) -> None:
    """Every dtype is float16, and so is the precision."""
    held["precision"] = "float16"
    for each in (*held["inputs"], *held["outputs"], *held["states"]):
        if each["dtype"] == "float32":
            each["dtype"] = "float16"


def reordered(held: dict[str, Any]) -> None:
    """The states in another order."""
    held["states"].reverse()


def options(before: str, other: str) -> Change:
    """``trtexec.txt`` builds another engine."""

    def change(folder: Path) -> None:
        text = (folder / TRTEXEC).read_text()
        assert before in text
        (folder / TRTEXEC).write_text(text.replace(before, other))
        sealed(folder)

    return change


GENERATION = "generation"
FAULTS: list[Fault] = [
    said("vocabulary of 2", "olmoe onnx", "vocab_size", to=2, words="vocab"),
    said("vocabulary of 511", "granite ort", "vocab_size", to=511, words="vocab"),
    said("vocabulary of 600", "mamba2 ort", "vocab_size", to=600, words="vocab"),
    said("vocabulary of 513, float16", "granite fp16", "vocab_size", to=513, words="vocab"),
    said("vocabulary of 100", "granite features ort", "vocab_size", to=100, words="vocab"),
    said("another end", "olmoe ort", GENERATION, "eos_token_ids", to=[5], words="eos"),
    said("two ends", "granite onnx", GENERATION, "eos_token_ids", to=[0, 5], words="eos"),
    said("another padding", "olmoe onnx", GENERATION, "pad_token_id", to=3, words="pad"),
    said("no padding", "mamba2 onnx", GENERATION, "pad_token_id", to=None, words="pad"),
    said("a longer context", "granite ort", GENERATION, "context_length", to=4096, words="context"),
    said("a shorter context", "olmoe ort", GENERATION, "context_length", to=64, words="context"),
    said("a context", "mamba2 ort", GENERATION, "context_length", to=512, words="context"),
    said("no context", "jetmoe onnx", GENERATION, "context_length", to=None, words="context"),
    said("labels", "jetmoe classify onnx", "labels", to=["no", "yes"]),
    said("labels reversed", "jetmoe classify ort", "labels", to=lambda names: names[::-1]),
    said("float16 on the label", "olmoe onnx", "precision", to="float16"),
    said("float16 on the label", "granite ort", "precision", to="float16"),
    said("float16 on the label", "mamba2 onnx", "precision", to="float16"),
    said("float32 on the label", "granite fp16", "precision", to="float32"),
    said("bfloat16 on the label", "olmoe fp16", "precision", to="bfloat16"),
    manifest("float16 everywhere", "granite onnx", changed(narrowed), "float16"),
    said("a shared buffer", "granite onnx", "states", 0, "shared", to=True, words="shared"),
    said("no shared buffer", "granite ort", "states", 1, "shared", to=False, words="shared"),
    said("a shared buffer, float16", "olmoe fp16", "states", 0, "shared", to=True, words="shared"),
    manifest(
        "keys fed to values",
        "granite onnx",
        changed(crosswise(0, 1, "output")),
        "state",
    ),
    manifest("layers' states crosswise", "mamba2 onnx", changed(crosswise(1, 3, "input")), "state"),
    manifest("kinds crosswise", "olmoe ort", changed(crosswise(0, 1, "kind")), "state"),
    manifest("a state is missing", "olmoe onnx", changed(dropped), "state"),
    manifest("a state is missing", "mamba2 ort", changed(dropped), "state"),
    manifest("states the other way round", "jetmoe ort", changed(reordered), "state"),
    said("a state's dtype", "mamba2 ort", "states", 1, "dtype", to="float16", words="states"),
    said(
        "a state's dtype, float16",
        "mamba2 fp16",
        "states",
        0,
        "dtype",
        to="float32",
        words="states",
    ),
    said(
        "a state's size",
        "granite onnx",
        "states",
        0,
        "input_shape",
        to=lambda shape: [shape[0], 4, *shape[2:]],
        words="states",
    ),
    said("a state's axis", "olmoe onnx", "states", 0, "axis", to=1, words="axis"),
    said("an input's dtype", "granite onnx", "inputs", 3, "dtype", to="float16", words="input"),
    said("an output's width", "olmoe ort", "outputs", 0, "shape", 2, to=500, words="output"),
    said("another task", "granite onnx", "task", to="features", words="contract:"),
    said("another family", "granite ort", "model_type", to="olmoe", words="model_type"),
    said("another target", "olmoe ort", "target", to="onnx", words="target"),
    said("parameters", "granite ort", "parameters", to=lambda n: n + 1),
    said("active parameters", "olmoe ort", "active_parameters", to=lambda n: 2 * n, words="active"),
    said("bytes of weights", "mamba2 onnx", "weight_bytes", to=lambda n: n // 2),
    said("operators", "jetmoe ort", "graph", "nodes", to=lambda n: n + 1, words="nodes"),
    said("the opset", "granite onnx", "graph", "opset", to=21, words="opset"),
    manifest("sums in TF32", "granite fp16", options("--noTF32\n", ""), TRTEXEC),
    manifest("a longer past", "granite fp16", options("x4095x", "x4096x"), TRTEXEC),
    manifest("masks of the past", "mamba2 fp16", options("mask:1x512", "mask:1x511"), TRTEXEC),
    said("another checkpoint", "olmoe onnx", "source", "sha256", to="0" * 64, words="sha256"),
]
