"""Planted errors and right exports: what a validation has to fail, and what it may not.

``make proof`` plants every fault of ``proof.faults`` in a copy of a kept ingot, or in what exports
or runs it, and validates it by the path of ``ingot validate``. Each has to be seen by what it says,
at the place that it says. The right exports of ``proof.rights`` have to pass.
"""
