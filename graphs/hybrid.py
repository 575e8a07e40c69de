"""Layers of which some have attention and the others a Mamba2 mixer, in one model."""

from __future__ import annotations

import torch

from ingot.graphs.attention import Attention, causal_mask
from ingot.graphs.layers import Layer, Step
from ingot.graphs.mamba2_mixer import Mamba2Mixer, MixerSizes
from ingot.graphs.rope import RotaryEmbedding
from ingot.graphs.state import State


class HybridLayer(Layer):
    """A layer with one of the two, under the names that checkpoints have.

    Args:
        mixer: attention, or the sizes of a Mamba2 mixer.
    """

    def __init__(self, mixer: Attention | MixerSizes) -> None:
        super().__init__()
        self.attends = isinstance(mixer, Attention)
        if isinstance(mixer, Attention):
            self.self_attn = mixer
        else:
            self.mamba = Mamba2Mixer(mixer)

    @property
    def mixer(self) -> Attention | Mamba2Mixer:
        """What mixes the tokens."""
        return self.self_attn if self.attends else self.mamba

    def states(self, index: int) -> tuple[State, ...]:
        """See ``Layer.states``."""
        return self.mixer.states(index)


def hybrid_step(
    attention: tuple[bool, ...],
    x: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    rotary_emb: RotaryEmbedding | None,
) -> Step:
    """What the layers of a model read, and no more.

    Args:
        attention: of each layer, whether it has attention.
        x: what enters the first layer, ``[B, T, H]``.
        attention_mask: see ``Model.forward``, as for ``position_ids``.
        position_ids: see ``attention_mask``.
        rotary_emb: how queries and keys are rotated; None where they are not.
    """
    tokens, step = x.shape[1], Step()
    if any(attention):
        step = step._replace(visible=causal_mask(attention_mask, tokens))
        if rotary_emb is not None:
            cos, sin = (table.to(x.dtype) for table in rotary_emb(position_ids))
            step = step._replace(cos=cos, sin=sin)
    if not all(attention):
        # Of a mask over a cache the last are of the new tokens.
        step = step._replace(real=attention_mask[:, -tokens:].to(x.dtype))
    return step
