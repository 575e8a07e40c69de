"""The parts of ``benchmarks/weights.py``: what weights in fewer bits cost."""
