"""Decoding speed of packed models against llama.cpp's integer types and dense bf16, in turns.

    pip install 'sparsellm[bench,instead]'
    python benchmarks/decoding.py [--layers 22] [--sparsities 0.5 0.7] [--values int8 int4] [--threads 1]

The dense model runs by the decoder of the packed ones, and as transformers runs it. The model is that of payoff.py: a
Llama of 1.1B's shape with random weights, of which fewer layers can be taken.
Packed models have embedding and head in int8; llama.cpp quantises its own. All forms decode the same number of tokens
after the same prompt, one form after another in every round, so that other load on the machine meets all of them. The
ratios are medians of the rounds' own ratios. The roofline stands beside them: the bytes of weights that a token reads,
against what a plain copy reads in the same rounds. ``SPARSELLM_KERNEL`` chooses the instruction set; llama.cpp's is
chosen when it is compiled.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forms import write_gguf
from instead import CLOCKS, llama_cpp
from payoff import conditions, llama, prune_at_random

import sparsellm
from sparsepack.bench import one_run, resident_bytes

EAGER = "dense bf16 by transformers"
COPIED = 64 << 20  # bytes, more than a cache holds


def forms(
    arguments: argparse.Namespace, folder: Path
) -> tuple[dict[str, Callable[[], float]], dict[str, int]]:
    """Every form's seconds of decoding, and the bytes of its weights without the embedding, of which a row is read."""
    clock = CLOCKS[arguments.cpu_seconds]
    source = llama(arguments.layers)
    rows = source.config.vocab_size * source.config.hidden_size
    runs: dict[str, Callable[[], float]] = {}
    sizes: dict[str, int] = {}
    if not arguments.without_llama_cpp:
        write_gguf(source, folder / "model.gguf", torch.float16)
        for kind in ("Q8_0", "Q4_0"):
            form = llama_cpp(
                folder / "model.gguf", kind, folder, arguments.threads, 256
            )
            runs[kind] = partial(
                form.decode,
                arguments.prompt_tokens,
                arguments.new_tokens,
                arguments.cpu_seconds,
            )
            sizes[kind] = int(
                form.all_bytes - rows * (8.5 if kind == "Q8_0" else 4.5) / 8
            )
    for sparsity in sorted(arguments.sparsities):
        prune_at_random(source, sparsity)
        directory = folder / f"dense-{sparsity}"
        source.save_pretrained(directory)
        loaded: dict[str, Any] = {}
        if "dense bf16" not in runs:
            loaded["dense bf16"] = sparsellm.load(directory, dtype="bfloat16")
            sizes["dense bf16"] = sizes[EAGER] = (
                resident_bytes(loaded["dense bf16"]) - 2 * rows
            )
            runs[EAGER] = partial(
                decoding, loaded["dense bf16"], arguments, clock, compiled=False
            )
        for values in arguments.values:
            packed = folder / f"{values}-{sparsity}"
            sparsellm.pack(directory, out=packed, values=values, head="int8")
            for activations in (
                arguments.activations if values in ("int8", "int4") else ("fp32",)
            ):
                name = f"{sparsity:.0%} {values}, {activations} activations"
                loaded[name] = sparsellm.load(packed, activations=activations)
                sizes[name] = resident_bytes(loaded[name]) - rows
        for name, model in loaded.items():
            runs[name] = partial(decoding, model, arguments, clock)
    return runs, sizes


def decoding(
    model: Any,
    arguments: argparse.Namespace,
    clock: Callable[[], float],
    *,
    compiled: bool = True,
) -> float:
    """Seconds of decoding."""
    return one_run(
        model,
        1,
        arguments.prompt_tokens,
        arguments.new_tokens,
        clock,
        compiled=compiled,
    )[1]


def copying(clock: Callable[[], float]) -> float:
    """Seconds for a byte that is read (and written) by a copy."""
    source, target = (
        torch.ones(COPIED, dtype=torch.uint8),
        torch.empty(COPIED, dtype=torch.uint8),
    )
    target.copy_(source)
    start = clock()
    target.copy_(source)
    return (clock() - start) / COPIED


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--values", nargs="+", default=["int8", "int4"])
    parser.add_argument(
        "--activations", nargs="+", default=["int8"], choices=["int8", "fp32"]
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="processor time: one thread on a shared machine",
    )
    parser.add_argument("--prompt-tokens", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--without-llama-cpp", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock: Callable[[], float] = (
        time.process_time if arguments.cpu_seconds else time.perf_counter
    )
    with tempfile.TemporaryDirectory() as folder:
        runs, sizes = forms(arguments, Path(folder))
        taken: dict[str, list[float]] = {name: [] for name in runs}
        copies = []
        print("all forms are made; measuring", file=sys.stderr, flush=True)
        for turn in range(arguments.rounds + 1):
            copies.append(copying(clock))
            for name, run in runs.items():
                seconds = run() / arguments.new_tokens
                if turn:
                    taken[name].append(seconds)
    print(
        f"Llama of 1.1B's shape, {arguments.layers} layers; {conditions(arguments.threads)}; {arguments.rounds} rounds."
    )
    print(
        f"{'Processor' if arguments.cpu_seconds else 'Wall-clock'} time. A copy reads {1e-9 / min(copies):.1f} GB/s.\n"
    )
    against = [name for name in ("dense bf16", EAGER, "Q8_0", "Q4_0") if name in runs]
    print(
        f"| form | MB a token | of the copy's rate | {' | '.join('speed / ' + name for name in against)} |"
    )
    print("|---" * (3 + len(against)) + "|")
    for name, seconds in taken.items():
        ratios = [
            statistics.median(b / a for a, b in zip(seconds, taken[other], strict=True)) for other in against
        ]  # fmt: skip
        rate = sizes[name] / min(seconds) * min(copies)
        print(
            f"| {name} | {sizes[name] / 1e6:.0f} | {rate:.0%} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |"
        )


if __name__ == "__main__":
    main()
