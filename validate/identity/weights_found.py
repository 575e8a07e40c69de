"""What a comparison of weights found, in sentences, and where the first of it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from ingot.plugins.errors import named
from ingot.validate.identity.weights_compare import HALF_UNIT, Difference
from ingot.validate.identity.weights_names import layer_of
from ingot.validate.result import Check, Location

# Sentences that a report has room for.
MOST_PROBLEMS = 20
MOST_REASONS = 3


@dataclass
class Found:
    """What one comparison found so far.

    Attributes:
        described: whether the names and factors of the architecture are known here.
        compared: how many weights.
        problems: in one sentence each.
        location: of the first.
        unknown: why some weights could not be compared.
        read: names of the tensors that some weight was compared with.
        parameters: what was compared, by its names in a bare model.
    """

    described: bool
    compared: int = 0
    problems: list[str] = field(default_factory=list)
    location: Location | None = None
    unknown: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)

    def wrong(
        self, weight: str, operator: str, sentence: str, ratio: float = float("inf"), of: str = ""
    ) -> None:
        """A problem with a weight, and where it is.

        Args:
            weight: of the graph.
            operator: that reads it.
            sentence: what is wrong, without a full stop.
            ratio: its error over that of one rounding.
            of: the tensor that differs, where it has another name.
        """
        layer = layer_of(weight)
        where = f"layer {layer}, " if layer is not None else ""
        stored = f" (stored in {named(weight)})" if of not in ("", weight) else ""
        self.problems.append(f"{where}{named(of or weight)}: {sentence}{stored}")
        if self.location is None:
            self.location = Location(layer, operator, weight, ratio, is_weight=True)

    def different(self, weight: str, operator: str, difference: Difference) -> None:
        """A tensor that a weight differs from."""
        factor, name = difference.factor, difference.tensor.name
        if factor is not None and not self.described:
            self.unknown.append(
                f"{named(name)} is stored times {factor:.6g}, and no rule says that its "
                "architecture has that factor there"
            )
            return
        whole = "" if factor is None else f", and all are {factor:.6g} times what they should be"
        ratio = difference.error / HALF_UNIT[difference.dtype]
        self.wrong(weight, operator, f"{difference}{whole}", ratio, name)

    def nameless(self, weight: str, operator: str) -> None:
        """A weight that the checkpoint has no name for."""
        if self.described:
            self.wrong(weight, operator, "the checkpoint has no tensors of this name")
        else:
            self.unknown.append(
                f"no rule says what {named(weight)} of this architecture is made of"
            )

    def missing(self, tensor: str, of: str) -> None:
        """A tensor that no weight was compared with.

        Args:
            tensor: its name.
            of: what it is of, in words.
        """
        # It may be a part of what no rule is known for.
        if self.described or not self.unknown:
            self.problems.append(f"{named(tensor)} {of} is in no weight of the graph")

    def check(self) -> Check:
        """All of it."""
        problems = self.problems[:MOST_PROBLEMS]
        more = len(self.problems) - len(problems)
        if more:
            problems.append(f"{more} more sentences of the same kinds")
        reasons = self.unknown[:MOST_REASONS]
        if len(self.unknown) > len(reasons):
            reasons.append(f"and {len(self.unknown) - len(reasons)} more")
        return Check("weights", self.compared, tuple(problems), self.location, "; ".join(reasons))
