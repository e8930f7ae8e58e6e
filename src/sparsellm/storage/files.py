"""Files that are whole or not there: synced, renamed into place, and errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from sparsellm.errors import StorageError

T = TypeVar("T")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: a limit on the size of one file


def replace_atomically(path: Path, write: Callable[[BinaryIO], T]) -> T:
    """``path`` with what ``write`` puts into it: the whole of it, on the disk, or as it was before.

    A file that could not be finished is removed, so that its room is free again.

    Raises:
        StorageError: the disk is full, or the directory cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with explained(path.parent):
        try:
            with temporary.open("wb", buffering=0) as file:
                written = write(file)
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    return written


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
