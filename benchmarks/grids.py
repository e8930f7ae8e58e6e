"""Which grid of whole numbers a linear's values should stand on: the error of its outputs on held-out windows.

Takes linears of a model and the Gram matrices of their inputs, prunes them by sparsegpt, and rounds them several ways.
Scales are chosen for each group of columns (about 32 kept values) by the diagonal of the Gram matrix of the windows to
fit; errors are ‖(Ŵ − W) G^½‖² / ‖W G^½‖² with the Gram matrix of other windows, where W is the pruned weight
("rounding") or the dense one ("in all"); means over the linears. Bits count mask, values and scales.

    nearest       to nearest
    descent       coordinate descent from nearest
    exponents     scales of columns that are powers of two, by the best of four powers of the inputs' size, then descent
                  over -8 … 7 or -4 … 3 without 0
    free scales   the same without the restriction to powers of two
    uneven        exponents, then descent over uneven numbers with a gap around 0: those that `prune --values int3`
                  takes for bitmasks, and sixteen found in the same way for int4
    learnt        the same with numbers found for each linear by Lloyd's method
    gap           ±(b + k s), k = 0 … 7, with b and s for each group (16 bits a group more), exponents, then descent
    prune         as `prune --values`: powers of two, one input after another, then scales of a row together and descent
                  in turn; uneven numbers for int3 with zeros
    Q4_0          llama.cpp's, of the gguf package: groups of 32, an fp16 scale, to nearest

    python benchmarks/grids.py --model demo --blocks 15 --sparsities 0 0.5 0.7
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import gguf
import torch
from measure import cpu_name
from quality import OUT
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from wikipedia import write_wikipedia

import sparsellm
from sparsellm.calibration import calibration_windows
from sparsellm.chain.open import load_tokenizer
from sparsellm.patterns import Unstructured
from sparsellm.solvers import SOLVERS, rounding
from sparsellm.solvers.rounding import FRACTIONS, POWERS
from sparsellm.sources.resolve import checkpoint_directory
from sparsellm.statistics import Gram
from sparsepack.codes import GAPPED, PLAIN, best_group
from sparsepack.grid import Groups

STARTS = (0.02, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)  # b of the grid with a gap, as a part of the largest magnitude
PASSES = 8
LLOYD = 6  # steps of Lloyd's method
UNEVEN = {
    4: (-128, -111, -94, -79, -64, -49, -34, -19, 20, 35, 48, 61, 74, 89, 104, 121),
    3: GAPPED["int3"].numbers,
}


@dataclass
class Grid:
    """Steps and starts of the numbers of a weight, each ``(out, in)``; ``start`` is 0 for plain whole numbers."""

    bits: int
    zero: bool  # whether a value may be 0
    step: Tensor
    start: Tensor | None = None
    numbers: Tensor | None = None  # ascending, where they are uneven

    def nearest(self, values: Tensor, columns: slice = slice(None)) -> Tensor:
        step = self.step[:, columns]
        if self.numbers is not None:
            units = torch.where(step == 0, 0.0, values / step).contiguous()
            return self.numbers[torch.bucketize(units, (self.numbers[1:] + self.numbers[:-1]) / 2)] * step
        if self.start is not None:
            start = self.start[:, columns]
            return values.sign() * (start + ((values.abs() - start) / step).round().clamp(0, 7) * step)
        half = 2 ** (self.bits - 1)
        units = torch.where(step == 0, 0.0, values / step)
        whole = units.round().clamp(-half, half - 1)
        return (whole if self.zero else torch.where(whole == 0, units.sign(), whole)) * step


@dataclass
class Kind:
    """A weight's bits, the columns that share a scale, and whether a value may be 0."""

    bits: int
    group: int
    zero: bool


def chosen(
    weight: Tensor, diagonal: Tensor, factors: Tensor, kind: Kind, way: str, numbers: Tensor | None = None
) -> Grid:
    """The grid whose scales have the least error in the diagonal; column j's are multiplied by ``factors[j]``."""
    groups, gap = Groups(weight.shape[1], kind.group, PLAIN["int4"]), way == "gap"
    grouped, curvature = groups.collect(weight / factors), groups.collect((diagonal * factors**2).expand_as(weight))
    extreme = grouped.gather(1, grouped.abs().argmax(1, keepdim=True))
    least, step, start = torch.full_like(extreme, math.inf), torch.ones_like(extreme), torch.zeros_like(extreme)
    for fraction in FRACTIONS:
        for part in STARTS if gap else (0.0,):
            largest = extreme.abs() * fraction if gap else -extreme * fraction
            tried_start = (largest * part).bfloat16().float()
            steps = 128 if numbers is not None else 7 if gap else 2 ** (kind.bits - 1)
            tried = (largest * (1 - part) / steps).bfloat16().float()
            grid = Grid(kind.bits, kind.zero, tried, tried_start if gap else None, numbers)
            error = torch.where(grouped == 0, 0.0, grid.nearest(grouped) - grouped).square().mul(curvature)
            error = error.sum(1, keepdim=True)
            step, start = torch.where(error < least, tried, step), torch.where(error < least, tried_start, start)
            least = torch.minimum(error, least)
    steps, starts = (groups.spread(each.expand_as(grouped)) * factors for each in (step, start))
    return Grid(kind.bits, kind.zero, steps, starts if gap else None, numbers)


def learnt(weight: Tensor, diagonal: Tensor, factors: Tensor, kind: Kind) -> Tensor:
    """Numbers from -128 on with the least error in the diagonal for the scales that they choose (Lloyd's method)."""
    numbers, kept = torch.tensor(UNEVEN[kind.bits]).float(), weight != 0
    for _ in range(LLOYD):
        step = chosen(weight, diagonal, factors, kind, "learnt", numbers).step
        units, weights = (weight / step)[kept], (diagonal.expand_as(weight) * step.square())[kept]
        places = torch.bucketize(units, (numbers[1:] + numbers[:-1]) / 2)
        sums = [torch.zeros(len(numbers)).index_add_(0, places, each) for each in (units * weights, weights)]
        numbers = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1e-30), numbers).round().clamp(-128, 127)
        numbers[0] = -128
    return numbers


def descended(weight: Tensor, start: Tensor, grid: Grid, gram: Tensor, free: Tensor) -> Tensor:
    found = start.clone()
    slope = (found - weight) @ gram
    for _ in range(PASSES):
        gained = 0.0
        for first in range(0, weight.shape[1], 64):
            block = slice(first, min(first + 64, weight.shape[1]))
            moves = torch.zeros_like(found[:, block])
            for column in range(first, block.stop):
                at, curvature = slice(column, column + 1), float(gram[column, column])
                if curvature <= 0:
                    continue
                own = slope[:, at] + moves[:, : column - first] @ gram[first:column, at]
                move = (grid.nearest(found[:, at] - own / curvature, at) - found[:, at]) * free[:, at]
                gain = (2 * own + curvature * move) * move
                move = torch.where(gain < 0, move, 0.0)
                moves[:, column - first] = move[:, 0]
                found[:, at] += move
                gained -= float(gain.clamp(max=0).sum())
            slope.addmm_(moves, gram[block])
        if gained <= 3e-3 * max(float(((found - weight) * slope).sum()), 0.0):
            break
    return found


def energy(difference: Tensor, gram: Tensor) -> float:
    return float(((difference @ gram) * difference).sum())


def rounded(weight: Tensor, gram: Tensor, way: str, bits: int) -> tuple[Tensor, float]:
    """The weight rounded one way, and its bits a weight."""
    if way == "prune":
        found = rounding.rounded(weight, Gram(gram, 1), f"int{bits}", torch.float32).weight
        share = float((found != 0).float().mean())
        groups = Groups.of(found, f"int{bits}")
        return found, (bits if groups.dense else 1 + bits * share) + 16 / groups.size
    share = float((weight != 0).float().mean())
    if way == "Q4_0":
        q4 = gguf.GGMLQuantizationType.Q4_0
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), q4), q4).copy()), 4.5
    zero, gap = share == 1, way == "gap"
    kind, diagonal = Kind(bits, best_group(share), zero), gram.diagonal().clamp(min=1e-30)
    numbers = torch.tensor(UNEVEN[bits]).float() if way == "uneven" else None
    magnitudes = diagonal.sqrt().log2() - diagonal.sqrt().log2().mean()
    tried = []
    for power in (0.0, *POWERS) if way not in ("nearest", "descent") else (0.0,):
        exponents = (-power * magnitudes).clamp(-8, 7)
        factors = 2.0 ** (exponents if way == "free scales" else exponents.round())
        if way == "learnt":
            numbers = learnt(weight, diagonal, factors, kind)
        grid = chosen(weight, diagonal, factors, kind, way, numbers)
        nearest = torch.where((weight == 0) & (not zero), 0.0, grid.nearest(weight))
        tried.append((energy(nearest - weight, gram), grid, nearest))
    _, grid, found = min(tried, key=lambda each: each[0])
    if way != "nearest":
        free = torch.ones_like(weight) if zero else (weight != 0).float()
        found = descended(weight, found, grid, gram, free)
    return found, (0 if zero else 1) + bits * share + (32 if gap else 16) / kind.group


def linears_and_grams(arguments: argparse.Namespace) -> dict[str, tuple[Tensor, Gram, Tensor]]:
    """Weight, Gram matrix of the windows to fit, and of the held-out ones, by name."""
    directory = checkpoint_directory(arguments.model)
    source = arguments.calibration or str(write_wikipedia(OUT / "wikipedia.txt"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    count = arguments.fit + arguments.test
    windows = calibration_windows(source, load_tokenizer(directory), count, arguments.window, 0, model)
    wanted = [f".{block}." for block in arguments.blocks]
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(each in name for each in wanted)
    }
    sums = {name: torch.zeros(2, linear.in_features, linear.in_features) for name, linear in linears.items()}
    half = 0

    def see(name: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            sums[name][half] += x.T @ x

        return add

    for name, linear in linears.items():
        linear.register_forward_pre_hook(see(name))
    with torch.no_grad():
        for number in range(count):
            half = int(number >= arguments.fit)
            model(windows[number : number + 1])
    tokens = arguments.fit * arguments.window
    return {
        name: (linear.weight.detach(), Gram(sums[name][0] / tokens, tokens), sums[name][1])
        for name, linear in linears.items()
    }


ROWS = (
    *((way, 4) for way in ("nearest", "descent", "exponents", "prune", "free scales", "uneven", "learnt", "gap")),
    *((way, 3) for way in ("exponents", "uneven", "prune", "learnt")),
    ("Q4_0", 4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", help="a text source; by default a sample of Wikipedia")
    parser.add_argument("--blocks", nargs="+", type=int, default=(3, 15, 26))
    parser.add_argument("--sparsities", nargs="+", type=float, default=(0.0, 0.4, 0.5, 0.6, 0.7))
    parser.add_argument("--ways", nargs="+", default=[f"{way}/{bits}" for way, bits in ROWS], help="a way and its bits")
    parser.add_argument("--fit", type=int, default=32, help="windows whose Gram matrices are rounded with")
    parser.add_argument("--test", type=int, default=16, help="windows of the errors")
    parser.add_argument("--window", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    linears = linears_and_grams(arguments)
    print(
        f"Model {arguments.model}, {len(linears)} linears of blocks {', '.join(map(str, arguments.blocks))}; windows "
        f"of {arguments.window}: {arguments.fit} to fit, {arguments.test} held out; sparsellm {sparsellm.__version__}, "
        f"torch {torch.__version__}, {cpu_name()}\n"
    )
    print("| sparsity | values | way | bits | error of rounding | / nearest | error in all |")
    print("|---|---|---|---|---|---|---|")
    for sparsity in arguments.sparsities:
        pruned = {
            name: SOLVERS["sparsegpt"].function(weight, gram, Unstructured(sparsity)).weight if sparsity else weight
            for name, (weight, gram, _) in linears.items()
        }
        reference: list[float] = []
        for way, _, bits in (each.partition("/") for each in arguments.ways):
            if (way == "Q4_0" and sparsity) or (way in ("gap", "uneven", "learnt") and not sparsity):
                continue
            alone, total, sizes = [], [], []
            for name, (dense, gram, held_out) in linears.items():
                found, size = rounded(pruned[name], gram.matrix, way, int(bits))
                alone.append(energy(found - pruned[name], held_out) / energy(pruned[name], held_out))
                total.append(energy(found - dense, held_out) / energy(dense, held_out))
                sizes.append(size)
            reference = reference or alone
            ratio = math.exp(sum(math.log(a / b) for a, b in zip(alone, reference, strict=True)) / len(alone))
            mean = sum(alone) / len(alone), sum(total) / len(total), sum(sizes) / len(sizes)
            print(
                f"| {sparsity:.0%} | int{bits} | {way} | {mean[2]:.2f} | {mean[0]:.5f} | {ratio:.3f} | {mean[1]:.5f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
