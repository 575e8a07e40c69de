"""The distribution figures, against torch, plain loops, exact decimals and resampling."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F

from ingot.runtime.loading import load
from ingot.runtime.session import Floats, Ids
from ingot.validate.gate import KL_FLOOR
from ingot.validate.judge.distribution import (
    Doubles,
    TokensError,
    distribution,
    negative_log_likelihoods,
    perplexities,
    read_text,
    read_tokens,
)


def make_logits(rows: int, vocab: int, error: float, seed: int = 0) -> tuple[Doubles, Floats]:
    """Logits as a trained model has them, some thirty apart, and a float32 target of them."""
    random = np.random.default_rng(seed)
    truth = 4 * random.normal(size=(rows, vocab)) + 20 * random.normal(size=(rows, 1))
    target = truth + error * random.normal(size=truth.shape)
    return truth, target.astype(np.float32)


def test_gives_the_divergence_worked_out_by_hand() -> None:
    # 1/2 log(1/2 / 1/4) + 1/4 log(1) + 1/4 log(1/4 / 1/2) = 1/4 log 2; the other way round the
    # same numbers would be 1/4 log 2 too, so the second row is not symmetric.
    truth = np.log([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    target = np.log([[0.25, 0.25, 0.5], [0.125, 0.625, 0.25]])
    # A constant on all logits of a token changes nothing.
    shifts = np.array([[7.0], [-900.0]]), np.array([[-3.0], [4000.0]])
    found = distribution(truth + shifts[0], target + shifts[1], 0.0)
    second = 0.5 * math.log(4) + 0.25 * math.log(0.4)
    assert found.kl == pytest.approx((math.log(2) / 4, second), rel=1e-11)
    assert found.tokens == 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gives_the_divergence_of_torch(dtype: npt.DTypeLike) -> None:
    truth, target = make_logits(200, 501, 0.3)
    truth = truth.astype(dtype)
    p, q = (F.log_softmax(torch.from_numpy(a.astype(np.float64)), -1) for a in (truth, target))
    expected = F.kl_div(q, p, reduction="none", log_target=True).sum(-1).sort().values
    found = distribution(truth, target, 0.01)
    assert found.kl == pytest.approx(expected.tolist(), rel=1e-11)
    assert all(type(value) is float for value in found.kl)
    assert found.kl_mean == pytest.approx(float(expected.mean()), rel=1e-11)
    assert (found.kl_p99, found.kl_max) == (found.kl[198], found.kl[199])


def _exact_divergence(truth: Doubles, target: Doubles) -> float:
    """In fifty digits."""
    getcontext().prec = 50
    p, q = ([Decimal(float(logit)).exp() for logit in row] for row in (truth, target))
    sums = (sum(p), sum(q))
    shares = [(a / sums[0], b / sums[1]) for a, b in zip(p, q, strict=True)]
    return float(sum(a * (a.ln() - b.ln()) for a, b in shares))


@pytest.mark.parametrize("error", [1e-3, 1e-6, 1e-9])
def test_is_right_to_less_than_what_the_gate_lets_pass(error: float) -> None:
    truth, _ = make_logits(12, 97, 0.0)
    target = truth + error * np.random.default_rng(1).normal(size=truth.shape)
    expected = sorted(_exact_divergence(p, q) for p, q in zip(truth, target, strict=True))
    found = distribution(truth, target, 0.0).kl
    assert found == pytest.approx(expected, rel=1e-12, abs=KL_FLOOR / 2)
    # Rounding alone makes some of these sums negative.
    assert min(found) >= 0


def test_equal_logits_do_not_diverge() -> None:
    truth, _ = make_logits(9, 301, 0.0)
    found = distribution(truth, truth, 0.0)
    assert (found.kl, found.top1_agreement, found.near_ties) == ((0.0,) * 9, 1.0, 0)


def test_nan_and_infinity_come_last_and_agree_with_nothing() -> None:
    truth, target = make_logits(5, 40, 1e-4)
    best = truth.argmax(-1)
    target[0, best[0]] = np.nan
    target[1, best[1]] = np.inf
    target[2, best[2] - 1] = -np.inf
    target[3] = -np.inf
    found = distribution(truth, target, 1e9)
    assert math.isfinite(found.kl[0]) and found.kl[1] == math.inf
    assert all(map(math.isnan, found.kl[2:]))
    assert math.isnan(found.kl_mean) and math.isnan(found.kl_max)
    # Rows 2 and 4 have a likeliest token, and it is the truth's.
    assert (found.top1_agreement, found.near_ties) == (0.4, 0)


def test_a_truth_that_is_broken_is_not_hidden_either() -> None:
    truth, target = make_logits(2, 40, 1e-4)
    truth[1, 5] = np.nan
    found = distribution(truth, target, 1e9)
    assert math.isnan(found.kl_max) and (found.top1_agreement, found.near_ties) == (0.5, 0)


def test_a_token_that_the_truth_excludes_adds_nothing() -> None:
    truth, target = make_logits(3, 40, 1e-2)
    short = distribution(truth[:, :39], target[:, :39], 0.0)
    truth[:, 39], target[:, 39] = -np.inf, -np.inf
    assert distribution(truth, target, 0.0).kl == pytest.approx(short.kl, rel=1e-9)
    truth[:, 39] = -2000.0
    assert distribution(truth, target, 0.0).kl == pytest.approx(short.kl, rel=1e-9)


def test_tells_near_ties_from_other_choices() -> None:
    truth = np.array(
        [
            [1.0, 5.0, 2.0],  # the same choice
            [4.0, 1.0, 3.75],  # another choice, as far apart as a tie may be
            [4.0, 1.0, 3.5],  # another choice, farther
            [4.0, 4.0, 1.0],  # equal logits
        ]
    )
    target = np.array([[0.0, 9.0, 1.0], [3.0, 1.0, 3.1], [3.0, 1.0, 3.1], [3.0, 3.5, 1.0]])
    found = distribution(truth, target.astype(np.float32), 0.25)
    assert (found.top1_agreement, found.near_ties) == (0.25, 2)
    assert distribution(truth, target, 0.0).near_ties == 1
    assert distribution(truth, target, 1.0).near_ties == 3


@pytest.mark.parametrize("shape", [(4, 1), (1, 8), (4, 7)])
def test_does_not_stretch_one_side_to_the_other(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not pair"):
        distribution(np.eye(4, 8), np.ones(shape), 0.0)
    with pytest.raises(ValueError, match="do not pair"):
        perplexities(np.ones(5), np.ones(shape[0]), 4)


def test_has_no_figures_of_nothing() -> None:
    with pytest.raises(ValueError, match="do not pair"):
        distribution(np.ones((0, 8)), np.ones((0, 8)), 0.0)
    with pytest.raises(ValueError, match="do not pair"):
        perplexities(np.ones(0), np.ones(0), 4)


class Recurrent:
    """A model of one recurrence, whose logits depend on every token since the last reset."""

    def __init__(self, vocab: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.embedding = random.normal(size=(vocab, 6))
        self.head = 2 * random.normal(size=(6, vocab))
        self.tapped: dict[str, Floats] = {}
        self.calls: list[tuple[int, int]] = []

    def reset(self, batch: int, capacity: int) -> None:
        self.hidden = np.zeros((batch, 6))
        self.left = capacity

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        assert input_ids.dtype == attention_mask.dtype == np.int64 and attention_mask.all()
        assert input_ids.shape == attention_mask.shape and input_ids.shape[1] <= self.left
        self.calls.append(input_ids.shape)
        self.left -= input_ids.shape[1]
        made = []
        for t in range(input_ids.shape[1]):
            self.hidden = np.tanh(0.9 * self.hidden + self.embedding[input_ids[:, t]])
            made.append(self.hidden @ self.head)
        return np.stack(made, axis=1).astype(np.float32)

    def state(self) -> dict[str, Floats]:
        return {}


def _plain_nlls(model: Recurrent, tokens: Ids, window: int) -> list[float]:
    """One window, one token at a time, by the definition."""
    found = []
    for start in range(0, len(tokens), window):
        hidden = np.zeros(6)
        piece = tokens[start : start + window]
        for token, following in pairwise(piece):
            hidden = np.tanh(0.9 * hidden + model.embedding[token])
            weights = [math.exp(logit) for logit in (hidden @ model.head).astype(np.float32)]
            found.append(-math.log(weights[following] / sum(weights)))
    return found


@pytest.mark.parametrize(
    ("count", "calls"),
    [
        (2, [(1, 2)]),
        (7, [(1, 7)]),
        (8, [(1, 7)]),  # a last window of one token
        (14, [(2, 7)]),
        (21, [(3, 7)]),
        (23, [(3, 7), (1, 2)]),
        (47, [(3, 7), (3, 7), (1, 5)]),
    ],
)
def test_scores_every_token_but_the_first_of_each_window(
    count: int, calls: list[tuple[int, int]]
) -> None:
    model = Recurrent(31)
    tokens = np.random.default_rng(count).integers(0, 31, size=count, dtype=np.int64)
    advanced: list[int] = []
    found = negative_log_likelihoods(model, tokens, 7, advanced.append, rows=3)
    assert found.dtype == np.float64
    assert found.tolist() == pytest.approx(_plain_nlls(model, tokens, 7), rel=1e-6)
    assert model.calls == calls
    assert sum(advanced) == count
    whole = negative_log_likelihoods(model, tokens, 7)
    assert whole.tolist() == pytest.approx(found.tolist(), rel=1e-6)


def test_scores_with_a_real_session(tiny_ort: Path) -> None:
    session = load(tiny_ort)
    tokens = np.random.default_rng(0).integers(0, session.manifest.vocab_size, size=29)
    found = negative_log_likelihoods(session, tokens, 6)
    expected = []
    for piece in (tokens[start : start + 6] for start in range(0, 29, 6)):
        session.reset(1, len(piece))
        for token, following in pairwise(piece):
            logits = session.step(np.array([[token]]), np.ones((1, 1), dtype=np.int64))[0, -1:]
            wide = torch.from_numpy(logits.astype(np.float64))
            expected.append(float(F.cross_entropy(wide, torch.tensor([following]))))
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert len(found) == 29 - 5 and np.ptp(found) > 1e-3


def test_shows_a_session_that_gives_nan() -> None:
    model = Recurrent(31)
    model.embedding[3] = np.nan
    found = negative_log_likelihoods(model, np.array([5, 2, 3, 4, 1, 2, 6]), 5)
    assert np.isnan(found).tolist() == [False, False, True, True, False]


def test_refuses_a_window_that_predicts_nothing() -> None:
    with pytest.raises(TokensError, match="a window of 1 tokens predicts none"):
        negative_log_likelihoods(Recurrent(31), np.array([1, 2, 3]), 1)


def make_nlls(
    windows: int, predicted: int, seed: int = 0, *, shared: float = 0.05
) -> tuple[Doubles, Doubles]:
    """Likelihoods of a hard and an easy text in turn; a window's differences have much in common.

    The last window is half as long as the others.
    """
    random = np.random.default_rng(seed)
    count = windows * predicted - predicted // 2
    truth = random.gamma(2.0, 1.5, size=count)
    common = np.repeat(shared * random.normal(size=windows), predicted)[:count]
    return truth, truth + 0.01 + common + 0.05 * random.normal(size=count)


def test_gives_the_perplexities_of_a_plain_loop() -> None:
    truth, target = make_nlls(12, 9)
    found, of_truth, (low, high) = perplexities(truth, target, 10)
    product = 1.0
    for value in target:
        product *= math.exp(value) ** (1 / len(target))
    assert found == pytest.approx(product, rel=1e-12)
    assert of_truth == pytest.approx(math.exp(sum(truth) / len(truth)), rel=1e-12)
    # Symmetric about the ratio, on the scale of the logarithm.
    assert low < found / of_truth < high
    assert math.sqrt(low * high) == pytest.approx(found / of_truth, rel=1e-12)


def _spread(low: float, high: float) -> float:
    return math.log(high / low) / 2


# Student's t, two-sided 95 %, from a printed table.
STUDENT = {7: 2.3646, 11: 2.2010, 29: 2.0452, 116: 1.9806}


@pytest.mark.parametrize("windows", [8, 12, 30])
def test_clusters_the_tokens_of_a_window(windows: int) -> None:
    truth, target = make_nlls(windows, 9)
    _, _, interval = perplexities(truth, target, 10)
    d = [b - a for a, b in zip(truth, target, strict=True)]
    mean = sum(d) / len(d)
    # Miller 2024, equation 4: the sum over all pairs of one window.
    pairs = sum(
        (d[i] - mean) * (d[j] - mean)
        for i in range(len(d))
        for j in range(len(d))
        if i // 9 == j // 9
    )
    error = math.sqrt(pairs * windows / (windows - 1)) / len(d)
    assert _spread(*interval) == pytest.approx(STUDENT[windows - 1] * error, rel=1e-4)


def test_takes_each_token_for_itself_with_too_few_windows() -> None:
    truth, target = make_nlls(7, 18)
    _, _, interval = perplexities(truth, target, 19)
    error = np.std(target - truth, ddof=1) / math.sqrt(len(truth))
    assert len(truth) == 117
    assert _spread(*interval) == pytest.approx(STUDENT[116] * error, rel=1e-4)


def test_the_interval_is_as_wide_as_resampled_windows_are_spread() -> None:
    truth, target = make_nlls(200, 9)
    truth, target = truth[: 199 * 9], target[: 199 * 9]
    _, _, interval = perplexities(truth, target, 10)
    random = np.random.default_rng(5)
    by_window = (target - truth).reshape(199, 9)
    means = [by_window[random.integers(0, 199, size=199)].mean() for _ in range(4000)]
    low, high = np.exp(np.quantile(means, (0.025, 0.975)))
    assert _spread(*interval) == pytest.approx(_spread(float(low), float(high)), rel=0.06)
    # What taking each token for itself would give is another number altogether.
    alone = 1.96 * (target - truth).std() / math.sqrt(len(truth))
    assert _spread(*interval) > 1.5 * alone


@pytest.mark.parametrize("windows", [8, 40])
def test_the_interval_holds_the_true_ratio_so_often(windows: int) -> None:
    runs, held = 3000, 0
    for seed in range(runs):
        # The shared part alone has 0.05 a window, so that few windows are few numbers indeed.
        truth, target = make_nlls(windows, 4, seed)
        low, high = perplexities(truth, target, 5)[2]
        held += low <= math.exp(0.01) <= high
    # Three standard deviations of a count. A factor of 1.96 would hold 91 % of 8 windows.
    assert held / runs == pytest.approx(0.95, abs=0.012)


def test_what_makes_a_text_hard_cancels() -> None:
    truth, target = make_nlls(40, 9, shared=0.0)
    _, _, interval = perplexities(truth, target, 10)
    # The likelihoods themselves vary by 2.1, and only their differences by 0.05.
    assert _spread(*interval) < 0.01 < np.std(truth) / math.sqrt(len(truth))


@pytest.mark.parametrize("window", [4, 200])
def test_a_broken_target_is_not_hidden(window: int) -> None:
    truth, target = make_nlls(12, 9)
    target[7] = np.nan
    found, of_truth, interval = perplexities(truth, target, window)
    assert math.isnan(found) and math.isfinite(of_truth) and all(map(math.isnan, interval))
    target[7] = np.inf
    assert perplexities(truth, target, window)[0] == math.inf
    assert perplexities(truth, np.full_like(truth, 1e4), window)[0] == math.inf


def test_one_token_says_nothing_of_the_ratio() -> None:
    found, of_truth, interval = perplexities(np.array([2.0]), np.array([2.1]), 512)
    assert (found, of_truth) == pytest.approx((math.exp(2.1), math.exp(2)), rel=1e-12)
    assert interval == (0.0, math.inf)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "uint64", ">i4"])
def test_reads_tokens_of_any_integer(tmp_path: Path, dtype: str) -> None:
    ids = np.random.default_rng(0).integers(0, 256, size=50)
    np.save(tmp_path / "ids.npy", ids.astype(dtype))
    found = read_tokens(tmp_path / "ids.npy", 50_000)
    assert found.dtype == np.dtype(np.int64) and found.dtype.isnative
    assert found.tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1, 2, 300]), "holds token id 300, outside of the vocabulary of 300"),
        (np.array([1, -2, 3]), "holds token id -2, outside"),
        (np.array([1, 2**64 - 1], dtype=np.uint64), "holds token id 18446744073709551615, outside"),
        (np.array([[1, 2, 3]]), r"holds int64 of shape \[1, 3\]; save integer token ids of shape"),
        (np.array(5), r"holds int64 of shape \[\]"),
        (np.array([1.0, 2.0]), r"holds float64 of shape \[2\]"),
        (np.array([True, False]), "holds bool"),
        (np.array([7]), "gives a sequence of 1 token ids, which predicts nothing"),
        (np.array([], dtype=np.int64), "gives a sequence of 0 token ids"),
    ],
)
def test_refuses_other_tokens(tmp_path: Path, array: npt.NDArray[Any], message: str) -> None:
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(TokensError, match=message):
        read_tokens(tmp_path / "ids.npy", 300)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\x93NUMPY", b"PK\x03\x04\x14\x00"),
        (b"'<i8'", b"'|O8'"),
        (b"(50,)", b"(51,)"),
        (b"(50,)", b"(50,("),
        (b"(50,), }             ", b"(9000000000000000,)} "),
        (b"(50,), }                ", b"(99999999999999999999,)}"),
    ],
)
def test_refuses_what_is_no_array_file(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(50))
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new[: len(old)].ljust(len(old)), 1))
    with pytest.raises(TokensError, match=r"is no whole \.npy file of numbers"):
        read_tokens(path, 300)


@pytest.mark.parametrize("content", [b"", b"1 2 3\n", b"\x93NUMPY\x01\x00\x76"])
def test_refuses_another_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ids.npy").write_bytes(content)
    with pytest.raises(TokensError, match=r"is no whole \.npy file of numbers"):
        read_tokens(tmp_path / "ids.npy", 300)


def test_loads_no_pickles(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([1, 2], dtype=object), allow_pickle=True)
    with pytest.raises(TokensError, match=r"is no whole \.npy file of numbers"):
        read_tokens(tmp_path / "ids.npy", 300)


def test_names_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(TokensError, match=f"cannot read {missing}: .*; give a .npy file"):
            read_tokens(missing, 300)
        with pytest.raises(TokensError, match=f"cannot read {missing}: .*; give a text file"):
            read_text(missing, tmp_path, 300)


def make_tokenizer() -> Tokenizer:
    """Of bytes, with a first token, and with the limits of a training run saved in it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | {"<s>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 256)]
    )
    return tokenizer


def test_reads_text_with_the_tokenizer_of_the_ingot(tmp_path: Path) -> None:
    text = "Größe € 😀\r\n" * 100
    plain = make_tokenizer().encode(text).ids
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=4096)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_bytes(text.encode())
    found = read_text(tmp_path / "text", tmp_path, 300)
    assert found.dtype == np.int64
    assert found.tolist() == plain and len(plain) == 1 + len(text.encode())


def test_refuses_text_it_cannot_encode(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some text")
    with pytest.raises(TokensError, match=r"no tokenizer\.json.*: --tokens FILE\.npy\."):
        read_text(tmp_path / "text", tmp_path, 300)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(TokensError, match="not UTF-8 text: byte 2 "):
        read_text(tmp_path / "text", tmp_path, 300)
    (tmp_path / "text").write_bytes(b"")
    with pytest.raises(TokensError, match="gives a sequence of 1 token ids"):
        read_text(tmp_path / "text", tmp_path, 300)
