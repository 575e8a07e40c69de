"""Which experts a kernel chose, read beside it: it is what the kernel's own numbers come from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper as oh
import pytest
from onnx import numpy_helper

from ingot.export.codecs.blocks import Blocks, Encoded
from ingot.plugins.moe_dispatch import function_body
from ingot.runtime.onnxruntime_session import open_session
from ingot.validate.truth.probes import Probes, insert_probes
from ingot.validate.truth.replay import Chosen, choices, forced_input, insert_replays

Array = npt.NDArray[Any]

ROUTER = "router_logits.0"
# What QMoE takes is whole blocks.
BLOCK: Literal[32] = 32
H, INNER = BLOCK, BLOCK
SIZES = [(1, 1), (4, 4), (8, 1), (9, 2), (64, 1), (64, 8)]
QUANTISED = ["QMoE4", "QMoE4Zeros", "QMoE8"]
KINDS = ["MoE", "MoeDispatch", "MoeLinear", "TopK", "QMoE4Zeros"]
INT64_MIN = np.iinfo(np.int64).min


class Experts:
    """Random experts and a graph that gives them to tokens by router logits.

    Args:
        kind: of the node that chooses; a TopK without a known node behind it is the last.
        experts: E.
        top_k: K.
        before: nodes between the router's logits and the choice, from ``logits`` to their result.
        half: whether activations and weights are float16.
    """

    def __init__(
        self,
        kind: str,
        experts: int,
        top_k: int,
        before: Sequence[onnx.NodeProto] = (),
        *,
        half: bool = False,
    ) -> None:
        self.kind, self.experts, self.top_k = kind, experts, top_k
        self.random = np.random.default_rng(experts * 100 + top_k)
        self.dtype: type = np.float16 if half else np.float32
        self.gate_up = self._draw(experts, 2 * INNER, H)
        self.down = self._draw(experts, H, INNER)
        self.constants: list[onnx.TensorProto] = []
        self.x: Array = np.zeros((0, H), self.dtype)
        nodes = [oh.make_node("Identity", ["logits_in"], [ROUTER]), *before]
        chosen_by = before[-1].output[0] if before else ROUTER
        nodes += getattr(self, f"_{kind}")(chosen_by)
        element = oh.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        graph = oh.make_graph(
            nodes,
            "experts",
            [
                oh.make_tensor_value_info("x", element, ["tokens", H]),
                oh.make_tensor_value_info("logits_in", onnx.TensorProto.FLOAT, ["tokens", experts]),
            ],
            [onnx.ValueInfoProto(name="y")],
            self.constants,
        )
        domains = ["ingot", "com.microsoft"]
        self.model = oh.make_model(
            graph,
            opset_imports=[oh.make_opsetid("", 23), *(oh.make_opsetid(d, 1) for d in domains)],
            ir_version=10,
        )
        if kind == "MoeDispatch":
            self.model.functions.append(function_body("silu"))

    def _draw(self, *shape: int) -> Array:
        return (self.random.standard_normal(shape) / 4).astype(self.dtype)

    def constant(self, name: str, array: Array) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _MoE(self, logits: str) -> list[onnx.NodeProto]:  # noqa: N802
        """As ``--target ort`` makes it: experts in reverse order, gate and up in turn."""
        halves = self.gate_up[::-1].reshape(self.experts, 2, INNER, H)
        turns = halves.swapaxes(1, 2).reshape(self.gate_up.shape)
        names = [
            self.constant(name, np.array([value], np.int64))
            for name, value in (("start", -1), ("end", INT64_MIN), ("axis", 1), ("step", -1))
        ]
        weights = (
            self.constant("gate_up_float", turns),
            self.constant("down_float", self.down[::-1]),
        )
        moe = oh.make_node(
            "MoE",
            ["x", "reversed", weights[0], "", weights[1]],
            ["y"],
            domain="com.microsoft",
            k=self.top_k,
            normalize_routing_weights=0,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
        )
        return [oh.make_node("Slice", [logits, *names], ["reversed"]), moe]

    def _QMoE4(self, logits: str) -> list[onnx.NodeProto]:  # noqa: N802
        return self._quantised(logits, Blocks(4, BLOCK))

    def _QMoE4Zeros(self, logits: str) -> list[onnx.NodeProto]:  # noqa: N802
        return self._quantised(logits, Blocks(4, BLOCK, symmetric=False))

    def _QMoE8(self, logits: str) -> list[onnx.NodeProto]:  # noqa: N802
        return self._quantised(logits, Blocks(8, BLOCK))

    def _quantised(self, logits: str, blocks: Blocks) -> list[onnx.NodeProto]:
        """The same in whole numbers, by which the expected numbers are computed too."""
        for name in ("gate_up", "down"):
            held: Array = getattr(self, name)
            encoded = [blocks.encode(each) for each in held]
            setattr(self, name, np.stack([blocks.decode(each, held.shape[-1]) for each in encoded]))
            turned = encoded[::-1]
            if name == "gate_up":
                rows = np.arange(2 * INNER).reshape(2, INNER).T.reshape(-1)
                turned = [
                    Encoded(
                        each.data[rows],
                        each.scales[rows],
                        None if each.zero_points is None else each.zero_points[rows],
                    )
                    for each in turned
                ]
            self.constant(
                name, np.stack([each.data.reshape(len(each.data), -1) for each in turned])
            )
            self.constant(f"{name}.scales", np.stack([each.scales for each in turned]))
            if not blocks.symmetric:
                zeros = [each.zero_points for each in turned if each.zero_points is not None]
                self.constant(f"{name}.zeros", np.stack(zeros))
        *slices, plain = self._MoE(logits)
        # Of the weights in floats nothing reads any.
        self.constants[:] = [each for each in self.constants if not each.name.endswith("float")]
        given = ["", ""] if blocks.symmetric else ["gate_up.zeros", "down.zeros"]
        products = ["gate_up", "gate_up.scales", "", "down", "down.scales", "", "", "", ""]
        inputs = ["x", "reversed", *products, *given, "", "shares"]
        moe = oh.make_node("QMoE", inputs, ["y"], domain="com.microsoft")
        moe.attribute.extend(plain.attribute)
        level = 0 if blocks.bits == 4 else 4
        for name, value in (
            ("expert_weight_bits", blocks.bits),
            ("block_size", BLOCK),
            ("accuracy_level", level),
        ):
            moe.attribute.append(oh.make_attribute(name, value))
        return [*slices, oh.make_node("Softmax", ["reversed"], ["shares"], axis=-1), moe]

    def _MoeDispatch(self, logits: str) -> list[onnx.NodeProto]:  # noqa: N802
        weights = self.constant("gate_up", self.gate_up), self.constant("down", self.down)
        attributes: dict[str, Any] = {
            "top_k": self.top_k,
            "normalize": 0,
            "activation": "silu",
        }
        inputs = ["x", logits, *weights]
        return [oh.make_node("MoeDispatch", inputs, ["y"], domain="ingot", **attributes)]

    def _TopK(self, logits: str) -> list[onnx.NodeProto]:  # noqa: N802
        k = self.constant("k", np.array([self.top_k], np.int64))
        return [
            oh.make_node("TopK", [logits, k], ["top", "ids"], axis=-1),
            oh.make_node("Cast", ["ids"], ["y"], to=onnx.TensorProto.FLOAT),
        ]

    def _MoeLinear(self, logits: str) -> list[onnx.NodeProto]:  # noqa: N802
        """Rows sorted by expert, as far as the sorting; of each token the last id comes first."""
        nodes = self._TopK(logits)
        last = [
            self.constant(name, np.array([value], np.int64))
            for name, value in (("s", -1), ("e", INT64_MIN), ("a", 1), ("t", -1))
        ]
        every = np.arange(self.experts, dtype=np.int64).reshape(-1, 1, 1)
        return [
            nodes[0],
            oh.make_node("Slice", ["ids", *last], ["turned"]),
            oh.make_node("Equal", [self.constant("every", every), "turned"], ["is_expert"]),
            oh.make_node("NonZero", ["is_expert"], ["sorted"]),
            oh.make_node("Cast", ["sorted"], ["y"], to=onnx.TensorProto.FLOAT),
        ]

    @functools.cached_property
    def _opened(self) -> tuple[Any, Probes]:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        insert_replays(model, [ROUTER])
        probes = insert_probes(model, [ROUTER])
        return open_session(model.SerializeToString(), threads=1), probes

    def run(self, logits: Array, forced: Chosen | None = None) -> tuple[Array, Array, Probes]:
        """The output, the choice as it is read, and how it was read."""
        session, probes = self._opened
        self.x = self.random.standard_normal((len(logits), H)).astype(self.dtype)
        every = np.ones((1, 1), np.bool_)
        feeds = {
            "x": self.x,
            "logits_in": logits,
            forced_input(ROUTER): every if forced is None else forced,
        }
        y, *taps = session.run(["y", *probes.outputs], feeds)
        arrays = {ROUTER: logits, **dict(zip(probes.outputs, taps, strict=True))}
        chosen = probes.chosen(ROUTER, arrays)
        assert chosen is not None and not probes.unread
        return y, chosen, probes

    def expected(self, logits: Array, chosen: Chosen) -> Array:
        """``y`` in float64, of these experts and their share of all."""
        x, gate_up, down = (a.astype(np.float64) for a in (self.x, self.gate_up, self.down))
        both = np.einsum("eih,nh->eni", gate_up, x)
        gate, up = both[..., :INNER], both[..., INNER:]
        outs = np.einsum("ehi,eni->enh", down, gate / (1 + np.exp(-gate)) * up)
        wide = logits.astype(np.float64)
        shares = np.exp(wide - wide.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        result: Array = np.einsum("ne,ne,enh->nh", shares, chosen, outs)
        return result


def clear_logits(experts: int, tokens: int = 60) -> Array:
    """No two of a token are near each other."""
    random = np.random.default_rng(experts)
    order = random.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)
    result: Array = (order * 3.0 / experts).astype(np.float32)
    return result


def near_logits(experts: int, tokens: int = 400) -> Array:
    """Several of a token are equal, or an ulp or a few apart."""
    random = np.random.default_rng(experts)
    few = random.standard_normal((tokens, 1)).astype(np.float32)
    steps = random.integers(-3, 4, (tokens, experts)).astype(np.float32)
    result: Array = (few + steps * np.spacing(np.abs(few))).astype(np.float32)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_where_logits_are_far_apart_it_is_their_top_k(kind: str) -> None:
    for experts, top_k in SIZES:
        logits = clear_logits(experts)
        _, chosen, _ = Experts(kind, experts, top_k).run(logits)
        np.testing.assert_array_equal(chosen, choices(logits, top_k), err_msg=f"{experts} {top_k}")


@pytest.mark.parametrize("kind", ["MoE", "MoeDispatch", *QUANTISED])
def test_it_is_what_the_kernel_s_own_numbers_come_from(kind: str) -> None:
    differ = 0
    # Its activations are rounded to int8.
    error = 0.3 if kind == "QMoE8" else 1e-5
    for experts, top_k in SIZES:
        subject, logits = Experts(kind, experts, top_k), near_logits(experts)
        y, chosen, _ = subject.run(logits)
        assert (chosen.sum(-1) == top_k).all()
        np.testing.assert_allclose(y, subject.expected(logits, chosen), atol=error)
        other = choices(logits, top_k)
        turned = (chosen != other).any(-1)
        differ += int(turned.sum())
        # The choice that the logits say would give other numbers there.
        apart = np.abs(y - subject.expected(logits, other)).max(-1)
        assert (apart[turned] > max(1e-3, error)).sum() >= 0.9 * turned.sum()
    # ONNX Runtime's kernel sees no difference of an ulp, and the function body sees every one.
    assert (differ > 100) == (kind == "MoE")


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_are_forced_are_used(kind: str) -> None:
    for experts, top_k in SIZES:
        subject = Experts(kind, experts, top_k)
        for logits in (clear_logits(experts), near_logits(experts), 0 * clear_logits(experts)):
            random = np.random.default_rng(1)
            wanted = choices(random.standard_normal(logits.shape), top_k)
            for mask in (wanted, choices(logits, top_k)):
                _, chosen, _ = subject.run(logits, mask)
                np.testing.assert_array_equal(chosen, mask)


def rounded() -> list[onnx.NodeProto]:
    """Logits that pass through float16 before the choice."""
    return [
        oh.make_node("Cast", [ROUTER], ["short"], to=onnx.TensorProto.FLOAT16),
        oh.make_node("Cast", ["short"], ["long"], to=onnx.TensorProto.FLOAT),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_shows_a_choice_by_rounded_logits(kind: str) -> None:
    logits = clear_logits(9)
    forced = choices(np.random.default_rng(1).standard_normal(logits.shape), 2)
    _, chosen, _ = Experts(kind, 9, 2, rounded()).run(logits, forced)
    assert 0.2 < (chosen == forced).all(-1).mean() < 0.9


def test_reads_a_graph_in_half_precision() -> None:
    logits = near_logits(8)
    subject = Experts("MoeDispatch", 8, 2, half=True)
    y, chosen, _ = subject.run(logits)
    np.testing.assert_array_equal(chosen, choices(logits, 2))
    np.testing.assert_allclose(y, subject.expected(logits, chosen), atol=1e-2)


def test_an_expert_taken_twice_is_one() -> None:
    model = Experts("MoeLinear", 4, 2)
    (turned,) = (n for n in model.model.graph.node if n.output[0] == "turned")
    turned.op_type, turned.input[:] = "Concat", ["first", "first"]
    turned.attribute.append(oh.make_attribute("axis", 1))
    split = oh.make_node("Split", ["ids"], ["first", "second"], axis=1, num_outputs=2)
    place = list(model.model.graph.node).index(turned)
    model.model.graph.node.insert(place, split)
    _, chosen, _ = model.run(clear_logits(4))
    assert (chosen.sum(-1) == 1).all()


def test_two_nodes_of_one_router_are_both_read() -> None:
    subject = Experts("MoeDispatch", 8, 2)
    other = onnx.NodeProto()
    (node,) = (n for n in subject.model.graph.node if n.op_type == "MoeDispatch")
    other.CopyFrom(node)
    other.output[0] = "other"
    next(a for a in other.attribute if a.name == "top_k").i = 3
    subject.model.graph.node.append(other)
    _, chosen, probes = subject.run(clear_logits(8))
    assert len(probes.outputs) == 2 and (chosen.sum(-1) == 3).all()


def _renamed(subject: Experts) -> None:
    (node,) = (n for n in subject.model.graph.node if n.op_type == "MoeDispatch")
    node.op_type = subject.model.functions[0].name = "OtherDispatch"


def _shuffled(subject: Experts) -> None:
    nodes = subject.model.graph.node
    order = numpy_helper.from_array(np.roll(np.arange(8), 3), "order")
    subject.model.graph.initializer.append(order)
    nodes.insert(1, oh.make_node("Gather", [ROUTER, "order"], ["other_order"], axis=1))
    nodes[-1].input[1] = "other_order"


def _computed(subject: Experts) -> None:
    nodes = subject.model.graph.node
    nodes.insert(1, oh.make_node("Identity", ["down"], ["copied"]))
    nodes[-1].input[3] = "copied"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_renamed, "no node that chooses by its logits was found"),
        (_shuffled, "has its experts in another order"),
        (_computed, "is not known here"),
    ],
)
def test_says_so_where_a_choice_cannot_be_read(change: Callable[[Experts], None], why: str) -> None:
    subject = Experts("MoeDispatch", 8, 2)
    change(subject)
    probes = insert_probes(subject.model, [ROUTER])
    assert list(probes.unread) == [ROUTER] and probes.unread[ROUTER].endswith(why)
    assert probes.outputs == [] and probes.chosen(ROUTER, {ROUTER: clear_logits(8)}) is None


def test_leaves_a_graph_without_routers_as_it_is() -> None:
    model = Experts("MoeDispatch", 8, 2).model
    before = model.SerializeToString()
    assert insert_probes(model, []).outputs == []
    assert model.SerializeToString() == before
