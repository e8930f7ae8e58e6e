"""Output directories: what is refused before the work, the working directory, and the final renaming.

``docs/architecture.md``, *Directories*, lists the states. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
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
from sparsellm.files.named import is_gguf

Place = str | os.PathLike[str]

PARTIAL = ".partial"  # how the name of a working directory ends
OLD = ".old"  # how the name of a checkpoint ends while another takes its place
STATE = ".sparsellm-run"  # folder of a run's records, in its working directory
RUN = "run.json"  # the record of the run's identity
MODEL = "model.json"  # the record of the name of the run's model, for messages
RENAMING = "renaming.json"  # the record that is there while the result gets its name
BLOCKS = "blocks"  # folder of the walk's checkpoint
SWEPT = "swept"  # folder of the sweep's checkpoint


def partial_of(out: Place) -> Path:
    """The working directory of a checkpoint: next to the directory that ``out`` leads to."""
    place = resolved(out)
    return place.with_name(f"{place.name}{PARTIAL}")


def old_of(out: Path) -> Path:
    """The name that the older checkpoint has while the new one takes its place."""
    return out.with_name(f"{out.name}{OLD}")


def resolved(path: Place) -> Path:
    """The absolute path without links; ``~`` is the user's home, as in the name of a model."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def left_in(partial: Path) -> dict[str, object] | None:
    """The identity of the unfinished run in a working directory, empty if its record is damaged; None without a run."""
    path = partial / STATE / RUN
    if not os.path.lexists(path):
        return None
    return kept_record(path, dict) or {}


def differences(
    there: Mapping[str, object], here: Mapping[str, object], prefix: str = ""
) -> Iterator[str]:
    """Sentences such as ``recipe.seed is 0 there and 1 here``."""
    for key in {**there, **here}:
        name = f"{prefix}{key}"
        old = there.get(key)
        new = here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{name}.")
        elif old != new:
            yield f"{name} is {shown(old, 80)} there and {shown(new, 80)} here"


class WorkingDirectory(contextlib.ExitStack):
    """``<out>.partial``, locked until it is closed: created, or taken over from an earlier process of the same run.
    Raises StorageError as ``check_destination``, or if it holds another run or foreign files, or is in use."""

    def __init__(
        self,
        out: Place,
        identity: Mapping[str, object],
        *,
        overwrite: bool = False,
        restart: bool = False,
        need_bytes: int = 0,
        model: str = "",
    ) -> None:
        """
        Args:
            out: the directory of the result.
            identity: everything that the result depends on, as JSON values.
            overwrite: replace the checkpoint in ``out``, which stays until the new one is complete.
            restart: remove the files of an unfinished run of any identity.
            need_bytes: disk space for the whole result, including the part that is written already.
            model: the name of the model, for messages; empty for an object.
        """
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
            self._begin(to_jsonable_python(identity), restart, model)
            self.push(held.pop_all())

    def publish(self, folder: Path) -> None:
        """Gives the complete checkpoint in ``folder`` its final name, and removes the working directory.

        An older checkpoint is renamed to ``<out>.old`` before, and deleted afterwards. Raises StorageError if files
        were added to ``out`` in the meantime, or a renaming fails: both checkpoints are then as before, or the next
        start completes the renaming."""
        check_replaceable(self.out, overwrite=self._overwrite)
        replaces = _is_filled(self.out)
        record = {"folder": folder.name, "replaces": replaces}
        with interrupts.held(), explained(self.out):
            files.sync_tree(folder)
            if self.out.is_dir():  # keeps access that was granted to others
                with contextlib.suppress(OSError):
                    shutil.copymode(self.out, folder)
            keep_record(self.state / RENAMING, record)
            try:
                if replaces:
                    os.replace(self.out, old_of(self.out))
                os.replace(folder, self.out)
            except OSError:
                with contextlib.suppress(OSError):
                    if replaces and not self.out.exists():
                        os.replace(old_of(self.out), self.out)
                    (self.state / RENAMING).unlink()
                raise
            files.sync(self.out.parent)
            interrupts.keeps(f"{self.out} is complete", resumes=False, part=True)
            if replaces:
                _delete_old(self.out, self.path)
            self.discard()

    def discard(self) -> None:
        """Removes the directory, and releases its lock."""
        _discard(self.path)
        self.close()

    def _begin(self, identity: dict[str, object], restart: bool, model: str) -> None:
        left = left_in(self.path)
        if not restart:
            check_identity(self.path, left, identity, model)
        with explained(self.path):
            if restart:  # all but the record by which a killed start is recognised
                empty(self.path, (STATE,))
                empty(self.state, (RUN,))
        for folder in (self.path, self.state, self.path / BLOCKS, self.path / SWEPT):
            remove_torn(folder)
        if left is None or restart:
            keep_record(self.state / RUN, identity)
            if model:
                keep_record(self.state / MODEL, {"name": model})


def check_unfinished(
    partial: Path, identity: Mapping[str, object], *, restart: bool, model: str = ""
) -> None:
    """A StorageError for a working directory with foreign files, or, without ``restart``, a run of another identity."""
    _check_entries(partial)
    if not restart:
        check_identity(partial, left_in(partial), identity, model)


def check_identity(
    partial: Path,
    left: Mapping[str, object] | None,
    identity: Mapping[str, object],
    model: str = "",
) -> None:
    """Raises StorageError if the unfinished run in a working directory, whose identity is ``left``, is another one.
    ``model`` is the name of this run's model, for the message; empty for an object."""
    if left is None or left == identity:
        return
    digest = identity.get("model")
    if model and left.get("model", digest) != digest:
        there = (kept_record(partial / STATE / MODEL, dict) or {}).get("name")
        other = shown(there) if there and there != model else "another model"
        why = f"an unfinished run of {other}, and this one prunes {shown(model)}"
        raise StorageError(
            f"{partial} holds {why}; name another --out, or give --restart to remove that run"
        )
    changed = [f"its record {partial / STATE / RUN} is damaged"]
    again = ""
    if left:
        changed = list(differences(left, identity))[:4]
        again = "repeat its settings to resume it; "
        if left.get("model") != identity.get("model"):
            again = f"a model object that it changed must be loaded anew; {again}"
    holds = f"{partial} holds another unfinished run: {'; '.join(changed)}"
    anew = f"to start again, remove {partial}, or give --restart if the command has it"
    raise StorageError(f"{holds}; {again}{anew}")


def _check_entries(partial: Path) -> None:
    """Refuses foreign files in a working directory, which would be removed with it or end in the result."""
    with explained(partial):
        if not partial.exists():
            return
        ours = set()
        if left_in(partial) is not None:
            known = [partial / name for name in (BLOCKS, SWEPT, STATE)]
            ours = {path for path in known if path.is_dir() and not path.is_symlink()}
        foreign: list[str] = []
        for folder in {partial, *ours} - {partial / STATE}:
            paths = {folder / name for name in unknown_entries(folder)}
            foreign += [str(path.relative_to(partial)) for path in paths - ours]
    if foreign:
        raise StorageError(
            f"{partial} holds {some(sorted(foreign))}, which no run wrote; move it elsewhere"
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
    check_replaceable(place, overwrite=overwrite, named=f"{option} {os.fspath(out)}")
    check_room(place, need_bytes - written_bytes(partial))
    for source in map(resolved, [*sources][-1:]):  # the last one is copied
        for file in companions_of(source) if source.is_dir() else ():
            if belongs_to(source, file) and not os.access(file, os.R_OK):
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
        str(place).encode()  # fails unless it is UTF-8, as records and reports are
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


def check_folder(out: Place, sources: Iterable[Place] = ()) -> Path:
    """The directory in which several checkpoints are written, as ``check_place``. Raises StorageError for a
    checkpoint too, which could not be replaced any more."""
    place = check_place(out, sources)
    if checkpoints_among(place):
        raise StorageError(
            f"--out {out} is a checkpoint itself; name a directory for new ones"
        )
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


def check_replaceable(out: Path, *, overwrite: bool, named: str = "") -> None:
    """Refuses a directory that is not empty, unless it may be replaced and holds nothing but a checkpoint of ours.
    Messages call it ``named``, by its path if that is empty."""
    named = named or str(out)
    only = "--overwrite replaces only what sparsellm wrote"
    with explained(out):
        if not _is_filled(out):
            return
        if not overwrite:
            raise StorageError(
                f"{named} exists and is not empty; name another directory or give --overwrite"
            )
        if listed_files(out) is None:
            why = f"has no {LIST}, the list of what sparsellm wrote there"
            raise StorageError(
                f"{named} {why}; {only}: remove it yourself, or name another directory"
            )
        if foreign := foreign_entries(out):
            raise StorageError(
                f"{named} holds {some(foreign)}; {only}: move it elsewhere, or name another directory"
            )
        if os.path.lexists(old_of(out)):
            raise StorageError(
                f"{old_of(out)} exists, and --overwrite needs this name for the older checkpoint; move it elsewhere"
            )


def check_room(place: Path, need_bytes: int) -> None:
    """Refuses a disk with less than ``need_bytes`` free."""
    with explained(place):
        free = shutil.disk_usage(_existing(place)).free
    if free < need_bytes:
        unit = 1e6
        name = "MB"
        if need_bytes >= 1e9:
            unit = 1e9
            name = "GB"
        needs = f"{need_bytes / unit:.2f} {name}"
        left = f"{free / unit:.2f} {name}"
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
    if is_gguf(place):
        yield "is the name of a .gguf file, and this writes a directory"
    yield from _refused_kinds(place, partial)
    for source in sources:
        for path in (place, partial):
            if _is_inside(path, source) or _is_inside(source, path):
                is_model = (source / "config.json").is_file()
                what = "the model" if is_model else "--out"  # the --out of the same run
                yield f"overlaps with {what} {source}, since {path} is written"
    # os.path.ismount does not know every mount point.
    mounted = {disk.mountpoint for disk in psutil.disk_partitions(all=True)}
    if mounted & {str(place), str(partial)}:
        yield "cannot be replaced: it is a mount point"
    # To rename a directory, the system writes the entry for its parent in it.
    for path in (_existing(place), place):
        if path.exists() and not os.access(path, os.W_OK | os.X_OK):
            yield f"cannot be written: {path} is not writable"


def _refused_kinds(place: Path, partial: Path) -> Iterator[str]:
    """Reasons that lie in what already has one of the names: a link, a file, or a directory of another user."""
    for path in (place, partial, partial / STATE):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # the caller explains other errors, such as that of a long name
        if not stat.S_ISDIR(status.st_mode):
            yield f"cannot be written: {path} is a link or a file"
        elif path != place and status.st_uid != user_of_new_files(path.parent):
            yield f"cannot be written: {path} belongs to another user (id {status.st_uid})"


def _is_filled(out: Path) -> bool:
    """Whether a path is a directory with anything in it."""
    return out.is_dir() and any(out.iterdir())


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or inside it, by what they are and not by their names."""
    return any(_same(outer, folder) for outer in (path, *path.parents))


def _existing(place: Path) -> Path:
    return next(folder for folder in place.parents if folder.exists())


def _same(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return first == second


def _settle(partial: Path, out: Path) -> None:
    """Completes a renaming or a removal after a process was killed there. Raises StorageError if a process is active in
    the directory, or somebody moved one of the checkpoints."""
    state = partial / STATE
    if state.is_dir():
        with locked(state), explained(partial):
            record = kept_record(state / RENAMING, dict)
            if record is not None:
                _settle_renaming(partial, out, record)
            elif left_in(partial) is None:
                remove_torn(state)
                with contextlib.suppress(OSError):
                    state.rmdir()
    with contextlib.suppress(OSError):
        partial.rmdir()  # empty only if a process was killed as it created or removed the directory


def _settle_renaming(partial: Path, out: Path, record: Mapping[str, object]) -> None:
    """Completes the renaming of a record, or removes the record if no renaming was done."""
    new = partial / Path(str(record.get("folder"))).name
    old = old_of(out)
    renamed_away = bool(record.get("replaces")) and old.is_dir()
    if new.is_dir() and not renamed_away:
        (partial / STATE / RENAMING).unlink()
        return
    if renamed_away:
        if new.is_dir() == _is_filled(out):
            raise StorageError(
                f"cannot tell what became of {out}, of which {old} is the older checkpoint; move that elsewhere"
            )
        if foreign := foreign_entries(old):
            raise StorageError(
                f"{old} holds {some(foreign)}, and would be deleted; move it elsewhere"
            )
        if new.is_dir():
            os.replace(new, out)
            files.sync(out.parent)
        _delete_old(out, partial)
    _discard(partial)


def _delete_old(out: Path, partial: Path) -> None:
    """Deletes the older checkpoint. It loses its name first, so no part of one is ever seen there."""
    with contextlib.suppress(OSError):  # the result is complete all the same
        os.replace(old_of(out), partial / OLD)
        shutil.rmtree(partial / OLD)


def _discard(partial: Path) -> None:
    """Removes a working directory, the records of run and renaming last, so that the removal can be repeated."""
    # Errors are ignored: the result is complete, or nobody wants anything in the directory.
    with contextlib.suppress(OSError):
        empty(partial, (STATE,))
        empty(partial / STATE, (RUN, RENAMING))
        for name in (RUN, RENAMING):
            (partial / STATE / name).unlink(missing_ok=True)
        (partial / STATE).rmdir()
        partial.rmdir()
