"""What masks that move during the sweep are worth, on a model small enough to be trained as a whole.

The model is pruned by ``sparsellm`` at effort 0. Then its kept weights are trained towards the dense model's
predictions with the library's Adam and schedule, new calibration windows in every pass, in one of these ways:

* ``fixed``: the masks stay, as in the sweep of the library.
* ``exchange:SHARE``: after each eighth of the first three quarters of the steps, each weight exchanges at most that
  share of its kept values: where growing a zero gains more than losing a kept value costs, by second order. The
  curvature of a weight is the Fisher information, which Adam's second moment measures: ``H = tokens of a step · v``.
* ``split:PENALTY``: a dense copy ``x`` of the weights is trained, drawn to a sparse copy ``z`` by ``PENALTY/2 · H
  (x − z + u)²``; ``z`` is the projection of ``x + u`` in the metric ``H`` (ELSA, arXiv 2510.01650, with Adam's second
  moment), renewed at the same steps. Then ``z``'s masks stay for the last quarter.
* ``chosen``: after half of the steps masks are chosen a second time, block by block in the order they run. A block gets
  the dense model's weights back and is pruned by the library to the sparsities that its linears had, with inputs, and
  costs of outputs, of the model as it is then. Then kept weights are trained for the other half.

    python benchmarks/masks.py --model out/opt --calibration out/opt/train.txt --text out/opt/heldout.txt
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import cpu_name
from quality import OUT, Cells
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sparsellm
from sparsellm.calibration.windows import calibration_windows, evaluation_windows
from sparsellm.sweep.training import Adam, schedule

STEP = 1024  # tokens
ROUNDS = 8  # of which masks move after each but the last two


class Student:
    """A pruned model in training, its weights with zeros, and Adam's state of each parameter."""

    def __init__(self, model: PreTrainedModel, names: set[str]) -> None:
        self.model = model
        self.trained = {name: p for name, p in model.named_parameters() if ".layers." in name}
        self.masks = {name: p != 0 for name, p in self.trained.items() if name in names}
        self.states = {name: torch.zeros(2, p.numel()) for name, p in self.trained.items()}
        self.gradients = {name: torch.zeros_like(self.trained[name]) for name in self.masks}
        self.steps = 0

    def curvature(self, name: str) -> Tensor:
        """The mean of ``E[g²]`` over the second moment's window, of a token."""
        weight = self.trained[name]
        return self.states[name][1].view_as(weight) / (1 - 0.95**self.steps) * STEP + 1e-12

    def step(self, rate: float, *, masked: bool) -> None:
        self.steps += 1
        for name, parameter in self.trained.items():
            assert parameter.grad is not None
            if name in self.masks:
                self.gradients[name] += parameter.grad
            state = self.states[name]
            if name in self.masks and masked:
                # The second moment sees every gradient; only kept weights move.
                mask = self.masks[name]
                Adam({name: parameter}, set(), state).step(rate, self.steps)
                parameter.data.masked_fill_(~mask, 0.0)
                state[0].masked_fill_(~mask.flatten(), 0.0)
            else:
                Adam({name: parameter}, set(), state).step(rate, self.steps)


def exchange(student: Student, share: float, since: int) -> float:
    """Exchanges kept values for zeros that gain more, in every weight; returns the share that moved."""
    moved = total = 0
    for name, mask in student.masks.items():
        weight, curvature = student.trained[name].data, student.curvature(name)
        mean = student.gradients[name] / since
        noise = curvature / STEP / since  # variance of the mean gradient, which is no gain
        gain = ((mean.square() - noise).clamp(min=0) / (2 * curvature)).masked_fill(mask, -math.inf)
        cost = (0.5 * curvature * weight.square() - mean * weight).masked_fill(~mask, math.inf)
        most = int(share * int(mask.sum()))
        gains, grown = gain.flatten().topk(most)
        costs, lost = cost.flatten().topk(most, largest=False)
        count = int((gains > costs).sum())
        flat, kept = weight.view(-1), mask.view(-1)
        flat[lost[:count]], kept[lost[:count]] = 0.0, False
        flat[grown[:count]] = 0.0  # a step of its own by each at once would be thousands of times too far
        kept[grown[:count]] = True
        student.states[name][:, lost[:count]] *= torch.tensor([[0.0], [1.0]])
        student.gradients[name].zero_()
        moved, total = moved + count, total + int(mask.sum())
    return moved / total


class Split:
    """The sparse copy and the multiplier of every pruned weight."""

    def __init__(self, student: Student, penalty: float) -> None:
        self.student, self.penalty = student, penalty
        self.sparse = {name: student.trained[name].detach().clone() for name in student.masks}
        self.scaled = {name: torch.zeros_like(value) for name, value in self.sparse.items()}

    def pull(self) -> None:
        """Adds the penalty's gradient."""
        for name in self.student.masks:
            weight = self.student.trained[name]
            assert weight.grad is not None
            far = weight.detach() - self.sparse[name] + self.scaled[name]
            weight.grad.add_(self.penalty * self.student.curvature(name) * far)

    def project(self) -> float:
        changed = total = 0
        for name, mask in self.student.masks.items():
            wanted = self.student.trained[name].detach() + self.scaled[name]
            score = wanted.square() * self.student.curvature(name)
            kept = int(mask.sum())
            new = torch.zeros_like(mask).view(-1).index_fill_(0, score.flatten().topk(kept).indices, True).view_as(mask)
            changed, total = changed + int((new & ~mask).sum()), total + kept
            mask.copy_(new)
            self.sparse[name] = wanted * new
            self.scaled[name] += self.student.trained[name].detach() - self.sparse[name]
        return changed / total

    def end(self) -> None:
        for name, mask in self.student.masks.items():
            self.student.trained[name].data.mul_(mask)


def choose_again(
    dense: nn.Module, recipe: sparsellm.Recipe, tokenizer: Any, model: PreTrainedModel, names: set[str]
) -> None:
    """Prunes the dense weights of one block after the other within the trained model, which is changed in place.

    Args:
        dense: its weights are the ones to choose from.
        recipe: that of the first choice.
        tokenizer: of both models.
        model: pruned and trained.
        names: of the weights of all pruned linears.
    """
    own, original = dict(model.named_parameters()), dict(dense.named_parameters())
    for number in range(model.config.num_hidden_layers):
        inside = [name for name in own if f".layers.{number}." in name]
        weights = [name for name in inside if name in names]
        zeros = {name: int((own[name] == 0).sum()) for name in weights}
        sparsities = {name.removesuffix(".weight"): zeros[name] / own[name].numel() for name in weights}
        for name in inside:
            own[name].data.copy_(original[name])
        one = recipe.updated(
            only=list(sparsities), sparsity_of=sparsities, allocation="uniform",
            sparsity=sum(zeros.values()) / sum(own[name].numel() for name in weights),
        )  # fmt: skip
        sparsellm.prune(model, one, tokenizer=tokenizer)


def divergence(dense: nn.Module, model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        target = functional.log_softmax(dense(ids).logits.flatten(0, 1).float(), -1)
    logits = model(ids).logits.flatten(0, 1).float()
    return functional.kl_div(functional.log_softmax(logits, -1), target, log_target=True, reduction="batchmean")


def train(dense: nn.Module, student: Student, windows: Tensor, way: str, rate: float) -> list[float]:
    """Trains over the windows in order; returns the shares of the masks that moved."""
    kind, _, value = way.partition(":")
    split = Split(student, float(value)) if kind == "split" else None
    batch = STEP // windows.shape[1]
    steps, moved, since = len(windows) // batch, [], 0
    for number in range(steps):
        divergence(dense, student.model, windows[number * batch : (number + 1) * batch]).backward()
        end = (number + 1) % max(1, steps // ROUNDS) == 0 and number + 1 <= steps * 6 // 8
        if split is not None and student.steps:
            split.pull()
        student.step(rate * schedule(number, steps), masked=split is None)
        since += 1
        if end and kind == "exchange":
            moved.append(exchange(student, float(value), since))
        if end and split is not None:
            moved.append(split.project())
            if (number + 1) + steps // ROUNDS > steps * 6 // 8:
                split.end()
                split = None
        if end:
            since = 0
    return moved


def tried(
    dense: nn.Module, start: PreTrainedModel, windows: Tensor, judges: Tensor, way: str, rate: float,
    choose: Callable[[PreTrainedModel, set[str]], None],
) -> dict[str, object]:  # fmt: skip
    """Trains a copy of the pruned model ``start``, and measures it; ``choose`` chooses its masks again.

    Returns:
        The divergences before and after, the shares of masks that moved (after a choice: also the divergence then), and
        CPU seconds.
    """
    names = {f"{name}.weight" for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    student = Student(copy.deepcopy(start), names)
    before, began = judge(dense, student.model, judges), time.process_time()
    if way == "chosen":
        half = len(windows) // 2
        train(dense, student, windows[:half], "fixed", rate)
        old = student.masks
        choose(student.model, names)
        student = Student(student.model, names)
        new = sum(int((student.masks[name] & ~old[name]).sum()) for name in old)
        moved = [new / sum(int(mask.sum()) for mask in old.values()), judge(dense, student.model, judges)]
        train(dense, student, windows[half:], "fixed", rate)
    else:
        moved = train(dense, student, windows, way, rate)
    seconds = time.process_time() - began
    return {"before": before, "after": judge(dense, student.model, judges), "moved": moved, "cpu_seconds": seconds}


@torch.no_grad()
def judge(dense: nn.Module, model: nn.Module, windows: Tensor) -> float:
    parts = [float(divergence(dense, model, part)) * part.numel() for part in windows.split(4)]
    return float(sum(parts) / windows.numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--targets", nargs="*", default=["0.8", "0.9"])
    parser.add_argument("--passes", nargs="*", type=int, default=[1, 4, 8])
    parser.add_argument("--ways", nargs="*", default=["fixed", "exchange:0.02", "exchange:0.1", "split:1"])
    parser.add_argument("--rates", nargs="*", type=float, default=[0.003])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--cells", type=Path, default=OUT / "masks.json")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    judges = evaluation_windows(arguments.text, tokenizer, arguments.window, max_tokens=16384)
    OUT.mkdir(parents=True, exist_ok=True)
    cells = Cells(arguments.cells)
    rows = []
    for target in arguments.targets:
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory(dir=OUT) as folder:
                recipe = sparsellm.Recipe(
                    sparsity=float(target), samples=arguments.samples, seq_len=arguments.window, seed=seed,
                    calibration=arguments.calibration, options={"effort": 0},
                )  # fmt: skip
                sparsellm.prune(arguments.model, recipe, out=Path(folder) / "model")
                pruned = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
            choose = partial(choose_again, dense, recipe, tokenizer)
            for passes in arguments.passes:
                windows = calibration_windows(
                    arguments.calibration, tokenizer, arguments.samples * passes, arguments.window, seed + 1000
                )
                for way in arguments.ways:
                    for rate in arguments.rates:
                        run = partial(tried, dense, pruned, windows, judges, way, rate, choose)
                        key = "/".join(map(str, (arguments.model, target, seed, passes, way, rate)))
                        cell = cells.get(key, run)
                        rows.append((target, seed, passes, way, rate, cell))
    print(f"\n{arguments.model}; {cpu_name()}, torch {torch.__version__}\n")
    print("| sparsity | seed | passes | way | rate | KL before | KL after | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for target, seed, passes, way, rate, cell in rows:
        print(
            f"| {target} | {seed} | {passes} | {way} | {rate} | {cell['before']:.4f} | {cell['after']:.4f} | "
            f"{cell['cpu_seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
