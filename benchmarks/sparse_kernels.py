"""How fast the kernels on packed weights are, beside a dense product and a copy of memory.

    python benchmarks/sparse_kernels.py [--threads 1] [--tokens 1 4 16] [--values bf16] [--kernel NAME]

For every shape and sparsity, dense, packed and copy take turns, so that all three meet the same machine. Weights take
turns too, enough of them that none is still in the second-level cache when it is used again. Two rates of the packed
product follow: its bytes (mask, values, offsets, scales) over its time, and the same as a share of the copy's. A copy
moves each byte twice, in and out; ``of copy`` is against the bytes copied, ``of traffic`` against twice those.
Medians; the minimum is in brackets.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable

import torch

from sparsellm.runtime import native
from tests.runtime.reference import FLOATS, Packed

SHAPES = ((11008, 4096), (5632, 2048))
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
COPIED = 256 << 20  # bytes
HELD = 200 << 20  # bytes of weights that take turns


def packed_at_random(out: int, columns: int, sparsity: float, value_type: str) -> Packed:
    """A packed weight with a random mask and random values; a test's packer would take minutes at these sizes."""
    stride = 8 * ((columns + 63) // 64)
    kept = torch.zeros(out, 8 * stride, dtype=torch.bool)
    kept[:, :columns] = torch.rand(out, columns) >= sparsity
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    mask = (kept.view(out, stride, 8) * weights).sum(-1).to(torch.uint8)
    counts = kept.sum(1)
    scales = None
    if value_type == "int4":
        counts += counts % 2
        scales = torch.rand(int(((counts + 31) // 32).sum())).bfloat16()
        values = torch.randint(0, 256, (int(counts.sum()) // 2,)).to(torch.uint8)
    elif value_type == "int8":
        scales = torch.rand(out)
        values = torch.randint(-127, 128, (int(counts.sum()),)).to(torch.int8)
    else:
        values = torch.randn(int(counts.sum())).to(FLOATS[value_type])
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    return Packed((out, columns), "bitmask", mask, values, offsets, scales, value_type)


def tensors(packed: Packed) -> dict[str, torch.Tensor]:
    found = {name: getattr(packed, name) for name in ("mask", "values", "offsets", "scales")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def interleaved(runs: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of every run in every round."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, taken in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            taken.append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the kernels on packed weights.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--values", nargs="+", default=["bf16"], choices=[*FLOATS, "int8", "int4"])
    parser.add_argument("--kernel", default=None, help="an instruction set; the best one if not given")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"kernel {options.kernel or native.available()}, {options.threads} threads, bf16 activations")
    source, target = torch.ones(COPIED, dtype=torch.uint8), torch.zeros(COPIED, dtype=torch.uint8)
    print("| shape | values | sparsity | tokens | dense bf16 ms | packed ms | faster | GB/s | of copy | of traffic |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (out, columns), value_type, sparsity in itertools.product(SHAPES, options.values, SPARSITIES):
        first = packed_at_random(out, columns, sparsity, value_type)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors(first).values())
        packed = [
            dataclasses.replace(first, **{name: tensor.clone() for name, tensor in tensors(first).items()})
            for _ in range(max(2, HELD // size))
        ]
        dense = [torch.randn(out, columns).bfloat16() for _ in range(max(2, HELD // (2 * out * columns)))]
        for tokens in options.tokens:
            x = torch.randn(tokens, columns).bfloat16()
            turns, dense_turns = itertools.cycle(packed), itertools.cycle(dense)

            def run_dense(x: torch.Tensor = x, turns: itertools.cycle[torch.Tensor] = dense_turns) -> None:
                torch.nn.functional.linear(x, next(turns))

            def run_packed(x: torch.Tensor = x, turns: itertools.cycle[Packed] = turns) -> None:
                native.multiply(next(turns), x, kernel=options.kernel)

            def run_copy() -> None:
                target.copy_(source)

            interleaved([run_dense, run_packed, run_copy], 3)
            times = interleaved([run_dense, run_packed, run_copy], options.rounds)
            slow, fast, copy = (statistics.median(each) for each in times)
            rate, copied = size / fast, COPIED / copy
            print(
                f"| {out} × {columns} | {value_type} | {sparsity:.0%} | {tokens} | {slow * 1e3:.2f} ({min(times[0]) * 1e3:.2f}) "
                f"| {fast * 1e3:.2f} ({min(times[1]) * 1e3:.2f}) | {slow / fast:.2f} × | {rate / 1e9:.1f} "
                f"| {rate / copied:.0%} | {rate / copied / 2:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
