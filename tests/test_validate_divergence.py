"""Divergences against PyTorch's, and what a model knows against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ingot.validate.judge.divergence import Divergences, information


def logits(seed: int, tokens: int = 50, scale: float = 3.0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((tokens, 37)) * scale
    return drawn.astype(np.float32)


def test_adds_up_what_pytorch_says_of_all_tokens() -> None:
    truth, found = logits(0), logits(0) + logits(1, scale=0.3)
    sums = Divergences()
    for part in (slice(0, 20), slice(20, 21), slice(21, 50)):
        sums.add(truth[part], found[part])
    log_p, log_q = (torch.from_numpy(a).double().log_softmax(-1) for a in (truth, found))
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    result = sums.result
    assert result is not None
    np.testing.assert_allclose(result.found.kl, np.sort(kl.numpy()), rtol=1e-9)
    assert result.found.tokens == 50
    assert result.found.top1_agreement == (truth.argmax(-1) == found.argmax(-1)).mean()
    # The mean divergence from the mean, term by term.
    p = log_p.exp()
    mean = p.mean(0)
    expected = (p * (log_p - mean.log())).sum(-1).mean()
    assert result.information == pytest.approx(float(expected), rel=1e-9)
    assert result.share == pytest.approx(float(kl.mean() / expected), rel=1e-9)


def test_a_model_that_ignores_its_context_knows_nothing() -> None:
    same = np.tile(logits(3, tokens=1), (8, 1))
    sums = Divergences()
    sums.add(same, same)
    assert sums.result is not None
    assert sums.result.information == pytest.approx(0.0, abs=1e-12)
    one_hot = np.eye(8)
    assert information(one_hot.mean(0), 0.0) == pytest.approx(math.log(8))


def test_what_is_not_finite_is_no_divergence_and_nothing_is_none() -> None:
    found = logits(1, tokens=3)
    found[1, 4] = np.nan
    sums = Divergences()
    sums.add(logits(0, tokens=3), found)
    assert sums.result is not None and math.isnan(sums.result.found.kl_mean)
    assert Divergences().result is None
