"""What text written by the model itself is worth as calibration, beside real texts: a section of docs/results.md.

Every cell prunes a model, writes it, and measures perplexity and KL(dense ‖ pruned) on a text of the kind that the
model was trained on, in this process. Finished cells are kept in a file: stop the script and run it on whenever you
like; several may run at once.

    python benchmarks/train_opt.py --out out/opt --layers 4 --width 128 --vocabulary 2048 --minutes 12
    python benchmarks/selftext.py --model out/opt --text out/opt/heldout.txt \
        --calibration out/opt/train.txt self wikipedia.txt
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import cpu_name
from quality import OUT, Cells, spread

import sparsellm


def scores(arguments: argparse.Namespace, directory: str) -> dict[str, Any]:
    """Perplexity, and the divergence from the dense model, which is 0 for itself."""
    limit, against = arguments.max_tokens or None, None if directory == arguments.model else arguments.model
    found = sparsellm.evaluate(directory, arguments.text, against=against, seq_len=arguments.window, max_tokens=limit)
    kl = found.against.kl.value if found.against is not None else 0.0
    return {"perplexity": found.value, "kl": kl, "tokens": found.tokens}


def run_cell(arguments: argparse.Namespace, sparsity: float, effort: int, source: str, seed: int) -> dict[str, Any]:
    recipe = sparsellm.Recipe(
        sparsity=sparsity, options={"effort": effort}, calibration=source, samples=arguments.samples,
        seq_len=arguments.window, seed=seed,
    )  # fmt: skip
    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="selftext-", dir=OUT) as folder:
        pruned = sparsellm.prune(arguments.model, recipe, out=Path(folder) / "pruned")
        seconds = time.process_time() - began
        found = scores(arguments, str(pruned.path))
    return {
        **found,
        "held_out": [each.held_out for each in pruned.sweeps],  # the KL of each pass on windows of the calibration text
        "cpu_seconds": seconds,
        "sparsity": pruned.sparsity,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", nargs="+", required=True, help="text sources; ratios are to the first")
    parser.add_argument("--sparsities", nargs="*", type=float, default=(0.7, 0.9))
    parser.add_argument("--efforts", nargs="*", type=int, default=(0, 1, 3))
    parser.add_argument("--seeds", nargs="*", type=int, default=(0, 1))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=16384, help="of the test text; 0 for all of it")
    parser.add_argument("--cells", type=Path, default=OUT / "selftext.json")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    cells, name = Cells(arguments.cells), Path(arguments.model).name
    conditions = f"{name}/{arguments.samples}x{arguments.window}/{Path(arguments.text).name}/{arguments.max_tokens}"
    dense = cells.get(f"{conditions}/dense", lambda: scores(arguments, arguments.model))
    table: dict[tuple[float, int, str], list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        for sparsity in arguments.sparsities:
            for effort in arguments.efforts:
                for source in arguments.calibration:
                    key = f"{conditions}/{sparsity:g}/{effort}/{Path(source).name}/{seed}"
                    make = lambda s=sparsity, e=effort, c=source, x=seed: run_cell(arguments, s, e, c, x)  # noqa: E731
                    table.setdefault((sparsity, effort, source), []).append(cells.get(key, make))
    print(
        f"Model {name}, dense perplexity {dense['perplexity']:.2f}; {Path(arguments.text).name}, windows of "
        f"{arguments.window}, {dense['tokens']} tokens scored; calibration {arguments.samples} × "
        f"{arguments.window} tokens, seeds {list(arguments.seeds)}; torch {torch.__version__}, 1 thread, "
        f"{cpu_name()}; code {cells.code}.\n"
    )
    print("| sparsity | effort | calibration | KL to dense | against the first | perplexity | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for (sparsity, effort, source), row in table.items():
        first = table[sparsity, effort, arguments.calibration[0]]
        ratio = spread([cell["kl"] / other["kl"] for cell, other in zip(row, first, strict=True)], 2)
        kl, perplexity = spread([cell["kl"] for cell in row], 4), spread([cell["perplexity"] for cell in row], 2)
        seconds = sum(cell["cpu_seconds"] for cell in row) / len(row)
        print(f"| {sparsity:.0%} | {effort} | {Path(source).name} | {kl} | {ratio} | {perplexity} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
