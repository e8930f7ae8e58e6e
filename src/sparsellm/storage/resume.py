"""The state of an unfinished run: finished shards with their checksums, and what tells the run from another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sparsellm.errors import StorageError
from sparsellm.storage.files import explained, replace_atomically, sync, write_all

try:
    import fcntl
except ImportError:  # Windows has none; there two runs into one directory are not noticed
    fcntl = None  # type: ignore[assignment]

FOLDER = ".sparsellm-run"
RUN = "run.json"


class RunState:
    """Beside the shards, in ``<partial>/.sparsellm-run``: the run's identity, and one record for each finished shard.

    A shard is finished when its record is there and its checksum holds; the record is written last, atomically. So a
    process may be killed at any moment, and what it left is either finished or not there.

    Args:
        partial: the directory that the shards go to; made if it is not there.
        identity: all that the result depends on, as JSON values; nested mappings are compared value by value.
        restart: forget what another run left.

    Raises:
        StorageError: the directory holds another run or something else, another process writes it now, or it cannot
            be written.
    """

    def __init__(self, partial: Path, identity: dict[str, Any], *, restart: bool = False) -> None:
        self.partial = partial
        self.folder = partial / FOLDER
        identity = json.loads(json.dumps(identity))  # as it will be read
        found = _identity(partial)
        if found is None and _holds_anything(partial):
            raise StorageError(
                f"{partial} is not a run that can go on; remove it, or name another directory for the result"
            )
        with explained(partial):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder)
        try:
            if found is not None and not restart and (differences := _differences(found, identity)):
                raise StorageError(
                    f"{partial} holds an unfinished run that is another one: {'; '.join(differences[:4])}; "
                    "repeat its settings to go on with it, or give --restart to begin anew"
                )
            if found is not None and restart:
                self._forget()
            if found is None or restart:
                self._write(RUN, identity)
        except BaseException:
            self.close()
            raise

    def record(self, shard: str, facts: dict[str, Any]) -> None:
        """Marks a shard that is on the disk as finished.

        Args:
            shard: the name of its file.
            facts: JSON values to find again, among them its ``sha256``.
        """
        self._write(f"{shard}.json", facts)

    def finished(self, shard: str) -> dict[str, Any] | None:
        """The facts of a finished shard, or None: not there, cut short, or not what was written."""
        record, file = self.folder / f"{shard}.json", self.partial / shard
        try:
            facts = json.loads(record.read_text(encoding="utf-8"))
            with file.open("rb") as opened:
                sound = sha256(opened) == facts["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        assert isinstance(facts, dict)
        return facts if sound else None

    def keep(self, name: str, content: dict[str, Any]) -> None:
        """Puts JSON values beside the records, for the process that goes on with this run."""
        self._write(f"{name}.json", content)

    def kept(self, name: str) -> dict[str, Any] | None:
        """What :meth:`keep` put there, or None."""
        try:
            found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def keep_tensors(self, name: str, content: dict[str, Tensor]) -> None:
        """As :meth:`keep`, of small tensors."""
        data = save({key: tensor.contiguous() for key, tensor in content.items()})
        replace_atomically(self.folder / f"{name}.safetensors", lambda file: write_all(file, data))
        sync(self.partial)

    def kept_tensors(self, name: str) -> dict[str, Tensor] | None:
        """What :meth:`keep_tensors` put there, on the CPU, or None."""
        try:
            return load((self.folder / f"{name}.safetensors").read_bytes())
        except (OSError, SafetensorError):
            return None

    def close(self) -> None:
        """Lets another process write the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Removes the directory, the identity last."""
        self._forget()
        self.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def _forget(self) -> None:
        """Removes all but the identity, by which a process that is killed meanwhile finds the run again."""
        with explained(self.partial):
            for folder, keep in ((self.partial, FOLDER), (self.folder, RUN)):
                for entry in folder.iterdir():
                    if entry.name != keep:
                        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def _write(self, name: str, content: dict[str, Any]) -> None:
        data = json.dumps(content, ensure_ascii=False, indent=1).encode()
        replace_atomically(self.folder / name, lambda file: write_all(file, data))
        sync(self.partial)


def has_kept(partial: Path, name: str) -> bool:
    """Whether an earlier run has put such values there; see :meth:`RunState.keep` and ``keep_tensors``."""
    return any((partial / FOLDER / f"{name}.{kind}").is_file() for kind in ("json", "safetensors"))


def unfinished(partial: Path) -> bool:
    """Whether a run that can go on has left something here."""
    return _identity(partial) is not None


def left_by(partial: Path, finished: Path) -> bool:
    """Whether ``partial`` is what the run that ended in ``finished`` would have removed."""
    identity = _identity(partial)
    return identity == _identity(finished) if identity is not None else not _holds_anything(partial)


def _identity(partial: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((partial / FOLDER / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _holds_anything(partial: Path) -> bool:
    """Anything but what a process leaves that was killed while it began."""
    if not partial.exists():
        return False
    if not partial.is_dir():
        return True
    inside = {str(path.relative_to(partial)) for path in partial.rglob("*")}
    return bool(inside - {FOLDER, f"{FOLDER}/{RUN}.tmp"})


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """Sentences such as ``recipe.seed is 0 there and 1 here``."""
    found = []
    for key in {**there, **here}:
        name, old, new = f"{prefix}{key}", there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} is {old!r} there and {new!r} here")
    return found


def _lock(folder: Path) -> int | None:
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StorageError(
            f"another process is writing {folder.parent} now; wait for it, or name another directory"
        ) from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def sha256(file: Any) -> str:
    """Of what is left to read of a file, in hexadecimal."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 22):
        digest.update(piece)
    return digest.hexdigest()
