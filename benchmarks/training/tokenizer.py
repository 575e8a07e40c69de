"""A byte-level BPE tokenizer, as those of OLMoE, Granite and Mamba2 are, of few tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1024
# Between documents, and at the end of a text. Padding has an id of its own, since the embedding of
# a padding token takes no gradient from where the token stands.
END, PADDING = "<|endoftext|>", "<|padding|>"
END_ID, PADDING_ID = 0, 1


def train_tokenizer(documents: Iterable[str]) -> Tokenizer:
    """A tokenizer of ``VOCABULARY`` tokens that any text goes through unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, documents: Iterable[str]) -> list[int]:
    """The ids of all documents, ``END_ID`` behind each."""
    return [
        token
        for encoded in tokenizer.encode_batch(list(documents))
        for token in (*encoded.ids, END_ID)
    ]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and the file that keeps transformers from changing how it cuts."""
    tokens = {"bos_token": END, "eos_token": END, "pad_token": PADDING}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    wrapped.save_pretrained(folder)
