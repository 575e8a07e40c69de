"""A copy of the repository as a newcomer has it, to run the commands of the documents in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def make_clone(folder: Path) -> Path:
    """The tracked files and this environment, so that nothing is installed again."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # With its mode: scripts are run. And links as links: the package is made of them.
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    environment = folder / ".venv"
    environment.mkdir()
    for entry in Path(sys.prefix).iterdir():
        (environment / entry.name).symlink_to(entry)
    # Newer than the copied pyproject.toml, so that make has nothing to install.
    (environment / ".installed").unlink(missing_ok=True)
    (environment / ".installed").touch()
    return folder


def run(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a line in a shell, in a copy."""
    # The copy's own packages, not those of the editable install.
    variables = {**os.environ, "PYTHONPATH": str(cwd), "COLUMNS": "100"}
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=variables, capture_output=True, text=True
    )
