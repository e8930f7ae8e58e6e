"""What is refused as an output directory, by whatever name it is called, and that nothing there has changed then."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from sparsellm import interrupts
from sparsellm.errors import StorageError
from sparsellm.files import directory
from sparsellm.files.contents import LATER, LIST, changing
from sparsellm.files.directory import (
    STATE,
    WorkingDirectory,
    check_destination,
    partial_of,
)
from sparsellm.files.writer import CheckpointWriter
from sparsepack.errors import Note
from tests.files.small import source, tree, value_of, write
from tests.killing import ahead_of

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="links need rights there"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return source(tmp_path / "model")


@pytest.fixture
def old(model: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be replaced."""
    return write(tmp_path / "old", 1, model)


@pytest.mark.parametrize(
    "out",
    ["", Path(""), ".", "a/..", "/", "//", "/..", "a\0b", "x" * 250,
     "y/" * 3000, "z\udcff", "p.partial", "p.partial/q", "p.gguf"],
)  # fmt: skip
def test_a_path_for_no_checkpoint_is_refused(
    out: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``x`` times 250 is a name that the system takes, but not with what is added to it while it is written."""
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError):
        check_destination(out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def file_in(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text("mine")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "dict.txt": file_in("dict.txt"),  # such as the text that a run calibrates on
    **{
        name: file_in(name)
        for name in (
            "thesis.txt",
            ".env",
            "model-backup.safetensors",
            "README.md",
            "results.json",
        )
    },
    **{
        f"{name} (changed)": file_in(name)
        for name in ("tokenizer.json", "model-00001-of-00002.safetensors")
    },
    f".{'0a' * 12}.tmp": lambda directory: (directory / f".{'0a' * 12}.tmp").symlink_to(
        "/etc/hosts"
    ),
    ".git": lambda directory: (directory / ".git").mkdir(),
    "vocab.json": lambda directory: (directory / "vocab.json").mkdir(),
    "merges.txt": lambda directory: (directory / "merges.txt").symlink_to("/etc/hosts"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_overwriting_replaces_only_what_was_written(
    name: str, old: Path, model: Path
) -> None:
    FOREIGN[name](old)
    before = tree(old.parent)
    with pytest.raises(
        StorageError, match="--overwrite replaces only what sparsellm wrote"
    ) as refused:
        write(old, 2, model, overwrite=True)
    assert f"holds {name};" in str(refused.value)
    assert tree(old.parent) == before


@pytest.mark.parametrize("damage", [None, "{", '{"config.json": 1}', "a link"])
def test_without_its_list_a_checkpoint_is_not_replaced(
    damage: str | None, old: Path
) -> None:
    """Such as one that ``save_pretrained`` made."""
    (old / LIST).rename(old.with_name("list"))
    if damage == "a link":
        (old / LIST).symlink_to(old.with_name("list"))
    elif damage is not None:
        (old / LIST).write_text(damage)
    with pytest.raises(
        StorageError, match=f"{LIST}.*: remove it yourself, or name another directory"
    ):
        check_destination(old, overwrite=True)


@pytest.mark.parametrize("target", ["theirs", "nothing"])
@pytest.mark.parametrize("name", LATER)
def test_a_link_in_the_place_of_a_later_file_is_replaced(
    name: str, target: str, old: Path, model: Path
) -> None:
    (old.parent / "theirs").write_text("mine")
    (old / name).symlink_to(old.parent / target)
    with changing(old) as write_later:
        write_later(name, b"ours")
    assert not (old / name).is_symlink()
    assert (old.parent / "theirs").read_text() == "mine"
    assert not (old.parent / "nothing").exists()
    assert value_of(write(old, 2, model, overwrite=True)) == 2


def test_a_file_added_during_the_run_is_kept(
    old: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        ahead_of(
            patched,
            CheckpointWriter,
            "write_json",
            lambda *_: (old / "notes.txt").write_text("mine"),
        )
        with pytest.raises(StorageError, match=r"notes\.txt"):
            write(old, 2, model, overwrite=True)
    assert (old / "notes.txt").read_text() == "mine"
    (old / "notes.txt").unlink()
    assert value_of(old) == 1
    assert value_of(write(old, 2, model, overwrite=True)) == 2


def linked(link: Path, target: Path) -> Path:
    link.symlink_to(target)
    return link


SPELLINGS: dict[str, Callable[[Path], Path]] = {
    "itself": lambda model: model,
    "a detour": lambda model: model.parent / "x" / ".." / model.name,
    "a link": lambda model: linked(model.parent / "link", model),
    "through a linked parent": lambda model: (
        linked(model.parent.parent / "all", model.parent) / model.name
    ),
    "its parent": lambda model: model.parent,
    "a child": lambda model: model / "pruned",
    "a linked child": lambda model: linked(model.parent / "link", model) / "a" / "b",
    "where the run writes": lambda model: model.rename(
        model.with_name("p.partial")
    ).with_name("p"),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_the_model_is_known_by_any_name(case: str, tmp_path: Path) -> None:
    (tmp_path / "models" / "x").mkdir(parents=True)
    model = source(tmp_path / "models" / "model")
    out, before = SPELLINGS[case](model), tree(tmp_path)
    with pytest.raises(StorageError, match="the model"):
        check_destination(
            out,
            sources=[model if model.exists() else model.with_name("p.partial")],
            overwrite=True,
        )
    assert tree(tmp_path) == before


def test_the_target_of_a_link_is_written(
    old: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "other").mkdir()
    (tmp_path / "new").symlink_to(tmp_path / "other" / "disk")  # leads to nothing yet
    assert partial_of(tmp_path / "link") == tmp_path / "old.partial"
    assert write(tmp_path / "link", 2, model, overwrite=True) == old
    assert write(tmp_path / "new", 3, model) == tmp_path / "other" / "disk"
    assert (value_of(old), value_of(tmp_path / "other" / "disk")) == (2, 3)
    assert os.readlink(tmp_path / "link") == "old"
    assert {path.name for path in tmp_path.iterdir()} == {
        "model",
        "old",
        "link",
        "new",
        "other",
    }
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(StorageError, match="round is a link"):
        check_destination(tmp_path / "round")


def test_a_path_may_begin_with_the_home(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert write("~/new", 1, model) == tmp_path / "new"
    assert partial_of("~/new") == tmp_path / "new.partial"
    with pytest.raises(StorageError, match="the model"):
        check_destination("~/model", sources=["~/model"], overwrite=True)
    assert not Path("~").exists()


def test_what_may_not_be_renamed_is_refused(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != old)  # root may do all
    with pytest.raises(StorageError, match=f"{old} is not writable"):
        check_destination(old, overwrite=True)
    assert "/" in {
        disk.mountpoint for disk in directory.psutil.disk_partitions(all=True)
    }
    monkeypatch.setattr(
        directory.psutil,
        "disk_partitions",
        lambda all: [SimpleNamespace(mountpoint=str(old))],
    )
    with pytest.raises(StorageError, match="it is a mount point"):
        check_destination(old, overwrite=True)


def test_a_result_that_has_its_name_is_called_complete(
    model: Path, tmp_path: Path
) -> None:
    with interrupts.installed():
        write(tmp_path / "p", 1, model)
        assert (
            interrupts.last_words(signal.SIGTERM)
            == f"interrupted (SIGTERM); {tmp_path / 'p'} is complete"
        )


def test_a_link_in_the_place_of_the_working_directory(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "p.partial").symlink_to("victim")
    (tmp_path / "q.partial").mkdir()
    (tmp_path / "q.partial" / STATE).symlink_to(tmp_path / "victim")
    for name in "pq":
        with pytest.raises(StorageError, match="is a link"):
            write(tmp_path / name, 1, model, restart=True)
    assert tree(tmp_path / "victim") == {}


def test_a_working_directory_of_others_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.partial").mkdir()
    monkeypatch.setattr(directory, "user_of_new_files", lambda folder: os.geteuid() + 1)
    with pytest.raises(
        StorageError, match=f"p.partial belongs to another user \\(id {os.geteuid()}\\)"
    ):
        write(tmp_path / "p", 1, model, restart=True)


def test_a_full_disk_is_not_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.partial").mkdir()
    monkeypatch.setattr(
        tempfile, "TemporaryFile", Mock(side_effect=OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(StorageError, match="is full; make room"):
        check_destination(tmp_path / "p")


def test_a_link_in_the_place_of_a_file_is_not_followed(
    model: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    with WorkingDirectory(tmp_path / "p", {"kind": "prune", "value": 1}) as work:
        (work.path / "blocks").mkdir()
        (work.path / "blocks" / "config.json").symlink_to(victim)
    with pytest.raises(StorageError, match=r"config\.json, which no run wrote"):
        write(tmp_path / "p", 1, model)
    (tmp_path / "p.partial" / "blocks" / "config.json").unlink()
    dangling = tmp_path / "p.partial" / "blocks" / "model-00001-of-00002.safetensors"
    dangling.symlink_to(tmp_path / "none")
    for restart in (False, True):
        with pytest.raises(
            StorageError, match=r"model-00001-of-00002\.safetensors, which no run wrote"
        ):
            write(tmp_path / "p", 1, model, restart=restart)
    dangling.unlink()
    write(tmp_path / "p", 1, model)
    assert victim.read_text() == "mine"


def test_links_out_of_the_model_are_not_copied(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    model = source(tmp_path / "model", NOTICE="ours", tekken__json="{}")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    (model / "vocab.json").symlink_to("tokenizer.json")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    with WorkingDirectory(tmp_path / "p", {}) as work:
        writer = CheckpointWriter(work, 1)
        with pytest.warns(
            Note,
            match="^LICENSE of the model was not copied: it is a link out of its directory; copy",
        ):
            writer.copy_companions(model)
        copied = {
            path.name + "@" * path.is_symlink()
            for path in writer.folder.rglob("*")
            if path.is_file()
        }
    assert copied == {
        "config.json",
        "tokenizer.json",
        "vocab.json",
        "tekken.json",
        "rag.jinja",
        "NOTICE",
    }


def test_what_is_copied_last_can_be_read_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = source(tmp_path / "model", LICENSE="ours", notes__txt="mine")
    (model / "NOTICE").symlink_to(Path(__file__))  # is not copied
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: Path(path).name not in ("LICENSE", "NOTICE", "notes.txt"),
    )
    with pytest.raises(
        StorageError,
        match=f"{model / 'LICENSE'} cannot be read, and is copied into the result",
    ):
        check_destination(tmp_path / "p", sources=[model])
    (model / "LICENSE").unlink()
    assert check_destination(tmp_path / "p", sources=[model]) == tmp_path / "p"


def test_a_snapshot_of_the_hub_is_copied_from_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    source(repository / "blobs", l="licence")
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name, target in {
        "config.json": "config.json",
        "tokenizer.json": "tokenizer.json",
        "LICENSE": "l",
    }.items():
        (snapshot / name).symlink_to(f"../../blobs/{target}")
    (snapshot / "NOTICE").symlink_to(
        source(tmp_path / "models--c--d" / "blobs") / "tokenizer.json"
    )
    with WorkingDirectory(tmp_path / "p", {}) as work:
        with pytest.warns(Note, match="^NOTICE of the model was not copied"):
            (writer := CheckpointWriter(work, 1)).copy_companions(snapshot)
        assert (writer.folder / "LICENSE").read_text() == "licence"
        assert json.loads((writer.folder / "config.json").read_text()) == {
            "model_type": "llama"
        }


COMPARE = ["compare", "x", "--text", "x", "--method", "wanda", "--sparsity", "0.5"]


@pytest.mark.parametrize("out", ["", "/", "//", "/.."])
@pytest.mark.parametrize(
    "command",
    [
        ["prune", "x"],
        ["pack", "x"],
        ["export", "x", "--to", "transformers"],
        ["demo"],
        COMPARE,
    ],
    ids=str,
)
def test_an_unset_variable_or_the_root_is_refused(
    command: list[str],
    out: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Any,
) -> None:
    """``--out "$UNSET" --overwrite`` in a directory that could be replaced; before the model is looked for."""
    here = write(tmp_path / "here", 1, source(tmp_path / "model"))
    monkeypatch.chdir(here)
    assert "--out" in refusal(
        *command,
        "--out",
        out,
        *[] if command in (["demo"], COMPARE) else ["--overwrite"],
    )
    assert value_of(here) == 1
