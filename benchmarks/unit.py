"""What is left to gain in one feed-forward unit: alternation of auxiliary variables against joint descent.

Takes one unit of a model, its inputs and outputs in the dense model, and prunes it in several ways on the same tokens.
Errors are ‖Y − FFN(X)‖² / ‖Y‖², tokens weighted as ``sparsellm`` weights them. Of the windows, some are for training,
some choose the best iterate or step of each way, and some are for the held-out error that is printed.

    local         the linears in order, down refitted: iteration 0 of the library's loop
    alternation   the library's exact alternation of the auxiliary variables, the best iterate
    rounds        the variables over the masks of ``local``; kept weights fitted to them, not to the dense products
    multipliers   the same with scaled multipliers: an augmented Lagrangian
    joint         Adam on the unit's true error from ``local``, over the same masks
    exchanged     the same, but pruned weights replace kept ones every few steps where that saves error to second order
    continued     the solver to rising sparsities, joint descent after each

    python benchmarks/unit.py --model opt --calibration opt/train.txt --block 1 --rounds 20 --iterations 4
    python benchmarks/unit.py --model demo --block 15 --train 8 --choose 2 --test 4 --window 1024 --steps 500 --every 25
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measure import cpu_name, pattern_of
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
from sparsellm.decomposition import (
    Chunk,
    FeedForward,
    Linear,
    Settings,
    default_coefficients,
    prune_feed_forward,
    true_error,
)
from sparsellm.decomposition.objective import Variables
from sparsellm.decomposition.updates import (
    MomentsAccumulator,
    activation_factor,
    move_variables,
    update_activation,
    wanted_weight,
)
from sparsellm.methods.feed_forward import plain
from sparsellm.methods.weighting import token_weights
from sparsellm.patterns import Pattern, Unstructured
from sparsellm.solvers import SOLVERS
from sparsellm.solvers.support import refine_on_support
from sparsellm.sources.resolve import checkpoint_directory
from sparsellm.statistics import Gram

MOVING = 0.7  # of the steps, in which masks may change
EXCHANGE_EVERY = 20  # steps between two exchanges
STAGES = 4  # of the continuation in the sparsity
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
    blocks = find_blocks(model)[1]
    module = blocks[block]
    del blocks[block + 1 :]  # nobody reads what comes after it
    linears = [
        LinearView(name, child, torch.float32) for name, child in module.named_modules() if isinstance(child, nn.Linear)
    ]
    unit: FeedForwardUnit = find_feed_forward(linears, lambda: model.base_model(windows[:1, :64], use_cache=False))[0]
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
            model.base_model(window[None], use_cache=False)
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
    settings = Settings(most, patience=max(2, most // 2), damping=0.1)
    args = dict.fromkeys(roles, SOLVERS[solver].function), dict.fromkeys(roles, pattern)
    chosen = prune_feed_forward(dense, tokens.train, tokens.choose, *args, settings).chosen
    return replace(local(dense, tokens, solver, pattern, chosen), note=f"iteration {chosen} of {most}")


@torch.no_grad()
def rounds(start: Pruned, tokens: Tokens, count: int, *, strength: float = 1.0, multipliers: bool = False) -> Pruned:
    """The best of ``count`` rounds over the masks of the start, in which the variables determine the weights.

    A round moves A, then Z (or U and S), each to its minimiser, fits the kept weights of the first half to Z (or U and
    S), and those of ``down`` to the targets, on what the first half makes. With scaled multipliers u of Z = m and v of
    A = Φ, the objective is α‖Z − m + u‖² + γ‖A − Φ + v‖² + β‖Y − (A W₂ᵀ + b₂)‖²: the same updates at m − u, Φ − v,
    A + v, with the weights fitted to Z + u, followed by u += Z − m and v += A − Φ.

    Args:
        strength: of all penalties, relative to the library's coefficients.
        multipliers: without them it is the penalty method.
    """
    x, y, w = joined(tokens.train)
    unit, phi = start.unit, start.unit.activation
    prices = default_coefficients(unit, *(part[: len(tokens.train[0].inputs)] for part in (x, y)))
    prices = replace(
        prices, alpha=prices.alpha * strength, gamma=prices.gamma * strength, alpha_gate=prices.alpha_gate * strength
    )
    z = unit.products(x)
    u = {role: torch.zeros_like(getattr(z, role)) for role in unit.first_half()}
    v = torch.zeros_like(z.up)
    best, least, at, gram = start, true_error(start.unit, tokens.choose), 0, None
    for number in range(1, count + 1):
        factor = activation_factor(unit.down, beta=prices.beta, gamma=prices.gamma)
        a = update_activation(z.made(phi) - v, y, factor)
        m = unit.products(x)
        shifted = Variables(m.up - u["up"], m.gate - u["gate"] if m.gate is not None else None)
        z = move_variables(unit, shifted, z, a + v, prices)
        for role, linear in unit.first_half().items():
            fitted, gram = refitted(linear, start.masks[role], x, getattr(z, role) + u[role], w, gram)
            unit = replace(unit, up=fitted) if role == "up" else replace(unit, gate=fitted)
            if multipliers:
                u[role] += getattr(z, role) - fitted(x)
        if multipliers:
            v += a - z.made(phi)
        unit = replace(unit, down=refitted(unit.down, start.masks["down"], unit.activations(x), y, w)[0])
        error = true_error(unit, tokens.choose)
        if error < least:
            best, least, at = Pruned(unit, start.masks), error, number
    return replace(best, note=f"round {at} of {count}")


def refitted(
    linear: Linear, mask: Tensor, x: Tensor, target: Tensor, w: Tensor, gram: Gram | None = None
) -> tuple[Linear, Gram]:
    """The linear with its kept weights and its bias fitted to the target, and the Gram matrix of its inputs."""
    accumulator = MomentsAccumulator(linear, gram)
    accumulator.update(x, target, w)
    moments = accumulator.finish()
    wanted = wanted_weight(moments, linear.weight, damping=1e-3).weight
    return moments.linear(refine_on_support(wanted, moments.gram, mask, linear.weight, 10).weight), moments.gram


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
        self.gradients = {role: torch.zeros_like(weight) for role, weight in self.weights.items()}
        self.optimiser = torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.99))

    def linear(self, role: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weights[role], self.biases.get(role))

    def __call__(self, x: Tensor) -> Tensor:
        if "gate" in self.weights:
            return self.linear("down", self.activation(self.linear("gate", x)) * self.linear("up", x))
        return self.linear("down", self.activation(self.linear("up", x)))

    def step(self, chunk: Chunk, factor: float, energy: float) -> None:
        assert chunk.token_weights is not None
        missed = (chunk.targets - self(chunk.inputs)).square().sum(dim=1)
        loss = (missed * chunk.token_weights).mean()
        self.optimiser.zero_grad()
        (loss / energy).backward()
        for role, weight in self.weights.items():
            assert weight.grad is not None
            self.gradients[role].lerp_(weight.grad * (energy / 2), 1 / EXCHANGE_EVERY)
            weight.grad *= self.masks[role]  # Adam never moves a pruned weight, which is zero
        for group in self.optimiser.param_groups:
            group["lr"] = factor * group["peak"]
        self.optimiser.step()

    @torch.no_grad()
    def exchange(self, share: float, chunk: Chunk) -> None:
        """Lets pruned weights in for kept ones where that lowers the error to second order, at most a share of them.

        With the gradient g over the steps since the last exchange and the diagonal h of the Gauss-Newton matrix,
        removing a kept weight costs about h w², and letting a pruned one in saves g² / h. It starts at zero.
        """
        curvatures = self.curvatures(chunk)
        for role, weight in self.weights.items():
            mask, h = self.masks[role].bool().flatten(), curvatures[role].flatten().clamp(min=1e-12)
            gains = (self.gradients[role].flatten().square() / h).masked_fill(mask, -1.0)
            losses = (h * weight.flatten().square()).masked_fill(~mask, torch.inf)
            most = round(share * int(mask.sum()))
            entering, leaving = gains.topk(most).indices, losses.topk(most, largest=False).indices
            better = gains[entering] > losses[leaving]
            entering, leaving = entering[better], leaving[better]
            mask[entering], mask[leaving] = True, False
            weight.view(-1)[leaving] = 0.0
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimiser.state[weight][moment].view(-1)[leaving] = 0.0
            self.masks[role] = mask.float().view_as(weight)
            self.gradients[role].zero_()

    def curvatures(self, chunk: Chunk) -> dict[str, Tensor]:
        """The diagonal of the Gauss-Newton matrix of the mean squared error, by role: h of :meth:`exchange`."""
        assert chunk.token_weights is not None
        unit, w = self.unit(), chunk.token_weights[:, None]
        x2 = chunk.inputs.square() * w
        columns = unit.down.weight.square().sum(dim=0)
        products = unit.products(chunk.inputs)
        made = products.made(unit.activation)
        found = {"down": (made.square() * w).mean(dim=0).expand_as(unit.down.weight)}
        if products.gate is None:
            slopes = {"up": unit.activation.derivatives(products.up)[1]}
        else:
            value, first, _ = unit.activation.derivatives(products.gate)
            slopes = {"up": value, "gate": first * products.up}
        for role, slope in slopes.items():
            found[role] = (slope.square().T @ x2) * (columns[:, None] / len(x2))
        return found

    def unit(self) -> FeedForward:
        made = {
            role: Linear(
                weight.detach().clone(),
                self.biases[role].detach().clone() if role in self.biases else None,
            )
            for role, weight in self.weights.items()
        }
        return FeedForward(made["up"], made["down"], self.activation, made.get("gate"))


def descend(
    start: Pruned, tokens: Tokens, *, steps: int, batch: int, rate: float, every: int, seed: int = 0,
    exchange: float = 0.0,
) -> Pruned:  # fmt: skip
    """The best of the states, by the error on the tokens that choose; the start is one of them.

    Args:
        steps: of Adam.
        batch: tokens in a step.
        rate: relative to the root mean square of the kept weights.
        every: steps between two errors that choose.
        exchange: the share of the kept weights that the first exchange may replace; it falls to zero.
    """
    torch.manual_seed(seed)
    descent = Descent(start.unit, start.masks, rate)
    x, y, w = joined(tokens.train)
    energy = float((y.square().sum(dim=1) * w).mean())
    best, least, at = start, true_error(start.unit, tokens.choose), 0
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.randperm(len(x))
        part, order = order[:batch], order[batch:]
        warm = min(step / (0.05 * steps), 1.0)
        descent.step(
            Chunk(x[part], y[part], w[part]), warm * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)), energy
        )
        if exchange and step < MOVING * steps and step % EXCHANGE_EVERY == 0:
            descent.exchange(exchange * (1 - step / (MOVING * steps)), tokens.train[step % len(tokens.train)])
        if step % every == 0 or step == steps:
            unit = descent.unit()
            error = true_error(unit, tokens.choose)
            if error < least:
                masks = {role: mask.bool() for role, mask in descent.masks.items()}
                best, least, at = Pruned(unit, masks), error, step
    return replace(best, note=f"step {at} of {steps}")


def adam(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("steps", "batch", "rate", "every", "seed")}


def joined(chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and token weights of all chunks."""
    parts = ((chunk.inputs, chunk.targets, chunk.token_weights) for chunk in chunks)
    x, y, w = (torch.cat(each) for each in zip(*parts, strict=True))  # type: ignore[arg-type]
    return x, y, w


def continued(
    dense: FeedForward, tokens: Tokens, solver: str, pattern: Pattern, arguments: argparse.Namespace
) -> Pruned:
    """Prunes by the solver to rising sparsities, with a joint descent after each; the targets stay the dense unit's."""
    now = Pruned(dense, {})
    for stage in range(1, STAGES + 1):
        kept = (1 - pattern.sparsity) ** (stage / STAGES)
        now = local(now.unit, tokens, solver, Unstructured(1 - kept) if stage < STAGES else pattern)
        now = descend(now, tokens, **{**adam(arguments), "steps": arguments.steps // STAGES})
    return now


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
    parser.add_argument("--rounds", type=int, default=30, help="over masks that stay")
    parser.add_argument("--strength", type=float, default=1.0, help="of the penalties beside multipliers")
    parser.add_argument("--steps", type=int, default=1000, help="of Adam")
    parser.add_argument("--batch", type=int, default=256, help="tokens in a step")
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
        f"{dense.activation.name}{', gated' if dense.gate else ''}; windows of {arguments.window}: {arguments.train} "
        f"to fit, {arguments.choose} to choose, {arguments.test} held out, of {Path(source).name}, seed "
        f"{arguments.seed}; Adam: {arguments.steps} steps of {arguments.batch} tokens, rate {arguments.rate}; "
        f"sparsellm {sparsellm.__version__}, torch {torch.__version__}, 1 thread, {cpu_name()}\n"
    )
    print("| target | solver | way | train error | held-out error | / local | zeros | CPU s | best |")
    print("|---|---|---|---|---|---|---|---|---|")
    for target in arguments.targets:
        for solver in arguments.solvers:
            base = 0.0
            for way in dict.fromkeys(("local", *arguments.ways)):
                if way == "exchanged" and ":" in target:
                    continue  # it moves weights between groups
                cell = cell_of(cells, name, (target, solver, way), dense, tokens, arguments)
                base = base or cell["held_out"]
                print(
                    f"| {target} | {solver} | {way} | {cell['train']:.4f} | {cell['held_out']:.4f} "
                    f"| {cell['held_out'] / base:.3f} | {cell['zeros']:.4f} | {cell['cpu_seconds']:.1f} "
                    f"| {cell['note']} |",
                    flush=True,
                )


def cell_of(
    cells: Cells, name: str, row: tuple[str, str, str], dense: FeedForward, tokens: Tokens,
    arguments: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    target, solver, way = row
    pattern = pattern_of(target)
    make, depends = WAYS[way]
    conditions = "".join(f"/{key}={getattr(arguments, key)}" for key in depends)

    def path(way: str) -> Path:
        return OUT / "units" / f"{name}/{target}/{solver}/{way}.pt".replace("/", "_")

    def run() -> dict[str, Any]:
        return measured(lambda: make(dense, tokens, solver, pattern, arguments, path), tokens, path(way))

    found: dict[str, Any] = cells.get(f"{name}/{target}/{solver}/{way}{conditions}", run)
    return found


Make = Callable[[FeedForward, Tokens, str, Pattern, argparse.Namespace, Callable[[str], Path]], Pruned]
ADAM = ("steps", "batch", "rate")
WAYS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "local": (lambda d, t, s, p, a, path: local(d, t, s, p), ()),
    "alternation": (lambda d, t, s, p, a, path: alternation(d, t, s, p, a.iterations), ("iterations",)),
    "rounds": (lambda d, t, s, p, a, path: rounds(kept(path("local"), d), t, a.rounds), ("rounds",)),
    "multipliers": (
        lambda d, t, s, p, a, path: rounds(
            kept(path("local"), d), t, a.rounds, strength=a.strength, multipliers=True
        ), ("rounds", "strength")),
    "joint": (lambda d, t, s, p, a, path: descend(kept(path("local"), d), t, **adam(a)), ADAM),
    "joint from alternation": (lambda d, t, s, p, a, path: descend(kept(path("alternation"), d), t, **adam(a)), ADAM),
    "exchanged": (lambda d, t, s, p, a, path: descend(kept(path("local"), d), t, **adam(a), exchange=0.1), ADAM),
    "continued": (lambda d, t, s, p, a, path: continued(d, t, s, p, a), ADAM),
}  # fmt: skip


if __name__ == "__main__":
    main()
