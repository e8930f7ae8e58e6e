"""What integers cost a pruned model: rounded to nearest afterwards, or rounded while pruning (`prune --values`).

Every cell prunes a model, writes it, and measures perplexity and KL(dense ‖ pruned) on the same windows, in this
process. Finished cells are kept in a file: stop the script and run it on whenever you like.

    python benchmarks/train_opt.py --out out/opt --layers 4 --width 128 --vocabulary 2048 --minutes 12
    python benchmarks/values.py --model out/opt --text out/opt/heldout.txt --calibration out/opt/train.txt
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import cpu_name
from quality import OUT, Cells

import sparsellm


def scores(arguments: argparse.Namespace, directory: Path) -> dict[str, float]:
    found = sparsellm.evaluate(
        str(directory), str(arguments.text), against=str(arguments.model), seq_len=arguments.window,
        max_tokens=arguments.max_tokens or None,
    )  # fmt: skip
    assert found.against is not None
    return {"perplexity": found.value, "kl": found.against.kl.value}


def run_cell(arguments: argparse.Namespace, sparsity: float, effort: int, values: str) -> dict[str, dict[str, Any]]:
    """The measurements of one pruned model by the type it is packed in.

    A run that keeps its values is packed in every type, to nearest; at sparsity 0 it is the dense model.
    """
    kept, began = values == "keep", time.process_time()
    with tempfile.TemporaryDirectory(prefix="values-", dir=OUT) as folder:
        pruned, zeros = arguments.model, 0.0
        if sparsity or not kept:
            recipe = sparsellm.Recipe(
                sparsity=sparsity, values=values, options={"effort": effort}, calibration=str(arguments.calibration),
                samples=arguments.samples, seq_len=arguments.window,
            )  # fmt: skip
            pruned = Path(folder) / "pruned"
            zeros = sparsellm.prune(str(arguments.model), recipe, out=pruned).sparsity
        seconds = time.process_time() - began
        measured = {}
        for packed_as in ("keep", *arguments.values) if kept else (values,):
            packed = sparsellm.pack(str(pruned), out=Path(folder) / f"packed-{packed_as}", values=packed_as)
            bits = packed.to_dict()["bits_per_weight"]
            measured[packed_as] = {
                **scores(arguments, packed.path), "sparsity": zeros, "bits": bits, "cpu_seconds": seconds
            }  # fmt: skip
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--sparsities", nargs="*", type=float, default=(0.5, 0.7))
    parser.add_argument("--values", nargs="*", default=("int4", "int3"))
    parser.add_argument("--efforts", nargs="*", type=int, default=(0, 1))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--cells", type=Path, default=OUT / "values.json")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    cells = Cells(arguments.cells)
    conditions = f"{arguments.model.name}/{arguments.samples}x{arguments.window}/{arguments.max_tokens}"
    print(
        f"Model {arguments.model.name}, windows of {arguments.window}, {arguments.max_tokens} tokens scored; "
        f"calibration {arguments.samples} × {arguments.window} tokens; sparsellm {sparsellm.__version__}, torch "
        f"{torch.__version__}, 1 thread, {cpu_name()}\n"
    )
    print("| sparsity | effort | values | zeros | bits a weight | perplexity | against keep | KL to dense | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for sparsity in arguments.sparsities:
        for effort in arguments.efforts:
            kept: dict[str, Any] | None = None
            for values in ("keep", *arguments.values):
                key = f"{conditions}/{sparsity:g}/{effort}/{values}"
                found = cells.get(key, lambda s=sparsity, e=effort, v=values: run_cell(arguments, s, e, v))
                for packed_as, cell in found.items():
                    kept = kept or cell
                    how = (
                        "keep" if packed_as == "keep" else f"{packed_as}, {'nearest' if values == 'keep' else 'prune'}"
                    )
                    print(
                        f"| {sparsity:.0%} | {effort} | {how} | {cell['sparsity']:.1%} | {cell['bits']:.2f} | "
                        f"{cell['perplexity']:.2f} | {cell['perplexity'] / kept['perplexity'] - 1:+.2%} | "
                        f"{cell['kl']:.4f} | {cell['cpu_seconds']:.0f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
