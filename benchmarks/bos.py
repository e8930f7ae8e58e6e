"""What a beginning-of-text token before every window changes: the table in docs/results.md.

Every model is measured dense, and pruned to 50 % by SparseGPT, with windows cut anywhere (``bos: no``, the protocol of
the papers) and with windows that each begin with BOS (``bos: yes``), in calibration and in evaluation. Calibration
windows are at the same places of the text. Finished cells are kept in a file, so that a stopped script continues.

    python benchmarks/bos.py --models demo path/to/gemma --text wikitext2:wikitext2-raw-test.txt
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import cpu_name
from quality import OUT, Cells
from wikipedia import write_wikipedia

import sparsellm
from sparsellm.calibration import leading_token
from sparsellm.chain.open import load_tokenizer
from sparsellm.recipe import Bos
from sparsellm.sources.resolve import checkpoint_directory

PROTOCOLS: tuple[Bos, ...] = ("no", "yes")


def evaluate(arguments: argparse.Namespace, model: str) -> dict[str, float]:
    """The perplexity of a model by each protocol."""
    limit = arguments.windows * arguments.window
    return {
        bos: sparsellm.evaluate(model, arguments.text, seq_len=arguments.window, max_tokens=limit, bos=bos).value
        for bos in PROTOCOLS
    }


def pruned(arguments: argparse.Namespace, model: str, bos: Bos) -> dict[str, float]:
    """The perplexity by each protocol of a model that was calibrated by one."""
    recipe = sparsellm.Recipe(
        method="sparsegpt", sparsity=0.5, calibration=arguments.calibration, samples=arguments.samples,
        seq_len=arguments.window, bos=bos,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="pruned-", dir=OUT) as folder:
        sparsellm.prune(model, recipe, out=Path(folder) / "model")
        return evaluate(arguments, str(Path(folder) / "model"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo"])
    parser.add_argument("--text", required=True, help="a text source")
    parser.add_argument("--calibration", help="a text source; by default a sample of Wikipedia")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--cells", type=Path, default=OUT / "bos.json")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    arguments.calibration = arguments.calibration or str(write_wikipedia(OUT / "wikipedia.txt"))
    cells = Cells(arguments.cells)
    print(
        f"{arguments.windows} windows of {arguments.window} tokens scored; SparseGPT, 50 %, {arguments.samples} × "
        f"{arguments.window} tokens; torch {torch.__version__}, {torch.get_num_threads()} threads, {cpu_name()}\n"
    )
    print("| model | adds BOS by itself | pruned, calibrated with | perplexity, `bos: no` | perplexity, `bos: yes` |")
    print("|---|---|---|---|---|")
    for model in arguments.models:
        tokenizer = load_tokenizer(checkpoint_directory(model))
        adds = "no" if leading_token(tokenizer) is None else "yes"
        conditions = f"{model}/{arguments.samples}/{arguments.window}/{arguments.windows}"
        rows: dict[str, Any] = {"dense": cells.get(f"{conditions}/dense", lambda m=model: evaluate(arguments, m))}
        for bos in PROTOCOLS:
            rows[f"`bos: {bos}`"] = cells.get(f"{conditions}/{bos}", lambda m=model, b=bos: pruned(arguments, m, b))
        for name, row in rows.items():
            print(f"| {Path(model).name} | {adds} | {name} | {row['no']:.2f} | {row['yes']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
