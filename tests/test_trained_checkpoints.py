"""Checkpoints that were trained: what they know of a held-out text, here and in transformers.

Of random weights a perplexity says nothing. tests/data/trained/README.md says how these were made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import MakeIngot
from oracle import every_other_is_slow
from transformers import AutoModelForCausalLM, AutoTokenizer

from ingot.export.ingot import Manifest
from ingot.runtime.loading import load
from ingot.runtime.session import Ids
from ingot.runtime.tokenizer import load_tokenizer
from ingot.validate.api import validate
from ingot.validate.truth.recording import CHOSEN_EXPERTS, ROUTER_LOGITS
from ingot.validate.truth.taps import TappedSession

FAMILIES = ("olmoe", "jetmoe", "granite", "mamba2", "granitemoehybrid")
ROUTED = ("olmoe", "jetmoe", "granitemoehybrid")
# Tokens read at a time, each run without what stands before it.
WINDOW = 256
# Nats a token below the best of all predictions that look at no other token.
LEARNED = 0.9
# What makes router logits in transformers, by the end of its name.
ROUTERS = (".mlp.gate", ".router.layer", ".block_sparse_moe.router")
# The load of the busiest expert of some router, in means of that router.
UNEVEN = 1.5

Trained = Callable[[str], Path]
Counts = npt.NDArray[np.int64]


class Subject:
    """One family: its checkpoint, transformers' model of it, its ingot and the text in tokens."""

    def __init__(self, folder: Path, ingot: Path, text: str) -> None:
        self.folder, self.ingot = folder, ingot
        self.oracle: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokens = np.array(load_tokenizer(ingot).encode(text).ids)
        self.text = text

    def windows(self) -> list[Ids]:
        """``[1, T]`` each; T is ``WINDOW`` of all but the last."""
        return [
            self.tokens[None, begin : begin + WINDOW]
            for begin in range(0, len(self.tokens), WINDOW)
        ]


@pytest.fixture(scope="module", params=every_other_is_slow(FAMILIES))
def subject(
    request: pytest.FixtureRequest, trained: Trained, trained_text: str, make_ingot: MakeIngot
) -> Subject:
    folder = trained(request.param)
    return Subject(folder, make_ingot(folder, "ort"), trained_text)


def _nats_per_token(logits: Callable[[Ids], npt.NDArray[Any]], windows: list[Ids]) -> float:
    """Mean cross entropy of each token but a window's first, in float64."""
    losses: list[float] = []
    for window in windows:
        scores = logits(window)[0, :-1].astype(np.float64)
        highest = scores.max(-1, keepdims=True)
        scores -= highest + np.log(np.exp(scores - highest).sum(-1, keepdims=True))
        losses.extend(-np.take_along_axis(scores, window[0, 1:, None], 1)[:, 0])
    return float(np.mean(losses))


def _unigram_nats_per_token(tokens: Ids) -> float:
    """Entropy of the text's own frequencies: no prediction that sees no other token is below."""
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    return float(-(shares * np.log(shares)).sum())


@torch.no_grad()
def _oracle_logits(model: Any, window: Ids) -> npt.NDArray[Any]:
    logits: npt.NDArray[Any] = model(torch.from_numpy(window), use_cache=False).logits.numpy()
    return logits


def test_encodes_the_text_as_transformers_does(subject: Subject) -> None:
    tokenizer = AutoTokenizer.from_pretrained(subject.folder)
    assert tokenizer(subject.text)["input_ids"] == subject.tokens.tolist()
    assert tokenizer.decode(subject.tokens) == subject.text


def test_knows_more_of_a_held_out_text_than_its_frequencies(subject: Subject) -> None:
    windows = subject.windows()
    session = load(subject.ingot)

    def logits(window: Ids) -> npt.NDArray[Any]:
        session.reset(1, window.shape[1])
        return session.step(window, np.ones_like(window))

    expected = _nats_per_token(lambda window: _oracle_logits(subject.oracle, window), windows)
    assert _nats_per_token(logits, windows) == pytest.approx(expected, rel=1e-5)
    assert expected < _unigram_nats_per_token(subject.tokens) - LEARNED


@pytest.mark.parametrize("subject", ROUTED, indirect=True)
def test_loads_its_experts_unevenly(subject: Subject) -> None:
    expected, found = _oracle_loads(subject), _loads(subject)
    assert len(expected) == len(found)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert max(load.max() / load.mean() for load in found) > UNEVEN


def _loads(subject: Subject) -> list[Counts]:
    """Of each router of the ingot, how many tokens took each expert."""
    session = TappedSession(subject.ingot, Manifest.read(subject.ingot))
    names = [name.replace(ROUTER_LOGITS, CHOSEN_EXPERTS) for name in session.routers]
    loads = []
    for window in subject.windows():
        session.reset(1, window.shape[1])
        session.step(window, np.ones_like(window))
        loads.append([session.tapped[name].sum(0) for name in names])
    return list(np.sum(loads, axis=0))


@torch.no_grad()
def _oracle_loads(subject: Subject) -> list[Counts]:
    """The same of transformers, by the largest logits of each router in the order they run."""
    config = subject.oracle.config
    experts, chosen = config.num_local_experts, config.num_experts_per_tok
    loads: dict[str, Counts] = {}

    def count(name: str, logits: torch.Tensor) -> None:
        taken = logits.topk(chosen).indices.flatten()
        counts = np.bincount(taken.numpy(), minlength=experts)
        loads[name] = loads.get(name, np.zeros(experts, np.int64)) + counts

    with contextlib.ExitStack() as hooks:
        for name, module in subject.oracle.named_modules():
            if name.endswith(ROUTERS):
                hook = module.register_forward_hook(
                    lambda _, __, out, name=name: count(
                        name, out[0] if isinstance(out, tuple) else out
                    )
                )
                hooks.callback(hook.remove)
        for window in subject.windows():
            _oracle_logits(subject.oracle, window)
    return list(loads.values())


@pytest.mark.slow
def test_passes_a_validation(subject: Subject) -> None:
    report = validate(subject.ingot, subject.folder)
    assert report.verdict == "passed", report.failures
