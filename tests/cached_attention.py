"""One attention layer over a cache, as ``graphs.attention.attention`` captures to."""

from __future__ import annotations

import numpy as np
from text_graph import Arrays


def attention_text(heads: int, groups: int, size: int) -> str:
    """``y [B, T, Hq*D]`` and both caches."""
    past = f"float[b, {groups}, p, {size}]"
    present = f"float[b, {groups}, s, {size}]"
    new = f"float[b, t, {groups}, {size}]"
    return f"""
    <ir_version: 10, opset_import: ["" : 23]>
    one_attention (
        int64[b, s] attention_mask, bool[b, 1, t, s] visible,
        float[b, t, {heads}, {size}] q, {new} k, {new} v, {past} past_key, {past} past_value
    ) => (float[b, t, {heads * size}] y, {present} present_key, {present} present_value) {{
        rows = Constant <value_ints: ints = [0, 0, {heads * size}]> ()
        query = Transpose <perm = [0, 2, 1, 3]> (q)
        new_key = Transpose <perm = [0, 2, 1, 3]> (k)
        new_value = Transpose <perm = [0, 2, 1, 3]> (v)
        present_key = Concat <axis = 2> (past_key, new_key)
        present_value = Concat <axis = 2> (past_value, new_value)
        mixed = Attention <scale = 0.3> (query, present_key, present_value, visible)
        back = Transpose <perm = [0, 2, 1, 3]> (mixed)
        y = Reshape (back, rows)
    }}
    """


def feeds(heads: int, groups: int, size: int, tokens: int, past: int) -> Arrays:
    """Three rows, of which two are padded on the left."""
    random = np.random.default_rng(5)
    total = past + tokens
    mask = np.ones((3, total), dtype=np.int64)
    mask[1, :2] = 0
    mask[2, : total - 1] = 0
    causal = np.arange(total) <= np.arange(past, total)[:, None]

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=(3, *shape)).astype(np.float32)

    return {
        "attention_mask": mask,
        "visible": (causal & (mask[:, None, None, :] != 0)),
        "q": normal(tokens, heads, size),
        "k": normal(tokens, groups, size),
        "v": normal(tokens, groups, size),
        "past_key": normal(groups, past, size),
        "past_value": normal(groups, past, size),
    }
