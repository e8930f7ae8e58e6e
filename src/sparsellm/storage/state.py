"""What a run keeps on the disk, and what a process that was killed left there. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from sparsellm.errors import StorageError
from sparsellm.inputs import read_object
from sparsellm.storage.files import TEMPORARY, empty, explained, locked, sync, write_bytes

PARTIAL = ".partial"  # how the name of a working directory ends
STATE = ".sparsellm-run"  # folder of a run's records, in its working directory
RUN, PUBLISHING = "run.json", "publishing.json"  # kind and identity of the run; exists while its result is renamed
BLOCKS, SWEPT, REPLACED = "blocks", "swept", "replaced"  # folders: the walk's checkpoint, the sweep's, the older one
PRUNE, PACK, UNPACK = "prune", "pack", "unpack"  # kinds of runs; only the first is resumed

T = TypeVar("T")


@dataclass(frozen=True)
class UnfinishedRun:
    """The kind of a run (empty if its record is damaged), and all that its result depends on, as JSON values."""

    kind: str
    identity: dict[str, Any]


@dataclass(frozen=True)
class Publishing:
    """The folder of the checkpoint that is being renamed, and its inode number, which renaming does not change."""

    folder: str
    inode: int


def partial_of(out: str | os.PathLike[str]) -> Path:
    """The working directory of a checkpoint: next to the directory that ``out`` leads to."""
    place = Path(os.path.realpath(out))
    return place.with_name(f"{place.name}{PARTIAL}")


def stage_of(out: str | os.PathLike[str]) -> Path:
    """The checkpoint from which the last stage of a run into ``out`` begins."""
    place = Path(os.path.realpath(out))
    return place.with_name(f"{place.name}.stage")


def write_sealed(path: Path, record: object) -> None:
    """Writes a dataclass or a pydantic model as a JSON object with a checksum.

    Raises:
        StorageError: the disk is full, or the directory cannot be written.
    """
    content = to_jsonable_python(record)
    sealed = {**content, "checksum": _checksum(content)}
    write_bytes(path, json.dumps(sealed, ensure_ascii=False, indent=1).encode())


def read_sealed(path: Path, kind: type[T]) -> T | None:
    """The record that :func:`write_sealed` wrote; None if the file is absent, damaged or something else."""
    try:
        content = read_object(path)
        return TypeAdapter(kind).validate_python(content) if content.pop("checksum", "") == _checksum(content) else None
    except (StorageError, ValidationError):
        return None


def _checksum(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def left_in(partial: Path) -> UnfinishedRun | None:
    """The unfinished run in a working directory, if there is one."""
    path = partial / STATE / RUN
    return (read_sealed(path, UnfinishedRun) or UnfinishedRun("", {})) if os.path.lexists(path) else None


def check_kind(partial: Path, kind: str) -> None:
    """Refuses a working directory with an unfinished run of another kind, or with a damaged record.

    Raises:
        StorageError: the directory is refused.
    """
    left = left_in(partial)
    if left is not None and not left.kind:
        raise StorageError(f"{partial / STATE / RUN}, the record of an unfinished run, is damaged; give --restart")
    if left is not None and left.kind != kind:
        raise StorageError(
            f"{partial} holds an unfinished {left.kind}, which this {kind} would remove; finish it by the command that "
            "began it, name another directory, or give --restart to remove it"
        )


def differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """Sentences such as ``recipe.seed is 0 there and 1 here``."""
    sentences = []
    for key in {**there, **here}:
        name, old, new = f"{prefix}{key}", there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            sentences += differences(old, new, f"{name}.")
        elif old != new:
            sentences.append(f"{name} is {old!r} there and {new!r} here")
    return sentences


def settle(partial: Path, out: Path) -> None:
    """Completes or undoes a renaming, and completes a removal, after a process was killed there.

    Raises:
        StorageError: a process is active in the directory, or the newer checkpoint cannot be determined.
    """
    if (partial / STATE).is_dir():
        with locked(partial / STATE), explained(partial):
            if _is_published(partial, out) or is_bare(partial):
                discard(partial)
    with contextlib.suppress(OSError):
        partial.rmdir()  # empty only if a process was killed while it created or removed the directory


def _is_published(partial: Path, out: Path) -> bool:
    """Whether a renaming has reached its end; one that stopped between two renames is completed."""
    record = read_sealed(partial / STATE / PUBLISHING, Publishing)
    if record is None or inode_of(out) == record.inode:  # a kill before the renaming may leave a damaged record
        return record is not None
    new, replaced = partial / Path(record.folder).name, (partial / REPLACED).exists()
    if inode_of(new) != record.inode or (replaced and out.exists()):
        raise StorageError(f"cannot tell which of {out} and {new} is newer; move one elsewhere and remove {partial}")
    if not replaced:
        (partial / STATE / PUBLISHING).unlink()
        return False
    os.replace(new, out)
    sync(out.parent)
    return True


def discard(partial: Path) -> None:
    """Removes a working directory, the records of run and renaming last, so that the removal can be repeated.

    Errors are ignored: the result is complete, or nothing of it is wanted.
    """
    with contextlib.suppress(OSError):
        empty(partial, (STATE,))
        empty(partial / STATE, (RUN, PUBLISHING))
        for name in (RUN, PUBLISHING):
            (partial / STATE / name).unlink(missing_ok=True)
        (partial / STATE).rmdir()
        partial.rmdir()


def is_bare(partial: Path) -> bool:
    """Whether a working directory holds no more than a process leaves if killed while it creates or removes it."""
    inside = (path.relative_to(partial).as_posix() for path in partial.rglob("*"))
    return not partial.exists() or (
        partial.is_dir() and all(n == STATE or (n.startswith(STATE) and n.endswith(TEMPORARY)) for n in inside)
    )


def inode_of(directory: Path) -> int:
    """The inode number of a directory; 0 if there is none."""
    return directory.lstat().st_ino if os.path.lexists(directory) else 0
