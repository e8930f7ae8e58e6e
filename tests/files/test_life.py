"""Random lives of two directories, written by runs that live, die or find the disk full.

Whatever happens to a directory, the older or the newer checkpoint is complete in it, no foreign file has changed, and
nothing that a run wrote counts as foreign."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from sparsellm.errors import StorageError
from sparsellm.files.contents import LATER, changing, foreign_entries
from sparsellm.files.files import TORN
from sparsellm.files.results import append_result
from sparsellm.records import Continuation
from sparsellm.report.document import GENERATOR, write_page
from tests.files.small import source, tree, value_of, value_there, write
from tests.killing import Died, dying, full_disk

NAMES = ("a", "b")
FATES = ("lives", "lives", "dies", "dies", "full disk")


def foreign(home: Path) -> dict[str, bytes | str | None]:
    """The content of every path that no run may change."""
    runs = {*NAMES, *(f"{name}.partial" for name in NAMES)}
    return {
        name: content
        for name, content in tree(home).items()
        if name.partition("/")[0] not in runs
    }


def write_later(place: Path, name: str, number: int) -> None:
    """Writes one of the files that commands write into a complete checkpoint, as they do."""
    if name == "results.json":
        append_result(place, Continuation(prompt="", dense="", pruned=str(number)))
    elif name == "report.html":
        write_page(
            f'<meta name="generator" content="{GENERATOR}">{number}'.encode(),
            place / name,
        )
    else:
        with changing(place) as write_one:
            write_one(name, str(number).encode())


def later(place: Path) -> dict[str, bytes]:
    return {
        name: (place / name).read_bytes() for name in LATER if (place / name).exists()
    }


def live_later(place: Path, model: Path, draw: random.Random) -> Counter[str]:
    """Files written into a complete checkpoint are as before or as they would be; one of the user's is not replaced."""
    value, ended = value_of(place), Counter[str]()
    for number in range(draw.randint(0, 6)):
        name, before = draw.choice(LATER), later(place)
        try:
            with dying(draw.randint(1, 16) if draw.random() < 0.7 else None):
                write_later(place, name, number)
        except Died:
            ended["died over a file"] += 1
        else:
            assert not [path for path in place.iterdir() if TORN.fullmatch(path.name)]
            assert name in later(place)
        ended["torn"] += any(
            TORN.fullmatch(path.name) is not None for path in place.iterdir()
        )
        after = later(place)
        others = [
            {key: data for key, data in files.items() if key != name}
            for files in (before, after)
        ]
        assert others[0] == others[1]
        assert (
            before.get(name) == after.get(name) or str(number).encode() in after[name]
        )
        assert foreign_entries(place) == []
    mine = place / draw.choice(
        ("notes.txt", "LICENSE-mine.docx", *LATER, "config.json")
    )
    ours = mine.read_bytes() if mine.exists() else None
    mine.write_text("mine")
    with pytest.raises(StorageError, match=re.escape(mine.name)):
        write(place, 8, model, overwrite=True, restart=True)
    assert mine.read_text() == "mine"
    mine.unlink() if ours is None else mine.write_bytes(ours)
    assert value_of(place) == value
    return ended


def live(home: Path, model: Path, draw: random.Random) -> Counter[str]:
    """A home with two directories to write, a link to one of them, and foreign files: how often a run ended how."""
    (home / "notes").mkdir(parents=True)
    for name in ("a.txt", "a.partial.txt", "b.replaced", "notes/a.txt"):
        (home / name).write_text(f"foreign {name}")
    (home / "link").symlink_to("a")
    there, begun = foreign(home), {name: set[float | None]() for name in NAMES}
    done, ended = [], Counter[str]()
    for _ in range(6):
        fate, out, value = (
            draw.choice(FATES),
            draw.choice((*NAMES, *NAMES, "link")),
            float(draw.randint(1, 3)),
        )
        kind, overwrite, restart = (
            draw.choice(("prune", "pack")),
            draw.random() < 0.8,
            draw.random() < 0.3,
        )
        changed, before = (
            "a" if out == "link" else out,
            {name: value_there(home / name) for name in NAMES},
        )
        full = full_disk(draw.randint(1, 20) if fate == "full disk" else None)
        try:
            with full, dying(draw.randint(1, 150) if fate == "dies" else None):
                write(
                    home / out, value, model, kind, overwrite=overwrite, restart=restart
                )
            end, possible = "done", {value}
        except (Died, StorageError) as error:
            end = "died" if isinstance(error, Died) else "refused"
            possible = {before[changed], value} | begun[changed]
        done.append((out, value, kind, overwrite, restart, fate, end))
        ended[end] += 1
        if end == "died":
            begun[changed].add(value)
        for name in NAMES:
            assert value_there(home / name) in (
                possible if name == changed else {before[name]}
            ), (name, done)
        assert foreign(home) == there, done
        if end == "done" and draw.random() < 0.4:
            ended += live_later(home / changed, model, draw)
    for name in NAMES:  # in the end all can be put in order
        write(home / name, 9, model, overwrite=True, restart=True)
        assert value_of(home / name) == 9, done
    assert {path.name for path in home.iterdir()} == {
        name.partition("/")[0] for name in there
    } | set(NAMES), done
    return ended


def test_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: None
    )  # what a kill leaves does not depend on it
    model, ended = source(tmp_path / "model"), Counter[str]()
    for seed in range(60):
        ended += live(tmp_path / str(seed), model, random.Random(seed))
    assert (
        min(
            ended[end]
            for end in ("done", "died", "refused", "died over a file", "torn")
        )
        > 30
    )
