"""Every command that writes is killed at random operations on files, or finds the disk full, and is started again.

    nice python -m tests.kills [--kills 6] [--disks 2] [--seed 0] [--only TEXT]

A table says for each command how many of its runs, killed by SIGKILL in processes of their own, ended after the second
start in the files of a run that nothing stopped, bit by bit (but for times, memory, and pages that show them), and that
nothing else was there. The exit code is 1 if one did not."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType

from sparsellm.files.contents import LIST
from sparsellm.records import RESULTS
from tests import killing
from tests.files.small import tree
from tests.killing import KILLED, some
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.models.families import family
from tests.models.in_gguf import quantized_llama, write_gguf

SMALL = [
    "--samples=4",
    "--seq-len=24",
    "--calibration=text.txt",
    "--sparsity=0.5",
    "--out=out",
]
TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog looks at the fox for a while. "
    * 200
)
MEASURED = {
    "seconds",
    "peak_rss_bytes",
    "memory",
    "date",
    "speeds",
}
MEASURED |= {"tokens_per_second", "dense_tokens_per_second", "peak_rss"}
Q8_0 = GGMLQuantizationType.Q8_0
PAGES = ".html"  # the end of their names


@dataclass(frozen=True)
class Job:
    """A command line, and those that prepare its directory, where ``dense``, ``mixture`` and ``text.txt`` are."""

    name: str
    words: list[str]
    before: tuple[list[str], ...] = ()


PRUNE = ["prune", "dense", "--method=sparsegpt", *SMALL]
INT4 = ["prune", "dense", "--method=sparsegpt", "--values=int4", *SMALL]
SIZED = ["--bits=6", "--effort=0", *SMALL[:3]]
EVAL = ["eval", "out", "--text=text.txt", "--seq-len=24", "--max-tokens=240"]
PACK = ["pack", "out", "--out=packed"]
JOBS = [
    Job("prune", PRUNE),
    Job("prune, sweep", ["prune", "dense", "--effort=1", *SMALL]),
    Job("prune, int4", INT4),
    Job(
        "prune, int3, 2:4", ["prune", "dense", "--values=int3", "--pattern=2:4", *SMALL]
    ),
    Job("prune, mixture", ["prune", "mixture", "--method=wanda", *SMALL]),
    Job("prune, GGUF", ["prune", "dense.gguf", "--method=wanda", *SMALL]),
    Job("prune, overwriting", [*PRUNE, "--overwrite", "--pattern=2:4"], (PRUNE,)),
    Job("pack", PACK, (PRUNE,)),
    Job("pack, int4", PACK, (INT4,)),
    Job(
        "unpack", ["export", "packed", "--to=transformers", "--out=again"], (INT4, PACK)
    ),
    Job(
        "export",
        ["export", "out", "--to=compressed-tensors", "--out=exported"],
        ([*PRUNE, "--grid=w8a16"],),
    ),
    Job("eval", EVAL, (PRUNE,)),
    Job("report", ["report", "out"], (PRUNE, EVAL)),
    Job(
        "compare",
        [
            "compare",
            "dense",
            "--method=wanda,sparsegpt",
            "--text=text.txt",
            "--text-seq-len=24",
            *SMALL,
        ],
    ),
    Job("compress", ["compress", "dense", "--for=sparsellm", "--out=out", *SIZED]),
    Job(
        "compress, GGUF",
        ["compress", "dense.gguf", "--for=llama.cpp", "--out=out.gguf", *SIZED],
    ),
]


def prepare(job: Job, home: Path) -> None:
    home.mkdir()
    (home / "text.txt").write_text(TEXT)
    save_tiny(tiny_llama().to(torch.bfloat16), tiny_tokenizer(), home / "dense")
    if "mixture" in job.words:
        save_tiny(family("Mixtral"), tiny_tokenizer(), home / "mixture")
    if "dense.gguf" in job.words:
        write_gguf(quantized_llama(Q8_0), home / "dense.gguf", Q8_0)
    for words in job.before:
        ended = killing.run(killing.line, home, words)
        assert (ended.code, ended.error) == (0, ""), (words, ended)


def contents(home: Path) -> dict[str, Any]:
    """Every file, without what was measured; for a list of files their names."""
    there: dict[str, Any] = tree(home)
    for name in [name for name in there if name.endswith(LIST)]:
        there[name] = json.dumps(sorted(json.loads(there[name])))
    for name in [name for name in there if name.endswith(RESULTS)]:
        known = json.loads(there[name])
        # a second start measures again, and adds what it found
        known["evaluations"] = unique(known["evaluations"])
        there[name] = json.dumps(known)
    for name in [name for name in there if name.endswith(PAGES)]:
        there[name] = "a page"
    for name in [name for name in there if name.endswith(".json") and there[name]]:
        there[name] = json.loads(
            there[name],
            object_hook=lambda entry: {
                key: entry[key] for key in entry.keys() - MEASURED
            },
        )
    return there


def unique(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that differ in more than what was measured of the machine, in order."""
    kept: dict[str, dict[str, Any]] = {}
    for record in records:
        same = {key: record[key] for key in record.keys() - MEASURED}
        kept.setdefault(json.dumps(same, sort_keys=True), record)
    return list(kept.values())


def copied(base: Path) -> Path:
    """A copy of a prepared directory, always in one place, because paths are in some records."""
    home = base.with_name("run")
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(base, home, symlinks=True)
    return home


def again(job: Job, home: Path, expected: dict[str, Any]) -> list[str]:
    """The job's second start: what went wrong, or nothing. Where the first had ended its work, it may say so."""
    ended = started(job, home)
    log = (home.parent / "run.log").read_text()
    if ended.code != 0 or (ended.error and "exists and is not empty" not in log):
        return [f"{ended.error}: {log[-300:]}"]
    got = contents(home)
    names = sorted(
        name
        for name in got.keys() | expected.keys()
        if got.get(name) != expected.get(name)
    )
    return [f"{', '.join(names)} differ"] if names else []


def started(
    job: Job, home: Path, at: int | None = None, disk: int | None = None
) -> killing.Ended:
    return killing.run(killing.line, home, job.words, disk, at=at)


def tried(job: Job, folder: Path, kills: int, disks: int, seed: int) -> list[str]:
    """What went wrong in the runs of a job; prints the line of the table."""
    prepare(job, base := folder / job.name)
    ended = started(job, home := copied(base))
    assert (ended.code, ended.error) == (0, ""), (
        job,
        ended,
        (folder / "run.log").read_text(),
    )
    expected, steps, writes = (
        contents(home),
        ended.steps.total(),
        ended.steps["write"] // 3,
    )
    wrong: dict[str, list[str]] = {"kill": [], "disk": []}
    for at in (kills_at := some(kills, steps, f"{seed} {job.name}")):
        home = copied(base)
        assert started(job, home, at=at).code == KILLED
        wrong["kill"] += [
            f"{job.name}, killed at {at}: {text}" for text in again(job, home, expected)
        ]
    for at in (full_at := some(disks, writes, f"{seed} {job.name}, disk")):
        home = copied(base)
        ended = started(job, home, disk=at)
        # a measurement is printed even if a file cannot be written, and that is said
        said = (folder / "run.log").read_text()
        told = ("the measurement is not kept", "the card is not written again")
        assert ended.error or any(text in said for text in told), said
        wrong["disk"] += [
            f"{job.name}, disk full at {at}: {text}"
            for text in again(job, home, expected)
        ]
    good = len(kills_at) - len(wrong["kill"]), len(full_at) - len(wrong["disk"])
    print(
        f"| {job.name} | {steps} | {len(kills_at)} | {good[0]} | {len(full_at)} | {good[1]} |",
        flush=True,
    )
    return wrong["kill"] + wrong["disk"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--disks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    wrong = []
    print(
        "| command | operations | kills | same bits | full disks | same bits |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for job in (job for job in JOBS if arguments.only in job.name):
            wrong += tried(
                job, Path(folder), arguments.kills, arguments.disks, arguments.seed
            )
    print(*wrong, sep="\n", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
