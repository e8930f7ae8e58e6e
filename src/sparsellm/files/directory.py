"""Output directories: what is refused before the work, the working directory, and the final renaming.

``docs/architecture.md``, *Directories*, draws the states, and says who may remove what. Imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import psutil
from pydantic_core import to_jsonable_python

from sparsellm import interrupts
from sparsellm.errors import StorageError, shown, some
from sparsellm.files import files
from sparsellm.files.contents import (
    LIST,
    belongs_to,
    companions_of,
    foreign_entries,
    listed_files,
    unknown_entries,
)
from sparsellm.files.files import (
    empty,
    explained,
    keep_record,
    kept_record,
    locked,
    remove_torn,
    user_of_new_files,
)

Place = str | os.PathLike[str]

PARTIAL = ".partial"  # how the name of a working directory ends
STATE = ".sparsellm-run"  # folder of a run's records, in its working directory
RUN, PUBLISHING = (
    "run.json",
    "publishing.json",
)  # the run's identity; exists while its result is renamed
BLOCKS, SWEPT, REPLACED = (
    "blocks",
    "swept",
    "replaced",
)  # folders: the walk's checkpoint, the sweep's, the older one


def partial_of(out: Place) -> Path:
    """The working directory of a checkpoint: next to the directory that ``out`` leads to."""
    place = resolved(out)
    return place.with_name(f"{place.name}{PARTIAL}")


def resolved(path: Place) -> Path:
    """The absolute path without links; ``~`` is the user's home, as in the name of a model."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def left_in(partial: Path) -> dict[str, object] | None:
    """The identity of the unfinished run in a working directory, empty if its record is damaged; None without a run."""
    path = partial / STATE / RUN
    return (kept_record(path, dict) or {}) if os.path.lexists(path) else None


def differences(
    there: Mapping[str, object], here: Mapping[str, object], prefix: str = ""
) -> Iterator[str]:
    """Sentences such as ``recipe.seed is 0 there and 1 here``."""
    for key in {**there, **here}:
        name, old, new = f"{prefix}{key}", there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{name}.")
        elif old != new:
            yield f"{name} is {shown(old, 80)} there and {shown(new, 80)} here"


class WorkingDirectory(contextlib.ExitStack):
    """``<out>.partial``, locked until it is closed: created, or taken over from an earlier process of the same run.
    Raises StorageError as :func:`check_destination`, or if it holds another run or foreign files, or is in use."""

    def __init__(
        self,
        out: Place,  # the directory of the result
        identity: Mapping[
            str, object
        ],  # everything that the result depends on, as JSON values
        *,
        overwrite: bool = False,  # replace the checkpoint in ``out``; it is kept until the new one is complete
        restart: bool = False,  # remove the files of an unfinished run of any identity
        need_bytes: int = 0,  # disk space for the whole result, including the part that is written already
    ) -> None:
        super().__init__()
        self.out = check_destination(out, overwrite=overwrite, need_bytes=need_bytes)
        self.path = partial_of(self.out)
        self.state = self.path / STATE
        self._overwrite = overwrite
        _check_entries(self.path)
        with explained(self.path):
            self.state.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            held.enter_context(locked(self.state))
            self._begin(to_jsonable_python(identity), restart)
            self.push(held.pop_all())

    def publish(self, folder: Path) -> None:
        """Gives the complete checkpoint in ``folder`` its final name, and removes the working directory.

        An older checkpoint is exchanged with it in one step (Linux), else first renamed into the working directory.
        Raises StorageError if files were added to ``out`` in the meantime, or a renaming fails: both checkpoints are
        then as before, or the next start completes the renaming."""
        check_replaceable(self.out, overwrite=self._overwrite)
        record, replaced = self.state / PUBLISHING, self.path / REPLACED
        with interrupts.held(), explained(self.out):
            files.sync_tree(folder)
            keep_record(record, {"folder": folder.name, "inode": folder.stat().st_ino})
            older = self.out.is_dir()
            try:
                if older:
                    with contextlib.suppress(OSError):
                        shutil.copymode(
                            self.out, folder
                        )  # keeps access that was granted to others
                if not older or not exchange(folder, self.out):
                    if older:
                        os.replace(self.out, replaced)
                    os.replace(folder, self.out)
            except OSError:
                with contextlib.suppress(OSError):
                    if replaced.exists():
                        os.replace(replaced, self.out)
                    record.unlink()
                raise
            files.sync(self.out.parent)
            interrupts.keeps(f"{self.out} is complete", resumes=False, part=True)
            self.discard()

    def discard(self) -> None:
        """Removes the directory, and releases its lock."""
        _discard(self.path)
        self.close()

    def _begin(self, identity: dict[str, object], restart: bool) -> None:
        left = left_in(self.path)
        if not restart:
            check_identity(self.path, left, identity)
        with explained(self.path):
            if (
                restart
            ):  # all but the record, by which the run is recognised after a kill
                empty(self.path, (STATE,))
                empty(self.state, (RUN,))
        for folder in (
            self.path,
            self.state,
            *(self.path / name for name in (BLOCKS, SWEPT)),
        ):
            remove_torn(folder)
        if left is None or restart:
            keep_record(self.state / RUN, identity)


def check_unfinished(
    partial: Path, identity: Mapping[str, object], *, restart: bool
) -> None:
    """A StorageError for a working directory with foreign files, or, without ``restart``, a run of another identity."""
    _check_entries(partial)
    if not restart:
        check_identity(partial, left_in(partial), identity)


def check_identity(
    partial: Path, left: Mapping[str, object] | None, identity: Mapping[str, object]
) -> None:
    """A StorageError if the unfinished run in a working directory, with the identity ``left``, is another one."""
    if left is not None and left != identity:
        changed = (
            [*differences(left, identity)][:4]
            if left
            else [f"its record {partial / STATE / RUN} is damaged"]
        )
        other = left and left.get("model") != identity.get("model")
        again = "a model object that it changed must be loaded anew; " if other else ""
        again += "repeat its settings to resume it; " if left else ""
        holds = f"{partial} holds another unfinished run: {'; '.join(changed)}"
        anew = (
            f"to start again, remove {partial}, or give --restart if the command has it"
        )
        raise StorageError(f"{holds}; {again}{anew}")


def _check_entries(partial: Path) -> None:
    """Refuses foreign files in a working directory, which would be removed with it or end in the result."""
    with explained(partial):
        if not partial.exists():
            return
        begun = left_in(partial) is not None
        known = (
            [partial / name for name in (BLOCKS, SWEPT, REPLACED, STATE)]
            if begun
            else []
        )
        ours = {
            folder for folder in known if folder.is_dir() and not folder.is_symlink()
        }
        folders = {partial, *ours} - {partial / STATE}
        paths = {
            folder / name for folder in folders for name in unknown_entries(folder)
        } - ours
    if foreign := sorted(str(path.relative_to(partial)) for path in paths):
        raise StorageError(
            f"{partial} holds {some(foreign)}, which no run wrote; move it elsewhere"
        )


def exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two directories in one step; False if the system cannot."""
    rename = (
        getattr(ctypes.CDLL(None), "renameat2", None)
        if sys.platform == "linux"
        else None
    )
    here, flag = (
        -100,
        ctypes.c_uint(2),
    )  # AT_FDCWD and RENAME_EXCHANGE of Linux, on every processor
    return (
        rename is not None
        and rename(here, os.fsencode(first), here, os.fsencode(second), flag) == 0
    )


def check_destination(
    out: Place,
    *,
    sources: Iterable[Place] = (),
    overwrite: bool = False,
    need_bytes: int = 0,
    option: str = "--out",
) -> Path:
    """The directory that ``out`` leads to, absolute and without links, after all checks.

    Nothing is changed, except that a renaming that was cut short by a kill is completed or undone. Call it before the
    work, and again when sources, the directories that are read, and size are known. Raises StorageError if ``out``
    cannot be a checkpoint, overlaps with a source or with another run, is a mount point, is not empty or holds foreign
    files, cannot be written, or its disk has too little space; or if a source has a file that cannot be copied."""
    place = check_place(out, sources, option)
    partial = partial_of(place)
    _settle(partial, place)
    check_replaceable(place, overwrite=overwrite)
    check_room(place, need_bytes - written_bytes(partial))
    for source in filter(
        os.path.isdir, map(resolved, [*sources][-1:])
    ):  # the last one is copied
        copied = (file for file in companions_of(source) if belongs_to(source, file))
        if (
            file := next(
                (path for path in copied if not os.access(path, os.R_OK)), None
            )
        ) is not None:
            raise StorageError(
                f"{file} cannot be read, and is copied into the result; correct its permissions"
            )
    return place


def check_place(
    out: Place, sources: Iterable[Place] = (), option: str = "--out"
) -> Path:
    """The directory that ``out`` leads to, absolute and without links, whatever it holds. Raises StorageError if it, by
    ``option``, cannot be written, overlaps with a source or with another run, or is a mount point."""
    try:
        place = resolved(out) if os.fspath(out) else Path("/")
        str(
            place
        ).encode()  # fails for names that are not UTF-8, as records and reports are
    except ValueError:
        place = Path("/")
    if not place.name:
        raise StorageError(
            f"{option} {shown(os.fspath(out))} is empty, the root, or not a name; name a directory"
        )
    with explained(place):
        for reason in _refusals(place, partial_of(place), map(resolved, sources)):
            raise StorageError(f"{option} {out} {reason}; name another directory")
    return place


def checkpoints_among(*models: object) -> list[Path]:
    """The models that are given by the name of a directory with a checkpoint, before any is opened."""
    named = (
        os.path.expanduser(model)
        for model in models
        if isinstance(model, str | os.PathLike) and model != "demo"
    )
    return [
        Path(name)
        for name in named
        if os.path.isfile(os.path.join(name, "config.json"))
    ]


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Refuses a directory that is not empty, unless it may be replaced and holds nothing but a checkpoint of ours."""
    with explained(out):
        if not out.is_dir() or not any(out.iterdir()):
            return
        if not overwrite:
            raise StorageError(
                f"{out} exists and is not empty; name another directory or give --overwrite"
            )
        only = "--overwrite replaces only what sparsellm wrote"
        if listed_files(out) is None:
            why = f"has no {LIST}, the list of what sparsellm wrote there"
            raise StorageError(
                f"{out} {why}; {only}: remove it yourself, or name another directory"
            )
        if foreign := foreign_entries(out):
            raise StorageError(
                f"{out} holds {some(foreign)}; {only}: move it elsewhere, or name another directory"
            )


def check_room(place: Path, need_bytes: int) -> None:
    """Refuses a disk with less than ``need_bytes`` free."""
    with explained(place):
        free = shutil.disk_usage(_existing(place)).free
    if free < need_bytes:
        unit, name = (1e9, "GB") if need_bytes >= 1e9 else (1e6, "MB")
        needs, left = f"{need_bytes / unit:.2f} {name}", f"{free / unit:.2f} {name}"
        raise StorageError(
            f"{place} needs {needs} and its disk has {left} free; make room or name another directory"
        )


def written_bytes(partial: Path) -> int:
    """Disk space of the blocks that an unfinished run has written."""
    with explained(partial):
        shards = (
            shard
            for name in (BLOCKS, SWEPT)
            for shard in (partial / name).glob("*.safetensors")
        )
        return sum(shard.lstat().st_size for shard in shards)


def _refusals(place: Path, partial: Path, sources: Iterable[Path]) -> Iterator[str]:
    """Reasons why a directory, whatever it holds, is not written."""
    if _same(place, Path()):
        yield "is the current directory"
    if any(part.endswith(PARTIAL) for part in place.parts):
        yield f"is a working directory, whose names end in {PARTIAL}, or in one"
    for path in (place, partial, partial / STATE):
        with contextlib.suppress(FileNotFoundError):
            status = (
                path.lstat()
            )  # other errors, such as that of a long name, are the caller's
            if not stat.S_ISDIR(status.st_mode):
                yield f"cannot be written: {path} is a link or a file"
            elif path != place and status.st_uid != user_of_new_files(path.parent):
                yield f"cannot be written: {path} belongs to another user (id {status.st_uid})"
    for source in sources:
        for path in (place, partial):
            pairs = [(outer, source) for outer in (path, *path.parents)] + [
                (path, outer) for outer in source.parents
            ]
            if any(
                _same(*pair) for pair in pairs
            ):  # one is the other or inside it, by what they are, not by name
                what = (
                    "the model" if (source / "config.json").is_file() else "--out"
                )  # the same run's
                yield f"overlaps with {what} {source}, since {path} is written"
    mounted = {
        disk.mountpoint for disk in psutil.disk_partitions(all=True)
    }  # os.path.ismount misses some
    if mounted & {str(place), str(partial)}:
        yield "cannot be replaced: it is a mount point"
    for path in (
        _existing(place),
        place,
    ):  # to rename a directory, its entry for its parent is written
        if path.exists() and not os.access(path, os.W_OK | os.X_OK):
            yield f"cannot be written: {path} is not writable"


def _existing(place: Path) -> Path:
    return next(folder for folder in place.parents if folder.exists())


def _same(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return first == second


def _settle(partial: Path, out: Path) -> None:
    """Completes or undoes a renaming, and completes a removal, after a process was killed there. Raises StorageError if
    a process is active in the directory, or the newer checkpoint cannot be determined."""
    state, record = partial / STATE, partial / STATE / PUBLISHING
    if state.is_dir():
        with locked(state), explained(partial):
            if (published := kept_record(record, dict)) is not None:
                new = partial / Path(str(published.get("folder"))).name
                if not (out.exists() and out.stat().st_ino == published.get("inode")):
                    if new.exists() and not (partial / REPLACED).exists():
                        record.unlink()
                        return
                    if out.exists() or not new.exists():
                        raise StorageError(
                            f"cannot tell which of {out} and {new} is newer; move one elsewhere and remove {partial}"
                        )
                    os.replace(new, out)
                    files.sync(out.parent)
                _discard(partial)
            elif left_in(partial) is None:
                remove_torn(state)
                with contextlib.suppress(OSError):
                    state.rmdir()
    with contextlib.suppress(OSError):
        partial.rmdir()  # empty only if a process was killed as it created or removed the directory


def _discard(partial: Path) -> None:
    """Removes a working directory, the records of run and renaming last, so that the removal can be repeated."""
    with contextlib.suppress(
        OSError
    ):  # the result is complete, or nothing of it is wanted
        empty(partial, (STATE,))
        empty(partial / STATE, (RUN, PUBLISHING))
        for name in (RUN, PUBLISHING):
            (partial / STATE / name).unlink(missing_ok=True)
        (partial / STATE).rmdir()
        partial.rmdir()
