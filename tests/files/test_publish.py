"""A checkpoint takes another's place: at every moment a whole one is there, and the next start ends what was begun."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from sparsellm.errors import StorageError
from sparsellm.files import directory
from sparsellm.files.directory import (
    PUBLISHING,
    REPLACED,
    STATE,
    WorkingDirectory,
    check_destination,
    partial_of,
)
from tests.files.small import source, value_of, value_there, write
from tests.killing import Died, ahead_of, dying

pytestmark = pytest.mark.usefixtures("exchanges")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill leaves does not depend on it, and it takes the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=[False])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the system can exchange two directories in one step."""
    if not request.param:
        monkeypatch.setattr(directory, "exchange", lambda first, second: False)
    return bool(request.param)


BOTH = pytest.mark.parametrize(
    "exchanges", [True, False], indirect=True, ids=["exchange", "two renames"]
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return source(tmp_path / "model")


def steps_of(model: Path, out: Path) -> tuple[int, int]:
    """The number of steps that replace a checkpoint, and the number before the renaming begins."""
    write(out, 1, model)
    begin: list[int] = []
    with dying() as steps, pytest.MonkeyPatch.context() as patched:
        ahead_of(
            patched, WorkingDirectory, "publish", lambda *_: begin.append(steps.total())
        )
        write(out, 2, model, overwrite=True)
    return steps.total(), begin[0]


def killed(out: Path, model: Path, number: int) -> Path:
    """A directory whose checkpoint 1 was about to be replaced by 2, when the process died at a step."""
    write(out, 1, model)
    with pytest.raises(Died), dying(number):
        write(out, 2, model, overwrite=True)
    return out


def go_on(out: Path, model: Path, number: int) -> None:
    """The same command again, another kind of run that removes what is left, or the same one from its beginning."""
    restart, kind, value = ((False, "prune", 2), (True, "pack", 3), (True, "prune", 4))[
        number % 3
    ]
    assert (
        value_of(write(out, value, model, overwrite=True, restart=restart, kind=kind))
        == value
    )
    assert [path.name for path in out.parent.glob(f"{out.name}*")] == [out.name]


def test_a_checkpoint_is_synced_before_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, synced, replace = tmp_path / "p", set[int](), os.replace

    def checked(source: Any, target: Any) -> None:
        if Path(target) == out:
            assert {
                path.stat().st_ino for path in [Path(source), *Path(source).rglob("*")]
            } <= synced
        elif Path(source).is_file():
            assert Path(source).stat().st_ino in synced
        replace(source, target)
        synced.discard(Path(target).parent.stat().st_ino)  # it has a new name

    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino)
    )
    monkeypatch.setattr(os, "replace", checked)
    for value in (1, 2):
        write(out, value, model, overwrite=True)
        assert tmp_path.stat().st_ino in synced


@BOTH
def test_dead_at_every_call(exchanges: bool, model: Path, tmp_path: Path) -> None:
    steps, begin = steps_of(model, tmp_path / "p")
    values = set()
    for number in [*range(1, begin, 19), *range(begin, steps + 1)]:
        out = killed(tmp_path / f"q{number}_", model, number)
        values.add(value_there(out))
        assert out.exists() or not exchanges
        go_on(out, model, number)
    assert values == {1, 2}


@BOTH
def test_dead_at_every_call_of_the_repair(model: Path, tmp_path: Path) -> None:
    steps, begin = steps_of(model, tmp_path / "p")
    for number in range(begin + 1, steps, 7):
        for again in range(1 + number % 3, 40, 4):
            out = killed(tmp_path / f"q{number}-{again}_", model, number)
            try:
                with dying(again):
                    check_destination(out, overwrite=True)
            except Died:
                assert value_there(out) in (1, 2)
            else:
                break
            go_on(out, model, again)


def test_dead_at_every_call_of_a_first_checkpoint(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()  # empty
    with dying() as steps:
        write(tmp_path / "p", 1, model)
    for number in range(1, steps.total() + 1, 5):
        out = tmp_path / f"q{number}_"
        out.mkdir()
        with pytest.raises(Died), dying(number):
            write(out, 1, model)
        with contextlib.suppress(StorageError):  # it is complete
            write(out, 1, model)
        assert value_of(out) == 1
        assert [path.name for path in tmp_path.glob(f"{out.name}*")] == [out.name]


@pytest.mark.parametrize("failing", [0, 1])
def test_failed_renames_leave_both(
    failing: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's work is kept, and goes on when the trouble is over."""
    out = write(tmp_path / "p", 1, model)
    left = [failing]

    def busy(source: Any, target: Any) -> None:
        if Path(source).is_dir():
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patched:
        ahead_of(patched, os, "replace", busy)
        with pytest.raises(StorageError, match=r"cannot write .*busy"):
            write(out, 2, model, overwrite=True)
    assert value_of(out) == 1
    assert len(list((partial_of(out) / "blocks").glob("*.safetensors"))) == 2
    assert not (partial_of(out) / STATE / PUBLISHING).exists()
    assert value_of(write(out, 2, model, overwrite=True)) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"model", "p"}


def test_what_cannot_be_undone_is_completed_later(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "p", 1, model)
    older = out.stat().st_ino

    def busy(source: Any, target: Any) -> None:
        if Path(target) == out:
            raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patched:
        ahead_of(patched, os, "replace", busy)
        with pytest.raises(StorageError, match="busy"):
            write(out, 2, model, overwrite=True)
    assert not out.exists()
    assert (partial_of(out) / REPLACED).stat().st_ino == older
    with pytest.raises(
        StorageError, match="not empty"
    ):  # the renaming is complete when the next start looks
        write(out, 3, model, restart=True)
    assert value_of(out) == 2


def test_two_checkpoints_that_cannot_be_told_apart_stay(
    model: Path, tmp_path: Path
) -> None:
    """After a kill between the two renames somebody puts a copy in the place of the result."""
    steps, begin = steps_of(model, tmp_path / "p")
    places = (
        killed(tmp_path / f"q{number}_", model, number)
        for number in range(begin, steps)
    )
    out = next(place for place in places if not place.exists())
    write(out.with_name("copy"), 3, model).rename(out)
    with pytest.raises(StorageError, match="cannot tell which"):
        check_destination(out, overwrite=True)
    assert value_of(out) == 3
    assert value_of(partial_of(out) / REPLACED) == 1


def test_permissions_of_the_old_checkpoint_are_kept(
    model: Path, tmp_path: Path
) -> None:
    out = write(tmp_path / "p", 1, model)
    out.chmod(0o2750)
    write(out, 2, model, overwrite=True)
    assert out.stat().st_mode & 0o7777 == 0o2750
