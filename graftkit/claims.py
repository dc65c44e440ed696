"""Who may write to a folder, and what killed writers left behind."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from graftkit.errors import Note, UserError, listing

TEMPORARY = ".part"
LOCK = ".lock"  # in a folder that a process writes to; the operating system frees it when that process ends
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of file systems that have no locks
LEFTOVER = re.compile(rf"(?P<of>.+)\.\d+{re.escape(TEMPORARY)}")
HOLDER = re.compile(r"process (?P<process>\d+) on (?P<host>\S+)")


class InUse(UserError):
    """A folder is held by another process."""


def temporary(path: Path) -> Path:
    """Return the name under which this process writes `path` before it is complete."""
    return path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")


def is_leftover(path: Path) -> bool:
    """Return whether `path` has the name of something that was not written completely."""
    return LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left in a folder that this process holds, and say so."""
    _remove_left([path for path in folder.rglob(f"*{TEMPORARY}") if is_leftover(path)])


def _remove_left(paths: list[Path]) -> None:
    for path in paths:
        remove(path)
    if paths:
        names = listing(map(str, paths), 4)
        warnings.warn(Note(f"removed what a killed process had left: {names}."), stacklevel=3)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path, *, new: bool = False) -> Iterator[Path]:
    """Hold a folder, creating it if needed, so that no other process writes to it.

    `new`: raise `FileExistsError` if it already exists. Raises `UserError` if another process holds it. A killed process
    releases its folders; what it built beside them is removed. On exit, folders that were created here and are empty are
    removed.
    """
    made, descriptor = _take(folder, new)
    try:
        with suppress(OSError):
            _remove_left([path for path in folder.parent.iterdir() if _is_left_by(path, folder)])
        yield folder
    finally:
        _release(folder, descriptor)
        with suppress(OSError):  # something is in it
            for path in made:
                path.rmdir()


@contextmanager
def held(folder: Path, what: str) -> Iterator[Path]:
    """As `claimed`, but raise `UserError` also if this user may not write there. `what` the folder is, for the message."""
    with ExitStack() as stack:
        try:
            stack.enter_context(claimed(folder))
        except OSError as error:
            raise UserError(f"{what} cannot be written to: {error.strerror or error}.") from None
        yield folder


def _is_left_by(path: Path, folder: Path) -> bool:
    found = LEFTOVER.fullmatch(path.name)
    return found is not None and found["of"] == folder.name


def holder(folder: Path) -> str | None:
    """Return the process that holds a folder, or None."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        return None if _lock(descriptor) else _named(descriptor)
    finally:
        os.close(descriptor)


def _take(folder: Path, new: bool) -> tuple[list[Path], int]:
    """Create and lock a folder. Return the created folders, innermost first, and the lock's descriptor."""
    while True:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=not new)
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process released the folder between the two calls
            continue
        if not _lock(descriptor):
            who = _named(descriptor)
            os.close(descriptor)
            raise InUse(
                f"{folder} is in use by {who}, which is still writing to it. Wait until it has finished, or name another "
                f"folder. (If that process is gone, for example with its machine, remove {folder / LOCK}.)"
            )
        if _is_there(folder, descriptor):  # and not a lock that its owner has just removed
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return made, descriptor
        os.close(descriptor)


def _release(folder: Path, descriptor: int) -> None:
    with suppress(OSError):
        if _is_there(folder, descriptor):
            (folder / LOCK).unlink()
    os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file without waiting. Return False if another process holds it."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return not _is_alive(_named(descriptor))
    return True


def _is_alive(who: str) -> bool:
    """Return whether the process that a lock names may be running, as far as this machine can tell."""
    found = HOLDER.match(who)
    if found is None:
        return False
    if found["host"] != socket.gethostname():
        return True
    if int(found["process"]) == os.getpid():
        return False
    try:
        os.kill(int(found["process"]), 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        pass
    return True


def _is_there(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder / LOCK), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _named(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode("utf-8", "replace") or "another process"
