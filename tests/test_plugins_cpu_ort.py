"""The CPU kernels as ONNX Runtime's operators: the library's own numbers, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from cpu_weights import FORMATS, drawn

from ingot.graphs.state import BATCH, PAST, SEQUENCE, TOTAL
from ingot.plugins.cpu.library import CpuLibrary
from ingot.plugins.cpu.panels import Format, rounding
from ingot.runtime.onnxruntime_session import open_session
from ingot.runtime.session import SessionError

DOMAIN = "ingot.cpu"
FLOAT, INT64, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.UINT8
TYPES = {"float32": FLOAT, "int64": INT64, "uint8": UINT8}


@pytest.fixture(scope="module")
def operators(cpu_library: CpuLibrary) -> Path:
    return cpu_library.path.with_name("libingot_ort.so")


def stored(form: Format, prefix: str = "") -> dict[str, Any]:
    """How a weight is stored, as attributes say it."""
    return {
        f"{prefix}numbers": form.numbers,
        f"{prefix}block": form.block,
        f"{prefix}zero_points": int(form.zero_points),
    }


def ran(
    operators: Path,
    name: str,
    inputs: dict[str, np.ndarray | None],
    *,
    threads: int = 1,
    domain: str = DOMAIN,
    outputs: int = 1,
    **attributes: Any,
) -> Any:
    """What one node makes of its inputs; the bytes of weights are initializers."""
    given = {key: array for key, array in inputs.items() if array is not None}
    node = oh.make_node(
        name,
        [key if key in given else "" for key in inputs],
        [f"y{number}" for number in range(outputs)],
        domain=domain,
        **attributes,
    )
    fed = {key: array for key, array in given.items() if array.dtype != np.uint8}
    graph = oh.make_graph(
        [node],
        "one",
        [oh.make_tensor_value_info(key, TYPES[str(a.dtype)], a.shape) for key, a in fed.items()],
        [oh.make_tensor_value_info(name, FLOAT, None) for name in node.output],
        [onnx.numpy_helper.from_array(given[key], key) for key in given if key not in fed],
    )
    opsets = [oh.make_opsetid("", 21), oh.make_opsetid(domain, 1)]
    model = oh.make_model(graph, opset_imports=opsets, ir_version=10)
    session = open_session(model.SerializeToString(), threads=threads, libraries=[operators])
    found = session.run(None, fed)
    return found[0] if outputs == 1 else found


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_linear_and_embedding_give_the_librarys_bits(
    cpu_library: CpuLibrary, operators: Path, form: Format
) -> None:
    rows, columns = 100, 70
    weight, _ = drawn(form, rows, columns, 1)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 5, columns)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    residual = rng.standard_normal((2, 5, rows)).astype(np.float32)
    sizes = {"in_features": columns, "out_features": rows, **stored(form)}
    for threads, given, rest, rounds in (
        (1, None, None, 0),
        (2, bias, None, 0),
        (2, None, residual, 1),
        (1, bias, residual, 0),
    ):
        inputs: dict[str, np.ndarray | None] = {"x": x, "weight": weight, "bias": given}
        inputs |= {"residual": rest} if rest is not None else {}
        options: dict[str, Any] = {"threads": threads, "scale": 0.5}
        options |= {"round_activations": rounding(bool(rounds), form)}
        found = ran(operators, "Linear", inputs, **options, **sizes)
        expected = cpu_library.linear(
            form,
            x.reshape(-1, columns),
            weight,
            rows,
            given,
            None if rest is None else rest.reshape(-1, rows),
            scale=0.5,
            round_activations=bool(rounds),
        )
        np.testing.assert_array_equal(found, expected.reshape(2, 5, rows))
    ids = np.array([[3, 99, 0]])
    found = ran(operators, "Embedding", {"ids": ids, "weight": weight}, **sizes)
    expected = cpu_library.embedding(form, ids[0], weight, rows, columns)
    np.testing.assert_array_equal(found, expected[None])


@pytest.mark.parametrize("form", FORMATS[::2], ids=str)
def test_several_weights_and_gated_mlps_give_the_librarys_bits(
    cpu_library: CpuLibrary, operators: Path, form: Format
) -> None:
    sizes, columns = (24, 7, 50), 40
    weights = {f"w{rows}": drawn(form, rows, columns, rows)[0] for rows in sizes}
    rng = np.random.default_rng(6)
    x = rng.standard_normal((2, 3, columns)).astype(np.float32)
    flat = x.reshape(-1, columns)
    found = ran(
        operators,
        "Linears",
        {"x": x, **weights},
        threads=2,
        outputs=len(sizes),
        in_features=columns,
        out_features=list(sizes),
        round_activations=rounding(True, form),
        **stored(form),
    )
    pairs = list(zip(weights.values(), sizes, strict=True))
    expected = cpu_library.linears(form, flat, pairs, round_activations=True)
    for one, other, rows in zip(found, expected, sizes, strict=True):
        np.testing.assert_array_equal(one, other.reshape(2, 3, rows))
    forms, inner = (form, Format("int8", 64)), 35
    gate, up = (drawn(form, inner, columns, seed)[0] for seed in (1, 2))
    down = drawn(forms[1], columns, inner, 3)[0]
    for residual in (None, rng.standard_normal(x.shape).astype(np.float32)):
        given: dict[str, np.ndarray | None] = {"x": x, "gate": gate, "up": up, "down": down}
        given |= {} if residual is None else {"residual": residual}
        found = ran(
            operators,
            "Mlp",
            given,
            threads=2,
            hidden=columns,
            intermediate=inner,
            round_activations=0,
            activation="silu",
            scale=0.25,
            **stored(forms[0], "gate_up_"),
            **stored(forms[1], "down_"),
        )
        rest = None if residual is None else residual.reshape(flat.shape)
        alone = cpu_library.mlp(
            forms, flat, gate, up, down, inner, rest, activation="silu", scale=0.25
        )
        np.testing.assert_array_equal(found, alone.reshape(x.shape))


@pytest.mark.parametrize("rounds", [0, 1])
def test_the_experts_give_the_librarys_bits(
    cpu_library: CpuLibrary, operators: Path, rounds: int
) -> None:
    forms, hidden, inner, experts = (Format("int4", 32), Format("int8", 64, True)), 70, 40, 4
    gate_up = np.stack([drawn(forms[0], 2 * inner, hidden, each)[0] for each in range(experts)])
    down = np.stack([drawn(forms[1], hidden, inner, each)[0] for each in range(experts)])
    rng = np.random.default_rng(3)
    x = rng.standard_normal((6, hidden)).astype(np.float32)
    logits = rng.standard_normal((6, experts)).astype(np.float32)
    chosen: dict[str, Any] = {"top_k": 2, "normalize": 1, "activation": "gelu_tanh"}
    found = ran(
        operators,
        "MoeDispatch",
        {"x": x, "router_logits": logits, "gate_up": gate_up, "down": down},
        threads=2,
        hidden=hidden,
        intermediate=inner,
        experts=experts,
        round_activations=rounds,
        **stored(forms[0], "gate_up_"),
        **stored(forms[1], "down_"),
        **chosen,
    )
    expected = cpu_library.moe_dispatch(
        forms, x, logits, gate_up, down, inner, round_activations=bool(rounds), **chosen
    )
    np.testing.assert_array_equal(found, expected)
    ids = rng.integers(0, experts, (6, 3))
    for given in (x, rng.standard_normal((6, 3, hidden)).astype(np.float32)):
        found = ran(
            operators,
            "MoeLinear",
            {"x": given, "expert_ids": ids, "weight": gate_up},
            in_features=hidden,
            out_features=2 * inner,
            experts=experts,
            round_activations=rounds,
            **stored(forms[0]),
        )
        expected = cpu_library.moe_linear(
            forms[0], given, ids, gate_up, 2 * inner, experts, round_activations=bool(rounds)
        )
        np.testing.assert_array_equal(found, expected)


LINEAR: dict[str, Any] = {
    "in_features": 32,
    "out_features": 16,
    "round_activations": 0,
    "scale": 1.0,
}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"out_features": 17}, "the weight has 2048 bytes"),
        ({"in_features": 64}, "rows have to have 64 numbers"),
        ({"in_features": 0}, "in_features is 0"),
        ({"out_features": 1 << 40}, "out_features is 1099511627776"),
        ({"numbers": "int3"}, 'no weights in "int3"'),
        ({"block": 32}, "neither blocks"),
        ({"numbers": "int8", "block": -32}, "32, 64 or 128"),
    ],
)
def test_a_graph_whose_sizes_are_others_is_refused(
    operators: Path, changed: dict[str, Any], why: str
) -> None:
    """Nothing outside of a tensor is read, whatever attributes say."""
    weight, _ = drawn(FORMATS[0], 16, 32, 0)
    attributes = {**LINEAR, **stored(FORMATS[0]), **changed}
    inputs: dict[str, np.ndarray | None] = {"x": np.zeros((1, 32), np.float32), "weight": weight}
    with pytest.raises(Exception, match=why):
        ran(operators, "Linear", inputs, **attributes)


def test_a_residual_of_another_shape_is_refused(operators: Path) -> None:
    weight, _ = drawn(FORMATS[0], 16, 32, 0)
    inputs: dict[str, np.ndarray | None] = {"x": np.zeros((2, 32), np.float32), "weight": weight}
    inputs |= {"bias": None, "residual": np.zeros((1, 16), np.float32)}
    with pytest.raises(Exception, match=r"residual is \[1, 16\] and has to be \[2, 16\]"):
        ran(operators, "Linear", inputs, **LINEAR, **stored(FORMATS[0]))


@pytest.mark.parametrize("sizes", [[16], [16, 16, 16], [16, 17]])
def test_weights_that_are_not_those_of_the_sizes_are_refused(
    operators: Path, sizes: list[int]
) -> None:
    weights = {name: drawn(FORMATS[0], 16, 32, 0)[0] for name in ("a", "b")}
    attributes: dict[str, Any] = {"in_features": 32, "out_features": sizes, "round_activations": 0}
    with pytest.raises(Exception, match=r"a weight and an output for each|weight has 2048 bytes"):
        ran(
            operators,
            "Linears",
            {"x": np.zeros((2, 32), np.float32), **weights},
            outputs=2,
            **attributes,
            **stored(FORMATS[0]),
        )


def test_an_id_past_the_table_is_refused(operators: Path) -> None:
    weight, _ = drawn(FORMATS[0], 16, 32, 0)
    inputs: dict[str, np.ndarray | None] = {"ids": np.array([16]), "weight": weight}
    attributes = {"in_features": 32, "out_features": 16, **stored(FORMATS[0])}
    with pytest.raises(Exception, match="no row of the table"):
        ran(operators, "Embedding", inputs, **attributes)


def test_without_the_library_there_is_no_such_operator() -> None:
    node = oh.make_node("Linear", ["x", "weight"], ["y"], domain=DOMAIN)
    graph = oh.make_graph(
        [node],
        "one",
        [oh.make_tensor_value_info("x", FLOAT, [1, 32])],
        [oh.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(np.zeros((1, 8), np.uint8), "weight")],
    )
    opsets = [oh.make_opsetid("", 21), oh.make_opsetid(DOMAIN, 1)]
    model = oh.make_model(graph, opset_imports=opsets, ir_version=10)
    with pytest.raises(SessionError, match=DOMAIN):
        open_session(model.SerializeToString(), threads=1)


@pytest.mark.parametrize("family", ["mamba2", "olmoe"])
def test_a_canonical_graph_takes_the_kernels_that_are_there(
    operators: Path, ingots: Callable[..., Path], family: str
) -> None:
    """The same file as with the function bodies, whether or not an operator of it has a kernel."""
    path = ingots(family, "onnx") / "model.onnx"
    plain, ours = (open_session(path, threads=1, libraries=each) for each in ([], [operators]))
    rng = np.random.default_rng(5)
    sizes = {BATCH: 2, SEQUENCE: 19, PAST: 0, TOTAL: 19}
    given: dict[str, np.ndarray] = {}
    for each in plain.get_inputs():
        shape = [sizes.get(size, size) for size in each.shape]
        if each.name == "input_ids":
            given[each.name] = rng.integers(0, 100, shape)
        elif each.type == "tensor(int64)":
            given[each.name] = np.ones(shape, np.int64)
        else:
            given[each.name] = rng.standard_normal(shape).astype(np.float32)
    names = [each.name for each in plain.get_outputs()]
    expected, found = plain.run(names, given), ours.run(names, given)
    for name, one, other in zip(names, expected, found, strict=True):
        assert np.abs(one - other).max() < 2e-5 * np.abs(one).max(), name
    if family == "mamba2":
        assert any((one != other).any() for one, other in zip(expected, found, strict=True))


def scanned(**changed: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Inputs of a scan: B 2, T 3, Hm 4, Pm 5, G 2, Ns 6."""
    shapes = {
        "x": (2, 3, 4, 5),
        "dt": (2, 3, 4),
        "A": (4,),
        "B": (2, 3, 2, 6),
        "C": (2, 3, 2, 6),
        "D": (4,),
        "dt_bias": (4,),
        "state": (2, 4, 5, 6),
        "mask": (2, 3),
        **changed,
    }
    rng = np.random.default_rng(6)
    return {name: rng.uniform(-1, 0, shape).astype(np.float32) for name, shape in shapes.items()}


SCAN: dict[str, Any] = {"domain": "ingot", "chunk_size": 16, "dt_min": 0.0, "dt_max": 10.0}


def test_the_scan_gives_the_librarys_bits(cpu_library: CpuLibrary, operators: Path) -> None:
    given = scanned()
    expected = cpu_library.mamba2_scan(*given.values(), limits=(0.0, 10.0))
    found = ran(operators, "Mamba2Scan", dict(given), threads=2, outputs=2, **SCAN)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "changed",
    [
        {"dt": (2, 3, 5)},
        {"A": (3,)},
        {"C": (2, 2, 2, 6)},
        {"D": (5,)},
        {"state": (2, 4, 6, 5)},
        {"mask": (2, 4)},
        {"x": (3, 4, 5)},
    ],
    ids=str,
)
def test_a_scan_whose_inputs_disagree_is_refused(
    operators: Path, changed: dict[str, tuple[int, ...]]
) -> None:
    with pytest.raises(Exception, match=r"ingot::Mamba2Scan: .* is \["):
        ran(operators, "Mamba2Scan", dict(scanned(**changed)), outputs=2, **SCAN)


def test_the_convolution_gives_the_librarys_bits(cpu_library: CpuLibrary, operators: Path) -> None:
    rng = np.random.default_rng(7)
    shapes = {"x": (2, 5, 9), "state": (2, 9, 3), "weight": (9, 1, 4), "bias": (9,)}
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    chosen: dict[str, Any] = {"domain": "ingot", "activation": "silu"}
    x, state, weight, bias = given.values()
    expected = cpu_library.causal_conv(x, state, weight, bias, "silu")
    found = ran(operators, "CausalConv", dict(given), threads=2, outputs=2, **chosen)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    given["bias"] = given["bias"][1:]
    with pytest.raises(Exception, match=r"ingot::CausalConv: bias is \[8\]"):
        ran(operators, "CausalConv", dict(given), outputs=2, **chosen)
