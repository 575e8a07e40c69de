"""What hatchling runs before a build: an editable install finds its links, or they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PARTS = ("export", "graphs", "plugins", "runtime", "validate")
# A source distribution has none of them, and a copy of a checkout may have lost them.
LINKS = {".editable/ingot": "../ingot", **{f"ingot/{part}": f"../{part}" for part in PARTS}}


class Links(BuildHookInterface):  # type: ignore[type-arg]
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            return
        for name, target in LINKS.items():
            link = Path(self.root, name)
            if link.is_dir():
                continue
            # In its place may be a file that holds the target, as git writes it without links.
            link.unlink(missing_ok=True)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(target, target_is_directory=True)
