"""Whether a process comes to its end."""

from __future__ import annotations

import time
from pathlib import Path


def ends(pid: int, seconds: float = 5.0) -> bool:
    """Whether it is gone within some time, or a zombie that nobody has waited for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
