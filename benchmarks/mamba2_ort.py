"""Why the ``ort`` target runs Mamba2 as it does: forms of its scan and of its convolution.

Run with ``.venv/bin/python benchmarks/mamba2_ort.py``, for some minutes. One operator at a time,
float32, two threads, in the shapes of Mamba2-2.7B and of Codestral Mamba. The forms take turns;
every figure is a median, the first form's in ms and the others' as multiples of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime

from ingot.export.passes import scan
from ingot.export.passes.convolution import CausalConvToBlocked
from ingot.export.passes.scan import Mamba2ScanToLinearAttention
from ingot.plugins import mamba2_scan
from ingot.runtime.onnxruntime_session import open_session, ort_value

THREADS = 2
SECONDS_PER_CELL = 1.0
LEAST, MOST = 7, 101
INT64_MAX = np.iinfo(np.int64).max
BATCHES, TOKENS = (1, 4), (1, 16, 128, 512, 1024)

Call = Callable[[], list[np.ndarray]]


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    groups: int
    head_size: int = 64
    states: int = 128
    width: int = 4
    chunk: int = 256

    @property
    def channels(self) -> int:
        return self.heads * self.head_size + 2 * self.groups * self.states


SHAPES = (Shape("2.7B", heads=80, groups=1), Shape("Codestral", heads=128, groups=8))


def scans(s: Shape) -> dict[str, ir.Model]:
    """The same scan in each form."""
    head = f"{s.heads}, {s.head_size}"
    state = f"float[b, {head}, {s.states}]"
    group = f"float[b, t, {s.groups}, {s.states}]"
    text = f"""
    <ir_version: 10, opset_import: ["" : 23, "ingot" : 1]>
    one_scan (
        float[b, t, {head}] x, float[b, t, {s.heads}] dt, {group} B, {group} C, {state} past,
        float[b, t] mask, float[{s.heads}] A, float[{s.heads}] D, float[{s.heads}] dt_bias
    ) => (float[b, t, {head}] y, {state} present) {{
        y, present = ingot.Mamba2Scan
            <chunk_size = {s.chunk}, dt_min = 0.0, dt_max = {3e38}>
            (x, dt, A, B, C, D, dt_bias, past, mask)
    }}
    """
    random = np.random.default_rng(0)
    weights = {
        "A": -random.uniform(1, 16, s.heads),
        "D": np.ones(s.heads),
        "dt_bias": random.uniform(-7, -2, s.heads),
    }

    def made() -> ir.Model:
        model = parsed(text, weights)
        for node in model.graph:
            node.attributes["dt_max"] = ir.AttrFloat32("dt_max", math.inf)
        function = ir.serde.deserialize_function(mamba2_scan.function_body())
        model.functions[function.identifier()] = function
        return model

    forms = {name: made() for name in ("function body", "kernel, always transposed", "as lowered")}
    with mock.patch.object(scan, "_one_token", scan._many_tokens):
        Mamba2ScanToLinearAttention()(forms["kernel, always transposed"])
    Mamba2ScanToLinearAttention()(forms["as lowered"])
    return forms


def convolutions(s: Shape) -> dict[str, ir.Model]:
    """The same convolution and SiLU in each form."""
    swap, stateful = "<perm = [0, 2, 1]>", "com.microsoft.CausalConvWithState"
    bodies = {
        "as captured": f"""
            columns = Transpose {swap} (x)
            window = Concat <axis = -1> (past, columns)
            convolved = Conv <group = {s.channels}> (window, kernel, bias)
            sigmoid = Sigmoid (convolved)
            activated = Mul (convolved, sigmoid)
            y = Transpose {swap} (activated)
            present = Slice (window, start, end, two)
        """,
        "CausalConvWithState": f"""
            columns = Transpose {swap} (x)
            convolved, present = {stateful} (columns, kernel, bias, past)
            rows = Transpose {swap} (convolved)
            y = com.microsoft.QuickGelu <alpha = 1.0> (rows)
        """,
        "with its SiLU": f"""
            columns = Transpose {swap} (x)
            convolved, present = {stateful} <activation = "silu"> (columns, kernel, bias, past)
            y = Transpose {swap} (convolved)
        """,
        "channels_last": f"""
            past_rows = Transpose {swap} (past)
            rows, tail = {stateful} <channels_last = 1> (x, kernel, bias, past_rows)
            present = Transpose {swap} (tail)
            y = com.microsoft.QuickGelu <alpha = 1.0> (rows)
        """,
        "sum of taps": f"""
            past_rows = Transpose {swap} (past)
            window = Concat <axis = 1> (past_rows, x)
            tail = Slice (window, start, end, one)
            present = Transpose {swap} (tail)
            taps = Transpose <perm = [2, 1, 0]> (kernel)
            {taps(s.width)}
            rows = Add (sum{s.width - 1}, bias)
            y = com.microsoft.QuickGelu <alpha = 1.0> (rows)
        """,
    }
    bodies["as lowered"] = bodies["as captured"]
    random = np.random.default_rng(0)
    weights = {
        "kernel": random.normal(size=(s.channels, 1, s.width)) / 2,
        "bias": random.normal(size=s.channels),
    }
    forms = {}
    for name, body in bodies.items():
        text = f"""
        <ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        one_convolution (
            float[b, t, {s.channels}] x, float[b, {s.channels}, {s.width - 1}] past,
            float[{s.channels}, 1, {s.width}] kernel, float[{s.channels}] bias
        ) => (float[b, t, {s.channels}] y, float[b, {s.channels}, {s.width - 1}] present) {{
            start = Constant <value = int64[1] {{{1 - s.width}}}> ()
            end = Constant <value = int64[1] {{{INT64_MAX}}}> ()
            one = Constant <value = int64[1] {{1}}> ()
            two = Constant <value = int64[1] {{2}}> ()
            {body}
        }}
        """
        forms[name] = parsed(text, weights)
    assert CausalConvToBlocked()(forms["as lowered"]).modified
    return forms


def taps(width: int) -> str:
    """Text that adds up the window's shifts, each times its tap, as ``sum{width - 1}``."""
    lines = []
    for w in range(width):
        lines += [
            f"from{w} = Constant <value = int64[1] {{{w}}}> ()",
            f"to{w} = Constant <value = int64[1] {{{w - width + 1 or INT64_MAX}}}> ()",
            f"next{w} = Constant <value = int64[1] {{{w + 1}}}> ()",
            f"shift{w} = Slice (window, from{w}, to{w}, one)",
            f"zero{w} = Constant <value = int64[1] {{0}}> ()",
            f"tap{w} = Slice (taps, from{w}, next{w}, zero{w})",
            f"part{w} = Mul (shift{w}, tap{w})",
            f"sum{w} = Add (sum{w - 1}, part{w})" if w else "sum0 = Identity (part0)",
        ]
    return "\n".join(lines)


def parsed(text: str, weights: dict[str, np.ndarray]) -> ir.Model:
    """The model of a text, with some of its inputs made initializers."""
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = ir.serde.deserialize_model(proto)
    for value in list(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            array = weights[value.name].astype(np.float32)
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.register_initializer(value)
    return model


def opened(model: ir.Model) -> onnxruntime.InferenceSession:
    graph = ir.serde.serialize_model(model).SerializeToString()
    # The threads of one form would take the processor from the next one's.
    return open_session(graph, threads=THREADS, spinning=False)


def calls(
    sessions: dict[str, onnxruntime.InferenceSession], batch: int, tokens: int
) -> dict[str, Call]:
    """One call of each form on the same inputs, which stay where they are."""
    random = np.random.default_rng(0)
    some = next(iter(sessions.values()))
    named = {"b": batch, "t": tokens}
    values = {}
    for item in some.get_inputs():
        size = [named[d] if isinstance(d, str) else d for d in item.shape]
        array = np.ones(size) if item.name == "mask" else random.normal(size=size)
        values[item.name] = ort_value(array.astype(np.float32))
    return {name: bound(session, values) for name, session in sessions.items()}


def bound(session: onnxruntime.InferenceSession, values: dict[str, onnxruntime.OrtValue]) -> Call:
    def call() -> list[np.ndarray]:
        binding = session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for item in session.get_outputs():
            binding.bind_output(item.name)
        session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()]

    return call


def check(forms: dict[str, Call]) -> None:
    """The forms agree, so that no figure is of something else."""
    first, *others = (call() for call in forms.values())
    for other in others:
        for ours, theirs in zip(other, first, strict=True):
            assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def medians_ms(forms: dict[str, Call]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in forms}
    begin = time.perf_counter()
    for turn in range(MOST):
        if turn >= LEAST and time.perf_counter() - begin > SECONDS_PER_CELL * len(forms):
            break
        for name, call in forms.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def table(title: str, make: Callable[[Shape], dict[str, ir.Model]]) -> None:
    header = True
    for shape in SHAPES:
        sessions = {name: opened(model) for name, model in make(shape).items()}
        if header:
            print(f"\n{title}\n")
            print("| shape | batch | tokens | " + " | ".join(sessions) + " |")
            print("|---|---|---|" + "---|" * len(sessions))
            header = False
        for batch in BATCHES:
            for tokens in TOKENS:
                forms = calls(sessions, batch, tokens)
                check(forms)
                first, *others = medians_ms(forms).values()
                cells = [f"{first:.2f} ms", *(f"{other / first:.2f}" for other in others)]
                row = [shape.name, str(batch), str(tokens), *cells]
                print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    print(f"onnxruntime {onnxruntime.__version__}, {THREADS} threads")
    table("Scan", scans)
    table("Convolution and SiLU", convolutions)


if __name__ == "__main__":
    main()
