"""The training itself: AdamW with a warm-up and a cosine, on one thread, the same each time."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from benchmarks.training.models import Recipe

SEED = 20
DECAY = 0.1
LAST_RATE = 0.02  # of the highest
LONGEST_STEP = 1.0  # the norm that gradients are cut to
REPORTED = 100


def train(model: Any, recipe: Recipe, tokens: torch.Tensor) -> None:
    """Fit ``model`` to the stream ``tokens [N]`` int64.

    transformers adds the load-balancing loss by itself where a config asks for router logits.
    """
    random = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(_groups(model), lr=recipe.rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: _rate(at, recipe))
    routed = hasattr(model.config, "output_router_logits")
    extra = {"output_router_logits": True} if routed else {}
    model.train()
    total, began = 0.0, time.monotonic()
    for step in range(1, recipe.steps + 1):
        starts = torch.randint(len(tokens) - recipe.length, (recipe.rows,), generator=random)
        batch = torch.stack([tokens[start : start + recipe.length] for start in starts.tolist()])
        loss = model(batch, labels=batch, use_cache=False, **extra).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LONGEST_STEP)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % REPORTED == 0:
            seconds = time.monotonic() - began
            print(f"  step {step:5}  loss {total / REPORTED:.3f}  {seconds:.0f} s", flush=True)
            total = 0.0
    model.eval()


@torch.no_grad()
def nats_per_token(model: Any, tokens: torch.Tensor, window: int = 256) -> float:
    """Mean cross entropy of the stream ``tokens [N]``, read in windows that know nothing before."""
    total, count = 0.0, 0
    for piece in tokens.split(window):
        if len(piece) < 2:
            continue
        scores = model(piece[None, :-1], use_cache=False).logits[0].double().log_softmax(-1)
        total -= scores.gather(1, piece[1:, None]).sum().item()
        count += len(piece) - 1
    return total / count


def unigram_nats_per_token(train_tokens: torch.Tensor, tokens: torch.Tensor, size: int) -> float:
    """Mean cross entropy of ``tokens`` under the frequencies of ``train_tokens`` and one more."""
    counts = torch.bincount(train_tokens, minlength=size).double() + 1
    return float(-(counts / counts.sum()).log()[tokens].mean())


def _groups(model: Any) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases, embeddings and what a scan is made of do not."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and "embed" not in name and "conv1d" not in name
        (matrices if decays else others).append(parameter)
    return [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]


def _rate(at: int, recipe: Recipe) -> float:
    """The share of the highest learning rate at update ``at``."""
    if at < recipe.warm_up:
        return (at + 1) / recipe.warm_up
    done = (at - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
