"""Random lives of two directories, written by runs that live, die or find the disk full.

Whatever happens to a directory, the older or the newer checkpoint is complete in it, and no foreign file has changed.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest

from sparsellm.errors import StorageError
from sparsellm.storage.directory import REPLACED, partial_of
from tests.killing import Died, dying, full_disk
from tests.storage.small import source, tree, value_of, write

NAMES = ("a", "b")
FATES = ("lives", "lives", "dies", "dies", "full disk")


def value_there(place: Path) -> float | None:
    """The value of the checkpoint under a name, or of the older one between two renames; None where there is none."""
    places = [each for each in (place, partial_of(place) / REPLACED) if each.is_dir()]
    return value_of(places[0]) if places else None


def foreign(home: Path) -> dict[str, bytes | str | None]:
    """The content of every path that no run may change."""
    runs = {*NAMES, *(f"{name}.partial" for name in NAMES)}
    return {name: content for name, content in tree(home).items() if name.partition("/")[0] not in runs}


def live(home: Path, model: Path, draw: random.Random) -> Counter[str]:
    """A home with two directories to write, a link to one of them, and foreign files: how often a run ended how."""
    (home / "notes").mkdir(parents=True)
    for name in ("a.txt", "a.partial.txt", "b.replaced", "notes/a.txt"):
        (home / name).write_text(f"foreign {name}")
    (home / "link").symlink_to("a")
    there, begun = foreign(home), {name: set[float | None]() for name in NAMES}
    done, ended = [], Counter[str]()
    for _ in range(6):
        fate, out, value = draw.choice(FATES), draw.choice((*NAMES, *NAMES, "link")), float(draw.randint(1, 3))
        kind, overwrite, restart = draw.choice(("prune", "pack")), draw.random() < 0.8, draw.random() < 0.3
        changed, before = "a" if out == "link" else out, {name: value_there(home / name) for name in NAMES}
        full = full_disk(draw.randint(1, 20) if fate == "full disk" else None)
        try:
            with full, dying(draw.randint(1, 150) if fate == "dies" else None):
                write(home / out, value, model, kind, overwrite=overwrite, restart=restart)
            end, possible = "done", {value}
        except (Died, StorageError) as error:
            end = "died" if isinstance(error, Died) else "refused"
            possible = {before[changed], value} | begun[changed]
        done.append((out, value, kind, overwrite, restart, fate, end))
        ended[end] += 1
        if end == "died":
            begun[changed].add(value)
        for name in NAMES:
            assert value_there(home / name) in (possible if name == changed else {before[name]}), (name, done)
        assert foreign(home) == there, done
    for name in NAMES:  # in the end all can be put in order
        write(home / name, 9, model, overwrite=True, restart=True)
        assert value_of(home / name) == 9, done
    assert {path.name for path in home.iterdir()} == {name.partition("/")[0] for name in there} | set(NAMES), done
    return ended


def test_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what a kill leaves does not depend on it
    model, ended = source(tmp_path / "model"), Counter[str]()
    for seed in range(60):
        ended += live(tmp_path / str(seed), model, random.Random(seed))
    assert min(ended[end] for end in ("done", "died", "refused")) > 30
