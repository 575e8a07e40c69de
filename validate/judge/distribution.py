"""Next-token distributions against the truth's: divergence, likeliest tokens, perplexity.

Shape letters: n tokens, B rows of one call, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import NormalDist
from tokenize import TokenError
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ingot.plugins.errors import IngotError
from ingot.runtime.session import Ids
from ingot.runtime.tokenizer import TOKENIZER, encode_text, load_tokenizer
from ingot.validate.judge.metrics import Array
from ingot.validate.result import Distribution

if TYPE_CHECKING:
    from ingot.validate.truth.recording import Stepper

Doubles = npt.NDArray[np.float64]

# Windows of one call; as many rows as an engine takes by default.
ROWS = 4
# With fewer, the spread between windows is itself hardly known.
FEWEST_WINDOWS = 8
CONFIDENCE = 0.95


class TokensError(IngotError):
    """A text or token file that gives no perplexity: what was found, and what to give instead."""


def distribution(truth: Array, target: Array, tie: float) -> Distribution:
    """Figures of the same real tokens' logits, ``[n, V]`` each; no perplexity.

    The divergence is the sum over V of p (log p - log q), for p of the truth and q of the target,
    in float64. It is never negative, but its rounded sum may be by some 1e-15; such a number is
    taken as 0. It is infinite where the target excludes a token that the truth allows, and NaN
    where either has a NaN or +infinity; both come last.

    Args:
        truth: any float dtype.
        target: any float dtype; no padding in either.
        tie: two of the truth's logits at most so far apart are a tie. A token without a divergence
            agrees with nothing and is no tie.

    Raises:
        ValueError: different shapes, or no tokens.
    """
    _require_pairs(truth, target)
    kl = np.array([divergence(p, q) for p, q in zip(truth, target, strict=True)])
    rows = np.arange(len(truth))
    best, chosen = truth.argmax(-1), target.argmax(-1)
    with np.errstate(invalid="ignore"):
        tied = truth[rows, best] - truth[rows, chosen] <= tie
    known = ~np.isnan(kl)
    agrees = known & (best == chosen)
    near = known & (best != chosen) & tied
    # NaN is sorted behind infinity.
    ascending = tuple(np.sort(kl).tolist())
    return Distribution(len(truth), ascending, float(agrees.mean()), int(near.sum()))


def divergence(truth: Array, target: Array) -> float:
    log_p, log_q = log_softmax(truth), log_softmax(target)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        # In the limit a token of probability 0 adds nothing, whatever the target gives it.
        terms = np.where(p == 0, 0.0, p * (log_p - log_q))
    # NaN stays NaN.
    return float(np.maximum(terms.sum(), 0.0))


def log_softmax(logits: Array) -> Doubles:
    """The log-probabilities ``[V]`` of one token; NaN where any logit is NaN or +infinity."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wide -= wide.max()
        result: Doubles = wide - np.log(np.exp(wide).sum())
    return result


def negative_log_likelihoods(
    session: Stepper,
    tokens: Ids,
    window: int,
    advance: Callable[[int], None] = lambda _tokens: None,
    *,
    rows: int = ROWS,
) -> Doubles:
    """What a model gives each token after those before it in its window, in nats.

    Args:
        session: one whose main output is ``logits [B, T, V]``; its state is reset.
        tokens: int64 ``[n]``, cut into consecutive windows. Each begins with an empty state and is
            fed in one call; its first token is not predicted.
        window: tokens of each but the last, which may be shorter.
        advance: told the tokens of each call, n in all.
        rows: most windows of one call.

    Returns:
        ``[n - windows]``, in the order of the tokens; NaN or infinite where the logits are.

    Raises:
        TokensError: a window that predicts nothing.
        IngotError: the session refuses the tokens, the window or the rows.
    """
    if window < 2:
        raise TokensError(f"a window of {window} tokens predicts none of them; give at least 2.")
    found: list[float] = []
    for ids in text_calls(tokens, window, rows):
        batch, length = ids.shape
        # Of a last window of one token nothing is predicted.
        if length > 1:
            session.reset(batch, length)
            logits = session.step(ids, np.ones_like(ids))
            # One token at a time: in float64 a whole call would take gigabytes more.
            found += [
                float(-log_softmax(logits[row, t])[ids[row, t + 1]])
                for row in range(batch)
                for t in range(length - 1)
            ]
        advance(ids.size)
    return np.array(found, dtype=np.float64)


def text_calls(tokens: Ids, window: int, rows: int) -> Iterator[Ids]:
    """The windows in order, ``[B, T]`` a call, all of one length within a call."""
    whole = len(tokens) // window * window
    for start in range(0, whole, rows * window):
        yield tokens[start : min(start + rows * window, whole)].reshape(-1, window)
    if whole < len(tokens):
        yield tokens[None, whole:]


def perplexities(
    truth_nll: Doubles, target_nll: Doubles, window: int
) -> tuple[float, float, tuple[float, float]]:
    """Perplexity of the target and of the truth, and how sure their ratio is.

    The logarithm of the ratio is the mean over tokens of the paired differences
    d = ``target_nll - truth_nll``, in which what makes a text hard cancels. Tokens of one window
    share a context and are not independent, so the standard error is the one clustered by window
    of Miller, "Adding Error Bars to Evals" (arXiv:2411.00640), with the usual G / (G - 1) of its
    variance for G clusters. With fewer than ``FEWEST_WINDOWS`` windows each token is a cluster
    of its own, which makes the interval too narrow where neighbours err together. The quantile is
    Student's t for G - 1 degrees of freedom: 1.96 is too small for few windows.

    Args:
        truth_nll: float64 ``[n]``, of ``negative_log_likelihoods``.
        target_nll: the same of the target, over the same tokens and windows.
        window: that they were made with.

    Returns:
        ``exp`` of each mean, and the 95 % confidence interval of the first over the second; from 0
        to infinity for a single token. NaN where the likelihoods are.

    Raises:
        ValueError: different shapes, or no tokens.
    """
    _require_pairs(truth_nll, target_nll)
    # A target that is badly wrong may well have a perplexity beyond float64.
    with np.errstate(invalid="ignore", over="ignore"):
        difference = target_nll - truth_nll
        middle, reach = difference.mean(), _reach(difference, window - 1)
        interval = (float(np.exp(middle - reach)), float(np.exp(middle + reach)))
        return float(np.exp(target_nll.mean())), float(np.exp(truth_nll.mean())), interval


def _reach(difference: Doubles, predicted: int) -> float:
    """Half of the confidence interval of the mean; ``predicted`` tokens are one window."""
    windows = -(-len(difference) // predicted)
    size = predicted if windows >= FEWEST_WINDOWS else 1
    residual = difference - difference.mean()
    sums = np.add.reduceat(residual, np.arange(0, len(difference), size))
    freedom = len(sums) - 1
    if freedom == 0:
        return float("inf")
    variance = np.square(sums).sum() * len(sums) / freedom
    return _student_t(freedom) * float(np.sqrt(variance)) / len(difference)


def _student_t(freedom: int) -> float:
    """The two-sided quantile of Student's t.

    Abramowitz and Stegun 26.7.5: right to 1e-4 from 7 degrees of freedom on. For fewer, which only
    a text of less than 8 predicted tokens has, it is up to a ninth too small.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))


def _require_pairs(truth: Array, target: Array) -> None:
    # NumPy would stretch a length of 1, and give figures of something else.
    if truth.shape != target.shape or truth.size == 0:
        raise ValueError(f"truth {list(truth.shape)} and target {list(target.shape)} do not pair")


def read_tokens(path: Path, vocab_size: int) -> Ids:
    """The token ids of a ``.npy`` file, int64 ``[n]``; it may hold any integer dtype.

    Raises:
        TokensError: no such file, not such an array, an id outside of the vocabulary, or fewer
            than two ids.
    """
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise TokensError(_unreadable(path, error, "a .npy file of token ids")) from error
    # A damaged header may claim any size, and is read with Python's tokenizer.
    except (ValueError, MemoryError, OverflowError, TokenError) as error:
        raise TokensError(
            f"{path} is no whole .npy file of numbers; write token ids with numpy.save."
        ) from error
    if not np.issubdtype(array.dtype, np.integer) or array.ndim != 1:
        raise TokensError(
            f"{path} holds {array.dtype} of shape {list(array.shape)}; save integer token ids of "
            "shape [n]."
        )
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise TokensError(
            f"{path} holds token id {outside[0]}, outside of the vocabulary of {vocab_size}; give "
            "ids of this ingot's own tokenizer."
        )
    return _enough(path, array)


def read_text(path: Path, folder: Path, vocab_size: int) -> Ids:
    """A UTF-8 text file as token ids, int64 ``[n]``.

    As for a prompt, the tokenizer adds what it adds to any text, such as a first token.

    Args:
        path: the text.
        folder: the ingot, whose own tokenizer is taken.
        vocab_size: of the model, which a tokenizer that belongs to another may exceed.

    Raises:
        TokensError: no such file, not UTF-8, an ingot without a tokenizer, an id outside of the
            vocabulary, or fewer than two ids.
        TokenizerError: a damaged tokenizer.
    """
    try:
        # Not read_text, which changes line ends.
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TokensError(_unreadable(path, error, "a text file")) from error
    except UnicodeDecodeError as error:
        raise TokensError(
            f"{path} is not UTF-8 text: byte {error.start} has no meaning there; save it as UTF-8."
        ) from error
    # Its own message names an option of another command.
    if not (folder / TOKENIZER).is_file():
        raise TokensError(
            f"{folder} holds no {TOKENIZER}, so text cannot be encoded; give token ids: "
            "--tokens FILE.npy."
        )
    ids = np.array(encode_text(load_tokenizer(folder), text), dtype=np.int64)
    outside = ids[ids >= vocab_size]
    if outside.size:
        raise TokensError(
            f"{folder / TOKENIZER} makes token id {outside[0]} of {path}, outside of the "
            f"vocabulary of {vocab_size}; it belongs to another model."
        )
    return _enough(path, ids)


def _unreadable(path: Path, error: OSError, wanted: str) -> str:
    return f"cannot read {path}: {error.strerror or error}; give {wanted}."


def _enough(path: Path, ids: npt.NDArray[np.integer]) -> Ids:
    if len(ids) < 2:
        raise TokensError(
            f"{path} gives a sequence of {len(ids)} token ids, which predicts nothing; give at "
            "least 2."
        )
    return ids.astype(np.int64)
