"""What is left to gain in one feed-forward unit: alternation of auxiliary variables against joint descent.

Takes one unit of a model, its inputs and outputs in the dense model, and prunes it in several ways on the same tokens.
Errors are ‖Y − FFN(X)‖² / ‖Y‖², tokens weighted as ``sparsellm`` weights them. Of the windows, some are for training,
some choose the best iterate or step of each way, and some are for the held-out error that is printed.

    local         the linears in order, down refitted: iteration 0 of the library's loop
    alternation   the library's exact alternation of the auxiliary variables, the best iterate
    multipliers   augmented Lagrangian on the masks of ``local``: the same updates with scaled multipliers
    joint         Adam on the unit's true error from ``local``, over the same masks
    exchanged     the same, but masks are chosen again by |w|·√v of Adam every few steps; gradients pass pruned weights
    gradual       the same from the dense weights; the sparsity rises over the first part of the steps

    python benchmarks/unit.py --model opt --calibration opt/train.txt --block 1
    python benchmarks/unit.py --model demo --block 15 --train 12 --window 1024 --steps 600
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import cpu_name
from quality import OUT, Cells
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from wikipedia import write_wikipedia

import sparsellm
from sparsellm.calibration import calibration_windows
from sparsellm.chain.capture import watch
from sparsellm.chain.linears import LinearView
from sparsellm.chain.open import load_tokenizer
from sparsellm.chain.structure import find_blocks
from sparsellm.chain.units import FeedForwardUnit, find_feed_forward
from sparsellm.decomposition import Chunk, FeedForward, Linear, Settings, prune_feed_forward, true_error
from sparsellm.methods.feed_forward import plain
from sparsellm.methods.weighting import token_weights
from sparsellm.patterns import Pattern, Unstructured, parse_pattern
from sparsellm.solvers import SOLVERS
from sparsellm.sources.resolve import checkpoint_directory

MOVING = 0.7  # of the steps, in which masks may change
EXCHANGE_EVERY = 10  # steps between two choices of masks
MEDIANS = 1.5  # as sparsellm's norm_weighting


@dataclass(frozen=True)
class Tokens:
    train: list[Chunk]
    choose: list[Chunk]  # decide which iterate or step counts
    test: list[Chunk]  # held out from everything


@dataclass(frozen=True)
class Pruned:
    unit: FeedForward
    masks: dict[str, Tensor]
    note: str = ""


# ---------------------------------------------------------------------------------------------------- unit and tokens


@torch.no_grad()
def unit_and_chunks(model: Any, block: int, windows: Tensor) -> tuple[FeedForward, list[Chunk]]:
    """The dense unit of a block, and its inputs and outputs: a chunk for each window."""
    module = find_blocks(model)[1][block]
    linears = [
        LinearView(name, child, torch.float32) for name, child in module.named_modules() if isinstance(child, nn.Linear)
    ]
    unit: FeedForwardUnit = find_feed_forward(linears, lambda: model(windows[:1, :64], use_cache=False))[0]
    entering: list[Tensor] = []
    seen: dict[str, list[Tensor]] = {"inputs": [], "targets": []}

    def see(linear: LinearView, given: Tensor, out: Tensor) -> None:
        if linear is unit.up:
            seen["inputs"].append(given.flatten(0, -2).clone())
        if linear is unit.down:
            seen["targets"].append(out.flatten(0, -2).clone())

    hook = module.register_forward_pre_hook(lambda _, given: entering.append(given[0].clone()))
    with watch([unit.up, unit.down], see):
        for window in windows:
            model(window[None], use_cache=False)
    hook.remove()
    weights = [weight.flatten() for weight in token_weights(entering, MEDIANS)]
    return plain(unit), [Chunk(*parts) for parts in zip(seen["inputs"], seen["targets"], weights, strict=True)]


# -------------------------------------------------------------------------------------------------------- alternation


def local(dense: FeedForward, tokens: Tokens, solver: str, pattern: Pattern, iterations: int = 0) -> Pruned:
    """The loop's iterate of that number, on the training tokens alone."""
    roles = dense.linears()
    settings = Settings(iterations, safeguard=False, damping=0.1)
    args = dict.fromkeys(roles, SOLVERS[solver].function), dict.fromkeys(roles, pattern)
    result = prune_feed_forward(dense, tokens.train, (), *args, settings)
    return Pruned(result.unit, result.masks)


def alternation(dense: FeedForward, tokens: Tokens, solver: str, pattern: Pattern, most: int) -> Pruned:
    roles = dense.linears()
    settings = Settings(most, patience=most, damping=0.1)
    args = dict.fromkeys(roles, SOLVERS[solver].function), dict.fromkeys(roles, pattern)
    chosen = prune_feed_forward(dense, tokens.train, tokens.choose, *args, settings).chosen
    return replace(local(dense, tokens, solver, pattern, chosen), note=f"iteration {chosen} of {most}")


# ------------------------------------------------------------------------------------------------------ joint descent


class Descent:
    """Adam on the true error of a unit, with masks that stay or move."""

    def __init__(self, start: FeedForward, masks: dict[str, Tensor], rate: float) -> None:
        self.activation = start.activation
        self.masks = {role: mask.float() for role, mask in masks.items()}
        self.weights = {role: linear.weight.clone().requires_grad_() for role, linear in start.linears().items()}
        self.biases = {
            role: linear.bias.clone().requires_grad_()
            for role, linear in start.linears().items() if linear.bias is not None
        }  # fmt: skip
        groups = [
            {"params": [value], "peak": rate * float((kept := value.detach()[value != 0]).norm()) / len(kept) ** 0.5}
            for value in (*self.weights.values(), *self.biases.values())
        ]
        self.optimiser = torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.99))

    def linear(self, role: str, x: Tensor) -> Tensor:
        weight = self.weights[role]
        sparse = weight + (weight * self.masks[role] - weight).detach()  # the gradient reaches pruned weights too
        return nn.functional.linear(x, sparse, self.biases.get(role))

    def __call__(self, x: Tensor) -> Tensor:
        if "gate" in self.weights:
            return self.linear("down", self.activation(self.linear("gate", x)) * self.linear("up", x))
        return self.linear("down", self.activation(self.linear("up", x)))

    def step(self, chunk: Chunk, factor: float, energy: float, *, masks_move: bool) -> None:
        assert chunk.token_weights is not None
        missed = (chunk.targets - self(chunk.inputs)).square().sum(dim=1)
        loss = (missed * chunk.token_weights).mean() / energy
        self.optimiser.zero_grad()
        loss.backward()
        for role, weight in self.weights.items():
            if not masks_move and weight.grad is not None:
                weight.grad *= self.masks[role]
        for group in self.optimiser.param_groups:
            group["lr"] = factor * group["peak"]
        self.optimiser.step()

    @torch.no_grad()
    def choose(self, pattern: Pattern) -> None:
        for role, weight in self.weights.items():
            second: Tensor = self.optimiser.state[weight]["exp_avg_sq"]
            self.masks[role] = pattern.mask(weight.abs() * second.sqrt()).float()

    def unit(self) -> FeedForward:
        made = {
            role: Linear(
                (weight * self.masks[role]).detach().clone(),
                self.biases[role].detach().clone() if role in self.biases else None,
            )
            for role, weight in self.weights.items()
        }
        return FeedForward(made["up"], made["down"], self.activation, made.get("gate"))


def descend(
    start: Pruned, tokens: Tokens, pattern: Pattern, arguments: argparse.Namespace, moving: str = "", seed: int = 0
) -> Pruned:
    """The best of the states with final masks, by the error on the tokens that choose."""
    torch.manual_seed(seed)
    steps, batch = arguments.steps, arguments.batch
    descent = Descent(start.unit, start.masks, arguments.rate)
    x, y, w = (
        torch.cat(parts)
        for parts in zip(*((c.inputs, c.targets, c.token_weights) for c in tokens.train), strict=True)
    )  # fmt: skip
    energy = float((y.square().sum(dim=1) * w).mean())
    best, least, at = start, true_error(start.unit, tokens.choose) if moving != "gradual" else math.inf, 0
    order = torch.empty(0, dtype=torch.long)
    last_move = round(MOVING * steps) if moving else 0
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.randperm(len(x))
        part, order = order[:batch], order[batch:]
        warm = min(step / (0.05 * steps), 1.0)
        factor = warm * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        descent.step(Chunk(x[part], y[part], w[part]), factor, energy, masks_move=step < last_move)
        if step <= last_move and (step % EXCHANGE_EVERY == 0 or step == last_move):
            now = pattern
            if moving == "gradual":
                assert isinstance(pattern, Unstructured)
                now = Unstructured(pattern.fraction * (1 - (1 - step / last_move) ** 3))
            descent.choose(now)
        if step >= last_move and (step % arguments.every == 0 or step == steps):
            unit = descent.unit()
            error = true_error(unit, tokens.choose)
            if error < least:
                masks = {role: mask.bool() for role, mask in descent.masks.items()}
                best, least, at = Pruned(unit, masks), error, step
    return replace(best, note=f"step {at} of {steps}")


# --------------------------------------------------------------------------------------------------------------- rows


def measured(make: Callable[[], Pruned], tokens: Tokens, path: Path) -> dict[str, Any]:
    """Errors and CPU seconds of one way; the unit is kept in a file, since other ways start from it."""
    began = time.process_time()
    pruned = make()
    seconds = time.process_time() - began
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {role: (linear.weight, linear.bias, pruned.masks[role]) for role, linear in pruned.unit.linears().items()}, path
    )
    weights = [linear.weight for linear in pruned.unit.linears().values()]
    return {
        "train": true_error(pruned.unit, tokens.train),
        "choose": true_error(pruned.unit, tokens.choose),
        "held_out": true_error(pruned.unit, tokens.test),
        "zeros": sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights),
        "cpu_seconds": seconds,
        "note": pruned.note,
    }


def kept(path: Path, dense: FeedForward) -> Pruned:
    parts = torch.load(path)
    made = {role: Linear(weight, bias) for role, (weight, bias, _) in parts.items()}
    unit = FeedForward(made["up"], made["down"], dense.activation, made.get("gate"))
    return Pruned(unit, {role: mask for role, (_, _, mask) in parts.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", help="a text source; by default a sample of Wikipedia")
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("--train", type=int, default=56, help="windows to fit to")
    parser.add_argument("--choose", type=int, default=8, help="windows that choose iterates and steps")
    parser.add_argument("--test", type=int, default=32, help="windows for the held-out error")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", default=("0.8", "0.9"))
    parser.add_argument("--solvers", nargs="*", default=("sparsegpt", "admm"))
    parser.add_argument("--ways", nargs="*", default=tuple(WAYS))
    parser.add_argument("--iterations", type=int, default=8, help="of the alternation")
    parser.add_argument("--steps", type=int, default=2000, help="of Adam")
    parser.add_argument("--batch", type=int, default=512, help="tokens in a step")
    parser.add_argument("--rate", type=float, default=0.01, help="relative to the size of the kept weights")
    parser.add_argument("--every", type=int, default=20, help="steps between two errors that choose")
    parser.add_argument("--cells", type=Path, default=OUT / "unit.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    directory = checkpoint_directory(arguments.model)
    source = arguments.calibration or str(write_wikipedia(OUT / "wikipedia.txt"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    counts = (arguments.train, arguments.choose, arguments.test)
    windows = calibration_windows(
        source, load_tokenizer(directory), sum(counts), arguments.window, arguments.seed, model
    )
    dense, chunks = unit_and_chunks(model, arguments.block, windows)
    del model
    first, second = arguments.train, arguments.train + arguments.choose
    tokens = Tokens(chunks[:first], chunks[first:second], chunks[second:])
    cells = Cells(arguments.cells)
    name = f"{directory.name[:12]}/{arguments.block}/{'+'.join(map(str, counts))}x{arguments.window}/{arguments.seed}"
    print(
        f"Model {arguments.model}, block {arguments.block}, unit of {tuple(dense.up.weight.shape)}, "
        f"{dense.activation.name}{', gated' if dense.gate else ''}; windows of {arguments.window}: {arguments.train} to "
        f"fit, {arguments.choose} to choose, {arguments.test} held out, of {Path(source).name}, seed {arguments.seed}; "
        f"Adam: {arguments.steps} steps of {arguments.batch} tokens, rate {arguments.rate}; sparsellm "
        f"{sparsellm.__version__}, torch {torch.__version__}, 1 thread, {cpu_name()}\n"
    )
    print("| target | solver | way | train error | held-out error | / local | zeros | CPU s | best |")
    print("|---|---|---|---|---|---|---|---|---|")
    for target in arguments.targets:
        pattern = parse_pattern(target) if ":" in target else Unstructured(float(target))
        for solver in arguments.solvers:
            base: dict[str, Any] = {}
            for way in dict.fromkeys(("local", *arguments.ways)):
                make, depends = WAYS[way]
                if way == "gradual" and ":" in target:
                    continue
                conditions = "".join(f"/{key}={getattr(arguments, key)}" for key in depends)
                key = f"{name}/{target}/{solver}/{way}{conditions}"

                def path(way: str, name: str = f"{name}/{target}/{solver}") -> Path:
                    return OUT / "units" / f"{name}/{way}.pt".replace("/", "_")

                cell = cells.get(
                    key, lambda: measured(lambda: make(dense, tokens, solver, pattern, arguments, path), tokens, path(way))
                )
                base = base or cell
                print(
                    f"| {target} | {solver} | {way} | {cell['train']:.4f} | {cell['held_out']:.4f} "
                    f"| {cell['held_out'] / base['held_out']:.3f} | {cell['zeros']:.4f} | {cell['cpu_seconds']:.1f} "
                    f"| {cell['note']} |",
                    flush=True,
                )


Make = Callable[[FeedForward, Tokens, str, Pattern, argparse.Namespace, Callable[[str], Path]], Pruned]
ADAM = ("steps", "batch", "rate")
WAYS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "local": (lambda d, t, s, p, a, path: local(d, t, s, p), ()),
    "alternation": (lambda d, t, s, p, a, path: alternation(d, t, s, p, a.iterations), ("iterations",)),
    "joint": (lambda d, t, s, p, a, path: descend(kept(path("local"), d), t, p, a), ADAM),
    "joint from alternation": (lambda d, t, s, p, a, path: descend(kept(path("alternation"), d), t, p, a), ADAM),
    "exchanged": (lambda d, t, s, p, a, path: descend(kept(path("local"), d), t, p, a, "exchange"), ADAM),
    "gradual": (
        lambda d, t, s, p, a, path: descend(
            Pruned(d, {r: torch.ones_like(x.weight, dtype=torch.bool) for r, x in d.linears().items()}), t, p, a,
            "gradual",
        ), ADAM),
}  # fmt: skip


if __name__ == "__main__":
    main()
