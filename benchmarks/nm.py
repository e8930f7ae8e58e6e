"""What the order of channels, and a choice of N for each linear, are worth in N:M.

    python benchmarks/nm.py linears --model demo --calibration wiki.txt --blocks 3 15 27
    python benchmarks/nm.py models --model opt --calibration opt/train.txt --text opt/held-out.txt --window 256
    python benchmarks/nm.py chosen --model opt --calibration opt/train.txt --text opt/held-out.txt --window 256

``linears``: each linear that reads permuted channels, in the dense model, is pruned in the natural order of its inputs
and in the chosen one. Errors are ‖(W − W̃) X‖² / ‖W X‖² on windows held out from the order and the solver.

``models``: ``sparsellm`` with ``options.permute`` false and true, each with several seeds. KL is the divergence from
the dense model in nats a token, on held-out text.

``chosen``: 4:8 in every linear, and auto:8 at 50 %, both with ``options.permute``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import cpu_name
from torch import Tensor

import sparsellm
from sparsellm.calibration import calibration_windows
from sparsellm.chain import Feed, LinearView, Stream, open_chain
from sparsellm.chain.capture import watch
from sparsellm.chain.open import load_tokenizer
from sparsellm.methods import BlockTask
from sparsellm.methods.permutation import find_channels
from sparsellm.patterns import NM, Pattern, parse_pattern
from sparsellm.progress import PhaseClock
from sparsellm.solvers import SOLVERS
from sparsellm.sources.resolve import checkpoint_directory
from sparsellm.statistics import Gram, GramAccumulator

Change = tuple[str, dict[str, Any]]
"""The name of a column, and fields of its recipe."""


def gram_of(linear: LinearView, stream: Stream, index: int) -> Gram:
    """The Gram matrix of the inputs of a linear of the loaded block."""
    accumulator = GramAccumulator(linear.in_features, stream.chain.device)
    with watch([linear], lambda _, entering, leaving: accumulator.update(entering)):
        for _ in stream.run(index):
            pass
    return accumulator.finish()


def errors(linear: LinearView, streams: list[Stream], index: int, pattern: NM) -> tuple[Gram, dict[str, float]]:
    """The Gram matrix of the first stream, and the held-out error of each solver."""
    fit, test = (gram_of(linear, stream, index) for stream in streams)
    weight, found = linear.weight(), {}
    for solver in ("wanda", "sparsegpt", "admm"):
        pruned = SOLVERS[solver].function(weight, fit, pattern).weight
        found[solver] = test.energy(weight, minus=pruned) / test.energy(weight)
    return fit, found


@torch.no_grad()
def print_linears(arguments: argparse.Namespace, pattern: NM) -> None:
    """A table of errors, a row for each solver and linear."""
    directory = checkpoint_directory(arguments.model)
    tokenizer = load_tokenizer(directory)
    ids: Tensor = calibration_windows(arguments.calibration, tokenizer, 12, arguments.window, 0)
    chain = open_chain(directory, device=torch.device("cpu"))
    streams = [Feed(chain, part, 4096).stream() for part in (ids[:8], ids[8:])]
    print("| linear | solver | natural order | chosen order | ratio |\n|---|---|---|---|---|")
    for index in range(max(arguments.blocks) + 1):
        with chain.block(index):
            if index in arguments.blocks:
                linears = chain.linears(index)
                patterns: dict[str, Pattern] = dict.fromkeys([linear.name for linear in linears], pattern)
                task = BlockTask(index, linears, patterns, streams[0], lambda step: None, PhaseClock())
                for channels in find_channels(task):
                    gram, natural = errors(channels.reader, streams, index, pattern)
                    channels.permute(channels.best_order(pattern, gram.diagonal))
                    _, chosen = errors(channels.reader, streams, index, pattern)
                    for solver, before in natural.items():
                        after = chosen[solver]
                        row = (
                            f"| {channels.reader.name} | {solver} | {before:.4f} | {after:.4f} | {after / before:.3f} |"
                        )
                        print(row, flush=True)
            for stream in streams:
                stream.advance(index)


def print_models(arguments: argparse.Namespace, patterns: Sequence[str], pair: Sequence[Change]) -> None:
    """A table of whole models, a row for each pattern, effort and seed; ``pair``: what the two runs of a row are."""
    (first, one), (second, two) = pair
    print(f"| pattern | effort | seed | KL, {first} | KL, {second} | ratio | perplexity, {first} | {second} |")
    print("|---|---|---|---|---|---|---|---|")
    for pattern in patterns:
        for effort in arguments.efforts:
            for seed in arguments.seeds:
                found = []
                for change in (one, two):
                    options = {"effort": effort, **change.get("options", {})}
                    found.append(one_model(arguments, {"pattern": pattern, "seed": seed, **change, "options": options}))
                (kl, perplexity), (kl_then, perplexity_then) = found
                print(
                    f"| {pattern} | {effort} | {seed} | {kl:.4f} | {kl_then:.4f} | {kl_then / kl:.3f} "
                    f"| {perplexity:.2f} | {perplexity_then:.2f} |",
                    flush=True,
                )


def one_model(arguments: argparse.Namespace, fields: dict[str, Any]) -> tuple[float, float]:
    """The divergence from the dense model, and the perplexity."""
    recipe = sparsellm.Recipe(
        samples=arguments.samples, seq_len=arguments.window, calibration=arguments.calibration, **fields
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pruned"
        sparsellm.prune(arguments.model, recipe, out=out)
        tokens = {"seq_len": arguments.window, "max_tokens": arguments.max_tokens}
        result = sparsellm.evaluate(out, arguments.text, against=arguments.model, **tokens)
    assert result.against is not None
    return result.against.kl.value, result.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("linears", "models", "chosen"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", help="held out, for whole models")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8", "1:4"])
    parser.add_argument("--blocks", nargs="+", type=int, default=[0])
    parser.add_argument("--efforts", nargs="+", type=int, default=[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=16384)
    arguments = parser.parse_args()
    print(f"{arguments.model}, {cpu_name()}, {torch.get_num_threads()} threads\n")
    if arguments.table == "models":
        orders = [("natural order", {"options": {"permute": False}}), ("chosen order", {})]
        print_models(arguments, arguments.patterns, orders)
    elif arguments.table == "chosen":
        print_models(arguments, ["4:8"], [("4:8", {}), ("auto:8", {"pattern": "auto:8", "sparsity": 0.5})])
    else:
        for pattern in arguments.patterns:
            print(f"\n{pattern}\n")
            print_linears(arguments, parse_pattern(pattern))


if __name__ == "__main__":
    main()
