"""What was measured so far, kept after every process, so that a run that was cut goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingot.plugins.whole import write_whole

Sample = dict[str, Any]


@dataclass
class Samples:
    """Samples of each row, in the order of the rounds.

    Attributes:
        path: the file that holds them.
        settings: what they were measured by; others begin anew.
        rows: samples by a row's key.
    """

    path: Path
    settings: dict[str, Any]
    rows: dict[str, list[Sample]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> Samples:
        """Those of a run that was cut and had the same settings, or none."""
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept["settings"] == settings:
                return cls(path, settings, kept["rows"])
        return cls(path, settings)

    def of(self, key: str) -> list[Sample]:
        return self.rows.get(key, [])

    def add(self, key: str, sample: Sample) -> None:
        self.rows.setdefault(key, []).append(sample)
        self._write()

    def forget(self, keys: Iterable[str]) -> None:
        """After a run: the next one measures these anew, and a cut one keeps its others."""
        for key in keys:
            self.rows.pop(key, None)
        if self.rows:
            self._write()
        else:
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        write_whole(self.path, json.dumps({"settings": self.settings, "rows": self.rows}))
