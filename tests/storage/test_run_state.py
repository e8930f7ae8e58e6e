"""The state beside the shards: what counts as finished, what is refused, and what a killed process may leave."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsellm.errors import StorageError
from sparsellm.storage.resume import FOLDER, RUN, RunState, has_kept, unfinished

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
        with pytest.raises(StorageError, match="not a run that can be resumed"):
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


def records(partial: Path) -> list[Path]:
    return sorted((partial / FOLDER).glob("*.json"))


@pytest.mark.parametrize("damage", ["a number", "a key", "cut", "a list", "deep", "not text", "unsealed"])
def test_a_damaged_record_counts_as_absent(damage: str, tmp_path: Path) -> None:
    state = with_shard(tmp_path / "p")
    state.keep("plan", {"zeros": {"a": 123}})
    state.keep_tensors("costs", {"a": torch.ones(2)})
    for path in records(tmp_path / "p"):
        content = path.read_bytes()
        changed = {
            "a number": content.replace(b"1", b"2"),
            "a key": content.replace(b'"sha256"', b'"sha257"').replace(b'"zeros"', b'"zerox"'),
            "cut": content[: len(content) // 2],
            "a list": b"[1]",
            "deep": b"[" * 100_000,
            "not text": b"\xff\xfe" + content,
            "unsealed": json.dumps({k: v for k, v in json.loads(content).items() if k != "checksum"}).encode(),
        }[damage]
        if path.name != RUN:
            path.write_bytes(changed)
    assert state.finished("s") is None
    assert state.kept("plan") is None
    assert state.kept_tensors("costs") is None
    assert not has_kept(tmp_path / "p", "plan")
    assert not has_kept(tmp_path / "p", "costs")
    state.close()
    (tmp_path / "p" / FOLDER / RUN).write_bytes(b'{"identity": 1}')
    assert not unfinished(tmp_path / "p")
    with pytest.raises(StorageError, match=r"run\.json.* is damaged; give --restart"):
        RunState(tmp_path / "p", IDENTITY)
    RunState(tmp_path / "p", IDENTITY, restart=True).close()
    assert [path.name for path in records(tmp_path / "p")] == [RUN]


def test_what_is_kept_is_kept(tmp_path: Path) -> None:
    state = RunState(tmp_path / "p", IDENTITY)
    state.keep("plan", {"zeros": {"a": 1.5, "é": None}, "9": 0, "10": 1})
    state.keep_tensors("costs", {"a": torch.ones(2)})
    assert state.kept("plan") == {"zeros": {"a": 1.5, "é": None}, "9": 0, "10": 1}
    found = state.kept_tensors("costs")
    assert found is not None
    assert torch.equal(found["a"], torch.ones(2))
    assert has_kept(tmp_path / "p", "plan")
    assert has_kept(tmp_path / "p", "costs")
    assert not has_kept(tmp_path / "p", "other")
    path = tmp_path / "p" / FOLDER / "costs.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert state.kept_tensors("costs") is None
    assert not has_kept(tmp_path / "p", "costs")


def test_what_a_killed_process_had_in_work_is_removed(tmp_path: Path) -> None:
    with_shard(tmp_path / "p").close()
    (tmp_path / "p" / ".0a1b.tmp").write_text("half a shard")
    (tmp_path / "p" / FOLDER / ".0a1b.tmp").write_text("half a record")
    state = RunState(tmp_path / "p", IDENTITY)
    assert {path.name for path in (tmp_path / "p").rglob("*")} == {FOLDER, RUN, "s", "s.json"}
    assert state.finished("s") is not None


def test_somebody_s_file_in_a_working_directory_is_named(tmp_path: Path) -> None:
    with_shard(tmp_path / "p").close()
    (tmp_path / "p" / "thesis.txt").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(StorageError, match=r"holds thesis\.txt, which no run wrote"):
            RunState(tmp_path / "p", IDENTITY, restart=restart)
    (tmp_path / "p" / "thesis.txt").unlink()
    assert with_shard(tmp_path / "p").finished("s") is not None


def test_another_kind_of_run_is_told_and_stays(tmp_path: Path) -> None:
    with_shard(tmp_path / "p").close()
    with pytest.raises(StorageError, match="holds an unfinished prune, which this pack would remove"):
        RunState(tmp_path / "p", IDENTITY, kind="pack", resumable=False)
    assert with_shard(tmp_path / "p").finished("s") is not None


def test_a_run_that_cannot_go_on_begins_anew(tmp_path: Path) -> None:
    for _ in range(2):
        state = RunState(tmp_path / "p", {}, kind="pack", resumable=False)
        assert state.finished("s") is None
        (tmp_path / "p" / "s").write_bytes(b"weights")
        state.record("s", {"sha256": hashlib.sha256(b"weights").hexdigest()})
        state.close()
