"""Time of each phase of a run, and its speed as a share of that of plain matrix products of the same size.

    python benchmarks/speed.py
    python benchmarks/speed.py --cases 1.1b --method wanda --samples 16 --seq-len 1024

``demo`` is the whole process of ``sparsellm prune demo``, from the start of Python to the finished checkpoint. The
others are one block of the shape of TinyLlama-1.1B or Llama-2-7B, of random weights, with a small vocabulary. The
process is killed when the first of two blocks is on the disk, so that only the work on a block is measured.

Plain products are timed in the same run, before and after the command, and the faster time counts: those of a linear on
a batch of tokens, of the batch with itself (a Gram matrix), of a weight with a Gram matrix. ``reached`` is the time
that the operations of a phase would take at that speed, divided by their actual time. Products of forward passes are
timed in the computing dtype of a block, which is bf16 for bf16 checkpoints if the CPU supports it; others are in fp32.
Only operations that the result needs are counted: half of the attention's, since it is causal, and half of a symmetric
product's. ``phases.py`` counts the products of a whole run as they are executed, for any method.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from measure import cpu_name, measured
from quality import OUT
from scale import COMMAND, CONFIGS, make_checkpoint, prune
from solvers import factorisations, products

from sparsellm.chain.chain import fast_dtype
from sparsellm.chain.streams import windows_in_batch
from sparsellm.methods import METHODS
from sparsellm.recipe import Recipe
from sparsellm.statistics.gram import PANEL

SHAPE_OF = {"demo": "135m"}
# The command with a clock that stands still while other processes compute.
CPU_COMMAND = ("-c", "import time; time.perf_counter = time.process_time; from sparsellm.cli import main; main()")
VOCABULARY = 1024  # of the models of two blocks: embedding and head are no part of a block


class Product(NamedTuple):
    rows: int
    inner: int
    columns: int
    dtype: torch.dtype


class Plain:
    """Speeds of plain products in operations a second, by sizes and dtype; each is timed again by :meth:`again`.

    Args:
        clock: returns seconds.
        least: seconds of one timing.
    """

    def __init__(self, clock: Callable[[], float], least: float = 0.3) -> None:
        self._clock, self._least = clock, least
        self._fastest: dict[Product, float] = {}

    def speed(self, product: Product) -> float:
        """Of ``(rows, inner) @ (inner, columns)``."""
        return self._fastest.get(product) or self._time(product)

    def again(self) -> None:
        for product in list(self._fastest):
            self._time(product)

    def _time(self, product: Product) -> float:
        rows, inner, columns, dtype = product
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype).T
        left[:64] @ right[:, :64]  # wakes threads
        start, runs = self._clock(), 0
        while runs == 0 or self._clock() - start < self._least:
            left @ right
            runs += 1
        speed = 2.0 * rows * inner * columns * runs / (self._clock() - start)
        self._fastest[product] = max(speed, self._fastest.get(product, 0.0))
        return self._fastest[product]


class Work:
    """Operations of some matrix products, and the seconds they would take at the speed of plain ones."""

    def __init__(self, plain: Plain) -> None:
        self.plain = plain
        self._parts: list[tuple[float, Product]] = []

    def add(self, operations: float, rows: int, inner: int, columns: int, dtype: torch.dtype = torch.float32) -> None:
        """Operations that a plain product of these sizes is the measure of."""
        product = Product(rows, inner, columns, dtype)
        self._parts.append((operations, product))
        self.plain.speed(product)

    def plus(self, other: Work) -> Work:
        both = Work(self.plain)
        both._parts = self._parts + other._parts
        return both

    @property
    def operations(self) -> float:
        return sum(operations for operations, _ in self._parts)

    @property
    def seconds(self) -> float:
        return sum(operations / self.plain.speed(product) for operations, product in self._parts)


def groups_of(config: Mapping[str, Any]) -> list[list[tuple[int, int]]]:
    """Sizes (out, in) of a Llama block's linears, those with the same input together."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    return [[(width, width), (keys, width), (keys, width)], [(width, width)], [(inner, width)] * 2, [(width, inner)]]


def work_of_block(
    plain: Plain, config: Mapping[str, Any], method: str, samples: int, seq_len: int, computing: torch.dtype
) -> dict[str, Work]:
    """Matrix products in each phase of one block, whose forward passes compute in ``computing``."""
    tokens = samples * seq_len
    batch = min(samples, windows_in_batch(Recipe().batch_tokens, seq_len)) * seq_len
    width, heads = config["hidden_size"], config["num_attention_heads"]
    forward, grams, solve = Work(plain), Work(plain), Work(plain)
    forward.add(2.0 * tokens * seq_len * width, seq_len, width // heads, seq_len, computing)  # by keys and values
    for group in groups_of(config):
        inputs = group[0][1]
        panels = sum(min(PANEL, inputs - start) * (inputs - start) for start in range(0, inputs, PANEL))
        grams.add(2.0 * tokens * panels, inputs, batch, inputs)
        solve.add(factorisations(method, inputs), inputs, inputs, inputs)
        for out, _ in group:
            forward.add(2.0 * tokens * out * inputs, batch, inputs, out, computing)
            solve.add(products(method, out, inputs), out, inputs, inputs)
    return {"prune/statistics": forward.plus(grams), "prune/solve": solve, "forward": forward}


def rows(case: str, work: Mapping[str, Work], seconds: Mapping[str, float], total: float) -> tuple[list[str], float]:
    """The table of one case, and the seconds of all phases that are matrix products."""
    lines, taken = [], 0.0
    named = {name: value for name, value in seconds.items() if name in work or "/" not in name}
    if "prune" in named:  # what is left of it beside its parts
        named["prune, the rest"] = named.pop("prune") - sum(v for k, v in seconds.items() if k.startswith("prune/"))
    named["Python's start, imports and end"] = max(0.0, total - sum(named.values()))
    for name, value in sorted(named.items(), key=lambda item: -item[1]):
        reached = speed = plain = "–"
        if name in work:
            taken += value
            speed, plain = (f"{work[name].operations / x / 1e9:.1f}" for x in (value, work[name].seconds))
            reached = f"{work[name].seconds / value:.0%}"
        if value > 0.0005 * total:
            lines.append(f"| {case} | {name} | {value:.2f} | {value / total:.1%} | {speed} | {plain} | {reached} |")
    return lines, taken


def program_of(arguments: argparse.Namespace) -> Sequence[str]:
    return CPU_COMMAND if arguments.cpu_seconds else COMMAND


def run_demo(arguments: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Seconds of each phase, and of the whole process."""
    out = OUT / "speed-demo"
    shutil.rmtree(out, ignore_errors=True)
    found = measured(
        [
            sys.executable, *program_of(arguments), "prune", "demo", f"--out={out}", f"--method={arguments.method}",
            f"--sparsity={arguments.sparsity}", f"--samples={arguments.samples}", f"--seq-len={arguments.seq_len}",
            "--json", *arguments.options,
        ],
        OUT / "speed-demo.log",
    )  # fmt: skip
    shutil.rmtree(out)
    seconds: dict[str, float] = json.loads(found.stdout)["seconds"]
    return seconds, found.cpu_seconds if arguments.cpu_seconds else found.seconds


def run_block(arguments: argparse.Namespace, config: Mapping[str, Any]) -> tuple[dict[str, float], float]:
    """Seconds of each phase of the first of two blocks, and of all of them."""
    model, out = OUT / "speed-model", OUT / "speed-block"
    for leftover in (model, out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    make_checkpoint(model, {**config, "num_hidden_layers": 2, "vocab_size": VOCABULARY}, seed=0)
    options = [f"--method={arguments.method}", f"--sparsity={arguments.sparsity}", f"--samples={arguments.samples}"]
    options += [f"--seq-len={arguments.seq_len}", *arguments.options]
    run = prune(model, out, options, stop_after=1, program=program_of(arguments))
    for leftover in (model, out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    seconds = {name: value for name, value in run.blocks[0].items() if name != "embed"}
    return seconds, sum(value for name, value in seconds.items() if "/" not in name)


def report(arguments: argparse.Namespace, case: str) -> Sequence[str]:
    config = CONFIGS[SHAPE_OF.get(case, case)]
    plain = Plain(time.process_time if arguments.cpu_seconds else time.perf_counter)
    stored = torch.float32 if case == "demo" else torch.bfloat16  # as in the file
    computing = fast_dtype(stored, torch.device("cpu"))
    work = work_of_block(plain, config, arguments.method, arguments.samples, arguments.seq_len, computing)
    if case == "demo":
        blocks = config["num_hidden_layers"]
        seconds, total = run_demo(arguments)
        times = {"prune/statistics": blocks, "prune/solve": blocks, "forward": blocks - 1}
        work = {name: _repeated(each, times[name]) for name, each in work.items()}
    else:
        seconds, total = run_block(arguments, config)
    plain.again()
    lines, taken = rows(case, work, seconds, total)
    ideal = sum(each.seconds for each in work.values())
    lines.append(
        f"| {case} | **all: products {taken / total:.1%}, the rest {1 - taken / total:.1%} of the time** "
        f"| {total:.2f} | | | | {ideal / taken:.0%} |"
    )
    return lines


def _repeated(work: Work, times: int) -> Work:
    return list(itertools.accumulate([work] * times, Work.plus))[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["demo", "1.1b", "7b"], choices=["demo", *CONFIGS])
    parser.add_argument("--method", default="sparsegpt", choices=["sparsegpt", "wanda", "magnitude", "admm"])
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="count CPU time, on a machine that others share; of one thread"
    )
    parser.add_argument("options", nargs="*", help="more for `sparsellm prune`, after --")
    arguments = parser.parse_args()
    assert arguments.method in METHODS
    print(
        f"{arguments.method}, sparsity {arguments.sparsity:g}, {arguments.samples} × {arguments.seq_len} calibration "
        f"tokens; {cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{'CPU seconds' if arguments.cpu_seconds else 'seconds by wall clock'}.\n"
    )
    print("| model | phase | seconds | of the time | GFLOP/s | plain products, GFLOP/s | reached |")
    print("|---|---|---|---|---|---|---|")
    for case in arguments.cases:
        print("\n".join(report(arguments, case)), flush=True)


if __name__ == "__main__":
    main()
