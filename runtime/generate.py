"""Greedy and sampled generation over any session, several prompts at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.plugins.errors import shown
from ingot.runtime.loading import load
from ingot.runtime.prompt import PREFILL_CHUNK, chunk_of, pieces
from ingot.runtime.session import Floats, Ids, Session, SessionError
from ingot.runtime.tokens import items, token_ids, whole

_NUMBERS = (int, float, np.integer, np.floating)
_Integers = npt.NDArray[np.integer[Any]]
# A list of lists of token ids, or arrays in place of either.
Prompts = Sequence[Sequence[int] | _Integers] | _Integers


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
        for name, count in (("top-k", self.top_k), ("seed", self.seed)):
            if whole(count) is None:
                raise SessionError(f"{name} is {shown(count)}; it must be a whole number.")
        for name, value in (("temperature", self.temperature), ("top-p", self.top_p)):
            if isinstance(value, bool) or not isinstance(value, _NUMBERS):
                raise SessionError(f"{name} is {shown(value)}; it must be a number.")
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


def pad_left(prompts: Prompts, pad: int) -> tuple[Ids, Ids]:
    """Prompts as one ``[B, T]`` batch of ids and its attention mask.

    Raises:
        SessionError: no prompts, an empty one, or one that holds anything but whole numbers.
    """
    given = items(prompts)
    if given is None:
        raise SessionError(f"prompts is {shown(prompts)}; it must be a list of lists of token ids.")
    rows = [token_ids(prompt, f"prompt {number}") for number, prompt in enumerate(given)]
    if not rows or not all(rows):
        raise SessionError("every prompt needs at least one token.")
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        try:
            ids[number, longest - len(row) :] = row
        except OverflowError as error:
            largest = shown(max(row, key=abs))
            raise SessionError(f"token id {largest} is in no vocabulary.") from error
        mask[number, longest - len(row) :] = 1
    return ids, mask


def generate(
    ingot: Session | Path | str,
    prompts: Prompts,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[list[int | None]]:
    """Generate for all prompts together.

    A prompt's memory beside its states is that of ``prefill_chunk`` tokens, since only the last
    token's logits are computed and a long prompt is fed in pieces; of several prompts over shared
    buffers, and where the model turns all positions with the length of a call, that of the whole.

    Args:
        ingot: a session of a ``generate`` ingot, whose state is reset; or the ingot's folder, which
            is opened for this one call.
        prompts: token ids, any lengths; shorter ones are padded on the left. Lists of whole numbers
            or integer arrays.
        max_new_tokens: at most so many for each prompt.
        sampling: greedy where absent.
        stop_ids: ids that end a sequence; the ingot's ``eos_token_id`` where absent.
        prefill_chunk: tokens of a prompt that are fed at once; 0 for all of them.

    Yields:
        per step, each prompt's new token, or None where that prompt has ended. The id that ends a
        sequence is yielded.

    Raises:
        SessionError: an ingot without logits, an empty prompt, one that holds no token ids or does
            not fit, or a session that something else was done with since the last token.
        IngotError: a folder that ``load`` refuses.
    """
    session = load(ingot) if isinstance(ingot, str | Path) else ingot
    manifest = session.manifest
    if manifest.task != "generate":
        raise SessionError(
            f"this ingot was exported for the task {manifest.task!r} and cannot generate; export "
            "it with --task generate."
        )
    count = whole(max_new_tokens)
    if count is None or count < 1:
        raise SessionError(f"max_new_tokens is {shown(max_new_tokens)}; it must be at least 1.")
    chunk = chunk_of(prefill_chunk)
    sampling = Sampling() if sampling is None else sampling
    if not isinstance(sampling, Sampling):
        raise SessionError(f"sampling is {shown(sampling)}; it must be a Sampling, or left out.")
    ends = manifest.generation["eos_token_ids"] if stop_ids is None else stop_ids
    # Their order means nothing, so a set is one of them.
    stops = set(token_ids(list(ends) if isinstance(ends, Set) else ends, "stop_ids"))
    ids, mask = pad_left(prompts, manifest.generation["pad_token_id"])
    longest = manifest.generation["context_length"]
    # None where nothing limits it.
    if longest is not None and ids.shape[1] + count > longest:
        raise SessionError(
            f"a prompt of {ids.shape[1]} tokens and {shown(count)} new ones exceed this model's "
            f"context of {longest}; shorten the prompt or lower --max-new-tokens, or export it "
            "with a longer --context."
        )
    changes = session.changes + 1
    session.reset(len(ids), ids.shape[1] + count)
    random = np.random.default_rng(sampling.seed)
    running = np.ones(len(ids), dtype=bool)
    parts = pieces(manifest, len(ids), ids.shape[1], chunk)
    for _ in range(count):
        for part in parts:
            _check_own(session, changes)
            logits = session.step(ids[:, part], mask[:, part], 1)
            changes += 1
            # Again, since another thread may have come in between.
            _check_own(session, changes)
        chosen = choose(logits[:, -1], sampling, random)
        yield [int(token) if on else None for token, on in zip(chosen, running, strict=True)]
        running &= [token not in stops for token in chosen.tolist()]
        if not running.any():
            return
        ids = chosen[:, None]
        mask = np.ones_like(ids)
        parts = (slice(0, 1),)


def _check_own(session: Session, changes: int) -> None:
    """Refuse to go on over a state that is not, or not only, this generation's."""
    if session.changes != changes:
        raise SessionError(
            "this generation was interrupted: its session was reset, or fed other tokens, in the "
            "meantime; fork() the session for each of several generations at once."
        )
