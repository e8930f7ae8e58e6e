"""Files that are whole or not there: synced, renamed into place, and errors that say what to do."""

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

T = TypeVar("T")

TEMPORARY = ".tmp"  # how the name of a file ends that is being written

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: a limit on the size of one file
# Never through a link, never into a file that is there, never handed on to a child; some systems lack some of them.
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
for _flag in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):
    _NEW |= getattr(os, _flag, 0)


def replace_atomically(path: Path, write: Callable[[BinaryIO], T]) -> T:
    """``path`` with what ``write`` puts into it: the whole of it, on the disk, or as it was before.

    A file that could not be finished is removed, so that its room is free again.

    Raises:
        StorageError: the disk is full, or the directory cannot be written.
    """
    temporary = path.with_name(f".{secrets.token_hex(12)}{TEMPORARY}")  # nobody can put a link there beforehand
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
    """A new file, unbuffered, for writing; what is there already, a link too, is neither followed nor changed.

    Raises:
        OSError: something is there, or the directory cannot be written.
    """
    return io.FileIO(os.open(path, _NEW, 0o666), "wb")  # type: ignore[return-value]


def write_all(file: BinaryIO, data: memoryview | bytes) -> None:
    """Writes all of it to an unbuffered file, which may take less at a time."""
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
    """Waits until every file below a directory, and every name, is on the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))


def check_own_directory(path: Path) -> None:
    """Refuses a working directory that is a link, or that another user made; none there is fine.

    Raises:
        StorageError: it is one of them, or a file.
    """
    with explained(path):
        try:
            found = path.lstat()
        except FileNotFoundError:
            return
        if stat.S_ISLNK(found.st_mode):
            raise StorageError(f"{path} is a link, where a run keeps its unfinished work; remove the link")
        if not stat.S_ISDIR(found.st_mode):
            raise StorageError(f"{path} is a file, where a run keeps its unfinished work; remove it")
        own = _own_user()
        if own is None or found.st_uid == own:
            return
        if found.st_uid != _user_of_new_files(path.parent):  # a file system may give every file one and the same owner
            raise StorageError(
                f"{path} belongs to another user (id {found.st_uid}); name another directory for the result"
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
    """Turns the system's errors into ours: a full disk, or a place that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"the disk of {path} is full; make room and run the same command again: it goes on where it was"
            ) from error
        raise StorageError(f"cannot write {path}: {error.strerror or error}; name another directory") from error
