"""The state of an unfinished run: finished shards with their checksums, and the identity of the run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sparsellm.errors import StorageError
from sparsellm.inputs.json_input import read_object
from sparsellm.storage.contents import STATE, foreign_entries
from sparsellm.storage.files import (
    TEMPORARY,
    check_own_directory,
    explained,
    lock,
    replace_atomically,
    sync,
    write_all,
)

FOLDER = STATE
RUN = "run.json"
JOURNAL = "publish.json"  # present while the result is renamed; see :mod:`sparsellm.storage.publish`
COMPANIONS = "companions"  # the record of files that were copied from the model
PRUNE, SWEEP, PACK, UNPACK = "prune", "sweep", "pack", "unpack"  # kinds of runs

_CHECKSUM = "checksum"


@dataclass(frozen=True)
class Left:
    """An unfinished run on the disk; both fields are None if its record is damaged."""

    kind: str | None
    identity: dict[str, Any] | None


class RunState:
    """The identity of a run and one record for each finished shard, in ``<partial>/.sparsellm-run`` beside the shards.

    A shard is finished if its record exists and both checksums match, the record's own and the shard's. The record is
    written last, atomically. So a process may be killed at any moment: a shard is either finished or ignored.

    Args:
        partial: the directory of the shards; created if it does not exist.
        identity: everything that the result depends on, as JSON values; nested mappings are compared value by value.
        kind: of the run. The files of a run of another kind are only removed with ``restart``.
        restart: remove the files of another run.
        resumable: continue an unfinished run of the same identity; False removes the files of one of the same kind.

    Raises:
        StorageError: the directory holds another run or foreign files, belongs to another user, is being written by
            another process, or cannot be written.
    """

    def __init__(
        self,
        partial: Path,
        identity: dict[str, Any],
        *,
        kind: str = PRUNE,
        restart: bool = False,
        resumable: bool = True,
    ) -> None:
        self.partial = partial
        self.folder = partial / FOLDER
        identity = json.loads(json.dumps(identity))  # in the form in which it will be read
        check_own_directory(partial)
        check_own_directory(self.folder)
        if left_in(partial) is None and not is_bare(partial):
            raise StorageError(
                f"{partial} is not a run that can be resumed; remove it, or name another directory for the result"
            )
        with explained(partial):
            self.folder.mkdir(parents=True, exist_ok=True)
        check_own_directory(partial)  # after creation, so that no other user can create it in between
        check_own_directory(self.folder)
        self._lock = lock(self.folder)
        try:
            left = left_in(partial)
            if left is not None:
                self._check_entries()
                if not restart:
                    refuse_other_kind(partial, left, kind)
                    if resumable:
                        self._check_same(left, identity)
            if left is not None and (restart or not resumable):
                self._forget()
                left = None
            with explained(partial):
                _tidy(partial)
            if left is None:
                self._write(RUN, {"kind": kind, "identity": identity})
        except BaseException:
            self.close()
            raise

    def record(self, shard: str, facts: dict[str, Any]) -> None:
        """Marks a shard that is on the disk as finished.

        Args:
            shard: the name of its file.
            facts: JSON values that :meth:`finished` will return, including its ``sha256``.
        """
        self._write(f"{shard}.json", facts)

    def finished(self, shard: str) -> dict[str, Any] | None:
        """The facts of a finished shard; None if it is absent, truncated or changed."""
        facts = read_record(self.folder / f"{shard}.json")
        try:
            with (self.partial / shard).open("rb") as opened:
                return facts if facts is not None and sha256(opened) == facts.get("sha256") else None
        except OSError:
            return None

    def keep(self, name: str, content: dict[str, Any]) -> None:
        """Saves JSON values beside the records, for a process that resumes this run."""
        self._write(f"{name}.json", content)

    def kept(self, name: str) -> dict[str, Any] | None:
        """The values that :meth:`keep` saved; None if they are absent or damaged."""
        return read_record(self.folder / f"{name}.json")

    def keep_tensors(self, name: str, content: dict[str, Tensor]) -> None:
        """As :meth:`keep`, for small tensors."""
        data = save({key: tensor.contiguous() for key, tensor in content.items()})
        replace_atomically(self.folder / f"{name}.safetensors", lambda file: write_all(file, data))
        self._write(f"{name}.safetensors.json", {"sha256": hashlib.sha256(data).hexdigest()})

    def kept_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors that :meth:`keep_tensors` saved, on the CPU; None if they are absent or damaged."""
        return _tensors(self.partial, name)

    def close(self) -> None:
        """Releases the lock, so that another process may write the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Removes the directory, the identity of the run last."""
        discard(self.partial)
        self.close()

    def _check_entries(self) -> None:
        """Refuses foreign files in the working directory, which would be removed with it or end in the result."""
        with explained(self.partial):
            recorded = [path.name.removesuffix(".json") for path in self.folder.glob("*.json")]
            taken = self.kept(COMPANIONS) or {}
            foreign = [
                name
                for name in foreign_entries(self.partial, [*recorded, *taken.get("files", [])])
                if not name.endswith(TEMPORARY)
            ]
        if foreign:
            raise StorageError(f"{self.partial} holds {some(foreign)}, which no run wrote; move it elsewhere")
        if (self.folder / JOURNAL).exists():
            raise StorageError(
                f"{self.partial} is of a run into another directory that was cut short at its very end; give "
                "the command of that run again"
            )

    def _check_same(self, left: Left, identity: dict[str, Any]) -> None:
        if left.identity is None:
            raise _damaged(self.partial)
        if changed := differences(left.identity, identity):
            raise StorageError(
                f"{self.partial} holds another unfinished run: {'; '.join(changed[:4])}; "
                "repeat its settings to resume it, or give --restart to start again"
            )

    def _forget(self) -> None:
        """Removes all files but the identity, so that the run is still recognised if this process is killed."""
        with explained(self.partial):
            empty(self.partial, (FOLDER,))
            empty(self.folder, (RUN,))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_record(self.folder / name, content)
        with explained(self.partial):
            sync(self.partial)


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON values to a file, with a checksum.

    Raises:
        StorageError: the disk is full, or the directory cannot be written.
    """
    content = json.loads(json.dumps(content))  # in the form in which it will be read
    sealed = {**content, _CHECKSUM: _checksum(content)}
    data = json.dumps(sealed, ensure_ascii=False, indent=1).encode()
    replace_atomically(path, lambda file: write_all(file, data))


def read_record(path: Path) -> dict[str, Any] | None:
    """The values that :func:`write_record` wrote; None if the file is absent, damaged or something else."""
    try:
        record = read_object(path)
    except StorageError:
        return None
    checksum = record.pop(_CHECKSUM, None)
    return record if checksum == _checksum(record) else None


def has_kept(partial: Path, name: str) -> bool:
    """Whether an earlier process saved values of this name; see :meth:`RunState.keep` and ``keep_tensors``."""
    return read_record(partial / FOLDER / f"{name}.json") is not None or _tensors(partial, name) is not None


def left_in(partial: Path) -> Left | None:
    """The unfinished run in a working directory, if there is one."""
    path = partial / FOLDER / RUN
    if not os.path.lexists(path):
        return None
    record = read_record(path) or {}
    kind, identity = record.get("kind"), record.get("identity")
    return Left(kind, identity) if isinstance(kind, str) and isinstance(identity, dict) else Left(None, None)


def unfinished(partial: Path) -> bool:
    """Whether a working directory holds an unfinished run that can be resumed."""
    left = left_in(partial)
    return left is not None and left.identity is not None


def refuse_other_kind(partial: Path, left: Left, kind: str) -> None:
    """Refuses a working directory in which a run of another kind was cut short, or one of a kind that is not known.

    Raises:
        StorageError: the run is of another kind.
    """
    if left.kind is None and kind in (PACK, UNPACK):  # they begin anew; the other kinds refuse it when they compare
        raise _damaged(partial)
    if left.kind not in (None, kind):
        raise StorageError(
            f"{partial} holds an unfinished {left.kind}, which this {kind} would remove; finish it by the command that "
            "began it, name another directory, or give --restart to remove it"
        )


def _damaged(partial: Path) -> StorageError:
    return StorageError(
        f"{partial / FOLDER / RUN}, the record of an unfinished run, is damaged; give --restart to begin anew"
    )


def discard(partial: Path) -> None:
    """Removes a working directory, the identity of the run last, so that an interrupted removal can be repeated.

    Errors are ignored, because the result is complete at this point.
    """
    folder = partial / FOLDER
    with contextlib.suppress(OSError):
        empty(partial, (FOLDER,))
        empty(folder, (RUN, JOURNAL))
        (folder / RUN).unlink(missing_ok=True)
        (folder / JOURNAL).unlink(missing_ok=True)
        folder.rmdir()
        partial.rmdir()


def is_bare(partial: Path) -> bool:
    """Whether a working directory holds no more than a process leaves if killed while it creates or removes it."""
    if not partial.exists():
        return True
    if not partial.is_dir():
        return False
    inside = {str(path.relative_to(partial)) for path in partial.rglob("*")}
    return all(name == FOLDER or (name.startswith(FOLDER) and name.endswith(TEMPORARY)) for name in inside)


def some(names: list[str]) -> str:
    """The first five of a list of names, and the number of the others, as text."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def sha256(file: Any) -> str:
    """SHA-256 of the rest of an open file, in hexadecimal."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 22):
        digest.update(piece)
    return digest.hexdigest()


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tensors(partial: Path, name: str) -> dict[str, Tensor] | None:
    record = read_record(partial / FOLDER / f"{name}.safetensors.json")
    try:
        data = (partial / FOLDER / f"{name}.safetensors").read_bytes()
        sound = record is not None and hashlib.sha256(data).hexdigest() == record.get("sha256")
        return load(data) if sound else None
    except (OSError, SafetensorError):
        return None


def empty(folder: Path, keep: tuple[str, ...]) -> None:
    """Removes all entries of a directory except those in ``keep``. Links are removed, their targets are not."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if entry.name not in keep:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _tidy(partial: Path) -> None:
    """Removes the temporary files of a process that was killed."""
    for folder in (partial, partial / FOLDER):
        for entry in folder.iterdir():
            if entry.name.endswith(TEMPORARY) and not entry.is_dir():
                entry.unlink()


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
