"""TensorRT-RTX's ONNX parser, made able to load plugins."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ingot.plugins.errors import IngotError

LIBRARY = "libtensorrt_rtx.so.1"
LINK = "libtensorrt_rtx.so"


def ensure_parser_can_load_plugins(folder: Path | None = None) -> None:
    """Put the name beside TensorRT-RTX's library by which its parser looks for it.

    At the first plugin node the parser opens ``libtensorrt_rtx.so``; the wheel has it only as
    ``libtensorrt_rtx.so.1``, and the process would end without a message.

    Args:
        folder: of the library; by default that of the wheel, and nothing is done without one.

    Raises:
        IngotError: the link is missing and may not be made.
    """
    if folder is None:
        found = find_spec("tensorrt_rtx_libs")
        if found is None or found.origin is None:
            return
        folder = Path(found.origin).parent
    link = folder / LINK
    if link.exists() or not (folder / LIBRARY).is_file():
        return
    try:
        link.symlink_to(LIBRARY)
    except OSError as error:
        # Another process may have made it meanwhile.
        if not link.exists():
            raise IngotError(
                f"TensorRT-RTX's parser needs {link}, which cannot be made here "
                f"({error.strerror}); run: ln -sf {LIBRARY} {link}"
            ) from error
