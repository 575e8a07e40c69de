"""Figures of two distributions, against PyTorch's in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from benchmarks.on_weights.figures import ROWS, Floats, Ids, Mean, Scores, score

WINDOWS, LENGTH, VOCABULARY = 3, ROWS + 5, 11


@pytest.fixture(scope="module")
def fed() -> tuple[Ids, Floats, Floats]:
    """Windows, the truth's logits and a model's: neither logits are sums of one, nor small."""
    random = np.random.default_rng(0)
    windows = random.integers(0, VOCABULARY, (WINDOWS, LENGTH))
    logits = 300 + 4 * random.standard_normal((2, WINDOWS, LENGTH, VOCABULARY))
    return windows, *logits.astype(np.float32)


@pytest.fixture(scope="module")
def scores(fed: tuple[Ids, Floats, Floats]) -> Scores:
    windows, truth, found = fed
    given = {ids.tobytes(): logits for ids, logits in zip(windows, found, strict=True)}
    return score(lambda ids: given[ids.tobytes()], windows, truth)


def test_kl_is_of_the_truth_from_the_model(scores: Scores, fed: tuple[Ids, Floats, Floats]) -> None:
    _windows, truth, found = (torch.from_numpy(x).double() for x in fed)
    expected = kl_div(
        found.log_softmax(-1), truth.log_softmax(-1), reduction="none", log_target=True
    )
    np.testing.assert_allclose(scores.kl, expected.sum(-1).numpy(), rtol=1e-9)


def test_loss_is_of_the_token_that_follows(scores: Scores, fed: tuple[Ids, Floats, Floats]) -> None:
    windows, found = torch.from_numpy(fed[0]), torch.from_numpy(fed[2]).double()
    expected = cross_entropy(
        found[:, :-1].reshape(-1, VOCABULARY), windows[:, 1:].reshape(-1), reduction="none"
    ).reshape(WINDOWS, -1)
    np.testing.assert_allclose(scores.loss, expected.numpy(), rtol=1e-9)
    assert scores.perplexity == pytest.approx(float(expected.mean().exp()))


def test_the_likeliest_token_is_the_same_where_it_is(
    scores: Scores, fed: tuple[Ids, Floats, Floats]
) -> None:
    _windows, truth, found = fed
    for window, at in np.ndindex(WINDOWS, LENGTH):
        same = truth[window, at].tolist().index(max(truth[window, at])) == int(
            np.argsort(found[window, at])[-1]
        )
        assert scores.same[window, at] == same
    assert 0 < scores.same.mean() < 1


def test_a_model_is_no_distance_from_itself(fed: tuple[Ids, Floats, Floats]) -> None:
    windows, truth, _found = fed
    rows = iter(truth)
    itself = score(lambda _ids: next(rows), windows, truth)
    assert not itself.kl.any() and itself.same.all()


def test_windows_and_not_tokens_are_what_the_error_counts() -> None:
    """Each window says one thing many times; so often as it says it is no further evidence."""
    by_window = np.array([1.0, 2.0, 6.0])
    found = Mean.of(np.repeat(by_window[:, None], 50, axis=1))
    assert found.value == pytest.approx(3.0)
    assert found.error == pytest.approx(torch.tensor(by_window).std().item() / 3**0.5)


def test_scores_come_back_from_their_file(scores: Scores, tmp_path: Path) -> None:
    scores.save(tmp_path / "scores.npz")
    again = Scores.read(tmp_path / "scores.npz")
    for name in ("kl", "same", "loss"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scores, name))
