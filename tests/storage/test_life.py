"""Random lives of two directories: pruned into, packed and unpacked, by runs that die or find the disk full.

Whatever happens to a directory, the older or the newer model is complete in it, and no foreign file has changed.
"""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import SparseLLMError
from sparsellm.storage.directory import REPLACED, partial_of
from sparsellm.storage.reader import memory_of, open_checkpoint
from tests.killing import Died, dying, full_disk
from tests.models import save_tiny, tiny_llama

IDS = torch.arange(16).view(2, 8)
NAMES = ("a", "b")
NOTES = "notes.md"  # a foreign file in a checkpoint, which packing does not copy
FATES = ("lives", "lives", "dies", "dies", "full disk")
Results = dict[tuple[str, float, str | None], str | None]  # what each command makes, by what it reads


@dataclass(frozen=True)
class Deed:
    """A command (prune, pack or unpack): what it reads, what it writes, and how."""

    kind: str
    source: str
    out: str
    sparsity: float
    overwrite: bool
    restart: bool

    def do(self, home: Path, out: Path | None = None) -> None:
        source, out = home / self.source, out or home / self.out
        again = {"overwrite": self.overwrite, "restart": self.restart}
        if self.kind == "prune":
            recipe = Recipe(method="magnitude", sparsity=self.sparsity)
            sparsellm.prune(source, recipe, calibration=IDS, out=out, **again)  # type: ignore[arg-type]
        else:
            (sparsellm.pack if self.kind == "pack" else sparsellm.unpack)(source, out=out, **again)


class Life:
    """A home with a dense model, two directories to write, a link to one of them, and foreign files.

    Args:
        home: an empty directory.
        dense: the directory of the model.
        seed: the seed of everything that happens.
        results: shared among lives, as it takes a run to know one.
    """

    def __init__(self, home: Path, dense: Path, seed: int, results: Results) -> None:
        self.home, self.dense, self.results, self.draw = home, dense, results, random.Random(seed)
        self.pending: dict[str, set[str]] = {name: set() for name in NAMES}
        self.done: list[str] = []
        (home / "dense").symlink_to(dense)
        (home / "link").symlink_to("a")
        for name in ("a.txt", "a.partial.txt", "b.replaced", "notes/a.txt"):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(f"foreign {name}")
        self.foreign, self.names = self.snapshot(), {path.name for path in home.iterdir()}

    def live(self, deeds: int) -> None:
        for _ in range(deeds):
            if self.draw.random() < 0.15:
                self.write_notes()
            else:
                self.step(self.some_deed(), self.draw.choice(FATES))
        for name in NAMES:  # and in the end all can be put in order
            (self.home / name / NOTES).unlink(missing_ok=True)
            assert self.step(Deed("prune", "dense", name, 0.5, True, True), "lives") == "done", self.done
        assert {path.name for path in self.home.iterdir()} == self.names | set(NAMES), self.done

    def some_deed(self) -> Deed:
        kind = self.draw.choice(("prune", "prune", "prune", "pack", "unpack"))
        source = "dense" if kind == "prune" else self.draw.choice(("dense", *NAMES))
        out, sparsity = self.draw.choice((*NAMES, *NAMES, "link")), self.draw.choice((0.5, 0.7))
        return Deed(kind, source, out, sparsity, self.draw.random() < 0.8, self.draw.random() < 0.3)

    def write_notes(self) -> None:
        """Puts a foreign file into a checkpoint, or takes it away again."""
        notes = self.home / self.draw.choice(NAMES) / NOTES
        if notes.exists():
            notes.unlink()
        elif notes.parent.is_dir():
            notes.write_text("foreign")
        self.done.append(f"{notes.parent.name}/{NOTES} {'is there' if notes.exists() else 'is not there'}")

    def step(self, deed: Deed, fate: str) -> str:
        """Does a deed, and looks at everything."""
        name = "a" if deed.out == "link" else deed.out
        before = {place: digest_of(self.home / place) for place in NAMES}
        notes = {place for place in NAMES if (self.home / place / NOTES).exists()}
        source = self.home / deed.source
        result = self.result_of(deed, digest_of(source) if source.is_dir() else None)
        ended = self.run(deed, fate)
        self.done.append(f"{deed} {fate}: {ended}")
        assert self.snapshot() == self.foreign, self.done
        assert notes == {place for place in NAMES if (self.home / place / NOTES).exists()}, self.done
        for place in NAMES:
            expected = {before[place]}
            if place == name:
                expected |= self.pending[place] | ({result} if result is not None and name not in notes else set())
                expected = {result} if ended == "done" else expected
            assert digest_of(self.home / place) in expected, (place, self.done)
        if ended == "died" and result is not None:
            self.pending[name].add(result)
        return ended

    def run(self, deed: Deed, fate: str) -> str:
        """How it ended: ``done``, ``died``, or by what error."""
        at = self.draw.randint(1, 300) if fate == "dies" else None
        try:
            with full_disk(self.draw.randint(1, 40) if fate == "full disk" else None), dying(at):
                deed.do(self.home)
        except SparseLLMError as error:
            return f"refused: {error}"
        except Died:
            return "died"
        return "done"

    def result_of(self, deed: Deed, source: str | None) -> str | None:
        """What the command makes when nothing goes wrong; None where it cannot be done."""
        key = (deed.kind, deed.sparsity if deed.kind == "prune" else 0.0, source)
        if key not in self.results:
            out = self.home.parent / f"result-{len(self.results)}"
            try:
                deed.do(self.home, out)
                self.results[key] = digest_of(out)
            except SparseLLMError:
                self.results[key] = None
        return self.results[key]

    def snapshot(self) -> dict[str, str]:
        """The content of every path that no command may change."""
        content = {}
        for path in [*self.home.rglob("*"), *self.dense.rglob("*")]:
            first = path.relative_to(self.home).parts[0] if path.is_relative_to(self.home) else "dense"
            ours = first in NAMES or (first.partition(".")[0] in NAMES and (self.home / first).is_dir())
            if not ours and (path.is_file() or path.is_symlink()):
                content[str(path)] = os.readlink(path) if path.is_symlink() else path.read_text("latin-1")
        return content


def digest_of(directory: Path) -> str | None:
    """A digest of the checkpoint under a name, or of the older one between two renames; None where there is none."""
    if not directory.is_dir():
        directory = partial_of(directory) / REPLACED
    if not directory.is_dir():
        return None
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    reader = open_checkpoint(directory)
    for name in sorted(reader):
        digest.update(name.encode() + memory_of(reader.get(name)))
    assert not list(directory.glob(".*")), "nothing of the run is in the result"
    return digest.hexdigest()


@pytest.mark.parametrize("first", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(100, 600, 100))])
def test_lives(first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten in the fast suite, five hundred in the slow one."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what a kill leaves does not depend on it
    model = tiny_llama(vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    dense = save_tiny(model.to(torch.bfloat16), None, tmp_path / "dense")
    results: Results = {}
    ended: list[str] = []
    for seed in range(first, first + 100 if first else 10):
        (tmp_path / str(seed)).mkdir()
        life = Life(tmp_path / str(seed), dense, seed, results)
        life.live(5)
        ended += [line.rpartition(": ")[2] if "refused" not in line else "refused" for line in life.done]
    assert {"done", "died", "refused"} <= set(ended)
