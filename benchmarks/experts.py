"""Mixtures with fewer experts: divergence and perplexity on each kind of text, by score, with and without repair.

    python benchmarks/train_mixture.py --articles wikipedia.txt --minutes 30 --out out/mixture
    python benchmarks/experts.py --model out/mixture --shares 0.25 0.5 --seeds 0 1 2

Calibration is on ``train.txt`` of all kinds, or on that of one kind (``--calibration docs``); tests are the held-out
documents of each kind. ``reap`` is scored as published, in our code.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import code_version, cpu_name

import sparsellm
from sparsellm import Recipe
from sparsellm.api import Opened

WAYS: dict[str, dict[str, Any]] = {
    "random": {"expert_score": "random", "expert_refit": False, "effort": 0},
    "frequency": {"expert_score": "frequency", "expert_refit": False, "effort": 0},
    "reap": {"expert_score": "reap", "expert_refit": False, "effort": 0},
    "coordinated": {"expert_score": "coordinated", "expert_refit": False, "effort": 0},
    "reap, refit": {"expert_score": "reap", "effort": 0},
    "coordinated, refit": {"expert_score": "coordinated", "effort": 0},
    "coordinated, refit, one sweep": {"expert_score": "coordinated", "effort": 1},
    "coordinated, refit, three sweeps": {"expert_score": "coordinated", "effort": 2},
}


def kinds_of(model: Path) -> list[str]:
    return sorted(path.stem.removeprefix("heldout-") for path in model.glob("heldout-*.txt"))


def run(arguments: argparse.Namespace, dense: dict[str, Opened], name: str, fields: dict[str, Any], seed: int) -> None:
    """Prints a row: KL and perplexity on each kind of text; ``dense`` has the dense model for each."""
    text = arguments.model / (f"train-{arguments.calibration}.txt" if arguments.calibration else "train.txt")
    recipe = Recipe(
        calibration=str(text),
        samples=arguments.samples,
        seq_len=arguments.window,
        seed=seed,
        method="sparsellm",
        **fields,
    )
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        result = sparsellm.prune(str(arguments.model), recipe, out=Path(folder) / "out")
        seconds = time.process_time() - began
        measured = [
            sparsellm.evaluate(
                str(Path(folder) / "out"), str(arguments.model / f"heldout-{kind}.txt"), seq_len=arguments.window,
                max_tokens=arguments.tokens, against=opened,
            )
            for kind, opened in dense.items()
        ]  # fmt: skip
    before, after = (
        statistics.fmean(values) for values in zip(*((x.error, x.refitted) for x in result.experts), strict=True)
    )
    divergences = [each.against.divergence.value for each in measured if each.against is not None]
    perplexities = [each.perplexity.value for each in measured]
    numbers = " | ".join(f"{kl:.4f} / {ppl:.2f}" for kl, ppl in zip(divergences, perplexities, strict=True))
    mean, error = statistics.fmean(divergences), f"{before:.3f} → {after:.3f}"
    print(f"| {name} | {seed} | {numbers} | {mean:.4f} | {error} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", default=[], help="parts of names; all if none is given")
    parser.add_argument("--calibration", default="", help="one kind of text; all kinds if it is not given")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192, help="of each test text")
    arguments = parser.parse_args()
    kinds, settings = kinds_of(arguments.model), Recipe(products="float32")
    dense = {kind: Opened(str(arguments.model), settings, trust=False) for kind in kinds}
    print(f"{cpu_name()}, sparsellm {code_version()}")
    print(f"{arguments.samples} × {arguments.window} calibration tokens; KL / perplexity on {kinds}")
    for share in arguments.shares:
        print(f"\n{share}\n| way | seed | {' | '.join(kinds)} | mean KL | error | CPU s |")
        for name, fields in WAYS.items():
            if not arguments.ways or any(part in name for part in arguments.ways):
                for seed in arguments.seeds:
                    run(arguments, dense, name, {"experts": share, "sparsity": 0.0, **fields}, seed)


if __name__ == "__main__":
    main()
