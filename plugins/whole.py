"""Files and folders that appear whole or not at all.

What is made for a destination lies in a *workplace* until it is complete: a folder beside the
destination, with a random name and a lock that is held as long as it is worked in. The kernel gives
a lock back when its process ends, however it ends. So whoever makes the same destination next knows
an abandoned workplace from one in use, where process ids would not tell them apart: two containers
have equal ones, and another machine of a shared disk has its own.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ingot.plugins.errors import IngotError

# In a workplace: what is made, what it replaces, and the lock.
NEW, OLD, LOCK = "new", "old", "lock"
# Seconds without a write after which a workplace is abandoned that has no lock. Its file system may
# have none, or its process is between making the folder and locking it.
STALE = 24 * 60 * 60
# What a rename to a destination fails with where something is: a full folder, a file or a link.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
# How libraries that are written in Rust, such as safetensors, pass on what the system refused.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class WriteError(IngotError):
    """A destination that cannot be written."""


class TakenError(WriteError):
    """A destination that another process made first."""


def system_error(error: BaseException) -> OSError | None:
    """An exception as what the system refused; None where it is something else."""
    if isinstance(error, OSError):
        return error
    found = _OS_ERROR.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def sha256(path: Path, advance: Callable[[int], None] = lambda _bytes: None) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces.

    Args:
        path: the file.
        advance: told the bytes hashed.
    """
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            total.update(piece)
            advance(len(piece))
    return total.hexdigest()


def write_whole(path: Path, text: str) -> None:
    """A text file, in UTF-8; its folder is made where missing.

    Raises:
        WriteError: the system refuses.
    """
    try:
        with staged_file(path) as part:
            part.write_bytes(text.encode("utf-8"))
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}.") from error


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A temporary path of a file that becomes ``path`` if the block ends well.

    It lies in a folder of its own: safetensors puts a temporary file beside what it writes.
    """
    with _workplace(path.absolute()) as work:
        yield work / NEW
        (work / NEW).replace(path)


@contextlib.contextmanager
def staged(out: Path, *, replace: bool) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` if the block ends well.

    Of several processes that make one destination, the last to end has its folder there, whole. A
    process killed inside the block leaves ``out`` as it was; the next one to make the same
    destination removes what that left.

    Args:
        out: the destination; folders above it are made where missing.
        replace: whether what is at ``out`` by the end of the block gives way.

    Raises:
        TakenError: ``out`` exists by then, and may not be replaced.
        WriteError: the temporary folder was removed from outside.
    """
    out = out.absolute()
    with _workplace(out) as work:
        new, old = work / NEW, work / OLD
        new.mkdir()
        yield new
        # Again where another process puts its own there in between.
        while not _moved(new, out):
            if not replace:
                raise TakenError(
                    f"{out} was made by another process meanwhile; give --overwrite to replace it, "
                    "or another --out."
                )
            _remove(old)
            with contextlib.suppress(FileNotFoundError):
                out.rename(old)


def remove_abandoned(folder: Path, names: str) -> None:
    """Remove the workplaces of processes that were killed.

    Args:
        folder: of the destinations.
        names: of the destinations; a regular expression without groups.
    """
    pattern = re.compile(rf"\.({names})\.partial-[0-9a-f]+")
    for work in folder.iterdir():
        if match := pattern.fullmatch(work.name):
            # Another process may be removing it, or may not let us.
            with contextlib.suppress(OSError):
                _remove_if_abandoned(work, folder / match[1])


def _remove_if_abandoned(work: Path, out: Path) -> None:
    lock = None
    with contextlib.ExitStack() as held:
        try:
            lock = held.enter_context((work / LOCK).open("r+b"))
            _lock(lock)
        except BlockingIOError:
            return
        except FileNotFoundError:
            if max(path.stat().st_mtime for path in (work, *work.rglob("*"))) > time.time() - STALE:
                return
        # First out of the way of its process, should that be alive after all, on a machine whose
        # locks do not reach here: it then fails, and never puts what is half removed in its place.
        doomed = _new_workplace(out)
        work.rename(doomed)
        _clear(doomed, out, lock)


@contextlib.contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A locked folder beside ``out`` for as long as the block lasts."""
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(out.parent, re.escape(out.name))
    work = _new_workplace(out)
    lock = None
    try:
        # Inside the block, so that a signal right after it still finds its way to the removal.
        work.mkdir()
        lock = _locked(work)
        yield work
    except FileNotFoundError as error:
        if work.exists():
            raise
        raise WriteError(
            f"{work} was removed while {out} was made in it, perhaps by another process that makes "
            "the same on a file system without locks; give each a destination of its own."
        ) from error
    finally:
        _clear(work, out, lock)


def _new_workplace(out: Path) -> Path:
    return out.parent / f".{out.name}.partial-{secrets.token_hex(8)}"


def _locked(work: Path) -> IO[bytes] | None:
    """The lock of a workplace, held until it is closed; None where the file system has none."""
    unnamed = work / f"{LOCK}.new"
    lock = unnamed.open("wb")
    try:
        _lock(lock)
    except OSError:
        lock.close()
        return None
    # Only now by the name that others look for, so that they never find it before it is locked.
    unnamed.rename(work / LOCK)
    return lock


def _lock(file: IO[bytes]) -> None:
    """Lock a file, which is open for writing, as NFS needs it.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: there are no locks.
    """
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError as error:
        raise OSError(errno.ENOTSUP, "no flock") from error
    flock(file, LOCK_EX | LOCK_NB)


def _moved(source: Path, out: Path) -> bool:
    """Rename a folder, unless something is in its place; whether it was renamed."""
    try:
        source.rename(out)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        return False
    return True


def _clear(work: Path, out: Path, lock: IO[bytes] | None) -> None:
    """Remove a workplace; what gave way to something that never came goes back first."""
    if os.path.lexists(work / OLD) and not os.path.lexists(out):
        _moved(work / OLD, out)
    # The lock goes last: without it, what a kill leaves here would stay for a day.
    for path in (work / NEW, work / OLD):
        _remove(path)
    # NFS keeps a file that is open, and so its folder.
    if lock is not None:
        lock.close()
    _remove(work)


def _remove(path: Path) -> None:
    # Of a link, the link goes, and not what it points to.
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
