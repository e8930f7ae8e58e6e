"""Random lives of two directories: pruned into, packed and unpacked, by processes that die or find the disk full."""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import SparseLLMError
from sparsellm.storage.directory import REPLACED, partial_of
from sparsellm.storage.reader import memory_of, open_checkpoint
from tests.killing import KILLED, Died, dying, full_disk, run

IDS = torch.arange(16).view(2, 8)
NAMES = ("a", "b")
NOTES = "notes.md"  # a foreign file in a checkpoint, which packing does not copy
FATES = ("lives", "lives", "dies", "dies", "dies", "full disk")


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


@dataclass
class Life:
    """A home with a dense model, two directories to write, a link to one of them, and foreign files.

    Args:
        home: an empty directory.
        dense: the directory of the model.
        seed: the seed of everything that happens.
        signals: share of the deaths that are real, by SIGKILL in a process of its own.
        results: what each command makes, by what it reads; shared among lives, as it takes a run to know.
    """

    home: Path
    dense: Path
    seed: int
    signals: float
    results: dict[tuple[str, float, str | None], str | None] = field(default_factory=dict)
    pending: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name in NAMES})
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        (self.home / "dense").symlink_to(self.dense)
        (self.home / "link").symlink_to("a")
        for name in ("a.txt", "a.partial.txt", "b.replaced", "notes/a.partial/thesis.txt"):
            (self.home / name).parent.mkdir(parents=True, exist_ok=True)
            (self.home / name).write_text(f"foreign {name}")
        self.foreign = self.snapshot()
        self.names = {path.name for path in self.home.iterdir()}

    def live(self, deeds: int) -> None:
        for _ in range(deeds):
            if self.draw.random() < 0.15:
                self.write_notes()
            else:
                self.step(self.some_deed(), self.draw.choice(FATES))
        for name in NAMES:  # and in the end all can be put in order
            (self.home / name / NOTES).unlink(missing_ok=True)
            self.step(Deed("prune", "dense", name, 0.5, True, True), "lives", must=True)
        assert {path.name for path in self.home.iterdir()} == self.names | set(NAMES), self.done

    def some_deed(self) -> Deed:
        kind = self.draw.choice(("prune", "prune", "prune", "pack", "unpack"))
        source = "dense" if kind == "prune" else self.draw.choice(("dense", *NAMES))
        out = self.draw.choice((*NAMES, *NAMES, "link"))
        sparsity = self.draw.choice((0.5, 0.7))
        return Deed(kind, source, out, sparsity, self.draw.random() < 0.8, self.draw.random() < 0.3)

    def write_notes(self) -> None:
        """Puts a foreign file into a checkpoint, or takes it away again."""
        notes = self.home / self.draw.choice(NAMES) / NOTES
        if notes.exists():
            notes.unlink()
        elif notes.parent.is_dir():
            notes.write_text("foreign")
        self.done.append(f"{notes.parent.name}/{NOTES} {'is there' if notes.exists() else 'is not there'}")

    def step(self, deed: Deed, fate: str, must: bool = False) -> None:
        """Does a deed, and looks at everything."""
        name = "a" if deed.out == "link" else deed.out
        before = {each: whole(self.home / each) for each in NAMES}
        notes = {each for each in NAMES if (self.home / each / NOTES).exists()}
        result = self.result_of(deed, whole(self.home / deed.source, beside=False))
        ended = self.run(deed, fate)
        self.done.append(f"{deed} {fate}: {ended}")
        assert self.snapshot() == self.foreign, self.done
        assert notes == {each for each in NAMES if (self.home / each / NOTES).exists()}, self.done
        for each in NAMES:
            expected = {before[each]} | (self.pending[each] if each == name else set())
            if each == name and result is not None and name not in notes:
                expected.add(result)
            if each == name and ended == "done":
                expected = {result}
            assert whole(self.home / each) in expected, (each, self.done)
        assert ended == "done" or not must, self.done
        if ended == "died" and result is not None:
            self.pending[name].add(result)

    def run(self, deed: Deed, fate: str) -> str:
        """How it ended: ``done``, ``died``, or by what error."""
        at = self.draw.randint(1, 300) if fate == "dies" else None
        if at is not None and self.draw.random() < self.signals:
            ended = run(deed.do, self.home, at=at)
            return "died" if ended.code == KILLED else ended.error or "done"
        try:
            with full_disk(self.draw.randint(1, 40) if fate == "full disk" else None):
                if at is None:
                    deed.do(self.home)
                else:
                    with dying(at):
                        deed.do(self.home)
        except SparseLLMError as error:
            return f"{type(error).__name__}: {error}"
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
                self.results[key] = whole(out)
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


def whole(directory: Path, beside: bool = True) -> str | None:
    """A digest of the checkpoint in a directory, which must be complete; None where there is none.

    Args:
        directory: the checkpoint.
        beside: look as well where an older one is kept while it is replaced by two renames.
    """
    if not directory.is_dir():
        kept = partial_of(directory) / REPLACED
        return whole(kept, beside=False) if beside and kept.is_dir() else None
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    reader = open_checkpoint(directory)
    for name in sorted(reader):
        digest.update(name.encode() + memory_of(reader.get(name)))
    assert not list(directory.glob(".*")), "nothing of the run is in the result"
    return digest.hexdigest()
