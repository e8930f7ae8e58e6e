"""Perplexity of each method at each sparsity on one real model: the table in docs/results.md.

Every cell is a run of ``sparsellm prune`` and one of ``sparsellm eval``, each in its own process, so that peak memory
is that of the cell. Finished cells are kept in a file, so that a stopped script continues when it is run again.

    python benchmarks/quality.py --text wikitext2-raw-test.txt                # the table
    python benchmarks/quality.py --text ... --methods sparsegpt admm --targets 0.7 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from measure import children_computed, code_version, cpu_name
from wikipedia import write_wikipedia

from sparsellm.files.files import sha256

OUT = Path(__file__).parent / "out"
TARGETS = ("0.5", "0.6", "0.7", "0.8", "2:4", "4:8", "0.9")
METHODS = ("magnitude", "wanda", "sparsegpt", "admm", "sparsellm")
# Hopeless beyond these, as the papers found; the machine's time is worth more elsewhere.
ONLY = {"magnitude": ("0.5", "0.7", "2:4"), "wanda": ("0.5", "0.7", "2:4")}
# What each part buys: a name, the method, and the settings of the run. Parts that stay off by default are rows as well.
ALIKE = "options.output_metric=0"  # a linear's outputs compete for weights as if errors of all cost the same
UNIFORM = ("effort=0", "allocation=uniform", ALIKE)
ABLATION: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("sparsegpt", "sparsegpt", ()),
    ("admm", "admm", ()),
    ("admm, in the order they run, no refit", "sparsellm", (*UNIFORM, "options.refit=false")),
    ("the same, every token counts alike", "sparsellm", (*UNIFORM, "options.refit=false", "options.norm_weighting=0")),
    ("refit of the writers", "sparsellm", UNIFORM),
    ("refit, with sparsegpt inside", "sparsellm", (*UNIFORM, "options.solver=sparsegpt")),
    ("refit, outputs compete by E[g²]^½", "sparsellm", ("effort=0", "allocation=uniform")),
    ("refit, variables, 2 iterations", "sparsellm", (*UNIFORM, "options.iterations=2")),
    ("refit, allocation threshold", "sparsellm", ("effort=0", "allocation=threshold", ALIKE)),
    ("effort 0: threshold, and outputs compete by E[g²]^½", "sparsellm", ("effort=0",)),
    ("effort 1, uniform, outputs alike", "sparsellm", ("effort=1", "allocation=uniform", ALIKE)),
    ("effort 1: one pass of the sweep", "sparsellm", ("effort=1",)),
    ("sparsellm-paper: the authors' released code", "sparsellm-paper", ()),
    ("sparsellm-paper, safeguard", "sparsellm-paper", ("options.safeguard=true",)),
    ("sparsellm-paper, an older state of the code", "sparsellm-paper",
     ("options.epochs=10", "options.output_update=pseudo-inverse")),
    ("sparsellm-paper, an older state of the code, safeguard", "sparsellm-paper",
     ("options.epochs=10", "options.output_update=pseudo-inverse", "options.safeguard=true")),
)  # fmt: skip


COLUMNS = "perplexity | excess / sparsegpt's | wall time / sparsegpt's | CPU time / sparsegpt's | peak memory (GB)"


class RefusedError(Exception):
    """The command ended with one error, exit code 2; this is its text."""


def command(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "sparsellm", *arguments, "--json"],
        capture_output=True,
        text=True,
    )
    print(done.stderr, end="", file=sys.stderr, flush=True)
    if done.returncode == 2:
        raise RefusedError(done.stderr.strip().splitlines()[-1])
    done.check_returncode()
    result: dict[str, Any] = json.loads(done.stdout)
    return result


class Cells:
    """Results by key and by the version of the code, on disk after each; several scripts may fill one file.

    Args:
        path: the file.
        versioned: whether results hold for one version of sparsellm only.
    """

    def __init__(self, path: Path, *, versioned: bool = True) -> None:
        self.path, self.code = path, code_version()
        self._prefix = f"{self.code}/" if versioned else ""
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, Any]:
        stored: dict[str, Any] = (
            json.loads(self.path.read_text()) if self.path.is_file() else {}
        )
        return stored

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self.read()

    def known(self, key: str) -> Any:
        """The result of a key, or None."""
        return self.read().get(self._prefix + key)

    def get(self, key: str, make: Any) -> Any:
        key, stored = self._prefix + key, self.read()
        if key in stored:
            return stored[key]
        print(f"running {key}", file=sys.stderr, flush=True)
        made = make()
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = json.dumps({**self.read(), key: made}, indent=1)
            temporary = self.path.with_suffix(".new")
            temporary.write_text(content)
            temporary.replace(self.path)
        return made


@cache
def identity(model: str) -> str:
    """A model's name and, for a directory, a digest of its weights: one that was trained again is another."""
    files = sorted(Path(model).glob("*.safetensors"))
    digest = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
    return f"{model}@{digest[:8]}" if files else model


def conditions_of(arguments: argparse.Namespace) -> str:
    """The part of a cell's key that all methods share."""
    parts = (
        identity(arguments.model), ",".join(Path(part).name for part in arguments.calibration.split(",")),
        arguments.samples, arguments.window,
        Path(arguments.text).name, arguments.max_tokens, *arguments.set,
        *([Path(arguments.other_text).name] if arguments.other_text else []),
        *([arguments.dtype] if arguments.dtype else []),
    )  # fmt: skip
    return "/".join(str(part) for part in parts)


def cell_key(
    arguments: argparse.Namespace,
    method: str,
    target: str,
    seed: int,
    settings: tuple[str, ...] = (),
) -> str:
    return "/".join((conditions_of(arguments), method, *settings, target, str(seed)))


def heading(arguments: argparse.Namespace, dense: dict[str, Any], code: str) -> str:
    """What a table was measured under."""
    return (
        f"Model {arguments.model}, dense perplexity {dense['perplexity']:.2f}; {Path(arguments.text).name}, windows of "
        f"{arguments.window}, {dense['tokens_scored']} tokens scored; calibration {arguments.samples} × "
        f"{arguments.window} tokens of {Path(arguments.calibration).name}, seed {arguments.seeds}; "
        f"scored in {arguments.dtype or 'the stored dtype'}; "
        f"{' '.join(arguments.set)}; torch {torch.__version__}, {torch.get_num_threads()} threads, {cpu_name()}; "
        f"code {code}.\n"
    )


def run_cell(
    arguments: argparse.Namespace,
    method: str,
    target: str,
    seed: int,
    settings: tuple[str, ...] = (),
) -> dict[str, Any]:
    OUT.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="pruned-", dir=OUT)) / "model"
    computed = children_computed()
    goal = ["--pattern", target] if ":" in target else ["--sparsity", target]
    prune = (
        "prune", arguments.model, "--out", str(directory), "--method", method, *goal, "--calibration",
        arguments.calibration, "--samples", str(arguments.samples), "--seq-len", str(arguments.window),
        f"--set=seed={seed}", *[line if line[:2] == "--" else f"--set={line}" for line in (*arguments.set, *settings)],
    )  # fmt: skip
    try:
        pruned = command(*prune)
    except RefusedError as refusal:
        if method != "sparsellm-paper":
            raise
        shutil.rmtree(directory.parent)
        return {"failed": str(refusal)}  # it diverges, and that is its result
    computed = children_computed() - computed
    scored = measure(arguments, str(directory))
    shutil.rmtree(directory.parent)
    return {
        **scored,
        "seconds": sum(
            value for name, value in pruned["seconds"].items() if "/" not in name
        ),
        "cpu_seconds": computed,  # the whole process, imports too: other jobs change it least
        "phases": pruned["seconds"],
        "peak_rss_bytes": pruned["peak_rss_bytes"],
        "sparsity": pruned["sparsity_reached"],
        "allocation": pruned["allocation"].get("name", "uniform"),
        "sweeps": pruned.get("sweeps", []),
    }


def measure(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    limit = ["--max-tokens", str(arguments.max_tokens)] if arguments.max_tokens else []
    protocol = (
        "--seq-len",
        str(arguments.window),
        *limit,
        *(["--dtype", arguments.dtype] if arguments.dtype else []),
    )
    measured = command("eval", model, "--text", arguments.text, *protocol)
    scored = {
        "perplexity": measured["perplexity"]["value"],
        "tokens_scored": measured["protocol"]["tokens"],
    }
    if arguments.other_text:
        scored["other"] = command(
            "eval", model, "--text", arguments.other_text, *protocol
        )["perplexity"]["value"]
    return scored


def add_conditions(parser: argparse.ArgumentParser) -> None:
    """What every perplexity is measured under."""
    parser.add_argument(
        "--text", required=True, help="raw WikiText-2 test, a row a line"
    )
    parser.add_argument(
        "--other-text", help="a second test text, of another kind than the calibration"
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--calibration", help="a text source; by default a sample of Wikipedia"
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=16384,
        help="of the test text; 0 for all of it",
    )
    parser.add_argument(
        "--dtype",
        help="in which models are scored: bfloat16 takes a third of the time of fp32",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_conditions(parser)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--targets", nargs="*", default=TARGETS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument(
        "--set", nargs="*", default=[], help="settings for every run, key=value"
    )
    parser.add_argument("--effort", type=int, help="of sparsellm; by default its own")
    parser.add_argument(
        "--ablation",
        action="store_true",
        help="what each part buys, at the first target and seed",
    )
    parser.add_argument(
        "--rows",
        nargs="*",
        default=[""],
        help="only rows of the ablation whose name has one of these",
    )
    parser.add_argument("--cells", type=Path, default=OUT / "quality.json")
    arguments = parser.parse_args()
    arguments.calibration = arguments.calibration or str(
        write_wikipedia(OUT / "wikipedia.txt")
    )
    cells = Cells(arguments.cells)
    dense = cells.get(
        f"{conditions_of(arguments)}/dense", lambda: measure(arguments, arguments.model)
    )
    title = heading(arguments, dense, cells.code)
    if arguments.ablation:
        print_ablation(arguments, cells, dense["perplexity"], title)
        return
    table = {}
    # every method's cell of a target before the next, so that times are comparable
    for target in arguments.targets:
        for seed in arguments.seeds:
            for method in arguments.methods:
                if target in ONLY.get(method, arguments.targets):
                    chosen = arguments.effort is not None and method == "sparsellm"
                    settings = (f"effort={arguments.effort}",) if chosen else ()
                    key = cell_key(arguments, method, target, seed, settings)
                    table[method, target, seed] = cells.get(
                        key,
                        lambda m=method, t=target, s=seed, x=settings: run_cell(
                            arguments, m, t, s, x
                        ),
                    )
    print(title)
    print(f"| target | method | {COLUMNS} |")
    print("|---|---|---|---|---|---|---|")
    for target in arguments.targets:
        for method in arguments.methods:
            rows = [
                table[method, target, seed]
                for seed in arguments.seeds
                if (method, target, seed) in table
            ]
            if not rows:
                continue
            base = [
                table["sparsegpt", target, seed]
                for seed in arguments.seeds
                if ("sparsegpt", target, seed) in table
            ]
            label = method
            if method == "sparsellm":
                effort = (
                    "" if arguments.effort is None else f", effort {arguments.effort}"
                )
                label += f"{effort}, {rows[0].get('allocation', 'uniform')}"
            print(
                f"| {target} | {label} | {columns(rows, base, dense['perplexity'])} |"
            )


def columns(
    rows: list[dict[str, Any]], base: list[dict[str, Any]], dense: float
) -> str:
    """What :data:`COLUMNS` names, for the cells of all seeds; ``base`` are sparsegpt's, where there are any."""
    failed = next((row["failed"] for row in rows if "failed" in row), None)
    if failed is not None:
        return f"{failed} | – | – | – | –"
    ratios: list[float] = []
    times = "– | –"
    if len(base) == len(rows):
        ratios = [
            excess_ratio(row, other, dense)
            for row, other in zip(rows, base, strict=True)
        ]
        times = time_ratios(rows, base)
    perplexity = spread([row["perplexity"] for row in rows], 1)
    peak = max(row["peak_rss_bytes"] for row in rows) / 1e9
    return f"{perplexity} | {spread(ratios, 3)} | {times} | {peak:.2f}"


def excess_ratio(
    row: dict[str, Any], base: dict[str, Any], dense: float, text: str = "perplexity"
) -> float:
    """How much of the base's excess of log perplexity over the dense model's a cell has; ``other`` is that on the
    second text."""
    return math.log(row[text] / dense) / math.log(base[text] / dense)


def spread(values: list[float], digits: int) -> str:
    """The mean, and the standard deviation of several."""
    if not values:
        return "–"
    shown = f"{statistics.mean(values):.{digits}f}"
    return shown + (
        f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    )


def time_ratios(rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """Two columns: means over the seeds. A cell of before CPU time was measured leaves the second out."""
    means = []
    for name in ("seconds", "cpu_seconds"):
        known = all(name in cell for cell in (*rows, *base))
        ratios = (
            [row[name] / other[name] for row, other in zip(rows, base, strict=True)]
            if known
            else []
        )
        means.append(f"{statistics.mean(ratios):.2f}" if ratios else "–")
    return " | ".join(means)


def print_ablation(
    arguments: argparse.Namespace, cells: Cells, dense: float, title: str
) -> None:
    target, seed = arguments.targets[0], arguments.seeds[0]
    rows = {}
    for name, method, settings in ABLATION:
        if name != "sparsegpt" and not any(part in name for part in arguments.rows):
            continue
        key = cell_key(arguments, method, target, seed, settings)
        rows[name] = cells.get(
            key, lambda m=method, x=settings: run_cell(arguments, m, target, seed, x)
        )
    print(title)
    print(f"| at {target} | {COLUMNS} |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {columns([row], [rows['sparsegpt']], dense)} |")


if __name__ == "__main__":
    main()
