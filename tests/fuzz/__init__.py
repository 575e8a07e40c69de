"""Fuzzers of what somebody else may have written: ``python -m fuzz.ingot`` and ``fuzz.checkpoint``.

Each makes numbered folders with something wrong in them, opens them, and counts what comes of it.
The same seed and number make the same folder.
"""
