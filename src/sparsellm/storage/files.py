"""Files that are complete or unchanged after a kill, directories that one process at a time writes, and the system's
errors in one sentence."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
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


def replace_atomically(path: Path, write: Callable[[BinaryIO], T]) -> T:
    """Writes ``path`` with ``write`` and returns the latter's result. The file is complete and synced, or unchanged.

    Raises:
        StorageError: the disk is full, or the directory cannot be written.
    """
    temporary = path.with_name(f".{secrets.token_hex(12)}{TEMPORARY}")  # nobody can put a link there first
    with explained(path.parent):
        try:
            with temporary.open("xb", buffering=0) as file:  # follows no link, opens no file that exists
                written = write(file)
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:  # frees the space
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    return written


def write_bytes(path: Path, data: bytes) -> None:
    """Writes ``data`` as :func:`replace_atomically` does."""
    replace_atomically(path, lambda file: write_all(file, data))


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


def empty(folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Removes all entries of a directory except those in ``keep``. Links are removed, their targets are not."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name not in keep:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def check_own_directories(*paths: Path) -> None:
    """Refuses working directories that are links or files, or that belong to another user. They need not exist.

    Raises:
        StorageError: one is refused.
    """
    for path in paths:
        with explained(path):
            if not os.path.lexists(path):
                continue
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                kind = "link" if stat.S_ISLNK(status.st_mode) else "file"
                raise StorageError(f"{path} is a {kind}, where a run keeps its unfinished work; remove it")
            if status.st_uid != _own_user() and status.st_uid != _user_of_new_files(path.parent):
                raise StorageError(f"{path} belongs to another user (id {status.st_uid}); name another directory")


def _own_user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0  # st_uid is 0 on Windows


def _user_of_new_files(folder: Path) -> int:
    """The owner of files made here, which on some file systems is always the same."""
    probe = folder / f".{secrets.token_hex(12)}{TEMPORARY}"
    with probe.open("xb") as file:
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


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Locks a directory against other processes until the context ends.

    Args:
        folder: the directory, such as the state of a run.
        wait: whether to wait until another process releases its lock.

    Raises:
        StorageError: another process holds the lock, and ``wait`` is False.
    """
    if fcntl is None:
        yield
        return
    with explained(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"another process is writing {folder.parent} now; wait for it, or name another directory"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def has_digest(file: Path, sha256: str) -> bool:
    """Whether a file can be read and has this SHA-256."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest() == sha256
    except OSError:
        return False
