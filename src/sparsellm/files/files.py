"""Files that are complete or unchanged after a kill, locks, and the system's errors in one sentence. No torch here."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from sparsellm.errors import StorageError
from sparsellm.inputs import read_object

T = TypeVar("T")

TEMPORARY = ".tmp"  # suffix of a file that is being written
# The whole name, as replace_atomically makes it, or as NFS renames a file that a process had open when it was removed.
TORN = re.compile(rf"\.[0-9a-f]{{24}}\{TEMPORARY}|\.nfs[0-9a-f]+")

# the last is a limit on the size of one file
_FULL = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
)


def replace_atomically(path: Path, write: Callable[[BinaryIO], T]) -> T:
    """Writes ``path`` with ``write`` and returns the latter's result. The file is complete and synced, or unchanged.
    Raises StorageError if the disk is full, or the directory cannot be written."""
    return _named_when_complete(path, write, os.replace)


def create_atomically(path: Path, write: Callable[[BinaryIO], T]) -> T:
    """Same as ``replace_atomically``, but a file that has the name by then stays, and a StorageError says so."""
    return _named_when_complete(path, write, _take_free_name)


def _named_when_complete(
    path: Path,
    write: Callable[[BinaryIO], T],
    rename: Callable[[Path, Path], None],
) -> T:
    temporary = temporary_in(path.parent)
    with explained(path.parent):
        try:
            # follows no link, opens no file that exists
            with temporary.open("xb", buffering=0) as file:
                written = write(file)
                os.fsync(file.fileno())
            rename(temporary, path)
            sync(path.parent)
        except BaseException:  # frees the space
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    return written


def temporary_in(folder: Path) -> Path:
    """A name for a temporary file in a folder, which nobody can put a link under first."""
    return folder / f".{secrets.token_hex(12)}{TEMPORARY}"


def lock_while_open(file: BinaryIO) -> None:
    """Locks an open file until it is closed, so that no other process takes it for one that a killed process left."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX)


def _take_free_name(temporary: Path, path: Path) -> None:
    """Renames a file to a name that no other file has."""
    try:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:
            # A file system without hard links: an empty file of ours takes the name, and is then replaced.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.replace(temporary, path)
    except FileExistsError:
        raise StorageError(
            f"{path} appeared while its contents were made, and is not replaced; name another file"
        ) from None
    temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes ``data`` as ``replace_atomically`` does."""
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
        for name in (*names, ""):  # the folder last
            sync(Path(folder) / name)


def user_of_new_files(folder: Path) -> int:
    """The owner of files made here, which on some file systems is always the same. Raises OSError if none can be."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid


def empty(folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Removes all entries of a directory except those in ``keep``. Links are removed, their targets are not."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name not in keep:
            shutil.rmtree(
                entry
            ) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def remove_torn(folder: Path) -> None:
    """Removes the files that killed processes were writing into a directory; only ordinary files of such a name."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if TORN.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                os.unlink(entry)


def keep_record(path: Path, record: object) -> None:
    """Writes a dataclass, a pydantic model or a dict as JSON, as ``replace_atomically`` does."""
    write_bytes(
        path,
        json.dumps(to_jsonable_python(record), ensure_ascii=False, indent=1).encode(),
    )


def kept_record(path: Path, kind: type[T]) -> T | None:
    """The record that ``keep_record`` wrote; None if the file is absent, damaged or something else."""
    try:
        return TypeAdapter(kind).validate_python(read_object(path))
    except (StorageError, ValidationError):
        return None


def sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal. Raises OSError if the file cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file can be read and has this SHA-256."""
    try:
        return sha256(path) == digest
    except OSError:
        return False


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns the system's errors into StorageError: a full disk, or a path that cannot be written."""
    try:
        yield
    except OSError as error:
        why = f"cannot write {path!s:.300}: {error.strerror or error}; name another directory"
        if error.errno in _FULL:
            why = f"the disk of {path} is full; make room and run the same command again to resume it"
        raise StorageError(why) from error


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Locks a directory against other processes until the context ends; with ``wait``, waits for another's lock. Raises
    StorageError, which names the parent, if another process holds the lock and ``wait`` is False."""
    with explained(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(
                descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
            )
        except BlockingIOError:
            raise StorageError(
                f"another process is writing {folder.parent} now; wait for it, or name another directory"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
