"""``Attention`` over a concatenated cache -> ``ingot.cpu::Attention``, which rotates as well."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ingot.export.passes.attention import cached_attentions, ensure_caches_alone
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.match import only_reader, producer
from ingot.export.passes.nodes import Nodes
from ingot.plugins.cpu.operators import ATTENTION, DOMAIN, VERSION

# Inputs of ``ingot.cpu::Attention``.
QUERY, KEY, ROTATION = 0, 1, slice(6, 8)


class AttentionToOperator(GraphPass):
    """Lets Ingot's kernel append to the cache, so that past and present may share a buffer.

    Matches what ``graphs.attention.attention`` captures to, with whatever mask: heads transposed to
    ``[B, h, T, D]``, key and value concatenated after the past. All attention nodes are swapped, or
    none.
    """

    looks_for = ("Attention",)

    requires = GraphPass.any_graph

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = cached_attentions(model)
        for match in matches:
            nodes = Nodes()
            flat = match.flat(model, nodes)
            pasts = [cache.inputs[0] for cache in match.caches]
            heads, key_heads = match.heads
            scale = match.head_size**-0.5 if match.scale is None else match.scale
            swapped = ir.node(
                ATTENTION,
                [*flat, *pasts, match.mask],
                domain=DOMAIN,
                version=VERSION,
                num_outputs=3,
                attributes={"num_heads": heads, "kv_num_heads": key_heads, "scale": scale},
            )
            match.give_way(model, nodes, swapped)
        # The transposes, which would still read what is rotated.
        RemoveUnusedNodesPass()(model)
        if matches:
            model.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, modified=bool(matches))

    def ensures(self, model: ir.Model) -> None:
        kernels = [node for node in model.graph if is_operator(node)]
        for node in model.graph:
            left = node.op_type == "Attention" and not node.domain and bool(kernels)
            self.ensure(not left, node, f"is left beside {DOMAIN}::{ATTENTION}")
        for node in kernels:
            ensure_caches_alone(self, node)


class RotateInAttention(GraphPass):
    """``RotaryEmbedding`` of queries and keys -> cosines and sines of the attention itself."""

    looks_for = ("RotaryEmbedding",)

    requires = GraphPass.any_graph

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            rotations = _rotations(node)
            if rotations is None:
                continue
            for place, rotation in zip((QUERY, KEY), rotations, strict=True):
                node.replace_input_with(place, rotation.inputs[0])
            tables = rotations[0].inputs[1:3]
            node.resize_inputs(ROTATION.stop)
            for place, table in zip(range(ROTATION.start, ROTATION.stop), tables, strict=True):
                node.replace_input_with(place, table)
            modified = True
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(_rotations(node) is None, node, "reads what it could rotate itself")


def is_operator(node: ir.Node) -> bool:
    """Whether it is ``ingot.cpu::Attention``."""
    return node.domain == DOMAIN and node.op_type == ATTENTION


def _rotations(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """What rotates the queries and the keys of an attention alike, and for it alone."""
    if not is_operator(node) or len(node.inputs) > ROTATION.start:
        return None
    query, key = (producer(node.inputs[place], "RotaryEmbedding") for place in (QUERY, KEY))
    if query is None or key is None or only_reader(query) is not node:
        return None
    same = query.inputs[1:] == key.inputs[1:] and only_reader(key) is node
    whole = all(_plain(each) for each in (query, key))
    return (query, key) if same and whole else None


def _plain(rotation: ir.Node) -> bool:
    """Whether it turns halves of all of a head by tables of each token."""
    given = rotation.attributes.get_int("rotary_embedding_dim", 0)
    apart = not rotation.attributes.get_int("interleaved", 0)
    return apart and not given and len(rotation.inputs) == 3
