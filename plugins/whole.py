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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from ingot.plugins.errors import IngotError, shown

# In a workplace: what is made, what it replaces, and the lock.
NEW, OLD, LOCK = "new", "old", "lock"
# Seconds without a write after which a workplace is abandoned that has no lock. Its file system may
# have none, or its process is between making the folder and locking it.
STALE = 24 * 60 * 60
# What a rename to a destination fails with where something is: a full folder, a file or a link.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
# What only who writes is told, mostly without the name of the file.
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
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


def check_destination(
    out: Path, *, overwrite: bool, mark: str, foreign: str, read: Iterable[Path] = ()
) -> None:
    """Refuse a destination that is taken or cannot be made, before any work is done.

    An earlier process may have been killed in the middle of an overwrite: what it had moved away is
    put back first.

    Args:
        out: the folder to make.
        overwrite: whether what is there may be replaced.
        mark: a file that only such a folder has; without it a full one is never replaced.
        foreign: what a folder without it is, such as ``is not an ingot``.
        read: files and folders that are read meanwhile, where they exist.

    Raises:
        WriteError: ``out`` exists and may not be replaced, cannot be made, or holds or lies in
            something that is read.
    """
    try:
        # Not of the path as it is written: `folder/..` may name what a link leads to.
        above = next((path for path in out.absolute().parents if path.exists()), out)
        if not above.is_dir():
            raise WriteError(f"{out} cannot be made: {above} is a file; give another --out.")
        if out.parent.is_dir():
            with contextlib.suppress(OSError):
                remove_abandoned(out.parent, re.escape(out.name))
        if out.is_symlink() and not out.exists():
            raise WriteError(
                f"{out} is a link to {shown(str(out.readlink()))}, which is not there; remove it, "
                "or give another --out."
            )
        if out.exists():
            if not overwrite:
                raise WriteError(f"{out} exists; give --overwrite to replace it, or another --out.")
            empty = out.is_dir() and not any(out.iterdir())
            if not empty and not (out / mark).is_file():
                raise WriteError(f"{out} exists and {foreign}, so it is left alone.")
        keep_apart(out, *read)
        if not os.access(above, os.W_OK | os.X_OK):
            raise WriteError(f"{out} cannot be made: {above} cannot be written to.")
    except OSError as error:
        raise WriteError(f"{out} cannot be made: {error.strerror or error}.") from error
    except ValueError as error:
        raise WriteError(f"{shown(str(out))} is no path: {error}.") from error


def check_file(path: Path) -> None:
    """Refuse a file that could not be written, before any work is done.

    Raises:
        WriteError: a folder is in its place, or it lies where nothing can be written.
    """
    try:
        if path.is_dir():
            raise WriteError(f"cannot write {path}: it is a folder.")
        # A link to nothing is in the way as well.
        above = next(each for each in path.absolute().parents if os.path.lexists(each))
        if not above.exists():
            raise WriteError(f"cannot write {path}: {above} is a link to nothing.")
        if not above.is_dir():
            raise WriteError(f"cannot write {path}: {above} is a file.")
        if not os.access(above, os.W_OK | os.X_OK):
            raise WriteError(f"cannot write {path}: {above} cannot be written to.")
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}.") from error


def keep_apart(out: Path, *read: Path) -> None:
    """Refuse a destination that holds, or lies in, what is read while it is made.

    Compared are the places themselves, whatever the links and names that lead there. What does not
    exist is left out: it may be a name of something else.

    Raises:
        WriteError: naming both.
    """
    place = Path(os.path.realpath(out))
    keep_out(out, *read)
    for source in filter(os.path.lexists, read):
        found = Path(os.path.realpath(source))
        links = (
            [Path(os.path.realpath(path)) for path in found.iterdir() if path.is_symlink()]
            if found.is_dir()
            else []
        )
        if any(_holds(place, path) for path in (found, *links)):
            raise WriteError(f"{out} and {source} lie in one another; give another place.")


def keep_out(out: Path, *read: Path) -> None:
    """Refuse a destination that lies in a folder which is to stay as it is.

    Raises:
        WriteError: naming both.
    """
    place = Path(os.path.realpath(out))
    for source in filter(os.path.lexists, read):
        if _holds(Path(os.path.realpath(source)), place):
            raise WriteError(f"{out} and {source} lie in one another; give another place.")


def _holds(folder: Path, path: Path) -> bool:
    """Whether a path is a folder, or lies in it."""
    return any(_same(folder, each) for each in (path, *path.parents))


def _same(one: Path, other: Path) -> bool:
    # The file itself, where it exists: a disk may not tell upper case from lower.
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return one == other


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
    pattern = _workplaces(names)
    for work in folder.iterdir():
        if match := pattern.fullmatch(work.name):
            # Another process may be removing it, or may not let us.
            with contextlib.suppress(OSError):
                _remove_if_abandoned(work, folder / match[1])


def is_workplace(path: Path, names: str) -> bool:
    """Whether something is made there for one of the destinations that an expression names."""
    return _workplaces(names).fullmatch(path.name) is not None


def _workplaces(names: str) -> re.Pattern[str]:
    return re.compile(rf"\.({names})\.partial-[0-9a-f]+")


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
    """A locked folder beside ``out`` for as long as the block lasts.

    Raises:
        WriteError: the system does not let us write, or the folder was removed from outside.
    """
    work = _new_workplace(out)
    try:
        with _work_in(work, out):
            yield work
    except Exception as error:
        refused = system_error(error)
        if refused is None or not _is_writing(refused, work, out):
            raise
        raise WriteError(
            f"cannot write {out}: {refused.strerror}; make room, or give another place."
        ) from error


def _is_writing(error: OSError, work: Path, out: Path) -> bool:
    """Whether the system refused what is written, and not what is read meanwhile."""
    if error.filename is None:
        return error.errno in _UNWRITTEN
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    path = Path(name)
    return path in (out, *out.parents) or work in (path, *path.parents)


@contextlib.contextmanager
def _work_in(work: Path, out: Path) -> Iterator[None]:
    missing = [folder for folder in out.parents if not folder.exists()]
    lock, made = None, False
    try:
        # Inside the block, so that a signal right after it still finds its way to the removal.
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out.parent, re.escape(out.name))
        work.mkdir()
        made = True
        lock = _locked(work)
        yield
    except FileNotFoundError as error:
        if work.exists() or not made:
            raise
        raise WriteError(
            f"{work} was removed while {out} was made in it, perhaps by another process that makes "
            "the same on a file system without locks; give each a destination of its own."
        ) from error
    finally:
        _clear(work, out, lock)
        for folder in missing:
            # Those that nothing was made in.
            with contextlib.suppress(OSError):
                folder.rmdir()


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
