"""Train the small checkpoints of tests/data/trained on text in the public domain.

Run with ``PYTHONPATH=. .venv/bin/python benchmarks/train_tiny.py``, or name some of ``olmoe``,
``jetmoe``, ``granite``, ``mamba2`` and ``granitemoehybrid``. It fetches its texts with pip and apt
(``benchmarks/training/texts.py`` says which, and why they are free), trains each family on one
thread from a fixed seed, and writes its folder, ``sample.txt`` and a line of the README's table.
Two runs on one machine give the same bytes; other processors sum in other orders.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.training.loop import SEED, nats_per_token, train, unigram_nats_per_token
from benchmarks.training.models import Recipe, recipes
from benchmarks.training.texts import read_texts
from benchmarks.training.tokenizer import (
    VOCABULARY,
    save_tokenizer,
    token_stream,
    train_tokenizer,
)

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    known = recipes()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(known))
    parser.add_argument("--texts", type=Path, default=ROOT / "build" / "texts", help="a cache")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "data" / "trained")
    asked = parser.parse_args()
    unknown = set(asked.families) - set(known)
    if unknown:
        parser.error(f"no recipe for {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    asked.texts.mkdir(parents=True, exist_ok=True)
    texts = read_texts(asked.texts)
    tokenizer = train_tokenizer(texts.train)
    learned = torch.tensor(token_stream(tokenizer, texts.train))
    held_out = torch.tensor(token_stream(tokenizer, texts.held_out))
    sample = torch.tensor(tokenizer.encode(texts.sample).ids)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "sample.txt").write_text(texts.sample)
    unseen = (held_out, sample)
    unigram = [unigram_nats_per_token(learned, each, VOCABULARY) for each in unseen]
    print(f"unigram: {unigram[0]:.3f} held out, {unigram[1]:.3f} sample")
    for family in asked.families or known:
        began = time.monotonic()
        model = _trained(known[family], learned)
        folder = asked.out / family
        _write(model, folder)
        save_tokenizer(tokenizer, folder)
        stored: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        losses = [nats_per_token(stored, each) for each in unseen]
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(
            f"| {family} | {stored.num_parameters() / 1e6:.2f} M | {size / 1e6:.1f} MB "
            f"| {losses[0]:.3f} | {losses[1]:.3f} | {time.monotonic() - began:.0f} s |",
            flush=True,
        )


def _trained(recipe: Recipe, tokens: torch.Tensor) -> Any:
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(recipe.config, dtype=torch.float32)
    train(model, recipe, tokens)
    return model


def _write(model: Any, folder: Path) -> None:
    """A checkpoint as they are released: bfloat16, with ``generation_config.json``."""
    model.to(torch.bfloat16).save_pretrained(folder)
    config = folder / "config.json"
    fields = json.loads(config.read_text())
    # Only loads of the model in training ask for it.
    fields.pop("output_router_logits", None)
    config.write_text(json.dumps(fields, indent=2) + "\n")
    # transformers makes it readable by its owner alone.
    (folder / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
