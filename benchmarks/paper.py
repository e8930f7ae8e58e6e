"""The tables of SparseLLM's paper (arXiv 2402.17946) for one of its models, by ordinary runs beside the published ones.

Protocol: 128 windows of 2048 tokens of C4 calibrate; WikiText-2, PTB and C4 judge; the whole model, and, as the paper's
code did, the first half of its layers. Every cell is a run of ``sparsellm prune``, which resumes by itself, and one
evaluation a text, kept in ``cells.json``. The same command goes on after a stop; checkpoints are removed once scored.

    python benchmarks/paper.py facebook/opt-125m --out paper                     # all cells
    python benchmarks/paper.py facebook/opt-125m --plan h100                     # what each takes on one GPU
    python benchmarks/paper.py path/to/model --out paper --targets 70% --methods sparsegpt "effort 1" \
        --calibration c4.txt --texts wikitext2=wiki.txt                          # a part, from local files
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import code_version, cpu_name

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import NumericalError
from sparsellm.files.files import replace_atomically
from sparsellm.files.resolve import config_place
from sparsellm.machine import resolve_device
from sparsellm.model.chain import outline

PUBLISHED = Path(__file__).with_name("published.csv")
TEXTS = {"wikitext2": "wikitext2", "ptb": "ptb", "c4": "c4"}
# 3:4 of the paper are three zeros in four, which is 1:4 where kept values are counted.
TARGETS: dict[str, dict[str, Any]] = {
    "70%": {"sparsity": 0.7},
    "80%": {"sparsity": 0.8},
    "90%": {"sparsity": 0.9},
    "3:4": {"pattern": "1:4"},
}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "admm": {"method": "admm"},
    "sparsellm-paper": {"method": "sparsellm-paper"},
    "effort 0": {"effort": 0},
    "effort 1": {"effort": 1},
    "effort 3": {"effort": 3},
}
LAYERS = ("all", "half")
NONE = "–"


@dataclass(frozen=True)
class Cell:
    """One pruning run of the table."""

    layers: str
    target: str
    method: str

    @property
    def name(self) -> str:
        """A name for its directory and its key."""
        words = f"{self.layers} {self.target} {self.method}"
        return words.replace("%", "").replace(":", "of").replace(" ", "-")


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="hub id or directory")
    parser.add_argument(
        "--published-as", help="its name in published.csv, such as facebook/opt-125m"
    )
    parser.add_argument("--out", type=Path, default=Path("paper"))
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS)
    parser.add_argument("--targets", nargs="+", default=[*TARGETS], choices=[*TARGETS])
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--calibration", default="c4")
    parser.add_argument(
        "--texts",
        nargs="+",
        default=[],
        metavar="NAME=SOURCE",
        help="instead of wikitext2, ptb and c4",
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, help="most tokens of each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--plan", metavar="GPU", help="print what each cell takes, and run none"
    )
    return parser.parse_args()  # fmt: skip


def cells_of(asked: argparse.Namespace) -> Iterator[Cell]:
    """The cells in the order in which they run: those of one target together."""
    for layers in asked.layers:
        for target in asked.targets:
            for method in asked.methods:
                yield Cell(layers, target, method)


def texts_of(asked: argparse.Namespace) -> dict[str, str]:
    """The sources of the texts that judge, by name."""
    if not asked.texts:
        return TEXTS
    return dict(text.split("=", maxsplit=1) for text in asked.texts)


def recipe_of(cell: Cell, asked: argparse.Namespace) -> Recipe:
    """The recipe of a cell's run."""
    only: list[str] = []
    if cell.layers == "half":
        only = first_half(asked.model)
    return Recipe(
        **METHODS[cell.method],
        **TARGETS[cell.target],
        only=only,
        calibration=asked.calibration,
        samples=asked.samples,
        seq_len=asked.window,
        seed=asked.seed,
        device=asked.device,
        # windows cut anywhere, as the papers' code does
        bos="no",
    )


def first_half(model: str) -> list[str]:
    """Shell patterns of the first half of a model's blocks."""
    chain = outline(config_place(model), device=resolve_device("cpu"))
    names = chain.block_names
    return [f"{name}.*" for name in names[: len(names) // 2]]


class Kept:
    """Perplexities by key, in a file that is complete after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def all(self) -> dict[str, Any]:
        """All that is known."""
        if not self.path.is_file():
            return {}
        known: dict[str, Any] = json.loads(self.path.read_text())
        return known

    def keep(self, key: str, value: Any) -> None:
        """Adds a value."""
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = json.dumps({**self.all(), key: value}, indent=1)
            replace_atomically(self.path, lambda file: file.write(content.encode()))


def key_of(asked: argparse.Namespace, name: str) -> str:
    """What a cell's numbers depend on."""
    texts = ",".join(f"{name}={source}" for name, source in texts_of(asked).items())
    conditions = (
        code_version(),
        asked.model,
        asked.calibration,
        asked.samples,
        asked.window,
        asked.max_tokens,
        asked.seed,
        texts,
        name,
    )
    return "/".join(map(str, conditions))


def scored(model: str | Path, asked: argparse.Namespace) -> dict[str, float]:
    """The perplexity of a model on each text."""
    return {
        name: sparsellm.evaluate(
            str(model),
            source,
            seq_len=asked.window,
            max_tokens=asked.max_tokens,
            bos="no",
            device=asked.device,
        ).perplexity.value
        for name, source in texts_of(asked).items()
    }


def run_cell(cell: Cell, asked: argparse.Namespace) -> dict[str, Any]:
    """Prunes and scores one cell; a method that diverges has its error as the result."""
    out = asked.out / cell.name
    recipe = recipe_of(cell, asked)
    try:
        if not (out / "pruning.json").is_file():
            sparsellm.prune(asked.model, recipe, out=out)
        perplexities = scored(out, asked)
    except NumericalError as error:
        if cell.method != "sparsellm-paper":
            raise
        return {"failed": str(error)}
    shutil.rmtree(out)
    return perplexities


def published(asked: argparse.Namespace) -> dict[tuple[str, str, str], dict[str, str]]:
    """The published perplexities of the model, by layers, target and text."""
    name = asked.published_as or asked.model
    with PUBLISHED.open() as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {
            (row["layers"], row["target"], row["text"]): row
            for row in rows
            if row["model"] == name
        }


def print_table(asked: argparse.Namespace, kept: Kept) -> None:
    """Prints what is known, beside what was published; a dash where nothing is."""
    known = kept.all()
    texts = texts_of(asked)
    others = published(asked)
    dense = known.get(key_of(asked, "dense"), {})
    shown = ", ".join(f"{name} {dense[name]:.2f}" for name in texts if name in dense)
    print(
        f"{asked.model}; {asked.samples} × {asked.window} tokens of {Path(asked.calibration).name}, seed {asked.seed}; "
        f"windows of {asked.window} without BOS; dense {shown or NONE}; {cpu_name()}; code {code_version()}\n"
    )
    print(f"| layers | target | method | {' | '.join(texts)} | published |")
    print("|---|---|---|" + "---|" * (len(texts) + 1))
    for cell in cells_of(asked):
        result = known.get(key_of(asked, cell.name), {})
        numbers = []
        for name in texts:
            value = result.get(name)
            numbers.append("failed" if "failed" in result else NONE)
            if value is not None:
                numbers[-1] = f"{value:.2f}"
        column = {"sparsellm-paper": "sparsellm"}.get(cell.method, cell.method)
        known_numbers = []
        for name in texts:
            row = others.get((cell.layers, cell.target, name), {})
            known_numbers.append(row.get(column) or NONE)
        cells = (
            cell.layers,
            cell.target,
            cell.method,
            *numbers,
            ", ".join(known_numbers),
        )
        print(f"| {' | '.join(cells)} |")


def print_plan(asked: argparse.Namespace) -> None:
    """Prints what each cell would take on one GPU."""
    print(
        f"| layers | target | method | minutes on one {asked.plan} | GPU memory (GB) |"
    )
    print("|---|---|---|---|---|")
    for cell in cells_of(asked):
        estimate = sparsellm.plan(asked.model, recipe_of(cell, asked), gpu=asked.plan)
        minutes = sum(estimate.seconds.values()) / 60
        memory = estimate.device_bytes / 1e9
        print(
            f"| {cell.layers} | {cell.target} | {cell.method} | {minutes:.0f} | {memory:.1f} |"
        )


def main() -> None:
    asked = settings()
    if asked.plan:
        print_plan(asked)
        return
    kept = Kept(asked.out / "cells.json")
    dense = key_of(asked, "dense")
    if dense not in kept.all():
        kept.keep(dense, scored(asked.model, asked))
    for cell in cells_of(asked):
        key = key_of(asked, cell.name)
        if key in kept.all():
            continue
        print(f"running {cell.name}", file=sys.stderr, flush=True)
        kept.keep(key, run_cell(cell, asked))
    print_table(asked, kept)


if __name__ == "__main__":
    main()
