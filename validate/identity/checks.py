"""Every check of an ingot that needs no run, over one fresh capture of its graph."""

from __future__ import annotations

from collections.abc import Callable

from ingot.plugins.errors import IngotError
from ingot.runtime.onnxruntime_session import said
from ingot.validate.identity.contract import check_contract
from ingot.validate.identity.graph import check_graph
from ingot.validate.identity.subject import Subject as Subject
from ingot.validate.identity.weights import check_weights
from ingot.validate.result import Check

CHECKS: dict[str, Callable[[Subject], Check]] = {
    "weights": check_weights,
    "graph": check_graph,
    "contract": check_contract,
}


def checks(subject: Subject) -> tuple[Check, ...]:
    """The weights, the graph and the contract, in the order in which a fault is looked for.

    What keeps a check from being made, such as a task that the checkpoint has no head for, is a
    problem that it has found.
    """
    return tuple(_made(name, check, subject) for name, check in CHECKS.items())


def _made(name: str, check: Callable[[Subject], Check], subject: Subject) -> Check:
    try:
        return check(subject)
    except IngotError as error:
        return Check(name, 0, (" ".join(str(error).split()).removesuffix("."),))
    # A file that is no graph may make onnx and numpy raise anything.
    except Exception as error:
        return Check(name, 0, (f"it cannot be compared ({type(error).__name__}: {said(error)})",))
