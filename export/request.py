"""What one export is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from ingot.export.ingot_schema import CHECKPOINT, INGOT, ORT
from ingot.export.quantization import BITS, SCALES, Quantization
from ingot.plugins.errors import IngotError

ExtraOutput = Literal["router_logits", "hidden_states"]
Task = Literal["generate", "features", "classify"]
Preset = Literal["tiny", "small", "full"]
Precision = Literal["fp32", "fp16", "bf16"]
Weights = Literal["checkpoint", "fp32", "bf16", "fp16", "int8", "int4"]
Kernels = Literal["ort", "ingot", "portable", "auto"]
Block = Literal[32, 64, 128]
Accuracy = Literal["exact", "fast"]
Method = Literal["gptq", "importance"]
Builder = Literal["auto", "tensorrt", "tensorrt-rtx", "none"]

EXTRA_OUTPUTS: tuple[ExtraOutput, ...] = get_args(ExtraOutput)
TASKS: tuple[Task, ...] = get_args(Task)
PRESETS: tuple[Preset, ...] = get_args(Preset)
# As on the command line -> as in the manifest, which has ONNX's and PyTorch's names.
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# As on the command line -> as in the manifest, where the precision goes without saying.
WEIGHTS = {
    "checkpoint": CHECKPOINT,
    "fp32": "",
    "bf16": "bfloat16",
    "fp16": "float16",
    **{name: name for name in BITS},
}
# Whose kernels run an ort ingot; what is fastest here is known when an export begins.
KERNELS: tuple[Kernels, ...] = get_args(Kernels)
AUTO = "auto"
BUILDERS: tuple[Builder, ...] = get_args(Builder)
# How numbers are chosen on a calibration.
CALIBRATED: tuple[Method, ...] = get_args(Method)
# Of weights with a budget, where none is given: the usual one, in which effects are measured. Each
# weight may be given smaller ones.
BLOCK_OF_A_BUDGET = 128


class ExportError(IngotError):
    """An export that cannot begin."""


@dataclass(frozen=True)
class Limits:
    """The sizes an engine is built for.

    Attributes:
        max_batch: most sequences of a call.
        max_seq: most tokens of a sequence, past and new.
        opt_seq: length that the builder tunes for.
    """

    max_batch: int = 4
    max_seq: int = 4096
    opt_seq: int = 512


@dataclass(frozen=True)
class ExportRequest:
    """One export.

    Attributes:
        model: a family name, a checkpoint folder, or ``org/name`` on the hub.
        target: one of ``export.ingot.TARGETS``.
        out: the ingot folder to make.
        task: one of ``TASKS``.
        preset: with a family name, the shape of a seeded random checkpoint made first.
        revision: branch, tag or commit on the hub.
        adapter: the folder of a PEFT LoRA adapter, or its ``org/name`` on the hub.
        seed: of a preset's weights.
        extra_outputs: of ``EXTRA_OUTPUTS``, each layer's tensor as a further output.
        overwrite: replace an ingot that is at ``out``.
        precision: of ``PRECISIONS``; of the weights and activations of a TensorRT target.
        weights: of ``WEIGHTS``; what matrices are stored in where it is not the precision.
        kernels: of ``KERNELS``, but for ``auto``; whose run the graph of the target ort.
        block: of ``export.quantization.BLOCKS``; this and the next two are of weights in whole
            numbers, and have the values of ``Quantization`` where they are not given (but with
            a budget each weight the block that it is worth).
        symmetric: whether they have no zero points.
        accuracy: of ``export.quantization.ACCURACIES``.
        calibration: a file of text or token ids that the numbers are chosen on.
        method: of ``CALIBRATED``, how; ``gptq`` where it is not given.
        bits: a weight, of int4 scales and zero points included, which some weights get more of,
            in numbers or, where no block is given, in scales.
        builder: of ``BUILDERS``; of a TensorRT engine.
        limits: sizes of a TensorRT engine's calls.
        embed_plugins: put the plugin library into the engine file.
        context: longest sequence that the ingot takes, in place of what the config says.
    """

    model: str
    target: str
    out: Path
    task: str = "generate"
    preset: str | None = None
    revision: str | None = None
    adapter: str | None = None
    seed: int = 0
    extra_outputs: tuple[str, ...] = ()
    overwrite: bool = False
    precision: str = "fp32"
    weights: str | None = None
    kernels: str = ORT
    block: int | None = None
    symmetric: bool | None = None
    accuracy: str | None = None
    calibration: Path | None = None
    method: str | None = None
    bits: float | None = None
    builder: str = "auto"
    limits: Limits = field(default_factory=Limits)
    embed_plugins: bool = False
    context: int | None = None

    @property
    def for_tensorrt(self) -> bool:
        """Whether the target is a TensorRT engine."""
        return self.target in ("trt", "trt-rtx")

    @property
    def in_numbers(self) -> bool:
        """Whether weights are stored in whole numbers."""
        return self.weights in BITS

    @property
    def quantization(self) -> Quantization | None:
        """How weights are stored in whole numbers; None where they are not."""
        if not self.in_numbers:
            return None
        said = {name: getattr(self, name) for name in ("block", "symmetric", "accuracy")}
        said["scales"] = scales_of(self.kernels)
        if self.bits is not None and self.block is None:
            said["block"] = BLOCK_OF_A_BUDGET
        return Quantization(**{name: value for name, value in said.items() if value is not None})


def scales_of(kernels: str) -> str:
    """What the scales of blocks are stored in, for some kernels."""
    return SCALES[kernels == INGOT]
