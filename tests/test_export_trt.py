"""The TensorRT target: what lowering changes, that the numbers stay, and engines built for real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from kinds import KINDS, every_family
from oracle import relative_rms, tokens

from ingot.export.engine import RTX, Builder, custom_nodes, layers, profiles, trtexec_options
from ingot.export.ingot import ENGINE, GRAPH, TRTEXEC, Manifest, TensorInfo
from ingot.export.request import PRECISIONS, Limits
from ingot.graphs.checkpoint import Checkpoint
from ingot.plugins.whole import sha256
from ingot.runtime.loading import load
from ingot.runtime.session import Session
from ingot.validate.truth.eager import EagerSession

PLUGINS = {
    "olmoe": {"MoeDispatch": 2},
    "jetmoe": {"MoeDispatch": 2, "MoeLinear": 4},
    "granite": {},
    "mamba2": {"CausalConv": 2, "Mamba2Scan": 2},
    "granitemoehybrid": {"CausalConv": 3, "Mamba2Scan": 3, "MoeDispatch": 4},
    "granitemoe": {"MoeDispatch": 2},
    "granitemoeshared": {"MoeDispatch": 2},
    "bamba": {"CausalConv": 3, "Mamba2Scan": 3},
    "mixtral": {"MoeDispatch": 2},
    "qwen3_moe": {"MoeDispatch": 2},
    "olmo2": {},
    "flex_olmo": {"MoeDispatch": 2},
}
# Layers that only a function body has.
BODY_LAYERS = {"RECURRENCE", "ITERATOR", "LOOP_OUTPUT", "TRIP_LIMIT", "SCATTER", "CUMULATIVE"}
BODY_LAYERS |= {"NON_ZERO", "CONVOLUTION", "CONDITION"}
SMALL = Limits(max_batch=3, max_seq=48, opt_seq=16)


FALLBACK = """
import json, sys
from pathlib import Path
from ingot.plugins.tensorrt import python_plugins
python_plugins.register = lambda trt: None
from ingot.export.engine import RTX, Builder, profiles
from ingot.export.ingot import GRAPH, Manifest
from ingot.export.request import Limits

ingot = Path(sys.argv[1])
manifest = Manifest.read(ingot)
builder = Builder(RTX)
parsed = builder.parse(ingot / GRAPH)
network = parsed[1]
outputs = [network.get_output(index) for index in range(network.num_outputs)]
# TensorRT-RTX 1.7.1 cannot build OLMoE's body for T = 1 alone: "CHECK(is_const()) failed".
limits = Limits(max_batch=3, max_seq=48, opt_seq=16)
made = profiles(manifest.inputs, manifest.states, limits)[:1]
result = {
    "plugins": builder.plugin_layers(network),
    "shapes": {output.name: list(output.shape) for output in outputs},
    "bytes": len(builder.build(parsed, made)),
}
print(json.dumps(result))
"""


class Lowered:
    """One family's tiny checkpoint, its canonical ingot and its lowered float32 graph."""

    def __init__(self, family: str, folder: Path, make_ingot: MakeIngot) -> None:
        self.family = family
        self.folder = folder
        self.canonical = make_ingot(folder, "onnx")
        self.lowered = make_ingot(folder, "trt", builder="none", precision="fp32")


@pytest.fixture(scope="module", params=every_family())
def case(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> Lowered:
    return Lowered(request.param, make_checkpoint(request.param), make_ingot)


# Of the two half precisions one is built each time.
BUILT = [pytest.param(p, marks=[pytest.mark.slow] if p == "fp16" else []) for p in PRECISIONS]


@pytest.fixture(scope="module", params=BUILT)
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(case: Lowered, precision: str, make_ingot: MakeIngot) -> Path:
    """The case as a TensorRT-RTX ingot; its graph is also what the other checks read."""
    pytest.importorskip("tensorrt_rtx")
    return make_ingot(case.folder, "trt", builder=RTX, precision=precision, limits=SMALL)


def run(session: Session | EagerSession) -> list[np.ndarray]:
    """Logits and states after a prefill of three padded rows, and after each of four tokens."""
    ids, mask = tokens(512)
    session.reset(*ids.shape)
    results = []
    for columns in (slice(0, 13), *(slice(t, t + 1) for t in range(13, 17))):
        real = mask[:, columns] != 0
        results.append(session.step(ids[:, columns], mask[:, columns])[real])
        seen = mask[:, : columns.stop] != 0
        for array in session.state().values():
            grows = array.ndim == 4 and array.shape[2] == columns.stop
            results.append(array.swapaxes(1, 2)[seen] if grows else array)
    return results


def worst(expected: list[np.ndarray], actual: list[np.ndarray]) -> float:
    assert len(expected) == len(actual) > 5
    return max(map(relative_rms, expected, actual))


def test_the_lowered_graph_computes_what_the_canonical_one_does(case: Lowered) -> None:
    assert custom_nodes(case.lowered / GRAPH) == PLUGINS[case.family]
    expected = run(load(case.canonical))
    assert worst(expected, run(load(case.lowered))) < 1e-5
    eager = EagerSession(Checkpoint.open(case.folder), "generate")
    assert worst(run(eager), expected) < 1e-4


def test_every_custom_node_names_its_plugin(case: Lowered) -> None:
    model = onnx.load(case.lowered / GRAPH, load_external_data=False)
    for node in model.graph.node:
        if node.domain == "ingot":
            attributes = {a.name: a.s.decode() for a in node.attribute if a.s}
            assert attributes["plugin_namespace"] == "ingot"
            assert attributes["plugin_version"] == "1"
    bodies = {function.name: function for function in model.functions}
    assert bodies.keys() == PLUGINS[case.family].keys()
    for function in bodies.values():
        assert {"plugin_namespace", "plugin_version"} <= set(function.attribute)


def test_the_engine_runs_every_custom_operator_as_a_plugin(
    case: Lowered, precision: str, engine: Path
) -> None:
    manifest = Manifest.read(engine)
    manifest.check_files(engine)
    assert manifest.precision == PRECISIONS[precision]
    found = manifest.engine
    assert found is not None
    assert found.builder == RTX
    assert found.plugins == PLUGINS[case.family]
    assert found.graph_sha256 == sha256(engine / GRAPH)
    options = (engine / TRTEXEC).read_text()
    assert options.count("--profile=") == len(found.profiles) == 2
    assert (engine / ENGINE).stat().st_size > 100_000
    builder = Builder(RTX)
    network = builder.parse(engine / GRAPH)[1]
    kinds = [layer.type.name for layer in layers(network)]
    assert kinds.count("PLUGIN_V3") == sum(PLUGINS[case.family].values())
    assert not BODY_LAYERS & set(kinds)


def test_dtypes_of_an_engine_ingot(case: Lowered, precision: str, engine: Path) -> None:
    manifest = Manifest.read(engine)
    dtype = PRECISIONS[precision]
    for state in manifest.states:
        assert state.dtype == ("float32" if state.kind == "ssm" else dtype)
    assert {tensor.dtype for tensor in manifest.outputs} <= {dtype, "float32"}
    model = onnx.load(engine / GRAPH, load_external_data=False)
    weights = [t for t in model.graph.initializer if t.external_data]
    wide = {t.name for t in weights if t.data_type == onnx.TensorProto.FLOAT}
    if dtype == "float32":
        assert len(wide) == len(weights)
    else:
        assert {name.rsplit(".", 1)[-1] for name in wide} == (
            {"A_log", "D", "dt_bias"} if "Mamba2Scan" in PLUGINS[case.family] else set()
        )


def test_a_bfloat16_engine_is_for_devices_that_have_it(
    case: Lowered, precision: str, engine: Path
) -> None:
    found = Manifest.read(engine).engine
    assert found is not None
    expects_turing = precision != "bf16" and not PLUGINS[case.family]
    assert (75 in found.compute_capabilities) == expects_turing
    assert {80, 86, 89, 120} <= set(found.compute_capabilities)
    # Our kernels for 12.0 fit no other device; the builder's own do.
    assert (121 in found.compute_capabilities) == (not PLUGINS[case.family])


# Granite's graph has no operator of ours.
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f == "granite")) for f in KINDS]
)
def test_half_precision_computes_what_eager_does_in_it(
    family: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    """ONNX Runtime's CPU provider runs float16, if slowly; bfloat16 it cannot."""
    folder = make_checkpoint(family)
    ingot = make_ingot(folder, "trt", builder="none", precision="fp16")
    checkpoint = Checkpoint.open(folder)
    truth = run(EagerSession(checkpoint, "generate"))
    eager = run(EagerSession(checkpoint, "generate", precision=torch.float16))
    floor = worst(truth, eager)
    # Of four layers with experts a router chooses otherwise here and there.
    assert 1e-5 < floor < (1e-1 if family == "granitemoehybrid" else 2e-2)
    assert worst(truth, run(load(ingot))) < 3 * floor


def test_a_multiplier_is_folded_before_it_is_rounded(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    """0.22 in bfloat16 is 0.2197: rounded first, it would make every residual 0.1 % wrong."""
    folder = make_checkpoint("granite", residual_multiplier=0.22)
    ingot = make_ingot(folder, "trt", builder="none", precision="bf16")
    name = "model.layers.0.mlp.down_proj.weight"
    entry = stored(ingot, name)
    exact = Checkpoint.open(folder).read(name).to(torch.bfloat16).float().T * 0.22
    torch.testing.assert_close(entry, exact.to(torch.bfloat16), rtol=0, atol=0)


def stored(ingot: Path, name: str) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(ingot / "weights.safetensors")[name]


@pytest.mark.parametrize("family", ["jetmoe", "mamba2"])
def test_shapes_follow_the_profile(
    family: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    """The real builder's shape inference, at each profile's largest sizes."""
    trt: Any = pytest.importorskip("tensorrt_rtx")
    ingot = make_ingot(make_checkpoint(family), "trt", builder="none", precision="fp32")
    manifest = Manifest.read(ingot)
    builder = Builder(RTX)
    network = builder.parse(ingot / GRAPH)[1]
    assert trt is builder.trt
    made = profiles(manifest.inputs, manifest.states, SMALL)
    assert [profile.name for profile in made] == ["prefill", "decode"]
    by_name = {
        network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)
    }
    for output in manifest.outputs:
        found = tuple(by_name[output.name].shape)
        expected = tuple(d if isinstance(d, int) else -1 for d in output.shape)
        assert found == expected, output.name


def test_the_same_file_builds_without_any_plugin(case: Lowered) -> None:
    """A parser without the plugin inlines the function body, and both networks agree on shapes."""
    pytest.importorskip("tensorrt_rtx")
    # Creators are registered for a whole process.
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK, case.lowered],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    fallback = json.loads(done.stdout.splitlines()[-1])
    builder = Builder(RTX)
    network = builder.parse(case.lowered / GRAPH)[1]
    assert fallback["plugins"] == 0
    assert builder.plugin_layers(network) == sum(PLUGINS[case.family].values())
    outputs = (network.get_output(index) for index in range(network.num_outputs))
    assert fallback["shapes"] == {output.name: list(output.shape) for output in outputs}
    assert fallback["bytes"] > 100_000


def test_profiles_hold_every_call_of_a_session() -> None:
    inputs = [
        TensorInfo("input_ids", "int64", ("batch", "sequence")),
        TensorInfo("attention_mask", "int64", ("batch", "total_sequence")),
        TensorInfo("past", "float32", ("batch", 2, "past_sequence", 16)),
    ]
    prefill, decode = profiles(inputs, [object()], Limits(4, 32, 8))  # type: ignore[list-item]
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 8), (4, 32))
    assert prefill.shapes["past"] == ((1, 2, 0, 16), (1, 2, 0, 16), (4, 2, 31, 16))
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (4, 1))
    assert decode.shapes["attention_mask"] == ((1, 1), (1, 8), (4, 32))
    assert decode.shapes["past"] == ((1, 2, 0, 16), (1, 2, 7, 16), (4, 2, 31, 16))
    (only,) = profiles(inputs[:1], [], Limits(4, 32, 8))
    assert only.name == "prefill"
    assert trtexec_options((prefill, decode)).splitlines() == [
        "--stronglyTyped",
        "--noTF32",
        "--profile=0",
        "--minShapes=input_ids:1x1,attention_mask:1x1,past:1x2x0x16",
        "--optShapes=input_ids:1x8,attention_mask:1x8,past:1x2x0x16",
        "--maxShapes=input_ids:4x32,attention_mask:4x32,past:4x2x31x16",
        "--profile=1",
        "--minShapes=input_ids:1x1,attention_mask:1x1,past:1x2x0x16",
        "--optShapes=input_ids:1x1,attention_mask:1x8,past:1x2x7x16",
        "--maxShapes=input_ids:4x1,attention_mask:4x32,past:4x2x31x16",
    ]
