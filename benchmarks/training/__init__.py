"""The recipe of the trained checkpoints in tests/data/trained: texts, tokenizer, models, loop."""
