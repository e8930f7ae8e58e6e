"""Resolves an output directory and checks, before the work, that a checkpoint can be written there."""

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
from sparsellm.storage.files import check_own_directory, explained, locked
from sparsellm.storage.publish import settle
from sparsellm.storage.resume import (
    FOLDER,
    PRUNE,
    RUN,
    SWEEP,
    discard,
    is_bare,
    left_in,
    refuse_other_kind,
    some,
)

_PARTIAL = ".partial"
_STAGE = ".stage"
_SECOND = ".swept"  # part of the name of the second stage's directory


def partial_of(out: str | os.PathLike[str], *, second: bool = False) -> Path:
    """The working directory of a checkpoint, or of its second stage: beside the directory that ``out`` leads to."""
    place = Path(os.path.realpath(out))
    return place.with_name(f"{place.name}{_SECOND if second else ''}{_PARTIAL}")


def stage_of(out: str | os.PathLike[str]) -> Path:
    """The directory of the checkpoint from which the last stage of a run into ``out`` begins."""
    place = Path(os.path.realpath(out))
    return place.with_name(f"{place.name}{_STAGE}")


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

    Nothing is changed, with one exception: if a process was killed while it renamed a result, the renaming is completed
    or undone. Call it before the work, and again when sources and size are known.

    Args:
        out: the directory.
        sources: directories that are read; ``out`` must be apart from them.
        overwrite: a checkpoint in ``out`` may be replaced.
        restart: files that an unfinished run of any kind left for ``out`` may be removed.
        kind: of the run.
        need_bytes: disk space for the whole result; the part that an unfinished run has written is subtracted.

    Raises:
        StorageError: ``out`` is no path for a checkpoint, overlaps with a source or with another run, is a mount
            point, is not empty or holds foreign files, cannot be written, or its disk has too little space.
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
        StorageError: the directory is refused, or cannot be read.
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
    with contextlib.suppress(OSError):  # the current directory may have been removed
        if place == Path(os.path.realpath(os.getcwd())):
            raise StorageError(f"--out {text} is the current directory (or empty); name a directory in it")
    if place.parent == place:
        raise StorageError(f"--out {text} is the root of the file system; name a directory in it")
    with explained(place):
        for path in (place, partial_of(place, second=True)):  # fails for a path that is too long, or links in a loop
            with contextlib.suppress(FileNotFoundError):
                path.stat()
    return place


def _check_apart(out: str | os.PathLike[str], place: Path, source: Path, partials: Iterable[Path]) -> None:
    """Refuses an output directory that overlaps with a source. Paths are compared by file identity, not by spelling."""
    source = Path(os.path.realpath(source))
    if _same(place, source):
        raise StorageError(f"--out {out} is the model itself; name another directory")
    if any(_same(place, folder) for folder in source.parents):
        raise StorageError(f"--out {out} holds the model {source}; name another directory")
    if any(_same(source, folder) for folder in place.parents):
        raise StorageError(f"--out {out} is inside the model {source}; name another directory")
    for partial in partials:
        if any(_same(partial, folder) for folder in (source, *source.parents)):
            raise StorageError(f"the model {source} is inside {partial}, where a run into --out {out} writes; move it")


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
    """Completes or undoes the renaming by a run that was killed; refuses if a run is active."""
    with contextlib.ExitStack() as held:
        there = [each for each, second in zip(partials, (False, True), strict=True) if _may_settle(each, second)]
        for partial in there:
            held.enter_context(locked(partial / FOLDER))
        published = [partial for partial in there if settle(partial, place)]
        for partial in there:
            if published or is_bare(partial):  # the result of the second stage includes that of the first
                discard(partial)
    for partial in partials:
        with contextlib.suppress(OSError):
            partial.rmdir()  # empty only if a process was killed while it removed the directory


def _may_settle(partial: Path, second: bool) -> bool:
    """Whether a working directory has the state of a run into ``out``.

    The name does not decide: ``a.swept.partial`` may belong to ``a`` or to ``a.swept``.
    """
    left = left_in(partial)
    return (partial / FOLDER).is_dir() and (left is None or (left.kind == SWEEP) == second)


def check_room(place: Path, need_bytes: int, partial: Path) -> None:
    """Refuses a disk with too little space for ``need_bytes``, less the bytes that ``partial`` has already.

    Raises:
        StorageError: the space is too little.
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
    """All mount points, on Linux. ``os.path.ismount`` misses directories mounted from the same file system."""
    if sys.platform != "linux":
        return set()
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines}
