"""What two levers on cost are worth: products of Gram matrices in bf16, and other schedules of the solver ``admm``.

    python benchmarks/levers.py --text wiki.txt
    python benchmarks/levers.py --text wiki.txt --samples 64 --blocks 2 --linears o_proj down_proj --repeats 1

The linears are those of a model, their inputs those of the dense model. Errors are ‖(W − W̃) X‖² / ‖W X‖² on windows
held out from the solver; the Gram matrix of these windows is always the library's. Times are CPU seconds of one thread,
the fastest of the repeats. Solvers start without remembered factorisations, as the first of the linears that share an
input does. As in a run, ``admm`` multiplies in bf16 where the processor has units for it.

``grams``: XᵀX by several kinds of products. ``bf16`` rounds X, and torch rounds each product over a chunk of tokens to
bf16 too; sums are fp64. ``split`` multiplies X = high + low, both in bf16, in three such products. ``medium`` is fp32
with torch's leave to multiply in bf16 inside; the difference from fp32 tells whether it does. ``fp32 results``, with X
in bf16, does not exist on a CPU: it is computed in fp32, and has no time.

``schedules``: ``admm`` with other iterations or values of ρ; with an end of each value of ρ, or of all iterations,
where fewer than 0.1 % of the kept weights changed; and from the mask and the weights of ``sparsegpt``, whose time is
included, with the multiplier of a stationary point or with none.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from measure import cpu_name, pattern_of
from nm import gram_of
from torch import Tensor

from sparsellm.calibration import calibration_windows
from sparsellm.chain import Feed, LinearView, Stream, open_chain
from sparsellm.chain.capture import watch
from sparsellm.chain.open import load_tokenizer
from sparsellm.chain.products import Bf16Products, bf16_is_native, bf16_products
from sparsellm.patterns import Pattern
from sparsellm.solvers import SOLVERS, Solution, Solver, admm
from sparsellm.solvers.solver import solution
from sparsellm.solvers.support import refine_on_support
from sparsellm.sources.resolve import checkpoint_directory
from sparsellm.statistics import Gram, GramAccumulator

STALL = 1e-3  # of the kept weights
DEFAULTS = {name: option.default for name, option in SOLVERS["admm"].options.items()}
ITERATIONS = DEFAULTS["iterations"]


@dataclass(frozen=True)
class Case:
    weight: Tensor  # (out, in)
    grams: dict[str, tuple[float, Gram]]  # by the way of multiplying, with the CPU seconds that it took
    test: Gram  # of the inputs held out


class Row(NamedTuple):
    error: float  # on the inputs held out
    seconds: float
    notes: tuple[str, ...]


class NarrowAccumulator(GramAccumulator):
    """Products in bf16 over chunks of tokens, each result rounded to bf16 unless ``wide``."""

    def __init__(self, features: int, chunk: int, *, split: bool = False, wide: bool = False) -> None:
        super().__init__(features)
        self.chunk, self.split, self.wide = chunk, split, wide

    def update(self, x: Tensor, token_weights: Tensor | None = None) -> None:
        for rows in x.split(self.chunk):
            high = rows.bfloat16()
            pairs = [(high, high)]
            if self.split:
                low = (rows - high).bfloat16()
                pairs += [(high, low), (low, high)]
            if self.wide:
                pairs = [(high.float(), high.float())]
            for panel in self.panels:
                start = self.features - panel.shape[1]
                for left, right in pairs:
                    panel += left[:, start : start + len(panel)].T @ right[:, start:]
            self.tokens += len(rows)


class MediumAccumulator(GramAccumulator):
    """The library's own, with torch's leave to multiply in bf16."""

    def update(self, x: Tensor, token_weights: Tensor | None = None) -> None:
        torch.set_float32_matmul_precision("medium")
        super().update(x, token_weights)
        torch.set_float32_matmul_precision("highest")


WAYS: dict[str, Callable[[int], GramAccumulator]] = {
    "fp32": GramAccumulator,
    "fp32, medium": MediumAccumulator,
    "bf16, 8192 tokens": partial(NarrowAccumulator, chunk=8192),
    "bf16, 512 tokens": partial(NarrowAccumulator, chunk=512),
    "split, 512 tokens": partial(NarrowAccumulator, chunk=512, split=True),
    "fp32 results": partial(NarrowAccumulator, chunk=8192, wide=True),
}


def alternate(
    weight: Tensor, gram: Gram, pattern: Pattern, *, iterations: int = ITERATIONS, stalled: str = "goes on",
    warm: bool = False, multiplier: bool = True,
) -> Solution:  # fmt: skip
    """The solver ``admm`` with its defaults, but for its start and for what a stalled mask leads to.

    Its one note is the number of iterations.

    Args:
        weight: (out, in), as of a solver; ``gram`` and ``pattern`` too.
        stalled: ``goes on``, ``next ρ`` or ``ends``.
        warm: start from the solution of ``sparsegpt``, with its ``multiplier`` or with zero.
    """
    ridge, refits, start, stop = (DEFAULTS[f] for f in ("damping", "refine_iterations", "rho_start", "rho_stop"))
    metric, scale = gram.remember(("admm", ridge), lambda: admm._metric(gram, ridge))
    dense = weight * scale.masked_fill(gram.dead, 0.0)
    kept, state = pattern.mask(dense.abs()), dense
    if warm:
        found = SOLVERS["sparsegpt"].function(weight, gram, pattern)
        kept, state = found.mask, found.weight * scale
        if multiplier:  # (D − W₀) H + ρV = 0
            state = state + ((dense - state) @ metric.matrix).div_(start * metric.mean_diagonal) * ~kept
    first, first_kept = refine_on_support(dense, metric, kept, state, admm.ROUGH_ITERATIONS), kept
    steps = [round((admm.RHO_STEPS - 1) * at / max(iterations - 1, 1)) for at in range(iterations)]
    at, count, last_rho = 0, 0, start
    while at < iterations:
        rho = start * (stop / start) ** (steps[at] / (admm.RHO_STEPS - 1))
        inverse, before = metric.inverse(rho), kept
        sparse = state * kept.view(torch.uint8).float()
        off = (state - sparse).mul_(last_rho / rho)
        pull = sparse.sub_(off).sub_(dense).mul_(inverse.damping * metric.mean_diagonal)
        state = torch.addmm(off.add_(dense), pull, inverse.matrix)
        kept, last_rho, count = pattern.mask(state.abs()), rho, count + 1
        if stalled != "goes on" and int((kept & ~before).sum()) < STALL * int(kept.sum()):
            at = iterations - 1 if stalled == "ends" else iterations - 1 - steps[::-1].index(steps[at])
        at += 1
    last = refine_on_support(dense, metric, kept, state, refits)
    if last.objective > admm.CLEARLY_BETTER * first.objective:
        first = refine_on_support(dense, metric, first_kept, first.weight, refits)
        if first.objective < last.objective:
            last, kept = first, first_kept
    return solution(weight, last.weight / scale, kept, gram, (str(count),))


def two_values(weight: Tensor, gram: Gram, pattern: Pattern, iterations: int) -> Solution:
    with patch.object(admm, "RHO_STEPS", 2):
        return SOLVERS["admm"].function(weight, gram, pattern, iterations=iterations)


def schedules() -> dict[str, Solver]:
    """The variants of ``admm`` by name; the first is the default."""
    solver, half = SOLVERS["admm"].function, ITERATIONS // 2
    return {
        "default": solver,
        **{f"{n} iterations": partial(solver, iterations=n) for n in (half // 2, half, 2 * ITERATIONS)},
        **{f"2 values of ρ, {n} iterations": partial(two_values, iterations=n) for n in (ITERATIONS, half)},
        "a stalled mask ends it": partial(alternate, stalled="ends"),
        "a stalled mask ends the value of ρ": partial(alternate, stalled="next ρ"),
        **{f"from sparsegpt, {n} iterations": partial(alternate, warm=True, iterations=n) for n in (ITERATIONS, half)},
        f"the same, {half}, no multiplier": partial(alternate, warm=True, iterations=half, multiplier=False),
    }


def fastest(make: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The CPU seconds of the fastest of the repeats, and what the last returned."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        made = make()
        times.append(time.process_time() - start)
    return min(times), made


def solved(case: Case, solver: Solver, way: str, pattern: Pattern, mode: Bf16Products | None) -> Row:
    gram = case.grams[way][1]
    with bf16_products(mode):
        taken, found = fastest(lambda: solver(case.weight, Gram(gram.matrix, gram.tokens), pattern), 1)
    return Row(case.test.energy(case.weight, minus=found.weight) / case.test.energy(case.weight), taken, found.notes)


def inputs_of(linear: LinearView, stream: Stream, index: int) -> Tensor:
    """The inputs (tokens, in) of a linear of the loaded block."""
    parts: list[Tensor] = []
    with watch([linear], lambda _, entering, leaving: parts.append(entering.flatten(0, -2))):
        for _ in stream.run(index):
            pass
    return torch.cat(parts)


def finished(x: Tensor, make: Callable[[int], GramAccumulator]) -> Gram:
    accumulator = make(x.shape[1])
    accumulator.update(x)
    return accumulator.finish()


@torch.no_grad()
def cases_of(arguments: argparse.Namespace, mode: Bf16Products | None) -> dict[str, list[Case]]:
    """The chosen linears by the last part of their name, one of each block."""
    directory = checkpoint_directory(arguments.model)
    count = arguments.samples + arguments.held_out
    ids = calibration_windows(arguments.text, load_tokenizer(directory), count, arguments.window, 0)
    chain = open_chain(directory, device=torch.device("cpu"))
    chain.products = mode
    streams = [Feed(chain, part, 4096).stream() for part in (ids[: arguments.samples], ids[arguments.samples :])]
    cases: dict[str, list[Case]] = {name: [] for name in arguments.linears}
    for index in range(max(arguments.blocks) + 1):
        with chain.block(index):
            linears = {linear.name.rpartition(".")[2]: linear for linear in chain.linears(index)}
            for name, own in cases.items() if index in arguments.blocks else ():
                x = inputs_of(linears[name], streams[0], index)
                ways = WAYS if "grams" in arguments.tables else {"fp32": GramAccumulator}
                grams = {way: fastest(partial(finished, x, make), arguments.repeats) for way, make in ways.items()}
                own.append(Case(linears[name].weight().clone(), grams, gram_of(linears[name], streams[1], index)))
            for stream in streams:
                stream.advance(index)
    return cases


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_grams(cases: dict[str, list[Case]], patterns: list[Pattern], mode: Bf16Products | None) -> None:
    print("\nCPU seconds of all blocks, relative to fp32's; highest ‖G − G of fp32‖ / ‖G of fp32‖.\n")
    print_row("products", *cases)
    print("|---" * (len(cases) + 1) + "|")
    for way in WAYS:
        cells = []
        for own in cases.values():
            taken, usual = (sum(case.grams[name][0] for case in own) for name in (way, "fp32"))
            pairs = [(case.grams[way][1].matrix, case.grams["fp32"][1].matrix) for case in own]
            away = max(float((one - two).norm() / two.norm()) for one, two in pairs)
            cells.append(f"–; {away:.0e}" if way == "fp32 results" else f"{taken:.3f}, {taken / usual:.2f}; {away:.0e}")
        print_row(way, *cells)
    print("\nErrors with fp32, mean of the blocks; with others, relative to it, the range over the blocks.")
    print("†: a block in which damping was raised.\n")
    others = [way for way in WAYS if way != "fp32"]
    print_row("pattern", "solver", "linear", "error, fp32", *others)
    print("|---" * (len(others) + 4) + "|")
    for pattern in patterns:
        for name in ("sparsegpt", "admm"):
            entry = SOLVERS[name]
            narrow = mode if entry.workspace.narrow else None
            for linear, own in cases.items():
                rows = {way: [solved(case, entry.function, way, pattern, narrow) for case in own] for way in WAYS}
                cells = [f"{sum(row.error for row in rows['fp32']) / len(own):.4f}"]
                for way in others:
                    ratios = [row.error / usual.error for row, usual in zip(rows[way], rows["fp32"], strict=True)]
                    raised = sum(bool(row.notes) for row in rows[way])
                    cells.append(f"{min(ratios):.4f} to {max(ratios):.4f}{' †' * raised}")
                print_row(str(pattern), name, linear, *cells)


def in_turns(case: Case, pattern: Pattern, mode: Bf16Products | None, repeats: int) -> dict[str, Row]:
    """The fastest run of each schedule. They run in turns, so that a machine that slows down slows all of them."""
    rounds = [
        {name: solved(case, solver, "fp32", pattern, mode) for name, solver in schedules().items()}
        for _ in range(repeats)
    ]
    return {name: min((each[name] for each in rounds), key=lambda row: row.seconds) for name in rounds[0]}


def print_schedules(
    cases: dict[str, list[Case]], patterns: list[Pattern], mode: Bf16Products | None, repeats: int
) -> None:
    print("\nError, CPU seconds: means of the blocks for the default; for others relative to it, errors as a range.")
    for pattern in patterns:
        print(f"\n{pattern}\n")
        print_row("schedule", *cases, "highest error", "longest time", "iterations")
        print("|---" * (len(cases) + 4) + "|")
        found = {name: [in_turns(case, pattern, mode, repeats) for case in own] for name, own in cases.items()}
        for name in schedules():
            cells, pairs = [], []
            for own in found.values():
                rows, usual = ([each[which] for each in own] for which in (name, "default"))
                pairs += (new := list(zip(rows, usual, strict=True)))
                ratios = [row.error / its.error for row, its in new]
                taken, before = (sum(row.seconds for row in part) for part in (rows, usual))
                cells.append(
                    f"{sum(row.error for row in rows) / len(own):.4f}, {taken / len(own):.3f}"
                    if name == "default"
                    else f"{min(ratios):.3f} to {max(ratios):.3f}, {taken / before:.2f}"
                )
            highest = max(row.error / its.error for row, its in pairs)
            longest = max(row.seconds / its.seconds for row, its in pairs)
            counts = [int(note) for row, _ in pairs for note in row.notes if note.isdigit()]
            ran = f"{min(counts)} to {max(counts)}" if counts else "–"
            print_row(name, *cells, f"{highest:.4f}", f"{longest:.2f}", ran)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=["grams", "schedules"], help="grams, schedules, or both")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True)
    parser.add_argument("--blocks", nargs="+", type=int, default=[2, 14, 27])
    parser.add_argument("--linears", nargs="+", default=["q_proj", "o_proj", "gate_proj", "down_proj"])
    parser.add_argument("--patterns", nargs="+", default=["0.7", "2:4"], help="sparsities, or n:m")
    parser.add_argument("--samples", type=int, default=16, help="windows of the Gram matrices")
    parser.add_argument("--held-out", type=int, default=4, help="windows of the errors")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2, help="the fastest run counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    patterns = [pattern_of(text) for text in arguments.patterns]
    mode = Bf16Products() if bf16_is_native() else None
    tokens = f"{arguments.samples} and {arguments.held_out} windows of {arguments.window}"
    print(f"{arguments.model}, blocks {arguments.blocks}, {tokens}; {cpu_name()}, torch {torch.__version__}")
    cases = cases_of(arguments, mode)
    if "grams" in arguments.tables:
        print_grams(cases, patterns, mode)
    if "schedules" in arguments.tables:
        print_schedules(cases, patterns, mode, arguments.repeats)


if __name__ == "__main__":
    main()
