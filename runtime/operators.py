"""The library of Ingot's own kernels that a graph needs: which one is loaded, and from where.

A library is a program, and a folder may be anybody's. So the one that lies in an ingot is what was
validated, and not what is loaded: loaded is this installation's, or one that somebody names, and
either only where it is the same to the byte.
"""

from __future__ import annotations

from pathlib import Path

from ingot.export.ingot import INGOT, LIBRARY, Manifest
from ingot.plugins.cpu.operators import INSTALLED, OperatorsError
from ingot.plugins.whole import sha256


def libraries(folder: Path, manifest: Manifest, named: Path | None = None) -> tuple[Path, ...]:
    """What a session registers before it opens an ingot's graph.

    Args:
        folder: the ingot.
        manifest: of the ingot.
        named: a library that the user vouches for; None for this installation's.

    Raises:
        OperatorsError: it is not there, or not the one that the ingot was validated with.
    """
    if manifest.kernels != INGOT:
        return ()
    # A name without a folder would be looked for where the system keeps libraries.
    library = INSTALLED if named is None else named.absolute()
    inside = folder / LIBRARY
    ways = (
        f"give --operators {inside} if you would run a program of whoever made it, install the "
        "Ingot that it was made with and `make cpu` there, or export it again with --kernels ort"
    )
    try:
        if not library.is_file():
            raise OperatorsError(
                f"{folder} runs on Ingot's own kernels, and {library} is missing: {ways}."
            )
        # Compared whatever is verified of the folder: this one is run.
        same = sha256(library) == manifest.files[LIBRARY].sha256
    except OSError as error:
        why = error.strerror or error
        raise OperatorsError(
            f"{folder} runs on Ingot's own kernels, and {library} cannot be read ({why}): {ways}."
        ) from error
    if not same:
        raise OperatorsError(
            f"{folder} was validated with another library of kernels than {library}: {ways}."
        )
    return (library,)
