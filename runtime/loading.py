"""From an ingot's folder to the session that runs it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from ingot.export.ingot import GRAPH, Manifest, ManifestError
from ingot.plugins.errors import shown
from ingot.runtime.session import Session, SessionError
from ingot.runtime.tokens import whole

# ONNX Runtime hangs when asked for more threads than the system gives.
MOST_THREADS = 1024


def load(
    path: Path | str,
    *,
    threads: int = 0,
    verify: bool = True,
    allow_failed: bool = False,
    graph_only: bool = False,
    operators: Path | str | None = None,
    advance: Callable[[int], None] = lambda _bytes: None,
) -> Session:
    """Open an ingot.

    Args:
        path: the ingot folder.
        threads: of the backend; 0 lets it choose.
        verify: compare the SHA-256 of every file with the manifest, not only sizes. Either way all
            that is opened must be listed there. The graph that runs is the one that was hashed;
            weights are read where they lie, so nobody may write to the folder of an open session.
        allow_failed: open an ingot whose validation failed.
        graph_only: run the graph on ONNX Runtime, also where the ingot holds an engine.
        operators: of an ingot that runs on Ingot's own kernels, the library that has them, which is
            a program that you vouch for, such as the one in the folder; by default that of this
            installation. Either is loaded only where it is the one that the ingot was made with.
        advance: told the bytes compared; gigabytes of weights take a while.

    Raises:
        IngotError: not an ingot, a damaged one, or one that failed its validation.
    """
    count = whole(threads)
    if count is None or not 0 <= count <= MOST_THREADS:
        raise SessionError(f"threads is {shown(threads)}; it must be 0 to {MOST_THREADS}.")
    folder = Path(path)
    manifest = Manifest.read(folder)
    manifest.check_files(folder, hashes=verify, advance=advance)
    if manifest.verdict == "failed" and not allow_failed:
        raise SessionError(
            f"{folder} failed its validation, so its numbers are wrong; see {folder / 'report'}. "
            "Export it again, or give --allow-failed to run it all the same."
        )
    if manifest.engine is not None and not graph_only:
        from ingot.runtime.trt import TrtSession

        return TrtSession(folder, manifest, hashed=verify)
    if manifest.precision == "bfloat16":
        raise SessionError(
            f"{folder} holds a bfloat16 graph and no engine, and ONNX Runtime's CPU provider "
            "computes no bfloat16; export with --precision fp32 to run it here."
        )
    from ingot.runtime.ort import OrtSession

    graph = _graph(folder, manifest, verify)
    library = None if operators is None else Path(operators)
    return OrtSession(folder, manifest, threads=count, graph=graph, operators=library)


def _graph(folder: Path, manifest: Manifest, verify: bool) -> bytes | None:
    """The graph's file, hashed again as it was read: its path may hold another one by then."""
    if not verify:
        return None
    path = folder / GRAPH
    try:
        graph = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror or error}.") from error
    if hashlib.sha256(graph).hexdigest() != manifest.files[GRAPH].sha256:
        raise ManifestError(f"{path} was changed while the ingot was opened; open it again.")
    return graph
