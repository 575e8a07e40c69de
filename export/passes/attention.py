"""``Attention`` over a concatenated cache -> ``com.microsoft::GroupQueryAttention``."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ingot.export.passes.constants import constant, integers
from ingot.export.passes.replace import take_place

SWAP_HEADS = (0, 2, 1, 3)


class AttentionToGroupQueryAttention(ir.passes.InPlacePass):
    """Lets ONNX Runtime's kernel append to the cache, so that past and present may share a buffer.

    Matches what ``graphs.layers.attention`` captures to: heads transposed to ``[B, h, T, D]``, key
    and value concatenated after the past, an explicit mask. The kernel takes ``[B, T, h*D]``,
    applies the causal order itself, and gets the mask as an additive bias for the padding.

    The kernel needs D to be a multiple of 8; with another D nothing changes. It refuses B > 1 with
    T > 1 after a past, which the runtime session answers by feeding such calls token by token.

    Postcondition: all attention nodes were swapped, or none.
    """

    def __init__(self, attention_mask: str = "attention_mask") -> None:
        super().__init__()
        self.attention_mask = attention_mask

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if node.op_type == "Attention"]
        if not nodes or not all(_matches(node) for node in nodes):
            return ir.passes.PassResult(model, modified=False)
        lengths = self._lengths(model, nodes[0])
        biases: dict[ir.Value, ir.Value] = {}
        for node in nodes:
            self._swap(model, node, lengths, biases)
        model.opset_imports["com.microsoft"] = 1
        return ir.passes.PassResult(model, modified=True)

    def _lengths(self, model: ir.Model, before: ir.Node) -> list[ir.Value]:
        """``seqlens_k [B]`` = S - 1 for every row, and ``total_sequence_length [1]`` = S, int32."""
        mask = next(v for v in model.graph.inputs if v.name == self.attention_mask)
        batch = ir.node("Shape", [mask], attributes={"start": 0, "end": 1})
        total = ir.node("Shape", [mask], attributes={"start": 1, "end": 2})
        last = ir.node("Sub", [total.outputs[0], integers(model, [1])])
        rows = ir.node("Expand", [last.outputs[0], batch.outputs[0]])
        int32 = {"to": ir.DataType.INT32.value}
        seqlens = ir.node("Cast", [rows.outputs[0]], attributes=int32)
        total32 = ir.node("Cast", [total.outputs[0]], attributes=int32)
        model.graph.insert_before(before, [batch, total, last, rows, seqlens, total32])
        return [seqlens.outputs[0], total32.outputs[0]]

    def _swap(
        self,
        model: ir.Model,
        node: ir.Node,
        lengths: list[ir.Value],
        biases: dict[ir.Value, ir.Value],
    ) -> None:
        query, key, value, mask = node.inputs[:4]
        assert query is not None and key is not None and value is not None and mask is not None
        flat, heads = [], []
        for new in (query, _appended(key), _appended(value)):
            source = _untransposed(new)
            assert source.shape is not None
            count, size = source.shape[2], source.shape[3]
            assert isinstance(count, int) and isinstance(size, int)
            reshape = ir.node("Reshape", [source, integers(model, [0, 0, count * size])])
            model.graph.insert_before(node, reshape)
            flat.append(reshape.outputs[0])
            heads.append(count)
        if mask not in biases:
            bias = additive_bias(model, mask)
            model.graph.insert_before(node, bias)
            biases[mask] = bias.outputs[0]
        pasts = [_producer(cache).inputs[0] for cache in (key, value)]
        attributes: dict[str, int | float] = {"num_heads": heads[0], "kv_num_heads": heads[1]}
        if "scale" in node.attributes:
            attributes["scale"] = node.attributes["scale"].as_float()
        # Inputs 7 to 9 are cos_cache, sin_cache and position_ids: the rotation is done already.
        inputs = [*flat, *pasts, *lengths, None, None, None, biases[mask]]
        swapped = ir.node(
            "GroupQueryAttention",
            inputs,
            domain="com.microsoft",
            num_outputs=3,
            attributes=attributes,
        )
        model.graph.insert_before(node, swapped)
        back, merge = _consumers(node)
        done = [back, node, _producer(key), _producer(value)]
        if _rank(merge.outputs[0]) == 3:
            take_place(merge.outputs[0], swapped.outputs[0])
            done.insert(0, merge)
        else:
            # Not merely [B, T, h*D]: the elements lie in the same order, so it stays.
            merge.replace_input_with(0, swapped.outputs[0])
        for old, new in zip((key, value), swapped.outputs[1:], strict=True):
            take_place(old, new)
        model.graph.remove(done, safe=True)


def additive_bias(model: ir.Model, mask: ir.Value) -> ir.Node:
    """A node, not yet in the graph, that turns a bool mask into what is added to the scores."""
    zero = constant(model, "bias_visible", np.array(0, dtype=np.float32))
    # The lowest float, not -inf: a row without any key must not become NaN.
    lowest = constant(model, "bias_hidden", np.array(np.finfo(np.float32).min, dtype=np.float32))
    return ir.node("Where", [mask, zero, lowest])


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _producer(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node


def _is_swap(node: ir.Node | None) -> bool:
    return (
        node is not None
        and node.op_type == "Transpose"
        and tuple(node.attributes["perm"].as_ints()) == SWAP_HEADS
    )


def _untransposed(value: ir.Value) -> ir.Value:
    source = _producer(value).inputs[0]
    assert source is not None
    return source


def _appended(cache: ir.Value) -> ir.Value:
    """The new tokens' part of a concatenated cache."""
    new = _producer(cache).inputs[1]
    assert new is not None
    return new


def _consumers(node: ir.Node) -> tuple[ir.Node, ir.Node]:
    """The Transpose back to ``[B, T, h, D]`` and the Reshape behind it."""
    back = next(iter(node.outputs[0].uses())).node
    merge = next(iter(back.outputs[0].uses())).node
    return back, merge


def _matches(node: ir.Node) -> bool:
    query, key, value, mask = (*node.inputs, None, None, None, None)[:4]
    if query is None or key is None or value is None or mask is None:
        return False
    if mask.dtype != ir.DataType.BOOL or not _is_swap(query.producer()):
        return False
    for cache in (key, value):
        concat = cache.producer()
        if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2:
            return False
        past, new = concat.inputs
        if past is None or not past.is_graph_input() or new is None:
            return False
        # A cache read by anything else would see a shared buffer's spare room.
        if len(past.uses()) != 1 or len(cache.uses()) != 1 or not _is_swap(new.producer()):
            return False
    size = query.shape[3] if query.shape is not None else None
    if not isinstance(size, int) or size % 8:
        return False
    if len(node.outputs) != 1 or len(node.outputs[0].uses()) != 1:
        return False
    back = next(iter(node.outputs[0].uses())).node
    if not _is_swap(back) or len(back.outputs[0].uses()) != 1:
        return False
    return next(iter(back.outputs[0].uses())).node.op_type == "Reshape"
