"""What ``ingot.json`` may say, field by field; a folder may come from anybody.

What runs by it trusts it then: names are those of graphs and files and nothing that a shell, a
server's config or a file system would read otherwise, numbers are in range, and what is said twice
is said alike. The C++ library has the same rules. Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Literal, get_args

from ingot.export.quantization import ACCURACIES, BITS, BLOCKS, METHODS, SCALES, UNCHANGED
from ingot.graphs import names
from ingot.graphs.state import BATCH, KEPT, LOGITS_TO_KEEP, PAST, SEQUENCE, TOTAL
from ingot.plugins.cpu.operators import LIBRARY as LIBRARY
from ingot.plugins.json_fields import Field, FieldError, distinct

Shape = tuple[int | str, ...]
# Of a tensor: its dtype and its shape.
Tensors = Mapping[str, tuple[str, Shape]]

# Of schema version 1; a field that later versions of Ingot add is for the manifest's class to know.
FIELDS = (
    *("model_type", "task", "target", "precision", "main_output", "inputs", "outputs", "states"),
    *("vocab_size", "source", "generation", "graph", "parameters", "active_parameters"),
    *("weight_bytes", "tools", "labels", "engine", "files", "validation", "schema_version"),
)
# Of the same version, where they say something.
OPTIONAL = ("weights", "quantization", "kernels", "activations")
OF_QUANTIZATION = ("calibration", "blocks", "scales")
Target = Literal["onnx", "ort", "trt", "trt-rtx"]
TARGETS: tuple[Target, ...] = get_args(Target)
Verdict = Literal["passed", "passed, in part", "failed", "skipped"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
TASKS = ("generate", "features", "classify")
PRECISIONS = ("float32", "float16", "bfloat16")
# What matrices may be stored in, where that is not the precision: each in what the checkpoint has
# it in, or all in one type, or in whole numbers.
CHECKPOINT = "checkpoint"
STORED = (CHECKPOINT, "float16", "bfloat16", *BITS)
# Whose kernels run a graph of the target ort: ONNX Runtime's, where nothing is said; those of
# standard operators alone; Ingot's own, which are in a library that lies in the folder.
ORT, PORTABLE, INGOT = "ort", "portable", "ingot"
SAID_KERNELS = (PORTABLE, INGOT)
# Bytes of an element, by the names that inputs, outputs and states have their dtypes under.
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
# Builder of an engine -> the Python package that builds and runs it.
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
GROWING = ("key", "value")
FIXED = ("conv", "ssm")
# The tensors that are not states; a mask may be as long as a sequence with its past.
TOKEN_INPUTS: dict[str, tuple[Shape, ...]] = {
    "input_ids": ((BATCH, SEQUENCE),),
    "attention_mask": ((BATCH, SEQUENCE), (BATCH, TOTAL)),
    "position_ids": ((BATCH, SEQUENCE),),
    LOGITS_TO_KEEP: ((1,),),
}

# Far above any model, and far below where arithmetic or a loop over them would be a risk.
MOST_TENSORS = 1 << 14
MOST_AXES = 8
MOST_SIZE = (1 << 31) - 1
MOST_BYTES = 1 << 53
# Of the sizes of one state of one sequence: 16 GiB in float32.
MOST_ELEMENTS = 1 << 32
MOST_FILES = 1 << 14
MOST_LABELS = 1 << 20

TENSOR = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,127}")
OPERATOR = re.compile(r"[A-Za-z_][A-Za-z0-9_.:]{0,127}")
VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,63}")
PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PROFILE = re.compile(r"[A-Za-z0-9_]{1,64}")
# An output that is neither a state nor the main one has any size, such as ``batch*sequence``.
SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_ +*/()-]{0,127}")
# What Python would import, had it been copied to where an interpreter looks.
CODE = (".py", ".pyc", ".pyd", ".pyi", ".pth", ".so")


def check(held: Mapping[str, Field]) -> None:
    """Refuse what is no manifest.

    Args:
        held: the fields of the top level; whether all are there is the caller's to see.

    Raises:
        FieldError: naming the field.
    """
    held["model_type"].one_of(names.FAMILIES)
    task = held["task"].one_of(TASKS)
    target = held["target"].one_of(TARGETS)
    precision = held["precision"].one_of(PRECISIONS)
    if "weights" in held and held["weights"].one_of(STORED) and precision != "float32":
        held["weights"].refuse("left out, but for a precision of float32")
    in_numbers = "weights" in held and held["weights"].value in BITS
    if in_numbers and target != "ort":
        held["weights"].refuse(f"of floats, but for the target ort, and the target is {target}")
    if in_numbers != ("quantization" in held):
        raise FieldError("quantization goes with weights in whole numbers, each with the other")
    kernels = held["kernels"].one_of(SAID_KERNELS) if "kernels" in held else ORT
    if kernels != ORT and target != "ort":
        held["kernels"].refuse(f"left out, but for the target ort, and the target is {target}")
    if kernels == PORTABLE and in_numbers:
        held["kernels"].refuse("others, for standard operators read no weights in whole numbers")
    if "activations" in held:
        held["activations"].one_of(("bfloat16",))
        floats = "weights" in held and held["weights"].value in ("checkpoint", "bfloat16")
        if kernels != INGOT or not floats:
            held["activations"].refuse(f"left out, but for kernels {INGOT} and weights in bfloat16")
    if "quantization" in held:
        _quantization(held["quantization"], SCALES[kernels == INGOT])
    vocab_size = held["vocab_size"].whole(1, MOST_SIZE)
    inputs = _tensors(held["inputs"])
    outputs = _tensors(held["outputs"])
    # Caches of ONNX Runtime's kernels too, and every state of our own.
    buffers = (GROWING if target == "ort" else ()) + (FIXED if kernels == INGOT else ())
    states = _states(held["states"], inputs, outputs, buffers=buffers)
    _token_inputs(inputs, states)
    if LOGITS_TO_KEEP in inputs and (task != "generate" or target not in ("onnx", "ort")):
        raise FieldError(
            f"inputs holds {LOGITS_TO_KEEP}, which is for --task generate and the targets onnx and "
            "ort"
        )
    labels = [each.text() for each in held["labels"].elements(most=MOST_LABELS)]
    rows = _rows(task, inputs)
    _main_output(held["main_output"], outputs, task, rows, vocab_size, len(labels))
    _source(held["source"])
    _generation(held["generation"], vocab_size)
    _graph(held["graph"])
    parameters = held["parameters"].whole(1, MOST_BYTES)
    held["active_parameters"].whole(0, parameters)
    held["weight_bytes"].whole(0, MOST_BYTES)
    for name, version in held["tools"].entries(most=256).items():
        Field(name, "a name in tools").matching(PACKAGE, "that of a package")
        version.matching(VERSION, "a version")
    files = _files(held["files"])
    engine = held["engine"].maybe()
    if engine is not None and not target.startswith("trt"):
        raise FieldError(f"engine is there and target is {target}, which has none")
    libraries = [] if engine is None else _engine(engine, inputs, files)
    if kernels == INGOT:
        libraries.append(LIBRARY)
        if LIBRARY not in files:
            raise FieldError(f"kernels is {INGOT} and files lacks {LIBRARY}, which has them")
    for name in files:
        if name.lower().endswith(CODE) and name not in libraries:
            raise FieldError(f"files holds {name}, which is a program; an ingot holds none")
    validation = held["validation"].members((), None)
    if "verdict" in validation:
        validation["verdict"].one_of(VERDICTS)


def _quantization(field: Field, scales: str) -> None:
    """How weights are stored in whole numbers; scales are what the kernels read."""
    needed = ("block", "symmetric", "accuracy", "method", "bits")
    chosen = field.members(needed, OF_QUANTIZATION)
    _number_of(chosen["block"], BLOCKS)
    chosen["symmetric"].flag()
    chosen["accuracy"].one_of(ACCURACIES)
    chosen["method"].one_of(METHODS)
    found = chosen["scales"].one_of(SCALES) if "scales" in chosen else SCALES[0]
    if found != scales:
        raise FieldError(
            f"quantization has scales in {found}, and the kernels of this ingot read {scales}"
        )
    for of, known in (("bits", (*BITS.values(), UNCHANGED)), ("blocks", BLOCKS)):
        by_name = chosen[of].entries(most=MOST_TENSORS) if of in chosen else {}
        for name, number in by_name.items():
            Field(name, f"a name in quantization.{of}").matching(TENSOR, "the name of a tensor")
            _number_of(number, known)
    if "calibration" in chosen:
        calibration = chosen["calibration"].members(("sha256", "tokens"), None)
        calibration["sha256"].sha256()
        calibration["tokens"].whole(1, MOST_SIZE)


def _number_of(field: Field, known: Collection[int]) -> None:
    if field.whole(0, max(known)) not in known:
        field.refuse(f"one of {', '.join(map(str, sorted(known)))}")


def _tensors(field: Field) -> dict[str, tuple[str, Shape]]:
    """Inputs or outputs by name: dtype and shape."""
    tensors = [
        each.members(("name", "dtype", "shape"))
        for each in field.elements(least=1, most=MOST_TENSORS)
    ]
    found = {
        each["name"].matching(TENSOR, "the name of a tensor"): (
            each["dtype"].one_of(SIZES),
            _shape(each["shape"]),
        )
        for each in tensors
    }
    distinct([each["name"] for each in tensors])
    return found


def _shape(field: Field) -> Shape:
    return tuple(
        axis.matching(SYMBOL, "a size or the name of one")
        if isinstance(axis.value, str)
        else axis.whole(0, MOST_SIZE)
        for axis in field.elements(least=1, most=MOST_AXES)
    )


def _states(
    field: Field, inputs: Tensors, outputs: Tensors, *, buffers: Collection[str]
) -> set[str]:
    """The states' input names."""
    states = [
        each.members(
            ("kind", "input", "output", "dtype", "input_shape", "output_shape", "axis", "shared")
        )
        for each in field.elements(most=MOST_TENSORS)
    ]
    for state in states:
        _state(state, inputs, outputs, buffers=buffers)
    for name in ("input", "output"):
        distinct([state[name] for state in states])
    return {state["input"].value for state in states}


def _state(
    state: Mapping[str, Field], inputs: Tensors, outputs: Tensors, *, buffers: Collection[str]
) -> None:
    kind = state["kind"].one_of((*GROWING, *FIXED))
    dtype = state["dtype"].one_of(PRECISIONS)
    shape = _shape(state["input_shape"])
    for side, tensors in (("input", inputs), ("output", outputs)):
        name = state[side].one_of(tensors)
        if (dtype, _shape(state[f"{side}_shape"])) != tensors[name]:
            raise FieldError(
                f"{state[side].place} is {name}, whose dtype or shape is another there"
            )
    grows = kind in GROWING
    # Sessions read these shapes: a batch first, and one growing axis where the kind has one.
    symbols = [axis for axis in shape if isinstance(axis, str)]
    if shape[0] != BATCH or symbols != ([BATCH, PAST] if grows else [BATCH]):
        expected = f"{BATCH} and further on {PAST}" if grows else f"{BATCH}, and sizes"
        state["input_shape"].refuse(expected)
    if _shape(state["output_shape"]) != tuple(TOTAL if axis == PAST else axis for axis in shape):
        state["output_shape"].refuse(f"input_shape with {TOTAL} for {PAST}")
    if math.prod(axis for axis in shape if isinstance(axis, int)) > MOST_ELEMENTS:
        state["input_shape"].refuse(f"of at most {MOST_ELEMENTS} elements")
    if not grows:
        if state["axis"].value is not None:
            state["axis"].refuse(f"null for a {kind} state")
    elif state["axis"].whole(0, MOST_AXES) != shape.index(PAST):
        state["axis"].refuse(f"{shape.index(PAST)}, the axis of {PAST}")
    if state["shared"].flag() and kind not in buffers:
        state["shared"].refuse("false, but for what kernels of the target ort write in place")


def _token_inputs(inputs: Tensors, states: Collection[str]) -> None:
    """Every input but the states' is one of the tokens'."""
    for name in ("input_ids", "attention_mask"):
        if name not in inputs:
            raise FieldError(f"inputs lacks {name}")
    for name, (dtype, shape) in inputs.items():
        if name in states and name != LOGITS_TO_KEEP:
            continue
        if name not in TOKEN_INPUTS:
            raise FieldError(f"inputs holds {name}, which is neither of the tokens nor a state")
        if dtype != "int64" or shape not in TOKEN_INPUTS[name]:
            expected = " or ".join(f"[{', '.join(map(str, each))}]" for each in TOKEN_INPUTS[name])
            raise FieldError(f"{name} of inputs must be int64 {expected}")


def _rows(task: str, inputs: Tensors) -> Shape:
    """The main output's dimensions but for its width."""
    if task == "classify":
        return (BATCH,)
    return (BATCH, KEPT if LOGITS_TO_KEEP in inputs else SEQUENCE)


def _main_output(
    field: Field, outputs: Tensors, task: str, rows: Shape, vocab_size: int, labels: int
) -> None:
    name = field.one_of(outputs)
    dtype, shape = outputs[name]
    width = {"generate": vocab_size, "classify": labels}.get(task)
    fits = shape[:-1] == rows and isinstance(shape[-1], int) and shape[-1] > 0
    if dtype not in PRECISIONS or not fits or width not in (None, shape[-1]):
        last = "its width" if width is None else width
        raise FieldError(
            f"{name}, the main output, is {dtype} {list(shape)} and must be of numbers "
            f"[{', '.join(map(str, (*rows, last)))}] with --task {task}"
        )


def _source(field: Field) -> None:
    """Where the checkpoint came from; an export may say more of it."""
    source = field.members(("checkpoint", "revision", "sha256"), None)
    source["checkpoint"].text()
    if source["revision"].value is not None:
        source["revision"].text()
    source["sha256"].sha256()
    if "adapter" in source:
        adapter = source["adapter"].members(("name", "revision", "sha256"), None)
        adapter["name"].text()
        if adapter["revision"].value is not None:
            adapter["revision"].text()
        adapter["sha256"].sha256()


def _generation(field: Field, vocab_size: int) -> None:
    generation = field.members(("eos_token_ids", "pad_token_id", "context_length"), None)
    for each in generation["eos_token_ids"].elements(most=4096):
        each.whole(0, vocab_size - 1)
    generation["pad_token_id"].whole(0, vocab_size - 1)
    if generation["context_length"].value is not None:
        generation["context_length"].whole(1, MOST_SIZE)
    if "switch_length" in generation:
        generation["switch_length"].whole(1, MOST_SIZE)


def _graph(field: Field) -> None:
    graph = field.members(("opset", "nodes", "operators", "unread_bytes"), None)
    graph["opset"].whole(1, 1000)
    graph["nodes"].whole(0, MOST_SIZE)
    for name, count in graph["operators"].entries(most=4096).items():
        Field(name, "a name in graph.operators").matching(OPERATOR, "that of an operator")
        count.whole(0, MOST_SIZE)
    graph["unread_bytes"].whole(0, MOST_BYTES)


def _files(field: Field) -> dict[str, Field]:
    files = field.entries(most=MOST_FILES)
    for name, info in files.items():
        Field(name, "a name in files").file_name()
        entry = info.members(("bytes", "sha256"))
        entry["bytes"].whole(0, MOST_BYTES)
        entry["sha256"].sha256()
    # One file on a system that tells no capitals from small letters, and a file that is a folder.
    distinct([Field(name, f"files[{name!r}]") for name in files], str.lower)
    for name in files:
        above = name.rpartition("/")[0]
        while above:
            if above in files:
                raise FieldError(f"files holds {name} and {above}, which cannot be a folder too")
            above = above.rpartition("/")[0]
    return files


def _engine(field: Field, inputs: Tensors, files: Collection[str]) -> list[str]:
    """The libraries."""
    engine = field.members(
        (
            *("builder", "version", "compute_capabilities", "graph_sha256", "plugins"),
            *("libraries", "embedded", "profiles"),
        )
    )
    engine["builder"].one_of(MODULES)
    engine["version"].matching(VERSION, "a version")
    for each in engine["compute_capabilities"].elements(least=1, most=64):
        each.whole(10, 9999)
    engine["graph_sha256"].sha256()
    for name, count in engine["plugins"].entries(most=256).items():
        Field(name, "a name in engine.plugins").matching(OPERATOR, "that of an operator")
        count.whole(1, MOST_SIZE)
    libraries = engine["libraries"].elements(most=16)
    for library in libraries:
        if "/" in library.file_name() or library.value not in files:
            library.refuse("a file of the folder that files lists")
    engine["embedded"].flag()
    profiles = engine["profiles"].elements(least=1, most=16)
    for profile in profiles:
        _profile(profile.members(("name", "shapes")), inputs)
    return [library.value for library in libraries]


def _profile(profile: Mapping[str, Field], inputs: Tensors) -> None:
    """Least, usual and largest shape of every input."""
    profile["name"].matching(PROFILE, "a name of letters, digits and _")
    for name, bounds in profile["shapes"].members(tuple(inputs)).items():
        shapes = [
            [axis.whole(0, MOST_SIZE) for axis in shape.elements(least=1, most=MOST_AXES)]
            for shape in bounds.elements(least=3, most=3)
        ]
        rank = len(inputs[name][1])
        if any(len(shape) != rank for shape in shapes):
            bounds.refuse(f"three shapes of {rank} axes")
        if any(not least <= usual <= most for least, usual, most in zip(*shapes, strict=True)):
            bounds.refuse("the least, the usual and the largest shape")
