"""What a validation asked of an ingot, and what it did not: plain data.

A verdict says nothing about what was never run. So the calls that a session was given are
recorded, and this is what they add up to: sizes, paddings and experts, and the *parts*, the shapes
of use that a default validation is to have asked for. A part that is not covered makes the verdict
``passed, in part``; what no default validation asks is named in ``not_asked``, and is no fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# What judged a part: the delivered session by itself, or its graph with the truth's experts where
# flips left nothing of the former.
How = Literal["session", "replayed"]


@dataclass(frozen=True)
class Part:
    """One shape of use, such as the decode of one sequence.

    Attributes:
        name: in words, as a person would ask for it.
        tokens: how many were compared in calls of this shape.
        how: what judged it; None where nothing did.
        why: it is not covered, in one sentence without a full stop; empty where it is.
    """

    name: str
    tokens: int
    how: How | None
    why: str = ""

    @property
    def covered(self) -> bool:
        """Whether anything of this shape was compared."""
        return self.how is not None


@dataclass(frozen=True)
class LeftOut:
    """What was computed and not compared.

    Attributes:
        what: ``tokens`` or ``tensors``.
        count: how many.
        of: of how many.
        why: in one sentence without a full stop.
    """

    what: Literal["tokens", "tensors"]
    count: int
    of: int
    why: str


@dataclass(frozen=True)
class Experts:
    """Which experts of one router were run.

    Attributes:
        router: what it is called, such as ``layer 3``.
        chosen: by the router itself, for some token.
        forced: never chosen, and run because they were given.
        never: neither.
    """

    router: str
    chosen: tuple[int, ...]
    forced: tuple[int, ...]
    never: tuple[int, ...]


@dataclass(frozen=True)
class Coverage:
    """What the calls of one validation add up to, counted from the calls that were made.

    Attributes:
        calls: of the delivered session.
        rows: the batch sizes, ascending.
        lengths: tokens of a call, ascending.
        positions: tokens of the longest sequence.
        context: the longest that the model takes; None where nothing limits it.
        paddings: such as ``left``, ``right``, ``all of a row``.
        ids: different token ids that were fed.
        vocab_size: of so many.
        chunks: of a scan, in the longest call; 0 for a model without.
        experts: by router.
        parts: the shapes of use.
        left_out: what was computed and not compared.
        not_asked: what no call asked, in words, such as a context that is longer than was fed.
    """

    calls: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    positions: int
    context: int | None
    paddings: tuple[str, ...]
    ids: int
    vocab_size: int
    chunks: int = 0
    experts: tuple[Experts, ...] = ()
    parts: tuple[Part, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    not_asked: tuple[str, ...] = ()

    @property
    def short(self) -> tuple[str, ...]:
        """The parts that are missing, each with the reason."""
        return tuple(f"{part.name}: {part.why}" for part in self.parts if not part.covered)

    def summary(self) -> dict[str, Any]:
        """What ``ingot.json`` keeps of it."""
        covered = [part for part in self.parts if part.covered]
        result: dict[str, Any] = {
            "calls": self.calls,
            "rows": list(self.rows),
            "lengths": list(self.lengths),
            "positions": self.positions,
            "context": self.context,
            "paddings": list(self.paddings),
            "ids": self.ids,
            "vocab_size": self.vocab_size,
            "parts": len(self.parts),
            "covered": len(covered),
            "replayed": [part.name for part in covered if part.how == "replayed"],
        }
        if self.chunks:
            result["chunks"] = self.chunks
        if self.experts:
            result["experts"] = {
                each.router: {
                    "chosen": len(each.chosen),
                    "forced": list(each.forced),
                    "never": list(each.never),
                }
                for each in self.experts
            }
        if self.left_out:
            result["left_out"] = [
                f"{left.count} of {left.of} {left.what}: {left.why}" for left in self.left_out
            ]
        if self.not_asked:
            result["not_asked"] = list(self.not_asked)
        return result
