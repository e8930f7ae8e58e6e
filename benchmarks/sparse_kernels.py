"""Speed of the kernels on packed weights, compared with a dense product and a memory copy.

    python benchmarks/sparse_kernels.py [--threads 1] [--tokens 1 4 16 128] [--values bf16] [--kernel NAME]
        [--shapes 11008x4096 5632x2048] [--sparsities 0.5 0.6 0.7 0.8] [--cached]

For every shape and sparsity, dense by torch, dense by the same kernel, packed and copy run in turns, so that all meet
the same load on the machine.
Weights are used in turns too, enough of them that none is still in the second-level cache when it is used again. Two
rates of the packed product are printed: its bytes (mask, values, offsets, scales) divided by its time, and that as a
share of the copy's rate. A copy moves each byte twice, in and out: ``of copy`` is relative to the bytes copied,
``of traffic`` to twice those. The copy is made of pieces that take about as long as a product, so that interruptions
affect both alike. Times are the shortest of all rounds, since other load can only add; the median is in brackets.

The last two columns are the roofline: nanoseconds and bytes for 64 weights, kept or not. With ``--cached`` one weight
is used every time: what it takes then (of a shape that the second-level cache holds, such as 512x2048) goes to
instructions, and what it takes longer without to memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable

import torch

from sparsepack import native
from sparsepack.codes import FLOAT_TYPES, WRITTEN_TYPES
from sparsepack.decode import dense_weight
from sparsepack.layout import PackedWeight, pack
from sparsepack.module import multiply

SHAPES = ((11008, 4096), (5632, 2048))
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
COPIED = 256 << 20  # bytes
PIECE = 16 << 20  # bytes of it that are copied at once
HELD = 200 << 20  # bytes of weights that take turns


def random_weight(
    out: int, columns: int, sparsity: float, value_type: str
) -> PackedWeight:
    weight = torch.randn(out, columns)
    weight[torch.rand(out, columns) < sparsity] = 0
    layout = "bitmask" if sparsity else "dense"
    packed = pack(weight, value_type, layout)
    assert packed is not None
    return packed


def copy_of(packed: PackedWeight) -> PackedWeight:
    scales = None if packed.scales is None else packed.scales.clone()
    tensors = {
        "values": packed.values.clone(),
        "mask": packed.mask.clone(),
        "offsets": packed.offsets.clone(),
    }
    return dataclasses.replace(packed, **tensors, scales=scales)  # type: ignore[arg-type]


def interleaved(
    runs: list[Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    cached: bool = False,
) -> list[list[float]]:
    """Seconds of every run in every round; if cached, of one of several after one that brings all into the cache."""
    times: list[list[float]] = [[] for _ in runs]
    repeats = 20 if cached else 1
    for _ in range(rounds):
        for run, taken in zip(runs, times, strict=True):
            if cached:
                run()
            begin = clock()
            for _ in range(repeats):
                run()
            taken.append((clock() - begin) / repeats)
    return times


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Speed of the kernels on packed weights."
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--values", nargs="+", default=["bf16"], choices=WRITTEN_TYPES)
    parser.add_argument(
        "--kernel", default=None, help="an instruction set; the best one if not given"
    )
    parser.add_argument(
        "--rounded",
        action="store_true",
        help="activations rounded to int8 for integer values",
    )
    parser.add_argument(
        "--activations",
        default="bf16",
        choices=FLOAT_TYPES,
        help="of the dense weight too",
    )
    parser.add_argument(
        "--shapes", nargs="+", default=[f"{out}x{columns}" for out, columns in SHAPES]
    )
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="processor time, on a machine with other work",
    )
    parser.add_argument(
        "--cached",
        action="store_true",
        help="one weight again and again, not weights in turns",
    )
    return parser.parse_args()


def main() -> None:
    options = asked()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"kernel {options.kernel or native.available()}, {options.threads} threads, {options.activations} activations"
    )
    dtype = FLOAT_TYPES[options.activations]
    shapes = [tuple(int(side) for side in shape.split("x")) for shape in options.shapes]
    source, target = (
        torch.ones(COPIED, dtype=torch.uint8),
        torch.zeros(COPIED, dtype=torch.uint8),
    )
    pieces = itertools.cycle(
        list(zip(target.split(PIECE), source.split(PIECE), strict=True))
    )
    print(
        "| shape | values | sparsity | tokens | dense ms | same kernel ms | packed ms | faster "
        "| faster than by the same kernel | GB/s | dense GB/s | copy GB/s "
        "| of copy | of traffic | ns / 64 | bytes / 64 |"
    )
    print("|---" * 16 + "|")
    for (out, columns), value_type, sparsity in itertools.product(
        shapes, options.values, options.sparsities
    ):
        first = random_weight(out, columns, sparsity, value_type)
        size = sum(tensor.nbytes for tensor in first.tensors.values())
        held = 1 if options.cached else HELD
        packed = [copy_of(first) for _ in range(max(1, held // size))]
        dense = [
            torch.randn(out, columns).to(dtype)
            for _ in range(max(1, held // (dtype.itemsize * out * columns)))
        ]
        for tokens in options.tokens:
            x = torch.randn(tokens, columns).to(dtype)
            turns, dense_turns = itertools.cycle(packed), itertools.cycle(dense)
            same_turns = itertools.cycle([dense_weight(weight) for weight in dense])

            def run_dense(
                x: torch.Tensor = x, turns: itertools.cycle[torch.Tensor] = dense_turns
            ) -> None:
                torch.nn.functional.linear(x, next(turns))

            def product(weight: PackedWeight, x: torch.Tensor = x) -> None:
                # decoded tile by tile
                least = native.least_tokens(weight, kernel=options.kernel)
                tiled = least is not None and least <= len(x)
                if tiled and x.dtype == torch.bfloat16:
                    native.multiply_tiles(weight, x, kernel=options.kernel)
                elif len(x) > native.MAX_TOKENS:
                    multiply(weight, x)
                else:
                    native.multiply(
                        weight, x, rounded=options.rounded, kernel=options.kernel
                    )

            def run_same(turns: itertools.cycle[PackedWeight] = same_turns) -> None:
                product(next(turns))

            def run_packed(turns: itertools.cycle[PackedWeight] = turns) -> None:
                product(next(turns))

            def run_copy() -> None:
                to, piece = next(pieces)
                to.copy_(piece)

            runs: list[Callable[[], object]] = [
                run_dense,
                run_same,
                run_packed,
                run_copy,
            ]
            interleaved(runs, 3)
            clock = time.process_time if options.cpu_seconds else time.perf_counter
            times = interleaved(runs, options.rounds, clock, options.cached)
            slow, same, fast, copy = (min(seconds) for seconds in times)
            usual = [f"{statistics.median(seconds) * 1e3:.2f}" for seconds in times]
            rate, copied = size / fast, PIECE / copy
            words = out * columns / 64
            print(
                f"| {out} × {columns} | {value_type} | {sparsity:.0%} | {tokens} | {slow * 1e3:.2f} ({usual[0]}) "
                f"| {same * 1e3:.2f} ({usual[1]}) | {fast * 1e3:.2f} ({usual[2]}) | {slow / fast:.2f} × "
                f"| {same / fast:.2f} × | {rate / 1e9:.1f} "
                f"| {dtype.itemsize * out * columns / slow / 1e9:.1f} | {copied / 1e9:.1f} | {rate / copied:.0%} "
                f"| {rate / copied / 2:.0%} | {fast * 1e9 / words:.2f} | {size / words:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
