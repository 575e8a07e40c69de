"""What is fed so that every expert of every layer is run once, whatever the routers would choose.

Of many experts a validation's tokens choose some, and what no token chose is not compared. So
short sequences are run with experts that are given: in each router every expert in turn, a few
tokens a call, on the eager graphs and on the target alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ingot.graphs.layers import Model
from ingot.validate.truth.inputs import EXPERTS_FORCED, Inputs, Mask

# Of a call. An error at one token of many is thinned out by the others, and what a call gives is
# kept until it is compared.
TOKENS = 16


def experts_of(model: Model) -> tuple[int, ...]:
    """E of each router of a graph without weights, in the order they run."""
    with torch.inference_mode(), torch.device("meta"):
        past = tuple(
            torch.zeros(state.shape(1, 0), dtype=getattr(torch, state.dtype))
            for state in model.states
        )
        one = torch.ones((1, 1), dtype=torch.int64)
        out = model(input_ids=one, attention_mask=one, position_ids=one, past=past)
    return tuple(logits.shape[-1] for logits in out.router_logits)


def forced_runs(
    experts: Sequence[int], top_k: int, vocab_size: int, seed: int, *, stateful: bool
) -> list[Inputs]:
    """Runs of one call of one row each, with the experts that are given (``Inputs.forced``).

    Args:
        experts: E of each router.
        top_k: K of all of them.
        vocab_size: token ids are below it.
        seed: of the ids and of the order of the experts.
        stateful: see ``Inputs``.

    Returns:
        As few as have every expert at least once; none where every token has all experts anyway.
    """
    most = max((-(-each // top_k) for each in experts), default=1)
    if most == 1:
        return []
    count = -(-most // TOKENS)
    random = np.random.default_rng([seed, count])
    ids = random.integers(0, vocab_size, size=(count, 1, TOKENS), dtype=np.int64)
    chosen = [_every(each, top_k, count * TOKENS, random) for each in experts]
    return [
        Inputs(
            ids[number],
            np.ones_like(ids[number]),
            TOKENS,
            stateful,
            calls=((f"{EXPERTS_FORCED} {number + 1}", TOKENS),),
            forced=(tuple(mask[number * TOKENS :][:TOKENS] for mask in chosen),),
        )
        for number in range(count)
    ]


def _every(experts: int, top_k: int, tokens: int, random: np.random.Generator) -> Mask:
    """Experts ``[tokens, E]``, K of each token, all of them as often as they can be, by lot."""
    mask = np.zeros((tokens, experts), dtype=np.bool_)
    for row, chosen in zip(mask, _sets(experts, top_k, random), strict=False):
        row[chosen] = True
    return mask


def _sets(
    experts: int, top_k: int, random: np.random.Generator
) -> Iterator[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """K different experts at a time, all of them before any comes a second time but to fill up."""
    while True:
        order = random.permutation(experts)
        for begin in range(0, experts, top_k):
            yield np.take(order, range(begin, begin + min(top_k, experts)), mode="wrap")
