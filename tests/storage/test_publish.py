"""A checkpoint takes another's place: at every moment a whole one is there, and the next start ends what was begun."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsellm.errors import StorageError
from sparsellm.storage import directory
from sparsellm.storage.directory import WorkingDirectory, check_destination
from sparsellm.storage.state import PUBLISHING, REPLACED, STATE, partial_of
from tests.killing import KILLED, Died, dying, run
from tests.storage.small import source, value_of, write

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")

MODES = pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill leaves does not depend on it, and it takes the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return source(tmp_path / "model")


def steps_of(model: Path, out: Path, exchanges: bool) -> tuple[int, int]:
    """The number of steps that replace a checkpoint, and the number before the renaming begins."""
    write(out, 1, model)
    begin: list[int] = []
    publish = WorkingDirectory.publish
    with dying(exchanges=exchanges) as steps, pytest.MonkeyPatch.context() as patched:
        patched.setattr(WorkingDirectory, "publish", lambda *a: (begin.append(steps.total()), publish(*a))[1])
        write(out, 2, model, overwrite=True)
    return steps.total(), begin[0]


def value_there(out: Path, exchanges: bool) -> float:
    """The checkpoint after a kill, under its name or, between two renames, in the working directory."""
    if out.exists():
        return value_of(out)
    assert not exchanges
    return value_of(partial_of(out) / REPLACED)


def go_on(out: Path, model: Path, number: int) -> None:
    """The same command again, another kind of run that removes what is left, or the same one from its beginning."""
    if number % 3 == 0:
        write(out, 2, model, overwrite=True)
    elif number % 3 == 1:
        check_destination(out, overwrite=True, restart=True, kind="pack")
        assert value_of(out) in (1, 2)
        write(out, 3, model, overwrite=True, restart=True, kind="pack")
    else:
        write(out, 4, model, overwrite=True, restart=True)
    assert value_of(out) == (2, 3, 4)[number % 3]
    assert [path.name for path in out.parent.glob(f"{out.name}*")] == [out.name]


@MODES
def test_dead_at_every_call(exchanges: bool, model: Path, tmp_path: Path) -> None:
    steps, begin = steps_of(model, tmp_path / "p", exchanges)
    values = set()
    for number in [*range(1, begin, 19), *range(begin, steps + 1)]:
        out = tmp_path / f"q{number}_"
        write(out, 1, model)
        with pytest.raises(Died), dying(number, exchanges=exchanges):
            write(out, 2, model, overwrite=True)
        values.add(value_there(out, exchanges))
        go_on(out, model, number)
    assert values == {1, 2}


@MODES
def test_dead_at_every_call_of_the_repair(exchanges: bool, model: Path, tmp_path: Path) -> None:
    """Killed where the second rename would come, and again while the next start mends it."""
    steps, begin = steps_of(model, tmp_path / "p", exchanges)
    for number in range(begin + 1, steps, 7):
        for again in range(1 + number % 3, 40, 4):
            out = tmp_path / f"q{number}-{again}_"
            write(out, 1, model)
            with pytest.raises(Died), dying(number, exchanges=exchanges):
                write(out, 2, model, overwrite=True)
            try:
                with dying(again, exchanges=exchanges):
                    check_destination(out, overwrite=True, restart=True)
            except Died:
                assert value_there(out, exchanges) in (1, 2)
            else:
                break
            go_on(out, model, again)


@MODES
def test_killed_by_a_signal(exchanges: bool, model: Path, tmp_path: Path) -> None:
    steps, begin = steps_of(model, tmp_path / "p", exchanges)
    for number in range(begin + 1, steps + 1, 11):
        out = tmp_path / f"q{number}_"
        write(out, 1, model)
        assert run(write, out, 2, model, overwrite=True, at=number, exchanges=exchanges).code == KILLED
        assert value_there(out, exchanges) in (1, 2)
        go_on(out, model, number)


def test_dead_at_every_call_of_a_first_checkpoint(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()  # empty
    with dying() as steps:
        write(tmp_path / "p", 1, model)
    for number in range(1, steps.total() + 1, 5):
        out = tmp_path / f"q{number}_"
        out.mkdir()
        with pytest.raises(Died), dying(number):
            write(out, 1, model)
        if out.exists() and any(out.iterdir()):
            with pytest.raises(StorageError, match="exists and is not empty"):
                write(out, 1, model)
        else:
            write(out, 1, model)
        assert value_of(out) == 1
        assert [path.name for path in tmp_path.glob(f"{out.name}*")] == [out.name]


def test_a_system_that_cannot_exchange(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "_renameat2", lambda: lambda *_: -1)
    write(tmp_path / "p", 1, model)
    write(tmp_path / "p", 2, model, overwrite=True)
    assert value_of(tmp_path / "p") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"model", "p"}


@pytest.mark.skipif(directory._renameat2() is None, reason="only Linux exchanges two directories")
def test_two_directories_are_exchanged_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / f"in {name}").touch()
    monkeypatch.setattr(os, "replace", None)
    assert directory.exchange(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["in b"]
    assert not directory.exchange(tmp_path / "a", tmp_path / "none")


@pytest.mark.parametrize(("exchanges", "failing"), [(True, 0), (False, 0), (False, 1)])
def test_a_rename_that_fails_leaves_both(
    exchanges: bool, failing: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's work is kept, and goes on when the trouble is over."""
    out = write(tmp_path / "p", 1, model)
    replace, left = os.replace, [failing]

    def busy(source: Any, target: Any) -> Any:
        if Path(source).is_dir():
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.EBUSY, "Device or resource busy")
        return replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", busy)
        patched.setattr(directory, "exchange", busy if exchanges else lambda first, second: False)
        with pytest.raises(StorageError, match=r"cannot write .*busy"):
            write(out, 2, model, overwrite=True)
    assert value_of(out) == 1
    assert len(list((partial_of(out) / "blocks").glob("*.safetensors"))) == 2
    assert not (partial_of(out) / STATE / PUBLISHING).exists()
    write(out, 2, model, overwrite=True)
    assert value_of(out) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"model", "p"}


def test_a_rename_that_cannot_be_undone_is_completed_later(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "p", 1, model)
    replace, older = os.replace, out.stat().st_ino

    def busy(source: Any, target: Any) -> Any:
        if Path(target) == out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", busy)
        patched.setattr(directory, "exchange", lambda first, second: False)
        with pytest.raises(StorageError, match="busy"):
            write(out, 2, model, overwrite=True)
    assert not out.exists()
    assert (partial_of(out) / "replaced").stat().st_ino == older
    with pytest.raises(StorageError, match="not empty"):  # the renaming is complete when the next start looks
        write(out, 3, model, restart=True)
    assert value_of(out) == 2


@MODES
def test_two_checkpoints_that_cannot_be_told_apart_stay(exchanges: bool, model: Path, tmp_path: Path) -> None:
    """After a kill in the middle somebody puts a copy in the place of the result."""
    steps, begin = steps_of(model, tmp_path / "p", exchanges)
    for number in range(begin, steps):
        out = tmp_path / f"q{number}_"
        write(out, 1, model)
        with pytest.raises(Died), dying(number, exchanges=exchanges):
            write(out, 2, model, overwrite=True)
        if (partial_of(out) / REPLACED).exists() and not out.exists():
            write(out.with_name("copy"), 3, model).rename(out)
            with pytest.raises(StorageError, match="cannot tell which"):
                check_destination(out, overwrite=True)
            assert value_of(out) == 3
            assert value_of(partial_of(out) / REPLACED) == 1
            return
    assert exchanges


def test_permissions_of_the_old_checkpoint_are_kept(model: Path, tmp_path: Path) -> None:
    out = write(tmp_path / "p", 1, model)
    out.chmod(0o2750)
    write(out, 2, model, overwrite=True)
    assert out.stat().st_mode & 0o7777 == 0o2750
