"""Damaged packed checkpoints and hostile records, many of each: refused in one line, or loaded with the right numbers.

    nice python -m tests.mutants [--runs 300] [--seed 0]

A table says for each kind of damage how many files were damaged, how many of them were refused, and how many were read.
After a bit flip in a file that has a checksum, a model that loads has the logits of the undamaged one. What a record
holds is text on a page, never markup. The exit code is 1 if one ended in something else."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import sparsellm
import sparsepack
from sparsellm.report.card import card
from sparsellm.report.document import write_report
from sparsepack.errors import UserError
from tests.generated import change_bytes, change_value, limited, template

SCRIPT = "<script>alert(1)</script>"
IDS = torch.arange(3, 15)[None]
REFUSED = "refused"
HELD = "loads"
Kind = Callable[[Path, random.Random], str]


def logits(packed: Path) -> Tensor:
    with torch.no_grad():
        return sparsepack.load(packed, dtype="float32").eval()(IDS).logits  # type: ignore[no-any-return]


def loaded(packed: Path, expected: Tensor | None) -> str:
    """What the end of loading a damaged model is. Without ``expected`` logits any are right."""
    try:
        got = logits(packed)
    except UserError as error:
        if "\n" in str(error):
            return f"several lines: {error}"
        return REFUSED
    if expected is not None and not torch.equal(got, expected):
        return "other logits"
    return HELD


def bit_flip(work: Path, chance: random.Random) -> str:
    """One bit of a file that has a checksum."""
    packed = work / "packed"
    files = [*sorted(packed.glob("*.safetensors")), packed / "config.json"]
    file = chance.choice(files)
    expected = logits(packed)
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return loaded(packed, expected)


def packed_mutant(work: Path, chance: random.Random) -> str:
    """A value of the header of the weights or of the config, or some bytes; half of them without checksums."""
    packed = work / "packed"
    names = ["config.json", "model.safetensors", "packed.json"]
    if chance.random() < 0.5:
        (packed / "packed.json").unlink()
        names.pop()
    change = chance.choice((change_value, change_value, change_bytes))
    change(packed / chance.choice(names), chance)
    return loaded(packed, None)


def hostile_record(work: Path, chance: random.Random) -> str:
    """Values of a record, which pages show."""
    directory = work / chance.choice(("pruned", "packed"))
    names = ("pruning.json", "results.json", "sparsellm-files.json", "config.json")
    name = chance.choice(names)
    change = chance.choice((change_value, change_value, change_value, change_bytes))
    change(directory / name, chance)
    ends = set()
    for show in (write_report, card, sparsellm.inspect):
        try:
            show(directory)
            ends.add(HELD)
        except UserError as error:
            if "\n" in str(error):
                return f"several lines: {error}"
            ends.add(REFUSED)
    page = directory / "report.html"
    if page.is_file() and SCRIPT in page.read_text():
        return "markup"
    return min(ends, key=[REFUSED, HELD].index)


KINDS: dict[str, Kind] = {
    "bit flips": bit_flip,
    "packed mutants": packed_mutant,
    "hostile records": hostile_record,
}


def end_of(kind: Kind, chance: random.Random) -> str:
    """What one damage ends in, with a traceback if that is an error of the program."""
    with tempfile.TemporaryDirectory() as place:
        work = Path(place) / "work"
        for name in ("pruned", "packed"):
            shutil.copytree(template() / name, work / name)
        try:
            with limited(60.0):
                return kind(work, chance)
        except BaseException:
            return traceback.format_exc()[-1500:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    wrong = []
    print("| damage | files | refused | loads |\n|---|---|---|---|")
    for name, kind in KINDS.items():
        ends: Counter[str] = Counter()
        for number in range(arguments.runs):
            seed = f"{arguments.seed} {name} {number}"
            end = end_of(kind, random.Random(seed))
            ends[end] += 1
            if end not in (REFUSED, HELD):
                wrong.append(f"{seed}: {end}")
        print(
            f"| {name} | {arguments.runs} | {ends[REFUSED]} | {ends[HELD]} |",
            flush=True,
        )
    print(*wrong, sep="\n", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
