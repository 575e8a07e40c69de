"""Packages of the registry that are not installed: fetched in one version, by their hash."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ingot.plugins.errors import IngotError
from ingot.plugins.whole import sha256


class FetchError(IngotError):
    """A package that does not come, or another one than was pinned."""


@dataclass(frozen=True)
class Package:
    """One file of the registry.

    Attributes:
        name: as the registry has it.
        version: the one that was tried.
        file: its name there, a wheel or a source archive.
        sha256: of the file; what is in it is run or trusted, so the version alone does not do.
    """

    name: str
    version: str
    file: str
    sha256: str

    def fetch(self, folder: Path) -> Path:
        """The file, downloaded into ``folder`` where it is not there yet.

        Raises:
            FetchError: pip fetches none, or one with another hash.
        """
        path = folder / self.file
        if not path.is_file():
            self._download(folder)
        found = sha256(path)
        if found != self.sha256:
            raise FetchError(
                f"{path} has SHA-256 {found} in place of {self.sha256}; remove it and try again."
            )
        return path

    def _download(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        wanted = folder / f"{self.name}.txt"
        wanted.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n")
        kind = "--only-binary" if self.file.endswith(".whl") else "--no-binary"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        which = ["--no-deps", "--require-hashes", kind, self.name, "--requirement", wanted]
        done = subprocess.run(
            [*pip, *which, "--dest", folder], capture_output=True, text=True, check=False
        )
        if done.returncode or not (folder / self.file).is_file():
            said = done.stderr.strip()[-400:] or "nothing"
            raise FetchError(f"pip fetched no {self.file}; it says: {said}")
