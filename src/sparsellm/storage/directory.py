"""Output directories: what is refused before the work, the working directory, and the final renaming.

``docs/architecture.md``, *Directories*, draws the states, and says who may remove what.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from sparsellm import interrupts
from sparsellm.errors import StorageError
from sparsellm.storage import state
from sparsellm.storage.contents import foreign_entries, has_weights, some
from sparsellm.storage.files import TEMPORARY, check_own_directories, empty, explained, locked, sync, sync_tree
from sparsellm.storage.state import BLOCKS, PARTIAL, PRUNE, PUBLISHING, REPLACED, RUN, STATE, SWEPT, partial_of


class WorkingDirectory:
    """``<out>.partial``, locked until it is closed: created, or taken over from an earlier process of the same run.

    Args:
        out: the directory of the result.
        identity: everything that the result depends on, as JSON values.
        kind: the kind of the run. An unfinished ``prune`` of the same identity is resumed; other kinds start again.
        overwrite: replace the checkpoint in ``out``; it is kept until the new one is complete.
        restart: remove the files of an unfinished run of any kind and identity.
        need_bytes: disk space for the whole result, the part that an unfinished run has written included.

    Raises:
        StorageError: as in :func:`check_destination`; or the working directory holds another run or foreign files, or
            is being written by another process.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        identity: dict[str, Any],
        *,
        kind: str = PRUNE,
        overwrite: bool = False,
        restart: bool = False,
        need_bytes: int = 0,
    ) -> None:
        self.out = check_destination(out, overwrite=overwrite, restart=restart, kind=kind, need_bytes=need_bytes)
        self.path = partial_of(self.out)
        self.state = self.path / STATE
        self._overwrite = overwrite
        self._held = contextlib.ExitStack()
        if state.left_in(self.path) is None and not state.is_bare(self.path):
            raise StorageError(f"{self.path} is not a run that can be resumed; remove it, or name another directory")
        with explained(self.path):
            self.state.mkdir(parents=True, exist_ok=True)
        check_own_directories(self.path, self.state)  # after creation, so that no other user can create it in between
        self._held.enter_context(locked(self.state))
        try:
            self._begin(state.UnfinishedRun(kind, json.loads(json.dumps(identity))), restart)
        except BaseException:
            self.close()
            raise

    def folder(self, name: str) -> Path:
        """The folder of a checkpoint in the making, ``BLOCKS`` or ``SWEPT``."""
        with explained(self.path):
            (self.path / name).mkdir(exist_ok=True)
        return self.path / name

    def publish(self, folder: Path) -> None:
        """Gives the complete checkpoint in ``folder`` its final name, and removes the working directory.

        Two directories are exchanged in one step where the system can. Otherwise the older one is renamed into the
        working directory first.

        Raises:
            StorageError: files were added to ``out`` in the meantime, or the system cannot rename. Both checkpoints are
                as before; where the older one could not be moved back, the next start completes the renaming.
        """
        check_replaceable(self.out, overwrite=self._overwrite)
        with interrupts.held(), explained(self.out):
            sync_tree(folder)
            replaces = self.out.is_dir() and any(self.out.iterdir())
            if self.out.is_dir():
                with contextlib.suppress(OSError):
                    shutil.copymode(self.out, folder)  # keeps access that was granted to others
            state.write_sealed(self.state / PUBLISHING, state.Publishing(folder.name, state.inode_of(folder)))
            try:
                self._rename(folder, replaces)
            except OSError:
                if not (self.path / REPLACED).exists():  # else the next start completes the renaming by this record
                    (self.state / PUBLISHING).unlink()
                raise
            sync(self.out.parent)
            self.discard()

    def discard(self) -> None:
        """Removes the directory."""
        state.discard(self.path)
        self.close()

    def close(self) -> None:
        """Releases the lock, so that another process may write the directory."""
        self._held.close()

    def __enter__(self) -> WorkingDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, run: state.UnfinishedRun, restart: bool) -> None:
        left = state.left_in(self.path)
        if left is not None:
            self._check_entries()
        if left is not None and not restart:
            state.check_kind(self.path, run.kind)
            if run.kind == PRUNE and (changed := state.differences(left.identity, run.identity)):
                raise StorageError(
                    f"{self.path} holds another unfinished run: {'; '.join(changed[:4])}; "
                    "repeat its settings to resume it, or give --restart to start again"
                )
        with explained(self.path):
            if restart or run.kind != PRUNE:  # all but the record, by which the run is recognised after a kill
                empty(self.path, (STATE,))
                empty(self.state, (RUN,))
            for entry in list(self.path.rglob(f".*{TEMPORARY}")):  # what a killed process was writing
                entry.unlink()
        if left is None or restart:
            state.write_sealed(self.state / RUN, run)

    def _check_entries(self) -> None:
        """Refuses foreign files in the directory, which would be removed with it or end in the result."""
        with explained(self.path):
            foreign = set(foreign_entries(self.path)) - {STATE}
            for name in (BLOCKS, SWEPT, REPLACED):
                if (self.path / name).is_dir() and not (self.path / name).is_symlink():
                    foreign.discard(name)
                    foreign |= {f"{name}/{each}" for each in foreign_entries(self.path / name)}
        if foreign := {name for name in foreign if not Path(name).match(f".*{TEMPORARY}")}:
            raise StorageError(f"{self.path} holds {some(sorted(foreign))}, which no run wrote; move it elsewhere")

    def _rename(self, folder: Path, replaces: bool) -> None:
        if replaces and exchange(folder, self.out):
            return
        if replaces:
            os.replace(self.out, self.path / REPLACED)
            sync(self.out.parent)
        elif self.out.is_dir():
            self.out.rmdir()  # it is empty; some systems cannot rename onto an existing directory
        try:
            os.replace(folder, self.out)
        except OSError:
            if replaces:
                os.replace(self.path / REPLACED, self.out)
            raise


def discard_unfinished(out: str | os.PathLike[str]) -> None:
    """Removes the unfinished run into a directory, if there is one.

    Raises:
        StorageError: a process is active in it, or it holds foreign files.
    """
    left = state.left_in(partial_of(out))
    if left is not None and left.kind:
        WorkingDirectory(out, left.identity, kind=left.kind, overwrite=True).discard()


@cache
def _renameat2() -> Any:
    """The C library's ``renameat2``; None where there is none, as on systems other than Linux."""
    return getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None


def exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two directories in one step; False if the system cannot."""
    here, flag = -100, ctypes.c_uint(2)  # AT_FDCWD and RENAME_EXCHANGE of Linux, on every processor
    rename = _renameat2()
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), flag) == 0


def check_destination(
    out: str | os.PathLike[str],
    *,
    sources: Iterable[Path] = (),
    overwrite: bool = False,
    restart: bool = False,
    kind: str = PRUNE,
    need_bytes: int = 0,
) -> Path:
    """The directory that ``out`` leads to, absolute and without links, after all checks.

    Nothing is changed, except that a renaming that was cut short by a kill is completed or undone. Call it before the
    work, and again when sources and size are known.

    Args:
        out, overwrite, restart, kind, need_bytes: as in :class:`WorkingDirectory`.
        sources: directories that are read; ``out`` must be apart from them.

    Raises:
        StorageError: ``out`` cannot be a checkpoint, overlaps with a source or with another run, is a mount point, is
            not empty or holds foreign files, cannot be written, or its disk has too little space.
    """
    text = os.fspath(out)
    place = Path(os.path.realpath(text)) if text and "\0" not in text else Path("/")
    if not place.name:
        raise StorageError(f"--out {text!r} is empty, the root of the file system or not a path; name a directory")
    partial = partial_of(place)
    with explained(place):
        for reason in _refusals(place, partial, [Path(os.path.realpath(source)) for source in sources]):
            raise StorageError(f"--out {out} {reason}; name another directory")
    check_own_directories(partial, partial / STATE)
    state.settle(partial, place)
    if not restart:
        state.check_kind(partial, kind)
    check_replaceable(place, overwrite=overwrite)
    check_room(place, need_bytes - written_bytes(partial))
    return place


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Refuses a directory that is not empty, unless it may be replaced and holds nothing but a checkpoint.

    Raises:
        StorageError: the directory is refused, or cannot be read.
    """
    with explained(out):
        if not out.is_dir() or not any(out.iterdir()):
            return
        if not overwrite:
            raise StorageError(f"{out} exists and is not empty; name another directory or give --overwrite")
        foreign = foreign_entries(out)
        if foreign or not has_weights(out):
            what = f"{some(foreign)}, which neither sparsellm nor save_pretrained wrote" if foreign else "no checkpoint"
            raise StorageError(
                f"{out} holds {what}; --overwrite replaces checkpoints only: move its files elsewhere, or name another "
                "directory"
            )


def check_room(place: Path, need_bytes: int) -> None:
    """Refuses a disk with less than ``need_bytes`` free.

    Raises:
        StorageError: the space is too little.
    """
    with explained(place):
        free = shutil.disk_usage(_existing(place)).free
    if free < need_bytes:
        needs, left = f"{need_bytes / 1e9:.2f} GB", f"{free / 1e9:.2f} GB"
        raise StorageError(f"{place} needs {needs} and its disk has {left} free; make room or name another directory")


def written_bytes(partial: Path) -> int:
    """Disk space of the blocks that an unfinished run has written."""
    with explained(partial):
        return sum(shard.lstat().st_size for shard in (partial / BLOCKS).glob("*.safetensors"))


def _refusals(place: Path, partial: Path, sources: Iterable[Path]) -> Iterator[str]:
    """Reasons why a directory, whatever it holds, is not written. Paths are compared by what they are, not by name."""
    try:
        str(place).encode()
    except UnicodeEncodeError:  # records and reports are UTF-8, and transformers reads no tokenizer from there
        yield "holds bytes that are not UTF-8"
    if _same(place, Path()):
        yield "is the current directory"
    if place.name.endswith(PARTIAL):
        yield f"ends in {PARTIAL}, as the working directories of runs do"
    for path in (place, partial):
        with contextlib.suppress(FileNotFoundError):
            path.stat()  # fails for a path that is too long, or links in a loop
    for folder in (place, *place.parents):
        if folder.name == STATE or os.path.lexists(folder / STATE / RUN):
            yield f"is the working directory of a run, {folder}, or in it"
    for source in sources:
        yield from _overlaps(place, partial, source)
    if place.exists() and not place.is_dir():
        yield "is a file"
    mounted = {disk.mountpoint for disk in psutil.disk_partitions(all=True)}  # os.path.ismount misses some
    for path in (place, partial):
        if str(path) in mounted or (path.is_dir() and os.path.ismount(path)):
            yield f"cannot be replaced: {path} is a mount point"
    if not os.access(_existing(place), os.W_OK | os.X_OK) or not _existing(place).is_dir():
        yield f"cannot be written: {_existing(place)} is not a writable directory"


def _overlaps(place: Path, partial: Path, source: Path) -> Iterator[str]:
    if _same(place, source):
        yield "is the model itself"
    if _in(source, place) or _in(place, source):
        yield f"holds the model {source}, or is inside it"
    if _same(partial, source) or _in(source, partial):
        yield f"would be written in {partial}, and the model {source} is there"


def _existing(place: Path) -> Path:
    return next(folder for folder in place.parents if folder.exists())


def _same(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return first == second


def _in(inner: Path, outer: Path) -> bool:
    return any(_same(folder, outer) for folder in inner.parents)
