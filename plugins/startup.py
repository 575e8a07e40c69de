"""What Ctrl-C and SIGTERM do while a program is still importing: they end it, without a trace.

Nothing is begun by then, so nothing is to be removed. ``command_line`` takes over once a command
runs. Standard library only, and little of it: what comes before ``begin`` is not covered.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def begin() -> None:
    """End at once on a signal, with the status that a command would have."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # One that is ignored, as in the background of a script, stays so.
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)


def done() -> None:
    """From here on Ctrl-C raises ``KeyboardInterrupt`` again, if ``begin`` had changed that."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, _frame: FrameType | None) -> None:
    # By the system's own call, since an exception would be told with its trace.
    os._exit(128 + number)
