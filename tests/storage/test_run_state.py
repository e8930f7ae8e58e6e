"""The state beside the shards: what counts as finished, what is refused, and what a killed process may leave."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from sparsellm.errors import StorageError
from sparsellm.storage.resume import FOLDER, RUN, RunState, unfinished

IDENTITY: dict[str, Any] = {"recipe": {"seed": 0, "sparsity": 0.7}, "model": "abc"}


def with_shard(partial: Path, content: bytes = b"weights") -> RunState:
    state = RunState(partial, IDENTITY)
    (partial / "s").write_bytes(content)
    state.record("s", {"sha256": hashlib.sha256(b"weights").hexdigest(), "linears": [1]})
    return state


def test_a_shard_is_finished_when_its_checksum_holds(tmp_path: Path) -> None:
    state = with_shard(tmp_path / "p")
    assert state.finished("s") == {"sha256": hashlib.sha256(b"weights").hexdigest(), "linears": [1]}
    assert state.finished("t") is None
    for damaged in (b"weightz", b"weight", b"weights!", b""):
        (tmp_path / "p" / "s").write_bytes(damaged)
        assert state.finished("s") is None
    (tmp_path / "p" / "s").write_bytes(b"weights")
    (tmp_path / "p" / FOLDER / "s.json").write_text('{"sha2')
    assert state.finished("s") is None


def test_the_same_run_goes_on_and_another_is_refused_by_what_differs(tmp_path: Path) -> None:
    with_shard(tmp_path / "p").close()
    RunState(tmp_path / "p", IDENTITY).close()
    other = {"recipe": {"seed": 1, "sparsity": 0.7, "new": True}, "model": "abc"}
    with pytest.raises(StorageError) as refused:
        RunState(tmp_path / "p", other)
    assert "recipe.seed is 0 there and 1 here" in str(refused.value)
    assert "recipe.new is None there and True here" in str(refused.value)
    assert "sparsity" not in str(refused.value)
    assert "--restart" in str(refused.value)
    assert with_shard(tmp_path / "p").finished("s") is not None  # the refusal let go of the lock and touched nothing


def test_restart_forgets_all_that_was_there(tmp_path: Path) -> None:
    with_shard(tmp_path / "p").close()
    (tmp_path / "p" / FOLDER / "sweep").mkdir()
    state = RunState(tmp_path / "p", {"model": "xyz"}, restart=True)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        "p",
        f"p/{FOLDER}",
        f"p/{FOLDER}/{RUN}",
    }
    assert json.loads((tmp_path / "p" / FOLDER / RUN).read_text())["identity"] == {"model": "xyz"}
    assert state.finished("s") is None


def test_somebody_else_s_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.txt").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(StorageError, match="not a run that can go on"):
            RunState(tmp_path / "p", IDENTITY, restart=restart)
    assert (tmp_path / "p" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "q").write_text("a file")
    with pytest.raises(StorageError):
        RunState(tmp_path / "q", IDENTITY)


@pytest.mark.parametrize("left", [[], [FOLDER], [FOLDER, f"{FOLDER}/{RUN}.tmp"]])
def test_a_process_killed_while_it_began_is_in_nobody_s_way(left: list[str], tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for name in left:
        path = tmp_path / "p" / name
        path.write_text("{") if path.suffix else path.mkdir()
    assert not unfinished(tmp_path / "p")
    RunState(tmp_path / "p", IDENTITY)
    assert unfinished(tmp_path / "p")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    state = RunState(tmp_path / "p", IDENTITY)
    with pytest.raises(StorageError, match="another process is writing"):
        RunState(tmp_path / "p", IDENTITY)
    state.close()
    RunState(tmp_path / "p", IDENTITY).close()
