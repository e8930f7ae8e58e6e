"""Time and error of each local solver, and its speed as a share of the limit set by plain matrix products.

    python benchmarks/solvers.py
    python benchmarks/solvers.py --sizes 576x576 1536x576 576x1536 --pattern 2:4 --device cuda

The linear is synthetic: Gaussian weights, and correlated inputs with a spectrum that decays as a power law, one input
in sixty-four ten times as large as the rest, similar to hidden states of language models. The limit of a solver is the
time that its matrix products and factorisations would take at the speed of a plain product of weight and Gram matrix.
That product is timed on the same machine in the same run, before and after each solver.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import cpu_name, pattern_of
from torch import Tensor

from sparsellm.patterns import Pattern
from sparsellm.solvers import SOLVERS
from sparsellm.solvers.admm import RHO_STEPS, ROUGH_ITERATIONS
from sparsellm.statistics import Gram, GramAccumulator
from sparsellm.statistics.gram import PANEL


def linear(out: int, inputs: int, seed: int, device: str) -> tuple[Tensor, Gram, Gram]:
    """A weight (out, inputs), the Gram matrix of 4 tokens per input, and that of as many tokens held out."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, inputs + 1).pow(-0.5)
    mixing = torch.randn(inputs, inputs, generator=generator) * spectrum[:, None] / spectrum.norm()  # (factors, inputs)
    mixing[:, ::64] *= 10
    grams = []
    for _ in range(2):
        accumulator = GramAccumulator(inputs, device)
        for _ in range(4):
            factors = torch.randn(inputs, inputs, generator=generator)  # (tokens, factors)
            accumulator.update(factors.to(device) @ mixing.to(device))
        grams.append(accumulator.finish())
    return torch.randn(out, inputs, generator=generator).to(device), grams[0], grams[1]


def operations(name: str, out: int, inputs: int) -> float:
    """Floating-point operations in matrix products and factorisations of a solver with its default options."""
    return products(name, out, inputs) + factorisations(name, inputs)


def products(name: str, out: int, inputs: int) -> float:
    """Those that are done for every linear."""
    product = 2.0 * out * inputs * inputs
    # Two energies, each half a product and half its diagonal panels.
    errors = product * (1 + min(PANEL / inputs, 1))
    if name == "sparsegpt":
        return errors + product / 2
    if name == "admm":
        options = {key: option.default for key, option in SOLVERS["admm"].options.items()}
        refits = ROUGH_ITERATIONS + 2 + int(options["refine_iterations"]) + 2
        return errors + (int(options["iterations"]) + refits) * product
    return errors


def factorisations(name: str, inputs: int) -> float:
    """Those that linears with the same inputs share."""
    cube = float(inputs * inputs * inputs)
    return {"sparsegpt": cube / 3 + cube, "admm": (1 + RHO_STEPS) * cube}.get(name, 0.0)  # factorise, invert a triangle


def seconds(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - start, result


def conditions(device: str) -> str:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32"


def rows(out: int, inputs: int, pattern: Pattern, names: list[str], repeats: int, seed: int, device: str) -> list[str]:
    weight, gram, held_out = linear(out, inputs, seed, device)
    weight @ gram.matrix  # the first product pays for waking threads and loading kernels
    lines = []
    for name in names:
        solve, times, products = SOLVERS[name].function, [], []
        for _ in range(repeats):
            fresh = Gram(gram.matrix, gram.tokens)  # no factorisation is remembered from the run before
            products.append(seconds(lambda: weight @ gram.matrix, device)[0])
            taken, found = seconds(lambda fresh=fresh, solve=solve: solve(weight, fresh, pattern), device)  # type: ignore[misc]
            times.append(taken)
            products.append(seconds(lambda: weight @ gram.matrix, device)[0])
        speed = 2.0 * out * inputs**2 / sorted(products)[len(products) // 2]
        share = operations(name, out, inputs) / speed / min(times)
        outside = held_out.energy(found.weight - weight) / held_out.energy(weight)
        lines.append(
            f"| {out} × {inputs} | {name} | {min(times):.3f} | {found.error:.4f} | {outside:.4f} "
            f"| {speed / 1e9:.0f} | {100 * share:.0f} % |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=["512", "1024", "2048", "4096"], help="n, or out x in as 1536x576"
    )
    parser.add_argument("--solvers", nargs="+", default=[entry.name for entry in SOLVERS])
    parser.add_argument("--pattern", default="0.7", help="a sparsity, or n:m")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest run counts")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own choice if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pattern = pattern_of(arguments.pattern)

    print(
        f"Pattern {pattern}, seed {arguments.seed}, fastest of {arguments.repeats}; {conditions(arguments.device)}.\n"
    )
    print("| out × in | solver | seconds | error | error, held-out tokens | GFLOP/s of a plain product | share of it |")
    print("|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        out, _, inputs = size.partition("x")
        shape = int(out), int(inputs or out)
        for line in rows(*shape, pattern, arguments.solvers, arguments.repeats, arguments.seed, arguments.device):
            print(line, flush=True)


if __name__ == "__main__":
    main()
