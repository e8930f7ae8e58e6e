"""A working directory against a model of it: random starts that live, die, find a full disk, or are not alone.

Whatever happens, the older or the newer checkpoint is complete, no foreign file has changed, and nothing that a run
wrote counts as foreign. Then every moment of a renaming, one by one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sparsellm.errors import StorageError
from sparsellm.files.contents import LATER, changing, foreign_entries
from sparsellm.files.directory import (
    BLOCKS,
    RENAMING,
    STATE,
    WorkingDirectory,
    check_destination,
    left_in,
    old_of,
    partial_of,
)
from sparsellm.files.files import TORN
from sparsellm.files.results import append_result
from sparsellm.records import Continuation
from sparsellm.report.document import GENERATOR, write_page
from tests.files.small import identity, source, tree, value_of, value_there, write
from tests.killing import Died, ahead_of, dying, full_disk

KINDS = ("prune", "pack")
values = st.sampled_from([1.0, 2.0, 3.0])


def write_later(place: Path, name: str, number: int) -> None:
    """Writes one of the files that commands write into a complete checkpoint, as they do."""
    if name == "results.json":
        append_result(place, Continuation(prompt="", dense="", pruned=str(number)))
    elif name == "report.html":
        page = f'<meta name="generator" content="{GENERATOR}">{number}'
        write_page(page.encode(), place / name)
    else:
        with changing(place) as write_one:
            write_one(name, str(number).encode())


def later(place: Path) -> dict[str, bytes]:
    there = [place / name for name in LATER if (place / name).exists()]
    return {path.name: path.read_bytes() for path in there}


class Life(RuleBasedStateMachine):
    """A home with a directory ``p`` that runs write, and foreign files with names like those of the runs."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.model = source(self.home / "model")
        self.out = self.home / "p"
        self.partial = partial_of(self.out)
        (self.home / "p.older").mkdir()
        for name in ("p.txt", "p.partial.txt", "p.older/p.txt"):
            (self.home / name).write_text(f"foreign {name}")
        self.strange = self.foreign()
        # The values of which a checkpoint may be there: after a kill these are the older and the newer one.
        self.possible: set[float | None] = {None}
        self.patched = mock.patch.object(os, "fsync", return_value=None)
        self.patched.start()

    def foreign(self) -> dict[str, bytes | str | None]:
        """The content of every path that no run may change."""
        runs = {"p", "p.partial", "p.old"}
        there = tree(self.home)
        return {name: there[name] for name in there if name.split("/")[0] not in runs}

    def write(self, value: float, kind: str = "prune", **options: bool) -> None:
        write(self.out, value, self.model, kind, **options)

    def refused(self, why: str, **options: bool) -> None:
        """A start is refused, and changes nothing but what a kill left."""
        with contextlib.suppress(StorageError):
            check_destination(self.out)
        before = tree(self.home)
        with pytest.raises(StorageError, match=why):
            self.write(8.0, overwrite=True, **options)
        assert tree(self.home) == before

    def settled(self) -> bool:
        """Whether no renaming was cut short."""
        return not (self.partial / STATE / RENAMING).exists()

    def complete(self) -> bool:
        return self.settled() and self.out.exists()

    @rule(
        value=values,
        kind=st.sampled_from(KINDS),
        overwrite=st.booleans(),
        restart=st.booleans(),
    )
    def start(self, value: float, kind: str, overwrite: bool, restart: bool) -> None:
        """Does all or is refused; a refusal has one of two reasons."""
        with contextlib.suppress(StorageError):
            check_destination(self.out)  # as other commands may do before
        assert not old_of(self.out).exists()
        before = value_there(self.out)
        left = left_in(self.partial)
        occupied = before is not None and not overwrite
        other = left not in (None, identity(kind, value)) and not restart
        options = {"overwrite": overwrite, "restart": restart}
        if occupied or other:
            why = "not empty" if occupied else "holds another unfinished run"
            with pytest.raises(StorageError, match=why):
                self.write(value, kind, **options)
            assert value_there(self.out) == before
            self.possible = {before}
            return
        self.write(value, kind, **options)
        assert value_of(self.out) == value
        assert not self.partial.exists()
        assert not old_of(self.out).exists()
        self.possible = {value}

    @rule(
        value=values,
        kind=st.sampled_from(KINDS),
        restart=st.booleans(),
        at=st.integers(1, 160),
        disk=st.none() | st.integers(1, 20),
    )
    def die(
        self, value: float, kind: str, restart: bool, at: int, disk: int | None
    ) -> None:
        """A run that replaces what is there is killed at a step, or finds the disk full, unless it ends before."""
        try:
            with full_disk(disk), dying(at if disk is None else None):
                self.write(value, kind, overwrite=True, restart=restart)
        except (Died, StorageError):
            self.possible.add(value)
        else:
            self.possible = {value}

    @rule(value=values)
    def second_process(self, value: float) -> None:
        try:
            work = WorkingDirectory(
                self.out, identity("prune", value), overwrite=True, restart=True
            )
        finally:
            self.possible = {value_there(self.out)} & self.possible
        with work:
            self.refused("another process is writing")
            self.refused("another process is writing", restart=True)

    @precondition(lambda self: self.complete())
    @rule(name=st.sampled_from(["notes.txt", "LICENSE-mine.docx", "config.json"]))
    def file_in_the_result(self, name: str) -> None:
        path = self.out / name
        ours = path.read_bytes() if path.exists() else None
        path.write_text("mine")
        self.refused(re.escape(name), restart=True)
        path.unlink()
        if ours is not None:
            path.write_bytes(ours)

    @precondition(lambda self: self.settled() and left_in(self.partial) is not None)
    @rule(place=st.sampled_from(["", BLOCKS]), restart=st.booleans())
    def file_in_the_working_directory(self, place: str, restart: bool) -> None:
        path = self.partial / place / "thesis.txt"
        if path.parent.is_dir():
            path.write_text("years of work")
            said = path.relative_to(self.partial)
            self.refused(f"holds {said}, which no run wrote", restart=restart)
            path.unlink()

    @precondition(lambda self: self.complete())
    @rule()
    def older_name_is_taken(self) -> None:
        """By a copy that the user made."""
        shutil.copytree(self.out, old_of(self.out))
        self.refused(r"p\.old exists", restart=True)
        shutil.rmtree(old_of(self.out))

    @precondition(lambda self: self.complete())
    @rule(
        name=st.sampled_from(LATER),
        number=st.integers(0, 9),
        at=st.none() | st.integers(1, 16),
    )
    def small_file(self, name: str, number: int, at: int | None) -> None:
        """A file written into a complete checkpoint is as before or as it would be."""
        before = later(self.out)
        try:
            with dying(at):
                write_later(self.out, name, number)
        except Died:
            pass
        else:
            assert name in later(self.out)
            assert not any(TORN.fullmatch(path.name) for path in self.out.iterdir())
        after = later(self.out)
        changed = {key for key in after if before.get(key) != after[key]}
        assert before.keys() <= after.keys()
        assert changed <= {name}
        assert not changed or str(number).encode() in after[name]

    @invariant()
    def a_complete_checkpoint_is_there(self) -> None:
        assert value_there(self.out) in self.possible
        if self.out.exists():
            assert foreign_entries(self.out) == []
        assert self.foreign() == self.strange

    def teardown(self) -> None:
        self.write(9.0, overwrite=True, restart=True)  # all can be put in order
        assert value_of(self.out) == 9
        ours = {"p", "model"}
        names = {path.name for path in self.home.iterdir()}
        assert names - ours == {"p.txt", "p.partial.txt", "p.older"}
        self.patched.stop()
        shutil.rmtree(self.home)


def test_life() -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=100,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return source(tmp_path / "model")


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk: what a kill leaves does not depend on it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def killed_while_renaming(
    model: Path, folder: Path, older: bool = True
) -> Iterator[tuple[int, Path]]:
    """Directories in which a run died at each step from the beginning of its renaming on, and the number of the step.
    With ``older``, checkpoint 1 was about to be replaced by 2."""

    def made(name: str) -> Path:
        if older:
            write(folder / name, 1, model)
        return folder / name

    begin: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        out = made("whole")
        with dying() as steps:
            ahead_of(
                patched,
                WorkingDirectory,
                "publish",
                lambda *_: begin.append(steps.total()),
            )
            write(out, 2, model, overwrite=True)
    for number in range(begin[0], steps.total() + 1):
        out = made(f"q{number}_")
        with pytest.raises(Died), dying(number):
            write(out, 2, model, overwrite=True)
        yield number, out


@pytest.mark.usefixtures("instant")
def test_dead_at_every_step_of_a_renaming(model: Path, tmp_path: Path) -> None:
    seen = set()
    for number, out in killed_while_renaming(model, tmp_path):
        seen.add((out.exists(), old_of(out).exists(), value_there(out)))
        restart = number % 2 == 0
        value = 3 if restart else 2
        write(out, value, model, overwrite=True, restart=restart)
        assert value_of(out) == value
        assert [path.name for path in tmp_path.glob(f"{out.name}*")] == [out.name]
    assert seen == {
        (True, False, 1),
        (False, True, 1),
        (True, True, 2),
        (True, False, 2),
    }


@pytest.mark.usefixtures("instant")
def test_a_backup_of_the_user_stays(model: Path, tmp_path: Path) -> None:
    """What has the name of an older checkpoint is not touched where a run replaces none."""
    backup = write(tmp_path / "backup", 5, model)
    for _, out in killed_while_renaming(model, tmp_path, older=False):
        shutil.copytree(backup, old_of(out))
        with contextlib.suppress(StorageError):  # it is complete
            write(out, 2, model)
        assert value_of(out) == 2
        assert value_of(old_of(out)) == 5
        assert not partial_of(out).exists()


@pytest.mark.usefixtures("instant")
def test_what_somebody_moved_meanwhile_is_not_deleted(
    model: Path, tmp_path: Path
) -> None:
    for _, out in killed_while_renaming(model, tmp_path):
        old = old_of(out)
        if not old.exists():
            continue
        (old / "notes.txt").write_text("mine")
        with pytest.raises(StorageError, match=r"\.old holds notes\.txt"):
            check_destination(out, overwrite=True)
        (old / "notes.txt").unlink()
        if not out.exists():
            write(out.with_name("copy"), 3, model).rename(out)
            with pytest.raises(StorageError, match="cannot tell"):
                check_destination(out, overwrite=True)
            assert value_of(out) == 3
            shutil.rmtree(out)
        assert value_of(old) == 1
        assert check_destination(out, overwrite=True) == out
        assert value_of(out) == 2


@pytest.mark.usefixtures("instant")
@pytest.mark.parametrize("undone", [True, False])
@pytest.mark.parametrize("failing", [0, 1])
def test_failed_renames_leave_both(
    failing: int, undone: bool, model: Path, tmp_path: Path
) -> None:
    """The run's work is kept, and goes on when the trouble is over."""
    out = write(tmp_path / "p", 1, model)
    calls: list[Path] = []

    def busy(source: Any, target: Any) -> None:
        if Path(source).is_dir():
            calls.append(source)
            if len(calls) == failing + 1 or (len(calls) > failing and not undone):
                raise OSError(errno.EBUSY, "Device or resource busy")

    with pytest.MonkeyPatch.context() as patched:
        ahead_of(patched, os, "replace", busy)
        with pytest.raises(StorageError, match=r"cannot write .*busy"):
            write(out, 2, model, overwrite=True)
    assert value_there(out) == 1
    assert out.exists() == (undone or failing == 0)
    assert len(list((partial_of(out) / BLOCKS).glob("*.safetensors"))) == 2
    if out.exists():
        assert not (partial_of(out) / STATE / RENAMING).exists()
        write(out, 2, model, overwrite=True)
    else:
        with pytest.raises(StorageError, match="not empty"):  # it is complete by then
            write(out, 3, model, restart=True)
    assert value_of(out) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"model", "p"}


def test_a_checkpoint_is_synced_before_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "p"
    synced = set[int]()
    replace = os.replace

    def checked(source: Any, target: Any) -> None:
        below = [Path(source), *Path(source).rglob("*")]
        if Path(target) == out:
            assert {path.stat().st_ino for path in below} <= synced
        elif Path(source).is_file():
            assert Path(source).stat().st_ino in synced
        replace(source, target)
        synced.discard(Path(target).parent.stat().st_ino)  # it has a new name

    def sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", checked)
    for value in (1, 2):
        write(out, value, model, overwrite=True)
        assert old_of(out).parent.stat().st_ino in synced or value == 2


def test_permissions_of_the_old_checkpoint_are_kept(
    model: Path, tmp_path: Path
) -> None:
    out = write(tmp_path / "p", 1, model)
    out.chmod(0o2750)
    write(out, 2, model, overwrite=True)
    assert out.stat().st_mode & 0o7777 == 0o2750
