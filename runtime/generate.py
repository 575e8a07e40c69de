"""Greedy and sampled generation over any session, several prompts at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ingot.runtime.loading import load
from ingot.runtime.session import Floats, Ids, Session, SessionError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities reach this sum; 1 keeps all.
        seed: of the random choices.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Written so that NaN is refused too.
        if not 0.0 <= self.temperature < float("inf"):
            raise SessionError(f"temperature is {self.temperature}; it must be 0 or more.")
        if self.top_k < 0:
            raise SessionError(f"top-k is {self.top_k}; it must be 0 (off) or more.")
        if not 0.0 < self.top_p <= 1.0:
            raise SessionError(f"top-p is {self.top_p}; it must be above 0 and at most 1.")
        if self.seed < 0:
            raise SessionError(f"seed is {self.seed}; it must be 0 or more.")


def choose(logits: Floats, sampling: Sampling, random: np.random.Generator) -> Ids:
    """The next token of every row, ``logits [B, V]`` -> ``[B]``.

    Raises:
        SessionError: logits that are NaN or infinite; a token taken from them would look like an
            answer. A token may be ruled out by -infinity.
    """
    highest = logits.max(axis=-1)
    if not np.isfinite(highest).all():
        found = highest[~np.isfinite(highest)][0]
        raise SessionError(
            f"the logits hold {found}; this model's numbers overflow: export it in a wider "
            "precision."
        )
    if sampling.temperature == 0.0:
        result: Ids = logits.argmax(axis=-1)
        return result
    return np.array([_sample(row, sampling, random) for row in logits], dtype=np.int64)


def _sample(logits: Floats, sampling: Sampling, random: np.random.Generator) -> int:
    # Counted from the likeliest token and not from 0, so that no temperature is too small.
    with np.errstate(over="ignore"):
        scores = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    order = np.argsort(-scores, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights: npt.NDArray[np.float64] = np.exp(scores[order])
    weights /= weights.sum()
    # The token that crosses top_p is kept, so at least one always is.
    kept = 1 + int(np.searchsorted(weights.cumsum(), sampling.top_p))
    weights = weights[:kept] / weights[:kept].sum()
    return int(random.choice(order[:kept], p=weights))


def pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Ids, Ids]:
    """Prompts as one ``[B, T]`` batch of ids and its attention mask."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise SessionError("every prompt needs at least one token.")
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        try:
            ids[row, longest - len(prompt) :] = prompt
        except OverflowError as error:
            raise SessionError(f"token id {max(prompt, key=abs)} is in no vocabulary.") from error
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def generate(
    ingot: Session | Path | str,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """Generate for all prompts together.

    Args:
        ingot: a session of a ``generate`` ingot, whose state is reset; or the ingot's folder, which
            is opened for this one call.
        prompts: token ids, any lengths; shorter ones are padded on the left.
        max_new_tokens: at most so many for each prompt.
        sampling: greedy where absent.
        stop_ids: ids that end a sequence; the ingot's ``eos_token_id`` where absent.

    Yields:
        per step, each prompt's new token, or None where that prompt has ended. The id that ends a
        sequence is yielded.

    Raises:
        SessionError: an ingot without logits, an empty prompt, or a prompt that does not fit.
        IngotError: a folder that ``load`` refuses.
    """
    session = load(ingot) if isinstance(ingot, str | Path) else ingot
    manifest = session.manifest
    if manifest.task != "generate":
        raise SessionError(
            f"this ingot was exported for the task {manifest.task!r} and cannot generate; export "
            "it with --task generate."
        )
    if max_new_tokens < 1:
        raise SessionError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    sampling = sampling or Sampling()
    stops = set(manifest.generation["eos_token_ids"] if stop_ids is None else stop_ids)
    ids, mask = pad_left(prompts, manifest.generation["pad_token_id"])
    longest = manifest.generation["context_length"]
    # None where nothing limits it.
    if longest is not None and ids.shape[1] + max_new_tokens > longest:
        raise SessionError(
            f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones exceed this model's "
            f"context of {longest}; shorten the prompt or lower --max-new-tokens."
        )
    session.reset(len(prompts), ids.shape[1] + max_new_tokens)
    random = np.random.default_rng(sampling.seed)
    running = np.ones(len(prompts), dtype=bool)
    for _ in range(max_new_tokens):
        logits = session.step(ids, mask)[:, -1]
        chosen = choose(logits, sampling, random)
        yield [int(token) if on else None for token, on in zip(chosen, running, strict=True)]
        running &= ~np.isin(chosen, list(stops))
        if not running.any():
            return
        ids = chosen[:, None]
        mask = np.ones_like(ids)
