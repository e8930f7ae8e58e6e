"""A checkpoint takes another's place: at every moment a whole one is there, and the next start ends what was begun."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsellm.errors import StorageError
from sparsellm.storage import publish
from sparsellm.storage.destination import check_destination, partial_of
from sparsellm.storage.resume import FOLDER, JOURNAL
from tests.storage.deaths import Died, dying, write_and_die
from tests.storage.small import source, value_of, write

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")

MODES = pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill leaves does not depend on it, and it is what takes the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return source(tmp_path / "model")


def steps_of(model: Path, out: Path, exchanges: bool) -> tuple[int, int]:
    """How many steps it takes to replace a checkpoint, and after how many it begins to be replaced."""
    write(out, 1, model)
    begin = []
    gather = publish._gather
    with dying(None, exchanges) as steps, pytest.MonkeyPatch.context() as patched:
        patched.setattr(publish, "_gather", lambda partial: (begin.append(steps[0]), gather(partial))[1])
        write(out, 2, model, overwrite=True)
    return steps[0], begin[0]


def found_whole(out: Path, exchanges: bool) -> float:
    """The checkpoint that is there after a kill, under its name or, where there are two renames, beside."""
    beside = [path for path in out.parent.iterdir() if path.name.startswith(f"{out.name}.replaced-")]
    if out.exists():
        return value_of(out)
    assert not exchanges
    assert len(beside) == 1
    assert value_of(beside[0]) == 1
    return 1


def check_all_is_tidy(out: Path) -> None:
    assert not [path.name for path in out.parent.iterdir() if path.name.startswith(out.name) and path != out]


def go_on_in_every_way(out: Path, model: Path, number: int) -> None:
    """The same command again, another kind of run that removes what is left, or the same one from its beginning."""
    if number % 3 == 0:
        write(out, 2, model, overwrite=True)
        assert value_of(out) == 2
    elif number % 3 == 1:
        check_destination(out, overwrite=True, restart=True, kind="pack")
        assert value_of(out) in (1, 2)
        write(out, 3, model, overwrite=True, restart=True, kind="pack")
        assert value_of(out) == 3
    else:
        write(out, 4, model, overwrite=True, restart=True)
        assert value_of(out) == 4
    check_all_is_tidy(out)


@MODES
def test_dead_at_every_call(exchanges: bool, model: Path, tmp_path: Path) -> None:
    steps, begin = steps_of(model, tmp_path / "p", exchanges)
    newer = 0
    for number in [*range(1, begin, 9), *range(begin, steps + 1)]:
        out = tmp_path / f"p{number}"
        write(out, 1, model)
        with pytest.raises(Died), dying(number, exchanges):
            write(out, 2, model, overwrite=True)
        found = found_whole(out, exchanges)
        assert found in (1, 2)
        newer += found == 2
        go_on_in_every_way(out, model, number)
    assert 0 < newer < steps


@MODES
def test_dead_at_every_call_of_the_repair(exchanges: bool, model: Path, tmp_path: Path) -> None:
    """Killed where the second rename would come, and again while the next start mends it."""
    steps, begin = steps_of(model, tmp_path / "p", exchanges)
    for number in range(begin + 1, steps, 5):
        for again in range(1 + number % 3, 40, 3):
            out = tmp_path / f"p{number}-{again}"
            write(out, 1, model)
            with pytest.raises(Died), dying(number, exchanges):
                write(out, 2, model, overwrite=True)
            try:
                with dying(again, exchanges):
                    check_destination(out, overwrite=True, restart=True)
            except Died:
                assert found_whole(out, exchanges) in (1, 2)
            else:
                break
            go_on_in_every_way(out, model, again)


@MODES
def test_killed_by_a_signal(exchanges: bool, model: Path, tmp_path: Path) -> None:
    steps, begin = steps_of(model, tmp_path / "p", exchanges)
    for number in range(begin + 1, steps + 1, 9):
        out = tmp_path / f"p{number}"
        write(out, 1, model)
        write_and_die(number, exchanges, out, 2, model, {"overwrite": True})
        assert found_whole(out, exchanges) in (1, 2)
        go_on_in_every_way(out, model, number)


def test_dead_at_every_call_of_a_first_checkpoint(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()  # empty
    with dying(None) as steps:
        write(tmp_path / "p", 1, model)
    for number in range(1, steps[0] + 1, 3):
        out = tmp_path / f"p{number}"
        out.mkdir()
        with pytest.raises(Died), dying(number):
            write(out, 1, model)
        if out.exists() and any(out.iterdir()):
            assert value_of(out) == 1
            with pytest.raises(StorageError, match="exists and is not empty"):
                write(out, 1, model)
        else:
            write(out, 1, model)
            assert value_of(out) == 1
        check_all_is_tidy(out)


@MODES
def test_the_state_of_the_run_is_never_in_the_result(
    exchanges: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap = publish._swap

    def watched(finished: Path, out: Path, *rest: Any) -> None:
        assert not (finished / FOLDER).exists()
        swap(finished, out, *rest)
        assert not (out / FOLDER).exists()
        assert value_of(out) == 2

    write(tmp_path / "p", 1, model)
    monkeypatch.setattr(publish, "_swap", watched)
    with dying(None, exchanges):
        write(tmp_path / "p", 2, model, overwrite=True)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.EPERM])
def test_a_system_that_cannot_exchange(
    number: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> int:
        publish.ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(publish, "_renameat2", lambda: cannot)
    write(tmp_path / "p", 1, model)
    write(tmp_path / "p", 2, model, overwrite=True)
    assert value_of(tmp_path / "p") == 2
    check_all_is_tidy(tmp_path / "p")


@pytest.mark.skipif(publish._renameat2() is None, reason="only Linux exchanges two directories")
def test_two_directories_are_exchanged_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / f"in {name}").touch()
    monkeypatch.setattr(os, "replace", None)
    assert publish.exchange(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["in b"]
    with pytest.raises(FileNotFoundError):
        publish.exchange(tmp_path / "a", tmp_path / "none")


@MODES
def test_what_the_system_refuses_to_rename_leaves_both(
    exchanges: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each rename of a directory in turn; the run's work is kept, and goes on when the trouble is over."""
    write(tmp_path / "p", 1, model)
    replace = os.replace
    for failing in range(1 if exchanges else 2):
        left = [failing]

        def busy(source: Any, target: Any, left: list[int] = left) -> Any:
            if Path(source).is_dir() and Path(source).parent != tmp_path / "x":
                left[0] -= 1
                if left[0] == -1:
                    raise OSError(errno.EBUSY, "Device or resource busy")
            return replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", busy)
            if exchanges:
                patched.setattr(publish, "exchange", lambda first, second: busy(tmp_path, second))
            else:
                patched.setattr(publish, "exchange", lambda first, second: False)
            with pytest.raises(StorageError, match=r"cannot write .*busy"):
                write(tmp_path / "p", 2, model, overwrite=True)
        assert value_of(tmp_path / "p") == 1
        assert len(list(partial_of(tmp_path / "p").glob("*.safetensors"))) == 2
        assert not (partial_of(tmp_path / "p") / FOLDER / JOURNAL).exists()
    write(tmp_path / "p", 2, model, overwrite=True)
    assert value_of(tmp_path / "p") == 2
    check_all_is_tidy(tmp_path / "p")


def test_who_may_read_the_old_one_may_read_the_new_one(model: Path, tmp_path: Path) -> None:
    out = write(tmp_path / "p", 1, model)
    out.chmod(0o2750)
    write(out, 2, model, overwrite=True)
    assert out.stat().st_mode & 0o7777 == 0o2750
