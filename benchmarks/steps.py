"""What a sweep gains by the windows that it runs on, and by the tokens of its steps: the table in docs/results.md.

Each row prunes a model with one sweep and measures it, in this process. *New* windows are those of the default; *seen*
ones are calibration windows, which masks and refits fit already. Finished rows are kept in a file: a stopped script
continues when it is run again.

    python benchmarks/steps.py --model demo --text wikitext2:wikitext2-raw-test.txt --samples 32 --window 1024
    python benchmarks/steps.py --model out/llama --text out/llama/heldout.txt --calibration out/llama/train.txt
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import cpu_name
from quality import OUT, Cells, spread
from selftext import scores
from torch import Tensor
from wikipedia import write_wikipedia

import sparsellm
from sparsellm.run.prepare import Prepared

# Windows, tokens of a step, windows of a sweep per calibration window.
ROWS = (
    ("new", 512, 0.5),
    ("seen", 512, 0.5),
    ("new", 1024, 1.0),
    ("seen", 1024, 1.0),
    ("new", 512, 1.0),
    ("new", 256, 0.5),
    ("new", 1024, 0.5),
)


def run_row(arguments: argparse.Namespace, sparsity: float, seed: int, row: tuple[str, int, float]) -> dict[str, Any]:
    windows, tokens, share = row
    recipe = sparsellm.Recipe(
        sparsity=sparsity, calibration=arguments.calibration, samples=arguments.samples, seq_len=arguments.window,
        seed=seed, options={"effort": 1},
    )  # fmt: skip
    chosen = vars(Prepared)["sweep_windows"].func

    def seen(prepared: Prepared) -> list[Tensor]:
        fresh = chosen(prepared)[0]
        return [prepared.own_windows.reshape(-1, fresh.shape[1])[: len(fresh)]]

    with (
        mock.patch("sparsellm.sweep.whole_model.STEP_TOKENS", tokens),
        mock.patch("sparsellm.run.prepare.STEP_TOKENS", tokens),
        mock.patch("sparsellm.run.prepare.SWEEP_SHARE", share),
        mock.patch.object(Prepared, "sweep_windows", property(seen) if windows == "seen" else Prepared.sweep_windows),
        tempfile.TemporaryDirectory(prefix="pruned-", dir=OUT) as folder,
    ):
        began = time.process_time()
        result = sparsellm.prune(arguments.model, recipe, out=Path(folder) / "model")
        seconds = time.process_time() - began
        found = scores(arguments, str(result.path))
    return {**found, "cpu_seconds": seconds, "held_out": [sweep.held_out for sweep in result.sweeps]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", help="a text source; by default a sample of Wikipedia")
    parser.add_argument("--sparsities", nargs="*", type=float, default=(0.7, 0.9))
    parser.add_argument("--seeds", nargs="*", type=int, default=(0, 1))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--cells", type=Path, default=OUT / "steps.json")
    arguments = parser.parse_args()
    arguments.calibration = arguments.calibration or str(write_wikipedia(OUT / "wikipedia.txt"))
    OUT.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    cells = Cells(arguments.cells)
    conditions = f"{arguments.model}/{arguments.samples}x{arguments.window}/{arguments.max_tokens}"
    table: dict[tuple[float, tuple[str, int, float]], list[dict[str, Any]]] = {}
    for sparsity in arguments.sparsities:
        for seed in arguments.seeds:
            for row in ROWS:
                key = "/".join(map(str, (conditions, sparsity, seed, *row)))
                made = cells.get(key, lambda s=sparsity, x=seed, r=row: run_row(arguments, s, x, r))
                table.setdefault((sparsity, row), []).append(made)
    print(
        f"Model {arguments.model}, windows of {arguments.window}, {arguments.samples} of them for calibration, "
        f"{arguments.max_tokens} tokens scored; seeds {list(arguments.seeds)}; {cpu_name()}, 1 thread; code "
        f"{cells.code}\n"
    )
    print("| sparsity | windows | tokens a step | tokens of the sweep / of the statistics | KL | perplexity "
          "| held-out KL before → after | CPU s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for (sparsity, (windows, tokens, share)), rows in table.items():
        before, after = (statistics.mean(row["held_out"][at] for row in rows) for at in (0, -1))
        seconds = statistics.mean(row["cpu_seconds"] for row in rows)
        print(
            f"| {sparsity:.0%} | {windows} | {tokens} | {share:g} | {spread([row['kl'] for row in rows], 5)} | "
            f"{spread([row['perplexity'] for row in rows], 2)} | {before:.4f} → {after:.4f} | {seconds:.0f} |"
        )


if __name__ == "__main__":
    main()
