"""Renames a finished checkpoint to its final name, replacing an older one; a kill at any moment loses neither.

The files are gathered in one folder inside the working directory, apart from the run's state. A journal then records
which folder is the new one. If the system can exchange two directories in one step, they are exchanged; the older
checkpoint is then in the working directory, and is removed with it. Otherwise the older one is renamed to a name in the
journal, and the new one is renamed into its place. If the process is killed in between, the journal remains, and
:func:`settle` completes or undoes the renaming before anything else is done with these directories.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

from sparsellm.errors import StorageError
from sparsellm.storage.files import TEMPORARY, explained, sync, sync_tree
from sparsellm.storage.resume import FOLDER, JOURNAL, read_record, write_record

FINISHED = "finished"  # the folder, beside the records, in which the new checkpoint's files are gathered

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux, on every processor
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)  # the kernel, file system or sandbox lacks it


def publish(partial: Path, out: Path) -> None:
    """Renames all files in the working directory ``partial`` into ``out``, replacing the checkpoint there.

    The caller has checked that ``out`` may be replaced, and removes ``partial`` afterwards, which may then hold the
    older checkpoint.

    Raises:
        StorageError: the system cannot rename it; the working directory is as before.
    """
    with explained(out):
        _scatter(partial)
        finished = _gather(partial)
        journal = partial / FOLDER / JOURNAL
        aside = out.with_name(f"{out.name}.replaced-{secrets.token_hex(4)}")
        replaces = out.is_dir() and any(out.iterdir())
        if out.is_dir():
            with contextlib.suppress(OSError):
                shutil.copymode(out, finished)  # keeps access that was granted to others
        old = _number(out) if replaces else None
        write_record(journal, {"out": out.name, "new": _number(finished), "old": old, "aside": aside.name})
        try:
            _swap(finished, out, aside, replaces)
        except OSError:
            if settle(partial, out):
                return
            raise
        sync(out.parent)
        sync(partial / FOLDER)
        if aside.exists():
            shutil.rmtree(aside, ignore_errors=True)  # the result is complete, so errors here are ignored


def settle(partial: Path, out: Path) -> bool:
    """Completes or undoes :func:`publish` of a process that was killed.

    The caller holds the lock on ``partial``.

    Returns:
        Whether ``out`` is the new checkpoint now; the caller then removes ``partial``.

    Raises:
        StorageError: the newer checkpoint cannot be determined, or the directories cannot be written.
    """
    journal, finished = partial / FOLDER / JOURNAL, partial / FOLDER / FINISHED
    record = read_record(journal)
    with explained(partial):
        if record is None:
            journal.unlink(missing_ok=True)
            _scatter(partial)
            return False
        if record["out"] != out.name:  # of a run into another directory; its next start settles it
            return False
        aside, there = out.with_name(Path(str(record["aside"])).name), _number(finished)
        old = record["old"]
        if there == record["new"] and (old is None or _number(aside) != old):
            journal.unlink()
            _scatter(partial)
            return False
        if there == record["new"] and not out.exists():  # the process was killed between the two renames
            os.replace(finished, out)
            sync(out.parent)
            there = None
        if there is not None and there != old:
            raise StorageError(
                f"cannot tell which of {out} and {finished} is the newer checkpoint; move one of them elsewhere and "
                f"remove {partial}"
            )
        if old is not None and _number(aside) == old:
            shutil.rmtree(aside)
    return True


def exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two directories in one step; False if the system has no such operation.

    Raises:
        OSError: the operation exists but failed.
    """
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(second))


@cache
def _renameat2() -> Any:
    """The C library's ``renameat2``; None if there is none, as on systems other than Linux."""
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


def _swap(finished: Path, out: Path, aside: Path, replaces: bool) -> None:
    if replaces and exchange(finished, out):
        return
    if replaces:
        os.replace(out, aside)
        sync(out.parent)
        try:
            os.replace(finished, out)
        except OSError:
            os.replace(aside, out)
            raise
        return
    if out.is_dir():
        out.rmdir()  # it is empty; some systems cannot rename onto an existing directory
    os.replace(finished, out)


def _gather(partial: Path) -> Path:
    """Renames the result's files into one folder beside the records, and syncs it."""
    finished = partial / FOLDER / FINISHED
    finished.mkdir()
    for entry in sorted(partial.iterdir()):
        if entry.is_symlink():
            raise StorageError(f"{entry} is a link, which no run wrote; remove it and run the same command again")
        if entry.name != FOLDER and not entry.name.endswith(TEMPORARY):
            os.replace(entry, finished / entry.name)
    sync_tree(finished)
    sync(partial)
    return finished


def _scatter(partial: Path) -> None:
    """Moves gathered files back to the working directory, where a resumed run expects them."""
    finished = partial / FOLDER / FINISHED
    if not finished.is_dir():
        return
    for entry in sorted(finished.iterdir()):
        os.replace(entry, partial / entry.name)
    sync(partial)
    finished.rmdir()


def _number(directory: Path) -> int | None:
    """The inode number of a directory, which does not change by renaming; None if there is no directory."""
    try:
        return directory.lstat().st_ino
    except FileNotFoundError:
        return None
