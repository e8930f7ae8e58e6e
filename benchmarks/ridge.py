"""Ridge and schedule of `admm`, with ``--floors`` the floor under the mean squares of its inputs, or with ``--values``
the damping of rounding, chosen on held-out articles: the error of linears on tokens that no Gram matrix has.

    python benchmarks/ridge.py --calibration wikipedia.txt --blocks 2 14 27 --targets 0.5 0.7 2:4
    python benchmarks/ridge.py --calibration wikipedia.txt --blocks 2 14 24 --targets 0.5 2:4 --floors 0 0.02 0.2 1
    python benchmarks/ridge.py --calibration wikipedia.txt --values int4 q4_0

The first half of the text gives the Gram matrices, the second half, which are other articles, the errors; no test text
takes part. A cell is the geometric mean over the linears of the blocks, divided by that of the default; for rounding
also on Python's documentation, and divided by that without damping; for floors two errors, with values kept and rounded
to int4.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import code_version, cpu_name
from quality import OUT
from torch import Tensor
from transformers import AutoModelForCausalLM
from wikipedia import write_wikipedia

from sparsellm.files.resolve import checkpoint_directory
from sparsellm.method.gram import Gram
from sparsellm.method.solvers import admm as solver
from sparsellm.method.solvers import rounding
from sparsellm.model.open import load_tokenizer
from sparsellm.model.structure import find_blocks, iterate_linears
from sparsellm.patterns import Pattern, Unstructured, parse_pattern
from sparsellm.text.sources import read_source
from sparsellm.text.texts import Text
from sparsellm.text.windows import calibration_windows

RIDGES = (0.0, 0.01, 0.02, 0.1, 0.2)  # and the default, 0.05
DAMPINGS = (0.03, 0.1, 0.2, 0.4)  # for rounding, in units of the mean square of inputs
# first and last ρ; the default is (0.2, 0.8)
SCHEDULES = (
    (0.1, 0.8),
    (0.4, 0.8),
    (0.2, 0.4),
    (0.2, 1.6),
)

# the Gram matrices of the linears' inputs on each text
Texts = tuple[dict[str, Gram], ...]


@torch.no_grad()
def grams(model: Any, linears: dict[str, Any], windows: Tensor) -> dict[str, Gram]:
    """The Gram matrix of the inputs of each linear; linears with one input share it."""
    sums: dict[str, Tensor] = {}
    last: list[Any] = [None, ""]  # an input, and the linear that it was first seen at
    shared = {name: name for name in linears}

    def hook(name: str) -> Any:
        def add(_: Any, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0] is last[0]:
                shared[name] = last[1]
                return
            last[:] = inputs[0], name
            x = inputs[0].flatten(0, -2).float()
            sums[name] = (
                sums[name] + (x.T @ x).double() if name in sums else (x.T @ x).double()
            )

        return add

    handles = [
        linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()
    ]
    for window in windows:
        model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    made = {
        name: Gram((total / windows.numel()).float(), windows.numel())
        for name, total in sums.items()
    }
    return {name: made[shared[name]] for name in linears}


@contextmanager
def scheduled(first: float, last: float) -> Iterator[None]:
    with mock.patch.object(solver, "RHO", (first, last)):
        yield


def rounded_errors(
    linears: dict[str, Any],
    fitted: dict[str, Gram],
    texts: Texts,
    type_: str,
    by: float,
) -> list[float]:
    """The geometric mean, on each text, of the errors of dense weights that are rounded with a damping."""
    logarithms: list[list[float]] = [[] for _ in texts]
    for name, linear in linears.items():
        weight = linear.get_parameter("weight").detach().float()
        with mock.patch.object(rounding, "DAMPING", by):
            # remembers no other damping
            gram = Gram(fitted[name].matrix, fitted[name].tokens)
            result = rounding.rounded(weight, gram, type_, torch.bfloat16).weight
        for known, text in zip(logarithms, texts, strict=True):
            known.append(math.log(text[name].energy(result, minus=weight)))
    return [math.exp(statistics.mean(known)) for known in logarithms]


def print_dampings(
    asked: argparse.Namespace,
    linears: dict[str, Any],
    fitted: dict[str, Gram],
    texts: Texts,
) -> None:
    print(f"| damping | {' | '.join(asked.values)} |")
    print("|---" * (1 + len(asked.values)) + "|")
    plain = [
        rounded_errors(linears, fitted, texts, values, 0.0) for values in asked.values
    ]
    for by in DAMPINGS:
        cells = []
        for values, bases in zip(asked.values, plain, strict=True):
            errors = rounded_errors(linears, fitted, texts, values, by)
            cells.append(
                ", ".join(
                    f"{error / base:.3f}"
                    for error, base in zip(errors, bases, strict=True)
                )
            )
        print(f"| {by:g} | {' | '.join(cells)} |", flush=True)


def print_floors(
    asked: argparse.Namespace,
    linears: dict[str, Any],
    fitted: dict[str, Gram],
    held: Any,
) -> None:
    print(
        f"| floor | {' | '.join(asked.targets)} | largest kept weight / largest dense weight |"
    )
    print("|---" * (2 + len(asked.targets)) + "|")
    for floor in asked.floors:
        cells, largest = [], 1.0
        for target in asked.targets:
            logarithms: list[tuple[float, float]] = []
            for name, linear in linears.items():
                weight = linear.get_parameter("weight").detach().float()
                # remembers no other floor
                gram = Gram(fitted[name].matrix, fitted[name].tokens)
                with mock.patch.object(solver, "FLOOR", floor):
                    pruned = solver.admm(
                        weight, gram, pattern_of(target, weight.numel())
                    ).weight
                near = rounding.rounded(
                    pruned, gram, "int4", torch.bfloat16, fixed_mask=":" in target
                ).weight
                lost = [
                    float(held[name].energy(changed, minus=weight))
                    for changed in (pruned, near)
                ]
                logarithms.append((math.log(lost[0]), math.log(lost[1])))
                largest = max(largest, float(pruned.abs().max() / weight.abs().max()))
            cells.append(
                [
                    math.exp(statistics.mean(column))
                    for column in zip(*logarithms, strict=True)
                ]
            )
        if floor == asked.floors[0]:
            bases = cells
        shown = [
            ", ".join(f"{error / base:.3f}" for error, base in zip(*pair, strict=True))
            for pair in zip(cells, bases, strict=True)
        ]
        print(f"| {floor:g} | {' | '.join(shown)} | {largest:.1f} |", flush=True)


def pattern_of(target: str, count: int) -> Pattern:
    return (
        parse_pattern(target)
        if ":" in target
        else Unstructured(round(float(target) * count), count)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--calibration", help="a text source; by default a sample of Wikipedia"
    )
    parser.add_argument("--samples", type=int, default=8, help="windows of each half")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 14, 27])
    parser.add_argument("--targets", nargs="+", default=["0.5", "0.7", "2:4"])
    parser.add_argument(
        "--values", nargs="+", default=[], help="types whose rounding is tried instead"
    )
    parser.add_argument(
        "--floors",
        type=float,
        nargs="+",
        default=[],
        help="that are tried, relative to the first",
    )
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    directory = checkpoint_directory(asked.model)
    tokenizer = load_tokenizer(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prefix, blocks = find_blocks(model)
    chosen = tuple(f"{prefix}.{block}." for block in asked.blocks)
    linears = {
        name: linear
        for name, linear in iterate_linears(blocks, prefix)
        if name.startswith(chosen)
    }
    documents = read_source(
        asked.calibration or str(write_wikipedia(OUT / "wikipedia.txt")), "calibration"
    ).documents
    halves = [
        Text(part)
        for part in (documents[: len(documents) // 2], documents[len(documents) // 2 :])
    ]
    fitted, held = (
        grams(
            model,
            linears,
            calibration_windows(
                half, tokenizer, asked.samples, asked.window, asked.seed
            ),
        )
        for half in halves
    )

    def error(target: str, damping: float, rho: tuple[float, float]) -> float:
        logarithms = []
        for name, linear in linears.items():
            weight = linear.get_parameter("weight").detach().float()
            with scheduled(*rho):
                pruned = solver.admm(
                    weight,
                    fitted[name],
                    pattern_of(target, weight.numel()),
                    damping=damping,
                ).weight
            logarithms.append(
                math.log(
                    held[name].energy(pruned, minus=weight) / held[name].energy(weight)
                )
            )
        return math.exp(statistics.mean(logarithms))

    conditions = (
        f"Model {asked.model}, blocks {asked.blocks}, {len(linears)} linears; {asked.samples} × {asked.window} tokens "
        f"of each half of {Path(asked.calibration or 'wikipedia.txt').name}, seed {asked.seed}; {cpu_name()}, torch "
        f"{torch.__version__}, code {code_version()}.\n"
    )
    print(conditions)
    if asked.values:
        other = grams(
            model,
            linears,
            calibration_windows(
                "pydoc", tokenizer, asked.samples, asked.window, asked.seed
            ),
        )
        return print_dampings(asked, linears, fitted, (held, other))
    if asked.floors:
        return print_floors(asked, linears, fitted, held)
    settings = [(ridge, solver.RHO) for ridge in RIDGES] + [
        (0.05, rho) for rho in SCHEDULES
    ]
    base = {target: error(target, 0.05, solver.RHO) for target in asked.targets}
    print(f"| ridge, ρ | {' | '.join(asked.targets)} |")
    print("|---" * (1 + len(asked.targets)) + "|")
    print(
        f"| **0.05, {solver.RHO}**: error | {' | '.join(f'{value:.4f}' for value in base.values())} |",
        flush=True,
    )
    for ridge, rho in settings:
        cells = [
            f"{error(target, ridge, rho) / base[target]:.3f}"
            for target in asked.targets
        ]
        print(f"| {ridge:g}, {rho} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
