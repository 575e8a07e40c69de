"""Small tokenizers of the shapes that released models have, trained on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SENTENCES = ["the quick brown fox jumps over the lazy dog, thrice; cafe au lait for 120 guests"] * 4
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
Shape = Callable[[], Tokenizer]


def byte_level() -> Tokenizer:
    """As of GPT-2, Granite and OLMoE."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=ALPHABET, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    return made


def with_first_token() -> Tokenizer:
    """The same, with a first token before every text, and text put into one form before."""
    made = byte_level()
    made.normalizer = normalizers.NFC()
    made.post_processor = _first("<|endoftext|>", 0)
    return made


def byte_fallback() -> Tokenizer:
    """As of Llama and JetMoE: pieces with a mark for the space, and bytes for the rest."""
    made = Tokenizer(models.BPE())
    mark = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    made.normalizer = normalizers.Sequence(mark)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    made.train_from_iterator(SENTENCES, trainer)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.post_processor = _first("<s>", 1)
    raw = json.loads(made.to_str())
    raw["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    raw["added_tokens"] = raw["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(raw))


def unigram() -> Tokenizer:
    """As of T5 and other models of sentencepiece's own kind."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=70, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    return made


def word_piece() -> Tokenizer:
    """As of BERT, in lower case, between two tokens."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    made.train_from_iterator(SENTENCES, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def _first(token: str, number: int) -> Any:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )


SHAPES: dict[str, Shape] = {
    shape.__name__: shape
    for shape in (byte_level, with_first_token, byte_fallback, unigram, word_piece)
}
