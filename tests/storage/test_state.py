"""The working directory of a run: what is resumed, what is refused, and what a killed process may leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsellm.errors import StorageError
from sparsellm.records import SweepPass
from sparsellm.run.journal import BlockRecord
from sparsellm.storage.directory import WorkingDirectory
from sparsellm.storage.state import RUN, STATE, UnfinishedRun, left_in, partial_of, read_sealed, write_sealed
from sparsellm.sweep.saved import SweepRecord
from tests.storage.small import tree

IDENTITY = {"recipe": {"seed": 0, "sparsity": 0.7}, "model": "abc"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The directory of a run that stopped when it had written a block."""
    with WorkingDirectory(tmp_path / "p", IDENTITY) as work:
        (work.folder("blocks") / "model-1.safetensors").write_text("weights")
    return tmp_path / "p"


def test_the_same_run_goes_on_and_another_is_refused_by_name(out: Path) -> None:
    before = tree(partial_of(out))
    WorkingDirectory(out, IDENTITY).close()
    with pytest.raises(StorageError) as refused:
        WorkingDirectory(out, {"recipe": {"seed": 1, "sparsity": 0.7, "new": True}, "model": "abc"})
    for said in ("recipe.seed is 0 there and 1 here", "recipe.new is None there and True here", "--restart"):
        assert said in str(refused.value)
    assert "sparsity" not in str(refused.value)
    WorkingDirectory(out, IDENTITY).close()  # the refusal let go of the lock
    assert tree(partial_of(out)) == before


def test_restart_removes_everything(out: Path) -> None:
    WorkingDirectory(out, {"model": "xyz"}, restart=True).close()
    assert tree(partial_of(out)).keys() == {STATE, f"{STATE}/{RUN}"}
    assert left_in(partial_of(out)) == UnfinishedRun("prune", {"model": "xyz"})


@pytest.mark.parametrize("place", ["", "blocks/", "swept/"])
@pytest.mark.parametrize("restart", [False, True])
def test_a_foreign_file_in_a_working_directory_is_named(place: str, restart: bool, out: Path) -> None:
    path = partial_of(out) / place / "thesis.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("years of work")
    before = tree(partial_of(out))
    with pytest.raises(StorageError, match=rf"holds {place}thesis\.txt, which no run wrote"):
        WorkingDirectory(out, IDENTITY, restart=restart)
    assert tree(partial_of(out)) == before


@pytest.mark.parametrize("restart", [False, True])
def test_a_foreign_directory_is_left_alone(restart: bool, tmp_path: Path) -> None:
    (tmp_path / "p.partial").mkdir()
    (tmp_path / "p.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="not a run that can be resumed"):
        WorkingDirectory(tmp_path / "p", IDENTITY, restart=restart)
    assert (tmp_path / "p.partial" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("left", [[], [STATE], [STATE, f"{STATE}/.0a1b.tmp"]])
def test_a_process_killed_at_its_begin_is_in_nobodys_way(left: list[str], tmp_path: Path) -> None:
    (tmp_path / "p.partial").mkdir()
    for name in left:
        path = tmp_path / "p.partial" / name
        path.write_text("{") if path.suffix == ".tmp" else path.mkdir()
    WorkingDirectory(tmp_path / "p", IDENTITY)
    assert tree(tmp_path / "p.partial").keys() == {STATE, f"{STATE}/{RUN}"}


def test_unfinished_files_of_a_killed_process_are_removed(out: Path) -> None:
    before = tree(partial_of(out))
    for folder in (STATE, "blocks"):
        (partial_of(out) / folder / ".0a1b.tmp").write_text("half")
    WorkingDirectory(out, IDENTITY)
    assert tree(partial_of(out)) == before


def test_two_processes_at_once_are_refused(out: Path) -> None:
    work = WorkingDirectory(out, IDENTITY)
    with pytest.raises(StorageError, match="another process is writing"):
        WorkingDirectory(out, IDENTITY, restart=True)
    work.close()
    WorkingDirectory(out, IDENTITY).close()


def test_another_kind_of_run_is_refused_and_packing_starts_again(out: Path) -> None:
    before = tree(partial_of(out))
    with pytest.raises(StorageError, match="holds an unfinished prune, which this pack would remove"):
        WorkingDirectory(out, {}, kind="pack")
    assert tree(partial_of(out)) == before
    for restart in (True, False):
        with WorkingDirectory(out, {}, kind="pack", restart=restart) as work:
            assert tree(partial_of(out)).keys() == {STATE, f"{STATE}/{RUN}"}
            (work.folder("blocks") / "model-1.safetensors").write_text("packed")


@pytest.mark.parametrize("damage", ["a number", "a key", "cut", "a list", "deep", "not text", "unsealed"])
def test_a_damaged_record_counts_as_absent(damage: str, out: Path, tmp_path: Path) -> None:
    record = SweepRecord([SweepPass(passes=0, held_out=1.25)], 1, {"é": "12"}, 0.1, 1 << 40)
    for path, kind in ((tmp_path / "r.json", SweepRecord), (partial_of(out) / STATE / RUN, UnfinishedRun)):
        if kind is SweepRecord:
            write_sealed(path, record)
            assert read_sealed(path, kind) == record
        content = path.read_bytes()
        path.write_bytes(
            {
                "a number": content.replace(b"0", b"2"),
                "a key": content.replace(b'"best"', b'"bext"').replace(b'"kind"', b'"kine"'),
                "cut": content[: len(content) // 2],
                "a list": b"[1]",
                "deep": b"[" * 100_000,
                "not text": b"\xff\xfe" + content,
                "unsealed": json.dumps({k: v for k, v in json.loads(content).items() if k != "checksum"}).encode(),
            }[damage]
        )
        assert read_sealed(path, kind) is None
    for kind in ("prune", "pack"):
        with pytest.raises(StorageError, match=r"run\.json, the record of an unfinished run, is damaged"):
            WorkingDirectory(out, IDENTITY, kind=kind)
    WorkingDirectory(out, IDENTITY, restart=True).close()


def test_a_record_of_another_kind_counts_as_absent(tmp_path: Path) -> None:
    write_sealed(tmp_path / "r.json", BlockRecord())
    assert read_sealed(tmp_path / "r.json", SweepRecord) is None
