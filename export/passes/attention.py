"""``Attention`` over a concatenated cache -> ``com.microsoft::GroupQueryAttention``."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ingot.export.passes.constants import integers
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.match import is_plain_attention, only_reader, producer, transposes
from ingot.export.passes.nodes import Nodes, additive_bias
from ingot.export.passes.replace import take_place

SWAP_HEADS = (0, 2, 1, 3)


@dataclass(frozen=True)
class CachedAttention:
    """The nodes of what ``graphs.attention.attention`` captures to.

    Attributes:
        attention: over query, key, value and mask.
        mask: bool.
        sources: queries, new keys and new values before their transposes, each ``[B, T, h, D]``.
        caches: the Concat of past and new keys, and that of values.
        back: -> ``[B, T, Hq, D]``.
        merge: the Reshape behind it.
    """

    attention: ir.Node
    mask: ir.Value
    sources: list[ir.Value]
    caches: list[ir.Node]
    back: ir.Node
    merge: ir.Node

    @property
    def heads(self) -> tuple[int, int]:
        """Hq and Hk."""
        return _size(self.sources[0], 2), _size(self.sources[1], 2)

    @property
    def head_size(self) -> int:
        """D."""
        return _size(self.sources[0], 3)

    @property
    def scale(self) -> float | None:
        """Of the scores; None where it is one over the root of D."""
        given = self.attention.attributes.get("scale")
        return None if given is None else given.as_float()

    def flat(self, model: ir.Model, nodes: Nodes) -> list[ir.Value]:
        """The sources as ``[B, T, h*D]``, by nodes that are added where they were not so before."""
        query, key = self.heads
        return [
            _flat(model, nodes, source, heads * self.head_size)
            for source, heads in zip(self.sources, (query, key, key), strict=True)
        ]

    def give_way(self, model: ir.Model, nodes: Nodes, made: ir.Node) -> None:
        """Put a node in the place of them all.

        Args:
            model: which it is in.
            nodes: before it.
            made: gives ``[B, T, Hq*D]`` and both caches.
        """
        model.graph.insert_before(self.attention, [*nodes, made])
        done = [self.back, self.attention, *self.caches]
        merged = self.merge.outputs[0]
        if merged.shape is not None and len(merged.shape) == 3:
            take_place(merged, made.outputs[0])
            done.insert(0, self.merge)
        else:
            # Not merely [B, T, h*D]: the elements lie in the same order, so it stays.
            self.merge.replace_input_with(0, made.outputs[0])
        for cache, new in zip(self.caches, made.outputs[1:], strict=True):
            take_place(cache.outputs[0], new)
        model.graph.remove(done, safe=True)


class AttentionToGroupQueryAttention(GraphPass):
    """Lets ONNX Runtime's kernel append to the cache, so that past and present may share a buffer.

    Matches what ``graphs.attention.attention`` captures to: heads transposed to ``[B, h, T, D]``,
    key and value concatenated after the past, an explicit mask. The kernel takes ``[B, T, h*D]``,
    applies the causal order itself, and gets the mask as an additive bias for the padding.

    The kernel needs D to be a multiple of 8; with another D nothing changes. It refuses B > 1 with
    T > 1 after a past, which the runtime session answers by feeding such calls token by token.

    All attention nodes are swapped, or none.
    """

    looks_for = ("Attention",)

    def __init__(self, attention_mask: str = "attention_mask") -> None:
        super().__init__()
        self.attention_mask = attention_mask

    def requires(self, model: ir.Model) -> None:
        inputs = [value.name for value in model.graph.inputs]
        for node in model.graph:
            lengths = node.op_type != "Attention" or self.attention_mask in inputs
            self.require(lengths, node, f"has its lengths from {self.attention_mask}, not an input")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = cached_attentions(model)
        if not matches or any(match.head_size % 8 for match in matches):
            return ir.passes.PassResult(model, modified=False)
        lengths = self._lengths(model, matches[0].attention)
        biases: dict[ir.Value, ir.Value] = {}
        for match in matches:
            _swap(model, match, lengths, biases)
        model.opset_imports["com.microsoft"] = 1
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        kernels = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
        for node in model.graph:
            left = node.op_type == "Attention" and bool(kernels)
            self.ensure(not left, node, "is left beside GroupQueryAttention")
        for node in kernels:
            query, key, value = (_row_size(flat) for flat in node.inputs[:3])
            size, rest = divmod(query, node.attributes["num_heads"].as_int())
            heads = node.attributes["kv_num_heads"].as_int()
            fits = rest == 0 and size % 8 == 0 and key == value == heads * size
            self.ensure(fits, node, f"has rows of {query}, {key} and {value} for its heads")
            ensure_caches_alone(self, node)

    def _lengths(self, model: ir.Model, before: ir.Node) -> list[ir.Value]:
        """``seqlens_k [B]`` = S - 1 for every row, and ``total_sequence_length [1]`` = S, int32."""
        mask = next(v for v in model.graph.inputs if v.name == self.attention_mask)
        nodes = Nodes()
        batch = nodes.add("Shape", mask, start=0, end=1)
        total = nodes.add("Shape", mask, start=1, end=2)
        last = nodes.add("Sub", total, integers(model, [1]))
        rows = nodes.add("Expand", last, batch)
        lengths = [nodes.add("Cast", size, to=int(ir.DataType.INT32)) for size in (rows, total)]
        model.graph.insert_before(before, nodes)
        return lengths


def _size(value: ir.Value, axis: int) -> int:
    size = value.shape[axis] if value.shape is not None else None
    assert isinstance(size, int)
    return size


def _flat(model: ir.Model, nodes: Nodes, source: ir.Value, wide: int) -> ir.Value:
    assert source.shape is not None
    shape = ir.Shape([*source.shape[:2], wide])
    before = producer(source, "Reshape")
    if before is not None and before.inputs[0] is not None and before.inputs[0].shape == shape:
        return before.inputs[0]
    result = nodes.add("Reshape", source, integers(model, [0, 0, wide]))
    result.shape, result.type = shape, source.type
    return result


def ensure_caches_alone(done: GraphPass, node: ir.Node) -> None:
    """Ensure that only a kernel that appends in place reads its caches, and nobody what it makes.

    Args:
        done: the pass that put it there.
        node: its inputs 3 and 4 are the caches, and its second and third output.
    """
    for past, present in zip(node.inputs[3:5], node.outputs[1:], strict=True):
        assert past is not None
        alone = past.is_graph_input() and len(past.uses()) == 1
        done.ensure(alone, past, "is a cache with spare room, for the kernel alone")
        done.ensure(not present.uses(), present, "has spare room, and a node reads it")


def cached_attentions(model: ir.Model) -> list[CachedAttention]:
    """Every attention of a graph, where all are over caches and in float32; else none."""
    found = [_match(node) for node in model.graph if node.op_type == "Attention"]
    matches = [match for match in found if match is not None]
    return matches if len(matches) == len(found) else []


def _match(attention: ir.Node) -> CachedAttention | None:
    """An attention and the nodes around it; None of one that is of another form."""
    if not is_plain_attention(attention) or attention.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    query, key, value, mask = attention.inputs
    assert mask is not None
    swaps, caches = [producer(query, "Transpose")], []
    for cache in (key, value):
        concat = producer(cache, "Concat")
        if concat is None or not _appends(concat):
            return None
        caches.append(concat)
        swaps.append(producer(concat.inputs[1], "Transpose"))
    sources = []
    for swap in swaps:
        source = swap.inputs[0] if swap is not None and transposes(swap, SWAP_HEADS) else None
        if source is None:
            return None
        sources.append(source)
    for source in sources:
        heads, size = source.shape[2:] if source.shape is not None else (None, None)
        if not isinstance(heads, int) or not isinstance(size, int):
            return None
    back = only_reader(attention)
    merge = only_reader(back) if back is not None and transposes(back, SWAP_HEADS) else None
    if back is None or merge is None or merge.op_type != "Reshape":
        return None
    return CachedAttention(attention, mask, sources, caches, back, merge)


def _row_size(flat: ir.Value | None) -> int:
    """h*D of ``[B, T, h*D]``."""
    size = flat.shape[-1] if flat is not None and flat.shape is not None else 0
    return size if isinstance(size, int) else 0


def _appends(concat: ir.Node) -> bool:
    """Whether it makes a cache of a past and new tokens that nothing else reads."""
    if len(concat.inputs) != 2 or concat.inputs[0] is None:
        return False
    if concat.attributes.get_int("axis", 0) not in (2, -2):
        return False
    past, cache = concat.inputs[0], concat.outputs[0]
    # Anything else would see a shared buffer's spare room.
    return past.is_graph_input() and len(past.uses()) == 1 and len(cache.uses()) == 1


def _swap(
    model: ir.Model,
    match: CachedAttention,
    lengths: list[ir.Value],
    biases: dict[ir.Value, ir.Value],
) -> None:
    nodes = Nodes()
    flat = match.flat(model, nodes)
    if match.mask not in biases:
        biases[match.mask] = additive_bias(model, nodes, match.mask)
    pasts = [cache.inputs[0] for cache in match.caches]
    heads, key_heads = match.heads
    attributes: dict[str, int | float] = {"num_heads": heads, "kv_num_heads": key_heads}
    if match.scale is not None:
        attributes["scale"] = match.scale
    # Inputs 7 to 9 are cos_cache, sin_cache and position_ids: the rotation is done already.
    inputs = [*flat, *pasts, *lengths, None, None, None, biases[match.mask]]
    swapped = ir.node(
        "GroupQueryAttention",
        inputs,
        domain="com.microsoft",
        num_outputs=3,
        attributes=attributes,
    )
    match.give_way(model, nodes, swapped)
