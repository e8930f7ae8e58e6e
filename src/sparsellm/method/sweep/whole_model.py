"""The sweep: trains the kept weights of all blocks towards the dense model's predictions.

The published objective ends at the last feed-forward unit; the global problem (arXiv 2402.17946, eq. 1) ends at the
model's predictions. A step runs forward through the blocks, computes the divergence of the predictions from the dense
model's, and propagates its gradient back through the blocks, which Adam updates.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.errors import ModelError, NumericalError
from sparsellm.method.sweep.resident import Resident
from sparsellm.method.sweep.streamed import Streamed
from sparsellm.method.sweep.sweep_task import SweepStep, SweepTask, TrainingSet, Weights
from sparsellm.method.sweep.training import held_out_of, schedule
from sparsellm.model import Chain
from sparsellm.progress import Progress
from sparsellm.records import SweepPass

# The learning rate of a model that is far from the dense one: three times as much diverges there within one pass. What
# a step gains falls with the square of the divergence, what noise costs does not. So the rate falls with that square.
RATE = 0.0007
FAR = 1.2  # nats on windows that nothing was fitted to; from here on the rate is the highest
CAREFUL = 0.75  # nats; below this divergence the rate is tried out
LOWEST_PROBED = RATE / 16  # the lowest rate that is tried
PROBED = 0.004  # the highest
FASTER = 4.0  # factor between the rates that are tried
# steps at each; a pass of fewer than three times as many is not worth the trials
PROBE_STEPS = 2
CUT = 1 / 3  # factor of the rate after a harmful pass
HARM = 1.01  # a pass is harmful above this multiple of the least divergence so far; smaller rises are noise
STEP_TOKENS = 512  # tokens of a step; half as many steps of twice the tokens cost as much and gain less
SHORTEST = 128  # tokens of the shortest windows into which others are cut where processes share a step


def cut_to(width: int, processes: int) -> int:
    """The length, in tokens, of the windows into which windows of ``width`` tokens are cut. In a step each process
    takes one of them, and all of a step have about ``STEP_TOKENS`` together."""
    return width // max(1, round(width / max(SHORTEST, STEP_TOKENS // processes)))


def check_sweepable(chain: Chain) -> None:
    """Raises a ModelError where a weight is used in a block and outside the blocks, or a block has none of its own."""
    for index in range(len(chain)):
        if not any(map(chain.owns, chain.block_parameters(index))):
            raise ModelError(
                f"block {index} has no weight of its own that a sweep could train; set passes=0"
            )
        for name in chain.block_parameters(index):
            if (outside := chain.outside(name)) is not None:
                used = f"{name} is used outside the blocks too, as {outside}"
                raise ModelError(f"{used}, which a sweep cannot train; set passes=0")


@torch.no_grad()
def sweep(task: SweepTask) -> list[SweepPass]:
    """Fits the kept weights, biases and norms of all blocks to the dense model's predictions; zeros stay zero. Returns
    the divergence before the first pass and after each.

    The result is the state with the least divergence on held-out windows, which may be the one at the start. States are
    judged with weights rounded as they will be written. A harmful pass is undone, and later passes take smaller steps.
    The loss is ``KL(dense ‖ pruned)``, averaged over tokens. ``check_sweepable`` comes before. A NumericalError
    says that the divergence is not finite at the start."""
    history: list[SweepPass] = []
    if task.saved is not None and task.saved.last is not None:
        history = task.saved.last.history
    make: Callable[[SweepTask], Weights] = Resident
    if task.resident is None:
        make = Streamed
    with contextlib.closing(make(task)) as weights:
        if len(history) <= task.passes:  # else all that is left is to write the best
            with _on(task, weights, task.feed.windows, 0, task.passes) as data:
                history = _passes(task, data, history)
        task.feed.progress(Progress("sweep", 1, 1))
        weights.write()
    return history


def _passes(
    task: SweepTask, data: TrainingSet, history: list[SweepPass]
) -> list[SweepPass]:
    """Runs the passes after those of ``history``: each is judged, kept or undone, and saved. Returns all passes."""
    chain = task.feed.chain
    weights = data.weights
    steps = data.steps()
    train, judges = held_out_of(steps, data.texts(steps))
    if task.saved is not None:
        task.saved.way = f"{parallel.size()} {type(weights).__name__}"
        if task.saved.last is not None and task.saved.last.way != task.saved.way:
            history = _rescaled(history, task, data, judges)
    history = list(history) or [_start(task, data, train, judges)]
    first = len(history)
    for number in range(first, task.passes + 1):
        done = number - first  # passes of this process
        passes = task.passes - first + 1
        with contextlib.ExitStack() as stack:
            trained = data
            steps = train
            # Turn 0 is the first set, without the windows that are held out.
            turn = (number - 1) % (1 + len(task.fresh))
            if turn:
                trained = stack.enter_context(
                    _on(task, weights, task.fresh[turn - 1], done, passes)
                )
                steps = trained.steps()
            stack.enter_context(chain.outer())
            mean = _pass(
                task,
                trained,
                steps=steps,
                history=history,
                first=first,
                length=len(train),
            )
            held_out, sources = data.judge(judges)
            history.append(
                SweepPass(passes=number, held_out=held_out, sources=sources, train=mean)
            )
        if history[-1].held_out < min(record.held_out for record in history[:-1]):
            weights.keep(number)
        elif number < task.passes and number in harmful_passes(history):
            weights.restart()
        if task.saved is not None:
            state = {"parameters": weights.parameters, "moments": weights.moments}
            task.saved.save(history, weights.best, state, last=number == task.passes)
    return history


def _rescaled(
    history: list[SweepPass],
    task: SweepTask,
    data: TrainingSet,
    judges: list[SweepStep],
) -> list[SweepPass]:
    """The history as if the windows that are held out now had been held out before.

    A resumed sweep may divide its windows among processes in another way, and then holds out others, on which the
    divergence is another. So every old divergence is multiplied by one factor: that of the present state on the new
    windows, over its recorded one."""
    before = history[-1].held_out
    if history[-1].passes in harmful_passes(history):  # the best state is there again
        before = min(record.held_out for record in history)
    with task.feed.chain.outer():
        factor = data.judge(judges)[0] / before

    def scaled(record: SweepPass) -> SweepPass:
        sources = {name: value * factor for name, value in record.sources.items()}
        held_out = record.held_out * factor
        return record.model_copy(update={"held_out": held_out, "sources": sources})

    return [scaled(record) for record in history]


def _start(
    task: SweepTask, data: TrainingSet, train: list[SweepStep], judges: list[SweepStep]
) -> SweepPass:
    """The state before the first pass, with the sweep's learning rate.

    The rate is proportional to the squared divergence. At a small divergence it may be far too low for a model whose
    gradients have little noise. So a few steps are tried at rising rates, each from the start, as long as they lower
    the held-out divergence further."""
    with task.feed.chain.outer():
        start, sources = data.judge(judges)
        if not math.isfinite(start):
            raise NumericalError(
                f"the pruned model diverges from the dense one by {start}; prune less"
            )
        if task.learning_rate is not None:
            return SweepPass(
                passes=0, held_out=start, sources=sources, rate=task.learning_rate
            )
        chosen = RATE * min(1.0, (start / FAR) ** 2)
        least = start
        rate = max(chosen, LOWEST_PROBED)
        while start < CAREFUL and rate <= PROBED and len(train) >= 3 * PROBE_STEPS:
            text = f"trying rate {rate:.1e} · KL {least:.3f}"
            task.feed.progress(Progress("sweep", total=task.passes, detail=text))
            for number, step in enumerate(train[:PROBE_STEPS], 1):
                data.step(step, rate, number)
            divergence, _ = data.judge(judges)
            data.weights.restart()
            if not divergence < least:
                break
            least = divergence
            chosen = rate
            rate = rate * FASTER
        return SweepPass(passes=0, held_out=start, sources=sources, rate=chosen)


def _pass(
    task: SweepTask,
    data: TrainingSet,
    steps: list[SweepStep],
    history: list[SweepPass],
    first: int,
    length: int,
) -> float:
    """Runs the next pass over the steps of all processes. Returns the mean divergence per token, that of each step
    before the step. ``first`` is the first pass of this start. The schedule is one curve over all passes, of ``length``
    steps each."""
    number = history[-1].passes + 1
    count = len(steps)
    total = 0.0
    harmful = harmful_passes(history)
    rate = history[0].rate
    undone = max(harmful, default=0)  # after this pass Adam's moments began anew
    assert rate is not None, "the state before the first pass has the rate"
    text = f"pass {number}/{task.passes} · KL {history[-1].held_out:.3f}"
    seed = task.seed + (number - 1) * 1_000_003
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    for place, chosen in enumerate(order.flip(0).tolist()):
        done = number - first + place / count
        passes = task.passes - first + 1
        task.feed.progress(Progress("sweep", done, total=passes, detail=text))
        # about the number of steps since Adam's moments began
        since = (number - 1 - undone) * length + place + 1
        at = ((number - 1) * count + place) * length / count
        factor = schedule(at, steps=task.passes * length, number=since)
        total += data.step(steps[chosen], rate * CUT ** len(harmful) * factor, since)
    return total / sum(step.tokens for step in steps)


@contextlib.contextmanager
def _on(
    task: SweepTask, weights: Weights, windows: Tensor, done: int, passes: int
) -> Iterator[TrainingSet]:
    """The training set of some windows. The dense model runs on them first, unless its hidden states are known; its
    progress shows ``done`` of ``passes``."""
    feed = replace(task.feed, windows=windows)
    chain = task.feed.chain
    with contextlib.ExitStack() as stack:
        # The processes of a resident sweep divide a step.
        processes = 1
        if task.resident is not None:
            processes = parallel.size()
        stream = feed.stream(task.pruned(0), pieces=STEP_TOKENS // processes)
        stack.callback(stream.close)
        goal = task.dense
        if goal is None:
            dense = stream.fork()
            stack.callback(dense.close)
            with chain.unpruned():
                for index in range(len(chain)):
                    text = f"dense block {index + 1}/{len(chain)}"
                    task.feed.progress(
                        Progress("sweep", done, total=passes, detail=text)
                    )
                    with chain.block(index):
                        dense.advance(index)
            goal = dense.hidden
        sources = task.sources if windows is task.feed.windows else ()
        yield TrainingSet(windows, stream, dense=goal, weights=weights, sources=sources)


def harmful_passes(history: Sequence[SweepPass]) -> list[int]:
    """The numbers of the passes that raised the held-out divergence above ``HARM`` times the least before."""
    harmful = []
    least = history[0].held_out
    for record in history[1:]:
        if not record.held_out <= HARM * least:  # NaN too
            harmful.append(record.passes)
        least = min(least, record.held_out)  # NaN is never less
    return harmful
