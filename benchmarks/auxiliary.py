"""What the auxiliary variables of the feed-forward units are worth on a whole model: the hearing in docs/results.md.

Every cell prunes a model, writes it, and measures it, in this process. Finished cells are kept in a file: stop the
script and run it on whenever you like. By default with ``sparsellm``'s own allocation and competing outputs, at effort
0; ``--uniform`` gives every linear the same share and lets all outputs count alike.

    python benchmarks/train_opt.py --out out/opt --layers 4 --width 128 --vocabulary 2048 --minutes 12
    python benchmarks/auxiliary.py --model out/opt --text out/opt/heldout.txt --calibration out/opt/train.txt
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import cpu_name
from quality import OUT, Cells, spread
from unit import Pruned, Tokens, descend

import sparsellm
from sparsellm.decomposition import Chunk, FeedForward, Result, Settings, prune_feed_forward
from sparsellm.errors import NumericalError

LOCAL = "local"  # the solver alone, each linear by itself


def run_cell(arguments: argparse.Namespace, target: str, solver: str, rounds: str, seed: int) -> dict[str, Any]:
    """One run; ``rounds`` is as of the option: iterations, ``local``, ``joint:``, ``sweep:`` or ``stages:``."""
    goal: dict[str, Any] = {"pattern": target} if ":" in target else {"sparsity": float(target)}
    method, options = solver, {}
    extra: dict[str, Any] = {}
    if rounds != LOCAL:
        kind, _, value = rounds.partition(":")
        options = {"effort": arguments.effort, "solver": solver, "iterations": 0}
        if kind in ("sweep", "stages"):
            passes, _, rate = value.partition(":")
            options |= {"passes": int(passes), "sweep_rate": float(rate) if rate else None}
            options["stages"] = 2 if kind == "stages" else 1
        else:
            options["iterations"] = 1 if kind == "joint" else int(rounds)  # joint: a descent in place of the loop
        method = "sparsellm"
        if arguments.uniform:
            options["output_metric"] = 0.0
            extra = {"allocation": "uniform"}
    recipe = sparsellm.Recipe(
        method=method, options=options, calibration=str(arguments.calibration), samples=arguments.samples,
        seq_len=arguments.window, seed=seed, **goal, **extra,
    )  # fmt: skip
    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="pruned-", dir=OUT) as folder:
        try:
            with descending(int(rounds[6:])) if rounds.startswith("joint:") else nullcontext():
                result = sparsellm.prune(str(arguments.model), recipe, out=Path(folder) / "model")
        except NumericalError as error:
            return {"failed": str(error)}
        seconds = time.process_time() - began
        found = sparsellm.evaluate(
            str(result.path), str(arguments.text), seq_len=arguments.window, max_tokens=arguments.max_tokens or None,
            against=str(arguments.model),
        )  # fmt: skip
    assert found.against is not None
    kl = found.against.kl.value
    return {"perplexity": found.value, "kl": kl, "cpu_seconds": seconds, "sparsity": result.sparsity}


@contextmanager
def descending(steps: int) -> Iterator[None]:
    """Within it, a feed-forward unit is pruned locally and then descends on its own error; see ``unit.py``."""

    def prune(
        dense: FeedForward, train: Sequence[Chunk], held_out: Sequence[Chunk], solvers: Any, patterns: Any,
        settings: Settings, scratch: Any,
    ) -> Result:  # fmt: skip
        start = prune_feed_forward(
            dense, train, (), solvers, patterns, replace(settings, iterations=0, safeguard=False), scratch
        )
        tokens = Tokens(list(train), list(held_out), [])
        best = descend(Pruned(start.unit, start.masks), tokens, steps=steps, batch=256, rate=0.01, every=25)
        return replace(start, unit=best.unit)

    with mock.patch("sparsellm.methods.feed_forward.prune_feed_forward", prune):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--targets", nargs="*", default=("0.7", "0.8", "0.9", "1:4", "3:4"))
    parser.add_argument("--solvers", nargs="*", default=("sparsegpt", "admm"))
    parser.add_argument(
        "--rounds",
        nargs="*",
        default=(LOCAL, "0", "2", "4", "8"),
        help="iterations; 'local' is the solver alone; joint:STEPS; sweep:PASSES[:RATE]; stages:PASSES[:RATE] in two",
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=(0, 1, 2))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--effort", type=int, default=0, help="of sparsellm")
    parser.add_argument("--uniform", action="store_true")
    parser.add_argument("--cells", type=Path, default=OUT / "auxiliary.json")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    cells = Cells(arguments.cells)
    how = "uniform" if arguments.uniform else "threshold"
    how += f" effort {arguments.effort}" if arguments.effort else ""
    conditions = f"{arguments.model.name}/{arguments.samples}x{arguments.window}/{arguments.max_tokens}/{how}"

    def dense() -> dict[str, Any]:
        found = sparsellm.evaluate(
            str(arguments.model), str(arguments.text), seq_len=arguments.window,
            max_tokens=arguments.max_tokens or None,
        )  # fmt: skip
        return {"perplexity": found.value, "tokens": found.tokens}

    base = cells.get(f"{conditions}/dense", dense)
    table: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        for target in arguments.targets:
            for solver in arguments.solvers:
                for rounds in arguments.rounds:
                    key = f"{conditions}/{target}/{solver}/{rounds}/{seed}"
                    cell = cells.get(key, lambda t=target, s=solver, r=rounds, x=seed: run_cell(arguments, t, s, r, x))
                    table.setdefault((target, solver, rounds), []).append(cell)
    print(
        f"Model {arguments.model.name}, dense perplexity {base['perplexity']:.2f}, {base['tokens']} tokens scored in "
        f"windows of {arguments.window}; calibration {arguments.samples} × {arguments.window} tokens; {how}; seeds "
        f"{list(arguments.seeds)}; sparsellm {sparsellm.__version__}, torch {torch.__version__}, 1 thread, "
        f"{cpu_name()}\n"
    )
    print("| target | solver inside | iterations | perplexity | excess / solver alone | CPU s | KL to dense |")
    print("|---|---|---|---|---|---|---|")
    for (target, solver, rounds), row in table.items():
        print(f"| {target} | {solver} | {rounds} | {columns(row, table.get((target, solver, LOCAL)), base)} |")


def columns(row: list[dict[str, Any]], alone: list[dict[str, Any]] | None, base: dict[str, Any]) -> str:
    """Perplexity, its excess in log perplexity over the dense model's as a ratio, CPU seconds, KL; means over seeds."""
    failed = next((cell["failed"] for cell in row if "failed" in cell), None)
    if failed is not None:
        return f"{failed} | – | – | –"

    def excess(cell: dict[str, Any]) -> float:
        return math.log(cell["perplexity"] / base["perplexity"])

    ratios = [excess(cell) / excess(other) for cell, other in zip(row, alone or [], strict=False)]
    seconds = statistics.mean(cell["cpu_seconds"] for cell in row)
    divergence = spread([cell["kl"] for cell in row if "kl" in cell], 4)  # cells of before it was measured have none
    return f"{spread([cell['perplexity'] for cell in row], 2)} | {spread(ratios, 3)} | {seconds:.1f} | {divergence}"


if __name__ == "__main__":
    main()
