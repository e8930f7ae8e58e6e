"""Other methods in our time, allocations of one span, long sweeps, orders of channels in N:M, on two test texts: the
tables in docs/results.md.

    python benchmarks/equal.py --text wikitext2:wikitext2-raw-test.txt --calibration wikipedia.txt --targets 0.7

Table ``budgets``: local solvers alone; then each in sparsellm without allocation, refit, output costs and symmetries,
and as many passes of the sweep as take at least the time of sparsellm at ``--effort``, admm in N:M also with our order
of channels and rotated values.
Table ``allocations``: sparsellm at effort 0. Table ``sweeps``: sparsellm with longer and longer sweeps.
Table ``symmetries``, for N:M: sparsellm at ``--effort`` with the order of channels alone, and with values rotated too.
Finished cells are kept in the file of ``quality.py``, so that a stopped script continues when it is run again.
"""

from __future__ import annotations

import argparse
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from quality import (
    ALIKE,
    OUT,
    Cells,
    add_conditions,
    cell_key,
    conditions_of,
    excess_ratio,
    heading,
    measure,
    run_cell,
)
from wikipedia import write_news, write_wikipedia

NATURAL_ORDER = "options.symmetries=none"
ALONE = (
    "allocation=uniform",
    ALIKE,
    "options.refit=false",
    "options.norm_weighting=0",
    NATURAL_ORDER,
    "sets=2",
)
SPAN = 0.15  # how far sparsities are from the target at most: the default of threshold
PLUGIN = f"--plugin={Path(__file__).with_name('allocations.py')}"
ALLOCATIONS = {
    "threshold": (f"allocation_options.span={SPAN}",),
    "uniform": (),
    "random": (f"allocation_options.span={SPAN}", PLUGIN),
    "owl": (f"allocation_options.lam={SPAN}", PLUGIN),
    "dlp": (f"allocation_options.alpha={SPAN}", PLUGIN),
}

Row = tuple[str, dict[str, Any]]


def cell(
    arguments: argparse.Namespace,
    cells: Cells,
    method: str,
    target: str,
    seed: int,
    *settings: str,
) -> Any:
    names = tuple(
        Path(setting).name if setting[:2] == "--" else setting for setting in settings
    )
    key = cell_key(arguments, method, target, seed, names)
    return cells.get(key, partial(run_cell, arguments, method, target, seed, settings))


def budgets(
    arguments: argparse.Namespace, cells: Cells, target: str, seed: int
) -> list[Row]:
    """Rows of one target and seed. The first is what ratios divide by."""
    run = partial(cell, arguments, cells)
    rows = [("sparsegpt", run("sparsegpt", target, seed))]
    ours = run("sparsellm", target, seed, f"effort={arguments.effort}")
    rows.append((f"sparsellm, effort {arguments.effort}", ours))
    seconds = sum(value for name, value in ours["phases"].items() if "/" not in name)
    passes = max(sweep["passes"] for sweep in ours["sweeps"])
    a_pass = ours["cpu_seconds"] * ours["phases"]["sweep"] / seconds / passes
    for solver in arguments.solvers:
        local = run(solver, target, seed)
        if solver != "sparsegpt":
            rows.append((solver, local))
        count = max(1, math.ceil((ours["cpu_seconds"] - local["cpu_seconds"]) / a_pass))
        after = (f"options.solver={solver}", f"passes={count}")
        passed = run("sparsellm", target, seed, *ALONE, *after)
        rows.append((f"{solver}, then {count} passes of the sweep", passed))
        if solver == "admm" and ":" in target:
            ordered = run(
                "sparsellm",
                target,
                seed,
                *(x for x in ALONE if x != NATURAL_ORDER),
                *after,
            )
            rows.append(
                (
                    f"{solver}, channels ordered and rotated, then {count} passes",
                    ordered,
                )
            )
    return rows


def allocations(
    arguments: argparse.Namespace, cells: Cells, target: str, seed: int
) -> list[Row]:
    """Rows of one target and seed; ``random`` draws other sparsities for each seed."""
    rows = [("sparsegpt, uniform", cell(arguments, cells, "sparsegpt", target, seed))]
    for name, options in ALLOCATIONS.items():
        drawn = (f"allocation_options.seed={seed}",) if name == "random" else ()
        settings = ("effort=0", f"allocation={name}", *options, *drawn)
        rows.append(
            (name, cell(arguments, cells, "sparsellm", target, seed, *settings))
        )
    return rows


def sweeps(
    arguments: argparse.Namespace, cells: Cells, target: str, seed: int
) -> list[Row]:
    """Rows of one target and seed: longer and longer sweeps behind the same walk."""
    rows = [("sparsegpt", cell(arguments, cells, "sparsegpt", target, seed))]
    for tokens in arguments.sweep_tokens:
        how_long = "effort=0" if tokens == "0" else f"sweep_tokens={tokens}"
        rows.append(
            (
                f"{tokens} tokens",
                cell(arguments, cells, "sparsellm", target, seed, "sets=4", how_long),
            )
        )
    return rows


def symmetries(
    arguments: argparse.Namespace, cells: Cells, target: str, seed: int
) -> list[Row]:
    """Rows of one target of N:M and one seed."""
    rows = [("sparsegpt", cell(arguments, cells, "sparsegpt", target, seed))]
    for name in ("permute", "rotate"):
        settings = (f"effort={arguments.effort}", f"options.symmetries={name}")
        rows.append(
            (name, cell(arguments, cells, "sparsellm", target, seed, *settings))
        )
    return rows


TABLES = {
    "budgets": budgets,
    "allocations": allocations,
    "sweeps": sweeps,
    "symmetries": symmetries,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_conditions(parser)
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=TABLES,
        default=["budgets", "allocations", "sweeps"],
    )
    parser.add_argument("--targets", nargs="+", default=["0.5", "0.7"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    effort = "whose time the other methods get, above 0; that of the table symmetries"
    parser.add_argument("--effort", type=int, choices=range(4), default=1, help=effort)
    parser.add_argument(
        "--solvers",
        nargs="*",
        default=["admm", "sparsegpt", "wanda"],
        help="local methods whose passes are measured",
    )
    parser.add_argument(
        "--sweep-tokens",
        nargs="*",
        default=["0", "16k", "64k", "256k"],
        help="of the table sweeps",
    )
    parser.add_argument(
        "--set", nargs="*", default=[], help="settings for every run, key=value"
    )
    parser.add_argument("--cells", type=Path, default=OUT / "quality.json")
    arguments = parser.parse_args()
    if arguments.effort == 0 and "budgets" in arguments.tables:
        parser.error("the table budgets needs an effort above 0")
    arguments.calibration = arguments.calibration or str(
        write_wikipedia(OUT / "wikipedia.txt")
    )
    arguments.other_text = arguments.other_text or str(write_news(OUT / "news.txt"))
    cells = Cells(arguments.cells)
    dense = cells.get(
        f"{conditions_of(arguments)}/dense",
        partial(measure, arguments, arguments.model),
    )
    print(heading(arguments, dense, cells.code))
    other = Path(arguments.other_text).name
    for table in arguments.tables:
        print(
            f"| {table} | {Path(arguments.text).name} | ratio | {other} ({dense['other']:.2f}) | ratio | CPU s |"
        )
        print("|---|---|---|---|---|---|", flush=True)
        for target in arguments.targets:
            by_seed = [
                TABLES[table](arguments, cells, target, seed)
                for seed in arguments.seeds
            ]
            for same in zip(*by_seed, strict=True):  # a row: one cell of each seed
                shown = []
                for text in ("perplexity", "other"):
                    excess = [
                        excess_ratio(row, rows[0][1], dense[text], text)
                        for (_, row), rows in zip(same, by_seed, strict=True)
                    ]
                    values = ", ".join(f"{row[text]:.1f}" for _, row in same)
                    shown.append(f"{values} | {statistics.mean(excess):.3f}")
                seconds = statistics.mean(row["cpu_seconds"] for _, row in same)
                print(
                    f"| {target} {same[0][0]} | {' | '.join(shown)} | {seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
