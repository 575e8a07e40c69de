"""Opening an ingot: the function that a program begins with stays what it is."""

from __future__ import annotations

import importlib
import pkgutil

import ingot.runtime
from ingot.runtime.loading import load


def test_no_module_of_the_runtime_hides_it() -> None:
    # A submodule, once imported, is an attribute of its package.
    for module in pkgutil.iter_modules(ingot.runtime.__path__, "ingot.runtime."):
        if module.name.rpartition(".")[2] != "triton_model":
            importlib.import_module(module.name)
    assert ingot.runtime.load is load
