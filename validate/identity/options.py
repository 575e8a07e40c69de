"""Whether ``trtexec.txt`` builds an engine that takes an ingot's calls.

The user's limits of batch and length are in no other file where no engine was built, so they are
read here; all else of the options follows from the graph's inputs. That is worked out apart from
``export.engine``, so that a fault of the one function that writes the file is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from ingot.export.ingot import Manifest

# Sums in full precision, in the types that the graph has.
ALWAYS = ("--stronglyTyped", "--noTF32")
BOUNDS = ("min", "opt", "max")
# A past may be empty; no other size may be 0.
PAST = "past_sequence"

Shapes = Mapping[str, tuple[int, ...]]


def options_problem(text: str, manifest: Manifest) -> str:
    """What is wrong of the options, in a sentence without a full stop; empty where nothing is.

    Args:
        text: of ``trtexec.txt``.
        manifest: of the ingot.
    """
    lines = text.splitlines()
    profiles = 2 if manifest.states else 1
    wanted = [*ALWAYS]
    for index in range(profiles):
        wanted += [f"--profile={index}", *(f"--{bound}Shapes=" for bound in BOUNDS)]
    starts = [line.split("=")[0] + "=" if "Shapes=" in line else line for line in lines]
    if starts != wanted:
        return f"has the options {' '.join(starts)}, and not {' '.join(wanted)}"
    given = [line.partition("=")[2] for line in lines if "Shapes=" in line]
    for index in range(profiles):
        bounds = given[len(BOUNDS) * index :][: len(BOUNDS)]
        problem = _profile_problem([_shapes(each) for each in bounds], manifest, decode=index > 0)
        if problem:
            return f"has a profile {index} {problem}"
    return ""


def _shapes(text: str) -> Shapes:
    """``name:1x2,...`` by name; empty where it is something else."""
    try:
        pairs = [each.rsplit(":", 1) for each in text.split(",")]
        return {name: tuple(map(int, sizes.split("x"))) for name, sizes in pairs}
    except ValueError:
        return {}


def _profile_problem(bounds: Sequence[Shapes], manifest: Manifest, *, decode: bool) -> str:
    """What is wrong of the least, usual and largest shapes of one profile."""
    found: list[dict[str, int]] = []
    for shapes in bounds:
        if list(shapes) != [each.name for each in manifest.inputs]:
            return "of other inputs than the graph's"
        sizes: dict[str, int] = {}
        for tensor in manifest.inputs:
            shape = shapes[tensor.name]
            if len(shape) != len(tensor.shape):
                return f"that has {tensor.name} of {len(shape)} dimensions"
            for dimension, size in zip(tensor.shape, shape, strict=True):
                known = dimension if isinstance(dimension, int) else sizes.get(dimension, size)
                if size != known:
                    return f"that has {tensor.name} of shape {list(shape)}"
                if isinstance(dimension, str):
                    sizes[dimension] = size
        found.append(sizes)
    least, usual, most = found
    for name, size in least.items():
        if size != (0 if name == PAST else 1):
            return f"whose least {name} is {size}"
        if any(one[name] > other[name] for one, other in pairwise(found)):
            return f"whose sizes of {name} are not in order"
    if decode and most["sequence"] != 1:
        return f"for decode of up to {most['sequence']} tokens"
    if usual.get("total_sequence", usual["sequence"]) != usual.get(PAST, 0) + usual["sequence"]:
        return "whose usual past and call are not of the usual sequence"
    # As long with a past as without one, less the new token.
    total = most.get("total_sequence", most["sequence"])
    if most.get(PAST, total - 1) != total - 1 or (not decode and most["sequence"] != total):
        return "whose longest past, call and sequence are not of one length"
    return ""
