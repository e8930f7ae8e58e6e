"""What is refused as an output directory, by whatever name it is called, and that nothing there has changed then."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsellm import cli
from sparsellm.errors import StorageError
from sparsellm.storage import destination, files
from sparsellm.storage.contents import LISTED
from sparsellm.storage.destination import check_destination, partial_of
from sparsellm.storage.resume import FOLDER, PACK, RUN, RunState
from tests.storage.small import source, value_of, write

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return source(tmp_path / "model")


@pytest.fixture
def old(model: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be replaced."""
    return write(tmp_path / "old", 1, model)


def tree(directory: Path) -> dict[str, bytes | str | None]:
    return {
        str(path.relative_to(directory)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in directory.rglob("*")
    }


@pytest.mark.parametrize("out", ["", Path(""), ".", "a/..", "/", "a\0b", "x" * 250, "y/" * 3000, "z\udcff"])
def test_what_is_no_name_for_a_checkpoint(out: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``x`` times 250 is a name that the system takes, but not with what is added to it while it is written."""
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError):
        check_destination(out, overwrite=True, restart=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def file_in(name: str, content: str = "mine") -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (file_in("thesis.txt"), "thesis.txt"),
    "of another tool": (file_in("package.json"), "package.json"),
    "a hidden file": (file_in(".env"), ".env"),
    "a program": (file_in("modeling_mine.py"), "modeling_mine.py"),
    "a folder": (lambda directory: (directory / "src").mkdir(), "src"),
    "a repository": (lambda directory: (directory / ".git").mkdir(), ".git"),
    "a folder by a known name": (lambda directory: (directory / "vocab.json").mkdir(), "vocab.json"),
    "a link by a known name": (lambda directory: (directory / "merges.txt").symlink_to("/etc/hosts"), "merges.txt"),
    "a trained adapter": (file_in("adapter_model.safetensors"), "adapter_model.safetensors"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_overwriting_replaces_nothing_but_a_checkpoint(case: str, old: Path, model: Path) -> None:
    put, name = FOREIGN[case]
    put(old)
    before = tree(old.parent)
    with pytest.raises(StorageError, match="--overwrite replaces checkpoints only") as refused:
        write(old, 2, model, overwrite=True)
    assert f"holds {name}," in str(refused.value)
    assert tree(old.parent) == before


def test_a_config_makes_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    for name in ("config.json", "README.md", "LICENSE"):
        (tmp_path / "web" / name).write_text("{}")
    with pytest.raises(StorageError, match="holds no checkpoint"):
        check_destination(tmp_path / "web", overwrite=True)


def test_what_was_put_there_while_the_run_went_on_is_kept(
    old: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsellm.storage.writer import CheckpointWriter

    write_json = CheckpointWriter.write_json

    def meanwhile(self: CheckpointWriter, name: str, content: object) -> None:
        (old / "notes.txt").write_text("mine")
        write_json(self, name, content)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "write_json", meanwhile)
        with pytest.raises(StorageError, match=r"notes\.txt"):
            write(old, 2, model, overwrite=True)
    assert (old / "notes.txt").read_text() == "mine"
    (old / "notes.txt").unlink()
    assert value_of(old) == 1
    write(old, 2, model, overwrite=True)  # nothing of the work is lost
    assert value_of(old) == 2


def test_files_that_came_with_the_model_by_names_of_their_own_may_be_replaced(tmp_path: Path) -> None:
    model = source(tmp_path / "model", emoji__json="{}", words__txt="a b")
    out = write(tmp_path / "p", 1, model)
    assert json.loads((out / LISTED).read_text()) == {"files": ["emoji.json", "words.txt"]}
    write(out, 2, model, overwrite=True)
    again = write(tmp_path / "q", 3, out)
    assert json.loads((again / LISTED).read_text()) == {"files": ["emoji.json", "words.txt"]}
    (out / LISTED).write_text("{")
    with pytest.raises(StorageError, match=r"emoji\.json"):
        write(out, 2, model, overwrite=True)


SPELLINGS: dict[str, Callable[[Path], Path]] = {
    "itself": lambda model: model,
    "a detour": lambda model: model.parent / "x" / ".." / model.name,
    "a link": lambda model: _linked(model.parent / "link", model),
    "through a linked parent": lambda model: _linked(model.parent.parent / "all", model.parent) / model.name,
    "its parent": lambda model: model.parent,
    "a child": lambda model: model / "pruned",
    "a linked child": lambda model: _linked(model.parent / "link", model) / "a" / "b",
}


def _linked(link: Path, target: Path) -> Path:
    link.symlink_to(target)
    return link


@pytest.mark.parametrize("case", SPELLINGS)
def test_the_model_is_known_by_any_name(case: str, tmp_path: Path) -> None:
    (tmp_path / "models" / "x").mkdir(parents=True)
    model = source(tmp_path / "models" / "model")
    out = SPELLINGS[case](model)
    before = tree(tmp_path)
    with pytest.raises(StorageError, match="the model"):
        check_destination(out, sources=[model], overwrite=True, restart=True)
    assert tree(tmp_path) == before


def test_a_model_where_the_run_would_write_is_refused(tmp_path: Path) -> None:
    model = source(tmp_path / "p.partial")
    with pytest.raises(StorageError, match="where a run into"):
        check_destination(tmp_path / "p", sources=[model], restart=True)


def test_a_link_s_target_is_what_is_written(old: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "other").mkdir()
    (tmp_path / "new").symlink_to(tmp_path / "other" / "disk")  # leads to nothing yet
    assert partial_of(tmp_path / "link") == tmp_path / "old.partial"
    assert write(tmp_path / "link", 2, model, overwrite=True) == old
    assert write(tmp_path / "new", 3, model) == tmp_path / "other" / "disk"
    assert (value_of(old), value_of(tmp_path / "other" / "disk")) == (2, 3)
    assert os.readlink(tmp_path / "link") == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "old", "link", "new", "other"}
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(StorageError, match="cannot write"):
        check_destination(tmp_path / "round")


def test_a_mount_point_is_refused(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(destination.os.path, "ismount", lambda path: Path(path) == old)
        with pytest.raises(StorageError, match=f"{old} is a mount point"):
            check_destination(old, overwrite=True)
    monkeypatch.setattr(destination, "_mount_points", lambda: {str(old)})  # of a part of the same file system
    with pytest.raises(StorageError, match=f"{old} is a mount point"):
        check_destination(old, overwrite=True)


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="only Linux lists them so")
def test_mount_points_are_listed() -> None:
    assert {"/", "/proc"} <= destination._mount_points()


@pytest.mark.parametrize("kind", ["sweep", "pack", "unpack"])
@pytest.mark.parametrize("alive", [True, False])
def test_what_another_kind_of_run_left_stays_without_restart(
    kind: str, alive: bool, model: Path, tmp_path: Path
) -> None:
    state = RunState(partial_of(tmp_path / "p"), {"a": 1}, kind=kind)
    if not alive:
        state.close()
    before = tree(tmp_path)
    with pytest.raises(StorageError, match="another process" if alive and kind != "sweep" else f"unfinished {kind}"):
        write(tmp_path / "p", 1, model)
    assert tree(tmp_path) == before
    if alive:
        with pytest.raises(StorageError, match="another process"):
            write(tmp_path / "p", 1, model, restart=True)
        assert tree(tmp_path) == before
        state.close()
    write(tmp_path / "p", 1, model, restart=True)
    assert value_of(tmp_path / "p") == 1


def test_a_run_of_which_the_kind_is_not_known_is_not_removed_by_packing(tmp_path: Path) -> None:
    state = RunState(partial_of(tmp_path / "p"), {"a": 1})
    state.close()
    (state.folder / RUN).write_text("damaged")
    before = tree(tmp_path)
    with pytest.raises(StorageError, match=r"run\.json, the record of an unfinished run, is damaged; give --restart"):
        check_destination(tmp_path / "p", kind=PACK)
    with pytest.raises(StorageError, match=r"is damaged; give --restart"):
        RunState(state.partial, {}, kind=PACK, resumable=False)
    assert tree(tmp_path) == before
    RunState(state.partial, {}, kind=PACK, resumable=False, restart=True).close()


@pytest.mark.parametrize(
    "name", ["p.partial", "p.swept.partial", "p.partial/x", f"p.partial/{FOLDER}", "moved", "moved/x"]
)
@pytest.mark.parametrize("alive", [True, False])
def test_the_working_directory_of_a_run_is_no_destination(name: str, alive: bool, tmp_path: Path) -> None:
    state = RunState(partial_of(tmp_path / "p"), {"a": 1})
    if not alive:
        state.close()
    if name.startswith("moved"):
        (tmp_path / "p.partial").rename(tmp_path / "moved")
    before = tree(tmp_path)
    with pytest.raises(StorageError, match="working director"):
        check_destination(tmp_path / name, overwrite=True, restart=True)
    assert tree(tmp_path) == before


def test_a_second_stage_is_not_taken_for_a_run_of_that_name(model: Path, tmp_path: Path) -> None:
    """``p.swept.partial`` is where the second stage of a run into ``p`` writes, and where one into ``p.swept`` does."""
    RunState(partial_of(tmp_path / "p", second=True), {"value": 1}, kind="sweep").close()
    before = tree(tmp_path)
    with pytest.raises(StorageError, match="unfinished sweep"):
        write(tmp_path / "p.swept", 1, model)
    assert tree(tmp_path) == before
    RunState(partial_of(tmp_path / "q.swept"), {"value": 1}).close()
    with pytest.raises(StorageError, match="unfinished prune"):
        write(tmp_path / "q", 1, model)


def test_a_working_directory_that_somebody_else_made_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "p.partial").symlink_to("victim")
    with pytest.raises(StorageError, match="is a link"):
        write(tmp_path / "p", 1, model, restart=True)
    (tmp_path / "q.partial").mkdir()
    (tmp_path / "q.partial" / FOLDER).symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match="is a link"):
        write(tmp_path / "q", 1, model, restart=True)
    (tmp_path / "r.partial").mkdir()
    own = os.geteuid()
    monkeypatch.setattr(files, "_own_user", lambda: own + 1)
    assert write(tmp_path / "s", 1, model)  # a file system that gives every file one owner
    monkeypatch.setattr(files, "_user_of_new_files", lambda folder: own + 1)
    with pytest.raises(StorageError, match=f"another user \\(id {own}\\)"):
        write(tmp_path / "r", 1, model, restart=True)
    assert tree(tmp_path / "victim") == {}


def test_a_link_in_the_place_of_a_file_is_not_followed(model: Path, tmp_path: Path) -> None:
    """Names that can be foreseen: those of the files themselves, and what earlier releases wrote them by."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    state = RunState(tmp_path / "p.partial", {"value": 1})
    for name in ("config.json", "pruning.json", "tokenizer.json"):
        for link in (name, f"{name}.tmp"):
            (tmp_path / "p.partial" / link).symlink_to(victim)
    state.close()
    with pytest.raises(StorageError, match=r"config\.json.* which no run wrote"):
        write(tmp_path / "p", 1, model)
    for path in (tmp_path / "p.partial").glob("*.json"):
        path.unlink()
    write(tmp_path / "p", 1, model)
    assert victim.read_text() == "mine"
    assert value_of(tmp_path / "p") == 1
    with pytest.raises(FileExistsError):
        files.create(_linked(tmp_path / "link", victim))


def test_links_out_of_the_model_are_not_copied(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    model = source(tmp_path / "model", NOTICE="ours")
    (model / "LICENSE").symlink_to(secret)
    (model / "vocab.json").symlink_to("tokenizer.json")
    from sparsellm.storage.writer import CheckpointWriter

    with CheckpointWriter(tmp_path / "p", shards=1, identity={}) as writer:
        assert writer.copy_companions(model) == ["LICENSE"]
        assert {path.name for path in writer.partial.iterdir()} == {
            *("config.json", "tokenizer.json", "vocab.json", "NOTICE"),
            FOLDER,
        }
        assert not (writer.partial / "vocab.json").is_symlink()


def test_a_snapshot_of_the_hub_is_copied_from_its_blobs(tmp_path: Path) -> None:
    from sparsellm.storage.writer import CheckpointWriter

    repository = tmp_path / "models--a--b"
    other = source(tmp_path / "models--c--d" / "blobs")
    blobs = source(repository / "blobs", l="licence")
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name, target in {"config.json": blobs / "config.json", "tokenizer.json": blobs / "tokenizer.json"}.items():
        (snapshot / name).symlink_to(os.path.relpath(target, snapshot))
    (snapshot / "LICENSE").symlink_to("../../blobs/l")
    (snapshot / "NOTICE").symlink_to(other / "tokenizer.json")
    with CheckpointWriter(tmp_path / "p", shards=1, identity={}) as writer:
        assert writer.copy_companions(snapshot) == ["NOTICE"]
        assert (writer.partial / "LICENSE").read_text() == "licence"
        assert json.loads((writer.partial / "config.json").read_text()) == {"model_type": "llama"}


@pytest.mark.parametrize("command", [["prune", "x"], ["pack", "x"], ["unpack", "x"], ["demo"]], ids=lambda c: c[0])
def test_an_unset_variable_is_not_the_current_directory(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--out "$UNSET" --overwrite`` in a directory that could be replaced; before the model is looked for."""
    here = write(tmp_path / "here", 1, source(tmp_path / "model"))
    monkeypatch.chdir(here)
    flags = [] if command == ["demo"] else ["--overwrite"]
    monkeypatch.setattr(sys, "argv", ["sparsellm", *command, "--out", "", *flags])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--out" in capsys.readouterr().err
    assert value_of(here) == 1
