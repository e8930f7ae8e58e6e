"""Quality of a pruned mixture of experts, and what the shrinkage of its experts' statistics is worth.

The first table compares methods at sparsities of 50 and 70 %, by perplexity and by the divergence from the dense model:
so small a model has overfitted its text, and pruning may lower its perplexity on another. The second prunes with few
calibration tokens, and varies n₀, the count at which the tokens of an expert weigh as much as all tokens, in multiples
of the inputs of a linear.
Every cell prunes a model, writes it, and measures it, in this process. Finished cells are kept in a file: stop the
script and run it on whenever you like.

    python benchmarks/train_mixture.py --out out/mixture
    python benchmarks/mixture.py --model out/mixture
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measure import cpu_name
from quality import OUT, Cells, spread
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsellm
from sparsellm.methods import routed

METHODS: dict[str, dict[str, Any]] = {
    "wanda": {},
    "sparsegpt": {},
    "sparsellm, effort 0": {"effort": 0},
    "sparsellm, effort 1": {"effort": 1},
}


@contextmanager
def prior(inputs: float | None) -> Iterator[None]:
    """Sets n₀ to so many times the inputs of a linear; None for the default."""
    usual = routed.PRIOR
    routed.PRIOR = usual if inputs is None else inputs
    try:
        yield
    finally:
        routed.PRIOR = usual


def run_cell(
    arguments: argparse.Namespace, name: str, sparsity: float, samples: int, seed: int, inputs: float | None = None
) -> dict[str, Any]:
    recipe = sparsellm.Recipe(
        method=name.partition(",")[0], options=METHODS[name], sparsity=sparsity, samples=samples,
        seq_len=arguments.window, seed=seed, calibration=str(arguments.model / "train.txt"),
    )  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pruned-", dir=OUT) as folder, prior(inputs):
        result = sparsellm.prune(str(arguments.model), recipe, out=Path(folder) / "model")
        return {**measured(arguments, result.path), "sparsity": result.sparsity}


@torch.no_grad()
def measured(arguments: argparse.Namespace, model: Path | None) -> dict[str, float]:
    """Perplexity, and the divergence ``KL(dense ‖ pruned)`` of a predicted token in nats, on the text held out."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = (arguments.model / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: arguments.max_tokens])
    windows = ids[: len(ids) // arguments.window * arguments.window].view(-1, arguments.window)
    places = (arguments.model, model or arguments.model)
    dense, pruned = (AutoModelForCausalLM.from_pretrained(each).eval() for each in places)
    loss = divergence = 0.0
    for part in windows.split(4):
        own = pruned(part, use_cache=False).logits[:, :-1].log_softmax(-1).flatten(0, 1)
        wanted = dense(part, use_cache=False).logits[:, :-1].log_softmax(-1).flatten(0, 1)
        loss += float(functional.nll_loss(own, part[:, 1:].flatten(), reduction="sum"))
        divergence += float(functional.kl_div(own, wanted, reduction="sum", log_target=True))
    tokens = windows[:, 1:].numel()
    return {"perplexity": math.exp(loss / tokens), "divergence": divergence / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=OUT / "mixture", help="written by train_mixture.py")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=(0.5, 0.7))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--few", nargs="*", type=int, default=(2, 8), help="windows of the second table")
    parser.add_argument("--priors", nargs="*", type=float, default=(0.001, 0.125, 0.5, 2.0))
    parser.add_argument("--seeds", nargs="*", type=int, default=(0, 1, 2))
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--cells", type=Path, default=OUT / "mixture.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells(arguments.cells)
    where = f"{arguments.model}/{arguments.window}/{arguments.max_tokens}"
    dense = cells.get(f"{where}/dense", lambda: measured(arguments, arguments.model))
    print(
        f"Dense perplexity {dense['perplexity']:.2f}, windows of {arguments.window}; calibration {arguments.samples} × "
        f"{arguments.window} tokens; seeds {list(arguments.seeds)}; sparsellm {sparsellm.__version__}, torch "
        f"{torch.__version__}, 1 thread, {cpu_name()}\n"
    )

    def row(name: str, sparsity: float, samples: int, inputs: float | None = None) -> list[dict[str, Any]]:
        keys = {seed: f"{where}/{name}/{sparsity}/{samples}/{inputs}/{seed}" for seed in arguments.seeds}
        return [
            cells.get(key, lambda seed=seed: run_cell(arguments, name, sparsity, samples, seed, inputs))
            for seed, key in keys.items()
        ]

    heads = [f"{sparsity:.0%}: {what}" for sparsity in arguments.sparsities for what in ("perplexity", "divergence")]
    print("| method | " + " | ".join(heads) + " |")
    print("|---" * (1 + len(heads)) + "|", flush=True)
    for name in arguments.methods:
        found = [row(name, sparsity, arguments.samples) for sparsity in arguments.sparsities]
        texts = [
            spread([c[what] for c in each], n) for each in found for what, n in (("perplexity", 2), ("divergence", 4))
        ]
        print(f"| {name} | " + " | ".join(texts) + " |", flush=True)
    most = max(arguments.sparsities)
    print(f"\nSparsity {most:.0%}, few calibration tokens; divergence:\n")
    print("| method, windows | " + " | ".join(f"n₀ = {inputs:g} inputs" for inputs in arguments.priors) + " |")
    print("|---" * (1 + len(arguments.priors)) + "|", flush=True)
    for name in ("sparsegpt", "sparsellm, effort 0"):
        for samples in arguments.few:
            found = [row(name, most, samples, inputs) for inputs in arguments.priors]
            texts = [spread([cell["divergence"] for cell in each], 4) for each in found]
            print(f"| {name}, {samples} | " + " | ".join(texts) + " |", flush=True)


if __name__ == "__main__":
    main()
