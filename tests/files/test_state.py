"""The working directory of a run: what is resumed, what is refused, and what a killed process may leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsellm.errors import StorageError
from sparsellm.files.directory import RUN, STATE, WorkingDirectory, left_in, partial_of
from sparsellm.files.files import keep_record, kept_record
from sparsellm.method.sweep.saved import SweepRecord
from sparsellm.records import SweepPass
from sparsellm.run.journal import BlockRecord
from tests.files.small import tree

IDENTITY = {"kind": "prune", "recipe": {"seed": 0, "sparsity": 0.7}, "model": "abc"}
BARE = {STATE, f"{STATE}/{RUN}"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The directory of a run that stopped when it had written a block."""
    with WorkingDirectory(tmp_path / "p", IDENTITY) as work:
        (work.path / "blocks").mkdir()
        (work.path / "blocks" / "model-00001-of-00002.safetensors").write_text(
            "weights"
        )
    return tmp_path / "p"


def test_the_same_run_goes_on_and_another_is_refused_by_name(out: Path) -> None:
    before = tree(partial_of(out))
    WorkingDirectory(out, IDENTITY).close()
    for other, reasons in (
        (
            {**IDENTITY, "recipe": {"seed": 1, "sparsity": 0.7, "new": True}},
            ["recipe.seed is 0 there and 1 here"],
        ),
        (
            {**IDENTITY, "recipe": {**IDENTITY["recipe"], "new": True}},
            ["recipe.new is None there and True here"],
        ),  # type: ignore[dict-item]
        ({"kind": "pack"}, ["kind is 'prune' there and 'pack' here"]),
    ):
        with pytest.raises(StorageError) as refused:
            WorkingDirectory(out, other)
        assert all(reason in str(refused.value) for reason in [*reasons, "--restart"])
        assert "sparsity is" not in str(refused.value)
    WorkingDirectory(out, IDENTITY).close()  # the refusal let go of the lock
    assert tree(partial_of(out)) == before


def test_restart_removes_everything(out: Path) -> None:
    WorkingDirectory(out, {"model": "xyz"}, restart=True).close()
    assert tree(partial_of(out)).keys() == BARE
    assert left_in(partial_of(out)) == {"model": "xyz"}


@pytest.mark.parametrize("place", ["", "blocks/", "swept/"])
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_foreign_file_is_named(
    place: str, restart: bool, begun: bool, out: Path
) -> None:
    if not begun:  # then the directory is somebody else's
        out = out.with_name("q")
    path = partial_of(out) / place / "thesis.txt"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("years of work")
    if begun and place:
        # as a run leaves it that is killed before the renaming
        path.with_name("experts.json").write_text("{}")
    before = tree(out.parent)
    said = f"{place}thesis.txt" if begun or not place else place.strip("/")
    with pytest.raises(StorageError, match=f"holds {said}, which no run wrote"):
        WorkingDirectory(out, IDENTITY, restart=restart)
    assert tree(out.parent) == before


@pytest.mark.parametrize("left", [[], [STATE], [STATE, f"{STATE}/.{'0a' * 12}.tmp"]])
def test_what_a_kill_at_the_start_leaves_stops_no_run(
    left: list[str], tmp_path: Path
) -> None:
    (tmp_path / "p.partial").mkdir()
    for name in left:
        path = tmp_path / "p.partial" / name
        path.write_text("{") if path.suffix == ".tmp" else path.mkdir()
    WorkingDirectory(tmp_path / "p", IDENTITY)
    assert tree(tmp_path / "p.partial").keys() == BARE


def test_unfinished_files_of_a_killed_process_are_removed(out: Path) -> None:
    before = tree(partial_of(out))
    for folder in (STATE, "blocks"):
        # NFS keeps a removed file that is open by such a name
        for name in (
            f".{'0a' * 12}.tmp",
            ".nfs00000000012ab4",
        ):
            (partial_of(out) / folder / name).write_text("half")
    WorkingDirectory(out, IDENTITY)
    assert tree(partial_of(out)) == before


@pytest.mark.parametrize(
    "content",
    [b'{"kind": "pru', b"[1]", b"[" * 100_000, b"\xff\xfe{}"],
    ids=["cut", "list", "deep", "bytes"],
)
def test_a_damaged_record_counts_as_absent(content: bytes, out: Path) -> None:
    (partial_of(out) / STATE / RUN).write_bytes(content)
    with pytest.raises(StorageError, match=r"run\.json is damaged; to start again"):
        WorkingDirectory(out, IDENTITY)
    WorkingDirectory(out, IDENTITY, restart=True).close()


def test_a_record_of_another_kind_counts_as_absent(tmp_path: Path) -> None:
    record = SweepRecord(
        [SweepPass(passes=0, held_out=1.25)], 1, {"é": "12"}, 0.1, 1 << 40
    )
    keep_record(tmp_path / "r.json", record)
    assert kept_record(tmp_path / "r.json", SweepRecord) == record
    assert kept_record(tmp_path / "r.json", BlockRecord) is None
