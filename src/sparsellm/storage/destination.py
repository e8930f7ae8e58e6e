"""What is decided about an output directory before the work begins: which it is, and that it can be written."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from sparsellm.errors import StorageError
from sparsellm.storage.contents import foreign_entries, has_weights
from sparsellm.storage.files import check_own_directory, explained
from sparsellm.storage.publish import settle
from sparsellm.storage.resume import (
    FOLDER,
    PRUNE,
    RUN,
    SWEEP,
    discard,
    is_bare,
    left_in,
    locked,
    refuse_other_kind,
    some,
)

_PARTIAL = ".partial"
_SECOND = ".swept"  # in the name of the directory of a second stage


def partial_of(out: str | os.PathLike[str], *, second: bool = False) -> Path:
    """Where a checkpoint, or the second stage of it, is written until it is complete: beside what ``out`` leads to."""
    place = Path(os.path.realpath(out))
    return place.with_name(f"{place.name}{_SECOND if second else ''}{_PARTIAL}")


def check_destination(
    out: str | os.PathLike[str],
    *,
    sources: Iterable[Path] = (),
    overwrite: bool = False,
    restart: bool = False,
    kind: str = PRUNE,
    need_bytes: int = 0,
) -> Path:
    """The directory that ``out`` leads to, absolute and without links, if it can take a checkpoint.

    Nothing is changed but what a process began that was killed while it gave a result its name: that is completed, or
    taken back. Call it before the work, and again when more is known.

    Args:
        out: the directory.
        sources: directories that are read, which ``out`` must have nothing to do with.
        overwrite: a checkpoint in ``out`` may be replaced.
        restart: what an unfinished run, of any kind, left for ``out`` may be removed.
        kind: of the run.
        need_bytes: room for the whole; what an unfinished run has written already is taken off.

    Raises:
        StorageError: ``out`` is no path for a checkpoint, has to do with a source or with another run, is a mount
            point, is not empty or holds foreign files, cannot be written, or its disk has too little room.
    """
    place = _resolved(out)
    partials = (partial_of(place), partial_of(place, second=True))
    for source in sources:
        _check_apart(out, place, source, partials)
    _check_not_a_working_directory(place)
    with explained(place):
        if place.exists() and not place.is_dir():
            raise StorageError(f"{out} is a file; name a directory")
        for directory in (place, *partials):
            if _is_mount_point(directory):
                raise StorageError(f"{directory} is a mount point, which cannot be replaced; name a directory in it")
    _check_parent(place)
    for partial in partials:
        check_own_directory(partial)
        check_own_directory(partial / FOLDER)
    _settle_all(place, partials)
    if not restart:
        for partial, own in zip(partials, (kind, SWEEP), strict=True):
            if (left := left_in(partial)) is not None:
                refuse_other_kind(partial, left, own)
    check_replaceable(place, overwrite=overwrite)
    check_room(place, need_bytes, partials[0])
    return place


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Refuses a directory that is not empty, unless it may be replaced and holds nothing but a checkpoint.

    Raises:
        StorageError: it is so, or it cannot be read.
    """
    with explained(out):
        if not out.is_dir() or not any(out.iterdir()):
            return
        if not overwrite:
            raise StorageError(f"{out} exists and is not empty; name another directory or give --overwrite")
        foreign = foreign_entries(out)
        if foreign:
            raise StorageError(
                f"{out} holds {some(foreign)}, which neither sparsellm nor save_pretrained wrote; --overwrite replaces "
                "checkpoints only: move them elsewhere, or name another directory"
            )
        if not has_weights(out):
            raise StorageError(
                f"{out} holds no checkpoint (config.json and weights); --overwrite replaces checkpoints only: name "
                "another directory"
            )


def _resolved(out: str | os.PathLike[str]) -> Path:
    text = os.fspath(out)
    if not text:
        raise StorageError("--out is empty; name a directory")
    if "\0" in text:
        raise StorageError(f"--out {text!r} has a NUL character; name another directory")
    place = Path(os.path.realpath(text))
    try:
        str(place).encode()
    except UnicodeEncodeError:  # records and reports are UTF-8, and transformers reads no tokenizer from there
        raise StorageError(f"--out {place} holds bytes that are not UTF-8; name another directory") from None
    with contextlib.suppress(OSError):  # there may be no current directory any more
        if place == Path(os.path.realpath(os.getcwd())):
            raise StorageError(f"--out {text} is the current directory (or empty); name a directory in it")
    if place.parent == place:
        raise StorageError(f"--out {text} is the root of the file system; name a directory in it")
    with explained(place):
        for path in (place, partial_of(place, second=True)):  # too long, or links that lead to each other
            with contextlib.suppress(FileNotFoundError):
                path.stat()
    return place


def _check_apart(out: str | os.PathLike[str], place: Path, source: Path, partials: Iterable[Path]) -> None:
    """Files are compared by what they are, not by how they are spelled."""
    source = Path(os.path.realpath(source))
    if _same(place, source):
        raise StorageError(f"--out {out} is the model itself; name another directory")
    if any(_same(place, folder) for folder in source.parents):
        raise StorageError(f"--out {out} holds the model {source}; name another directory")
    if any(_same(source, folder) for folder in place.parents):
        raise StorageError(f"--out {out} lies in the model {source}; name another directory")
    for partial in partials:
        if any(_same(partial, folder) for folder in (source, *source.parents)):
            raise StorageError(f"the model {source} lies in {partial}, where a run into --out {out} writes; move it")


def _same(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return first == second


def _check_not_a_working_directory(place: Path) -> None:
    if place.name.endswith(_PARTIAL):
        raise StorageError(
            f"--out {place} has a name that ends in {_PARTIAL}, as the working directories of runs do; name another"
        )
    for folder in (place, *place.parents):
        if folder.name == FOLDER or os.path.lexists(folder / FOLDER / RUN):
            raise StorageError(f"--out {place}: {folder} is the working directory of a run; name another directory")


def _check_parent(place: Path) -> None:
    existing = next(folder for folder in place.parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write to {place}: {existing} is not a writable directory; name another directory")


def _settle_all(place: Path, partials: tuple[Path, Path]) -> None:
    """Completes, or takes back, the end of a run that was killed; refuses if a run is going on."""
    with contextlib.ExitStack() as held:
        there = [each for each, second in zip(partials, (False, True), strict=True) if _may_settle(each, second)]
        for partial in there:
            held.enter_context(locked(partial))
        published = [partial for partial in there if settle(partial, place)]
        for partial in there:
            if published or is_bare(partial):  # the second stage's result has all of the first's
                discard(partial)
    for partial in partials:
        with contextlib.suppress(OSError):
            partial.rmdir()  # only if a process was killed when it had removed what was in it


def _may_settle(partial: Path, second: bool) -> bool:
    """Whether there is a run's state that is of ``out``: ``a.swept.partial`` may be of ``a`` or of ``a.swept``."""
    left = left_in(partial)
    return (partial / FOLDER).is_dir() and (left is None or (left.kind == SWEEP) == second)


def check_room(place: Path, need_bytes: int, partial: Path) -> None:
    """Refuses a disk with too little room for ``need_bytes``, less what ``partial`` has of them already.

    Raises:
        StorageError: it is so.
    """
    existing = next(folder for folder in place.parents if folder.exists())
    with explained(existing):
        free = shutil.disk_usage(existing).free
        need_bytes -= sum(shard.stat().st_size for shard in partial.glob("*.safetensors"))
    if free < need_bytes:
        raise StorageError(
            f"{place} needs {need_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "make room or name another directory"
        )


def _is_mount_point(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    return os.path.ismount(directory) or str(directory) in _mount_points()


def _mount_points() -> set[str]:
    """Of Linux, where a directory can be mounted that is on the same file system."""
    if sys.platform != "linux":
        return set()
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines}
