"""What lies beside an ingot's weights: its tokenizer, its chat templates, its stop ids."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from ingot.export.ingot import SIDE_FILES
from ingot.export.manifest import versions
from ingot.export.tokenizer import TOKENIZER, copy_tokenizer, find_beside, make_tokenizer
from ingot.validate.identity.subject import Subject

# What makes a ``tokenizer.json`` whole, and may write it otherwise in another version.
MAKER = "tokenizers"


def side_files(subject: Subject) -> tuple[list[str], str]:
    """Files whose bytes are others than a new export of the checkpoint writes.

    Returns:
        The problems, one sentence each, and what could not be compared; "" where all was.

    Raises:
        IngotError: the checkpoint's tokenizer cannot be used.
    """
    find = find_beside(subject.checkpoint)
    whole = make_tokenizer(find, subject.opened.family.tokenizer_class)
    problems, left_out = [], ""
    with tempfile.TemporaryDirectory(prefix="ingot-") as made:
        copy_tokenizer(find, whole, Path(made))
        fresh, found = _files(Path(made)), _files(subject.folder)
        for name in sorted(fresh.keys() | found.keys()):
            if name not in fresh:
                problems.append(f"{name} lies in the ingot, and a new export writes none")
            elif name not in found:
                problems.append(f"{name} of a new export is missing in the ingot")
            elif not _same(
                found[name], fresh[name], parsed=name == TOKENIZER and whole is not None
            ):
                here, there = versions([MAKER]).get(MAKER), subject.manifest.tools.get(MAKER)
                if name == TOKENIZER and whole is not None and here != there:
                    left_out = f"{name} was made by {MAKER} {there}, and here is {here}"
                else:
                    problems.append(f"{name} is not what a new export of the checkpoint writes")
    return problems, left_out


def _files(folder: Path) -> dict[str, Path]:
    paths = {path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _same(path: Path, other: Path, *, parsed: bool) -> bool:
    mine, theirs = path.read_bytes(), other.read_bytes()
    if mine == theirs:
        return True
    try:
        # What is made anew may be spaced otherwise; what is copied is copied.
        return parsed and bool(json.loads(mine) == json.loads(theirs))
    except (ValueError, RecursionError):
        return False
