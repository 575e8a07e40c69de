"""Whether a graph and the safetensors file beside it say the same of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ingot.plugins.errors import named
from ingot.validate.identity.weights_files import FileFormatError, Tensor, read_header
from ingot.validate.identity.weights_graph import Graph, Weight


def disagreements(graph: Graph, folder: Path) -> Iterator[str]:
    """Where a graph's words on its external data are not those of the file, one sentence each.

    Args:
        graph: of an ingot.
        folder: of the ingot.

    Raises:
        FileFormatError: a file that is not there, or no safetensors file.
    """
    external = [each for each in graph.weights.values() if each.external is not None]
    headers = {}
    for location in sorted({each.external.location for each in external if each.external}):
        if Path(location).name != location or not (folder / location).is_file():
            raise FileFormatError(
                f"the graph has weights in {named(location)}, which is no file of the ingot; "
                "export it again."
            )
        headers[location] = read_header(folder / location)
    for weight in external:
        yield from _disagreement(weight, headers)
    used = {each.tensor.name for each in external}
    for location, header in headers.items():
        for name in header.keys() - used:
            yield f"{location} holds {named(name)}, which the graph does not use"
        end, last = 0, ""
        for tensor in sorted(header.values(), key=lambda each: (each.begin, each.nbytes)):
            if tensor.begin < end:
                yield f"{location}: {named(tensor.name)} overlaps {named(last)}"
            end, last = max(end, tensor.begin + tensor.nbytes), tensor.name


def _disagreement(weight: Weight, headers: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    tensor, external = weight.tensor, weight.external
    assert external is not None
    entry = headers[external.location].get(tensor.name)
    if entry is None:
        yield f"{external.location} has no {named(tensor.name)}, which the graph has there"
        return
    length = tensor.nbytes if external.length is None else external.length
    for what, says, holds in (
        ("dtype", tensor.dtype, entry.dtype),
        ("shape", list(tensor.shape), list(entry.shape)),
        ("first byte", external.offset, entry.begin),
        ("length", length, entry.nbytes if entry.dtype == tensor.dtype else length),
    ):
        if says != holds:
            yield (
                f"{named(tensor.name)}: its {what} is {says} in the graph and {holds} in "
                f"{external.location}"
            )
