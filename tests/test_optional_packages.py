"""The tests themselves on a machine that has a GPU and few packages: they are collected."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
OPTIONAL = ("tritonclient", "tensorrt", "tensorrt_rtx", "polygraphy")
# An import of such a module fails, and a search for it finds nothing.
WITHOUT = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_what_needs_a_gpu_is_collected_without_the_optional_packages() -> None:
    """One file that cannot be imported would end the run before its first test."""
    words = re.compile(rf"mark\.gpu|triton_server|\b({'|'.join(OPTIONAL)})\b")
    sources = {path: path.read_text() for path in TESTS.glob("test_*.py")}
    files = [path for path, source in sorted(sources.items()) if words.search(source)]
    command = [sys.executable, "-c", WITHOUT, "-m", "gpu", "--collect-only", "-q"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-o", "addopts=", *map(str, files)],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    decorated = re.compile(r"^@pytest\.mark\.gpu", re.MULTILINE)
    marked = {path.name for path, source in sources.items() if decorated.search(source)}
    collected = set(re.findall(r"^tests/(\w+\.py)::", done.stdout, re.MULTILINE))
    assert len(marked) >= 3 and marked <= collected
