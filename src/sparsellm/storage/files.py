"""Atomic files: written beside, synced and renamed into place, with errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from sparsellm.errors import StorageError

try:
    import fcntl
except ImportError:  # Windows has no fcntl; two runs into one directory are not detected there
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

TEMPORARY = ".tmp"  # suffix of a file that is being written

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last is a limit on the size of one file
# Never follow a link, never open an existing file, never pass the descriptor to a child. Some systems lack some flags.
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
for _flag in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):
    _NEW |= getattr(os, _flag, 0)


def replace_atomically(path: Path, write: Callable[[BinaryIO], T]) -> T:
    """Writes ``path`` with ``write`` and returns the latter's result. The file is complete and synced, or unchanged.

    A file that could not be completed is removed, to free its space.

    Raises:
        StorageError: the disk is full, or the directory cannot be written.
    """
    temporary = path.with_name(f".{secrets.token_hex(12)}{TEMPORARY}")  # nobody can put a link there first
    with explained(path.parent):
        try:
            with create(temporary) as file:
                written = write(file)
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    return written


def create(path: Path) -> BinaryIO:
    """A new unbuffered file for writing. An existing file or link is neither followed nor changed.

    Raises:
        OSError: the path exists, or the directory cannot be written.
    """
    return io.FileIO(os.open(path, _NEW, 0o666), "wb")  # type: ignore[return-value]


def write_all(file: BinaryIO, data: memoryview | bytes) -> None:
    """Writes all of ``data`` to an unbuffered file, in as many calls as needed."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[file.write(rest) :]


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Waits until every file and every name below a directory is on the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))


def check_own_directory(path: Path) -> None:
    """Refuses a working directory that is a link or a file, or that belongs to another user. It need not exist.

    Raises:
        StorageError: the directory is refused.
    """
    with explained(path):
        try:
            status = path.lstat()
        except FileNotFoundError:
            return
        if stat.S_ISLNK(status.st_mode):
            raise StorageError(f"{path} is a link, where a run keeps its unfinished work; remove the link")
        if not stat.S_ISDIR(status.st_mode):
            raise StorageError(f"{path} is a file, where a run keeps its unfinished work; remove it")
        own = _own_user()
        if own is None or status.st_uid == own:
            return
        if status.st_uid != _user_of_new_files(path.parent):  # some file systems give all files the same owner
            raise StorageError(
                f"{path} belongs to another user (id {status.st_uid}); name another directory for the result"
            )


def _own_user() -> int | None:
    return os.geteuid() if hasattr(os, "geteuid") else None


def _user_of_new_files(folder: Path) -> int:
    probe = folder / f".{secrets.token_hex(12)}{TEMPORARY}"
    with create(probe) as file:
        probe.unlink()
        return os.fstat(file.fileno()).st_uid


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns the system's errors into StorageError: a full disk, or a path that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"the disk of {path} is full; make room and run the same command again to resume it"
            ) from error
        raise StorageError(f"cannot write {path}: {error.strerror or error}; name another directory") from error


def lock(folder: Path, *, wait: bool = False) -> int | None:
    """Locks a directory, such as a run's state, against other processes until the returned descriptor is closed.

    Args:
        folder: the directory.
        wait: until another process releases its lock.

    Raises:
        StorageError: another process holds the lock, and ``wait`` is False.
    """
    if fcntl is None:
        return None
    with explained(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StorageError(
            f"another process is writing {folder.parent} now; wait for it, or name another directory"
        ) from None
    except OSError:  # a file system without locks
        pass
    return descriptor


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """As :func:`lock`, until the context ends.

    Raises:
        StorageError: another process holds the lock, and ``wait`` is False.
    """
    descriptor = lock(folder, wait=wait)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
