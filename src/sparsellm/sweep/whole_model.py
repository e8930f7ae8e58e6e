"""The sweep: trains the kept weights of all blocks towards the dense model's predictions, one block at a time.

The published objective ends at the last feed-forward unit; the global problem (arXiv 2402.17946, eq. 1) ends at the
model's predictions. A step runs forward through the blocks, computes the divergence of the predictions from the dense
model's, and propagates its gradient back through the blocks. On the way back each block runs again on its stored input,
Adam updates it, and it is stored. So a step needs the memory of one block and of the step's windows; weights and
moments of the other blocks are in memory or on disk, depending on the room. With several processes, the one that has
the windows of a step computes the gradient, and all take the step.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import methodcaller
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.chain import Call, Chain, Feed, Stream
from sparsellm.chain.streams import Piece
from sparsellm.errors import ModelError, NumericalError
from sparsellm.progress import Progress
from sparsellm.records import SweepPass
from sparsellm.storage.reader import CheckpointReader
from sparsellm.sweep.head import divergence_from, through_head
from sparsellm.sweep.integers import Integers
from sparsellm.sweep.saved import SavedSweep
from sparsellm.sweep.training import (
    adam_step,
    held_out_of,
    running_on,
    schedule,
    share_gradients,
    shuffled,
)

# The learning rate of a model that is far from the dense one: three times as much diverges there within one pass. What
# a step gains falls with the square of the divergence, what its noise costs does not. So the rate does, too.
RATE = 0.0007
FAR = 1.2  # nats on windows that nothing was fitted to; from here on the rate is the highest
CAREFUL = 0.75  # nats; below this divergence the rate is tried out
LOWEST_PROBED, PROBED = RATE / 16, 0.004  # the lowest and the highest rate that are tried
FASTER = 4.0  # factor between the rates that are tried
PROBE_STEPS = 2  # steps at each; a pass of fewer than four times as many is not worth the trials
CUT = 1 / 3  # factor of the rate after a harmful pass
HARM = 1.01  # a pass is harmful above this multiple of the least divergence so far; smaller rises are noise
STEP_TOKENS = 512  # tokens of a step; half as many steps of twice the tokens cost as much and gain less
SWEEP_SHARE = 0.5  # windows of a pass per calibration window; what a pass gains depends more on its steps


class _Step(NamedTuple):
    """A step of a pass: the process that has its windows, the number of the step there, and its tokens."""

    process: int
    number: int
    tokens: int


@dataclass(frozen=True)
class SweepTask:
    """A pruned model to be swept.

    Attributes:
        feed: the pruned chain and the windows of the first pass, this process's share.
        dense: the output of the dense model's last block, ``(batch, seq, hidden)`` in the batches of the feed; None for
            a chain that holds the dense model's weights, which then runs.
        passes, seed: the number of passes, each over a set of windows, and the seed of the windows' order.
        write_block: called for each final block in order, while it is loaded.
        learning_rate: Adam's rate, relative to the root mean square of each parameter; None: by the divergence at
            the start, at most :data:`RATE`.
        blocks: the shard of each pruned block, or None for a chain that holds its weights.
        saved: storage of the passes, from which an interrupted sweep continues; None to save none.
        fresh: this process's windows for later passes, one tensor a pass; after the last, the sets come again in turn.
            ``dense`` must then be None. A sweep soon fits the windows it has seen.
        integers: the linears whose values are rounded; blocks and passes hold the trained values before that.
    """

    feed: Feed
    dense: Sequence[Tensor] | None
    passes: int
    seed: int
    write_block: Callable[[int], None]
    learning_rate: float | None = None
    blocks: Sequence[CheckpointReader] | None = None
    saved: SavedSweep | None = None
    fresh: Sequence[Tensor] = ()
    integers: Integers | None = None

    def pruned(self, index: int) -> CheckpointReader | None:
        return self.blocks[index] if self.blocks is not None else None


class _Masters:
    """The fp32 parameters of every block and Adam's moments, in a store: those of block i at 2i and 2i + 1.

    A parameter that several blocks use belongs to the first of them; the others borrow it. Another store holds the
    parameters after the best pass, unless that is pass 0, the state before the first pass."""

    def __init__(self, task: SweepTask) -> None:
        self.task, self.chain, self.integers = task, task.feed.chain, task.integers
        self.pruned: set[str] = set()  # names of the weights of linears, whose zeros must stay
        self.factors: set[str] = set()  # names of the factors of groups, where values are rounded
        self.store = task.feed.scratch.store(self.chain.device)
        self.best, self.best_store = 0, task.feed.scratch.store()
        self.shapes: list[dict[str, torch.Size]] = []
        self._dtypes: list[dict[str, tuple[torch.dtype, torch.dtype]]] = []
        self._aliases: list[dict[str, tuple[int, str]]] = []  # other names of parameters: the block and the name there
        saved, reached = task.saved, task.saved.last if task.saved is not None else None
        number = len(reached.history) - 1 if reached is not None else 0  # passes that an earlier process saved
        for index in range(len(self.chain)):
            with self.chain.block(index, task.pruned(index)):
                parameters, trained = self.chain.block_parameters(index), self._trained(index)
                self.pruned |= {linear.weight_name for linear in self.chain.linears(index)}
                self.factors |= trained.keys() - parameters.keys()
                self.shapes.append({name: p.shape for name, p in trained.items()})
                self._aliases.append({name: self.chain.home(name) for name in parameters if name not in trained})
                self._dtypes.append({n: (p.dtype, self.chain.stored_dtype(n)) for n, p in parameters.items()})
                flat, moments = _flat(trained)
            if saved is not None and 0 < number < task.passes:
                flat, moments = (saved.read(kind, number, index) for kind in ("parameters", "moments"))
            self.store.append(flat)
            self.store.append(moments)
        if saved is not None and reached is not None and reached.best:
            self.best = reached.best
            for index in range(len(self.chain)):
                self.best_store.append(saved.read("parameters", self.best, index))

    def keep(self, number: int) -> None:
        """Copies the current parameters, which are those after pass ``number``, as the best."""
        self.best = number
        self.best_store.close()
        for index in range(len(self.chain)):
            self.best_store.append(self.parameters(index).clone())

    def restart(self) -> None:
        """Restores the best state, or the blocks as they were pruned if there is none, with moments of zero."""
        for index in range(len(self.chain)):
            if self.best:
                flat = self.best_store[index].clone()
                moments = torch.zeros(2, len(flat), device=flat.device)
            else:
                with self.chain.block(index, self.task.pruned(index)):
                    flat, moments = _flat(self._trained(index))
            self.store[2 * index], self.store[2 * index + 1] = flat, moments

    def parameters(self, block: int) -> Tensor:
        return self.store[2 * block]

    def moments(self, block: int) -> Tensor:
        return self.store[2 * block + 1]

    def _trained(self, index: int) -> dict[str, Tensor]:
        """What is trained in the loaded block: the parameters it owns, and factors of groups if values are rounded."""
        factors = {} if self.integers is None else self.integers.factors(self.chain, index)
        parameters = self.chain.block_parameters(index)
        return {**{name: p for name, p in parameters.items() if self.chain.owns(name)}, **factors}

    def views(self, flat: Tensor, index: int) -> dict[str, nn.Parameter]:
        """Views of a block's flat tensor, by parameter. All require gradients, so that moments have the same layout."""
        shapes = self.shapes[index]
        parts = flat.split([shape.numel() for shape in shapes.values()])
        return {name: nn.Parameter(part.view(shapes[name])) for name, part in zip(shapes, parts, strict=True)}

    def all_views(
        self, flat: Tensor, index: int, *, running: bool = False, written: bool = False
    ) -> dict[str, nn.Parameter]:
        """:meth:`views`, and the parameters that the block borrows, which are the same objects under all their names.
        With ``running``, values are on the grids of :class:`Integers`; with ``written``, also rounded as on disk."""
        views: dict[int, dict[str, nn.Parameter]] = {}
        for at in [index, *dict.fromkeys(at for at, _ in self._aliases[index].values())]:
            if at not in views:
                views[at] = self.views(flat if at == index else self.parameters(at), at)
                if running and self.integers is not None:
                    views[at] = self.integers.of(views[at], self.chain, at)
                if written:
                    for name, parameter in views[at].items():
                        memory, disk = self._dtypes[at][name]
                        views[at][name] = nn.Parameter(parameter.detach().to(memory).to(disk).float())
        return {**views[index], **{name: views[at][first] for name, (at, first) in self._aliases[index].items()}}

    def borrowed(self, index: int) -> dict[str, str]:
        """For each parameter that block ``index`` borrows of another, by its name there, its name in the block."""
        return {first: name for name, (at, first) in self._aliases[index].items() if at != index}

    def write(self) -> None:
        """Calls ``write_block`` for each block, loaded with its best weights, rounded as they are written."""
        chain = self.chain
        self.store.close()
        for index in range(len(chain)):
            with chain.block(index, self.task.pruned(index)):
                if self.best:
                    trained = self.views(self.best_store[index].to(chain.device), index)
                    trained = trained if self.integers is None else self.integers.of(trained, chain, index)
                    for name, value in trained.items():
                        chain.block_parameters(index)[name].copy_(value)
                elif self.integers is not None:
                    self.integers.settle(chain, index)
                chain.settle_block(index)
                self.task.write_block(index)
        self.best_store.close()


def _flat(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The tensors as one, fp32, and Adam's moments for it, which are zero."""
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors.values()])
    return flat, torch.zeros(2, len(flat), device=flat.device)


def check_sweepable(chain: Chain) -> None:
    """Raises a ModelError for a model that a sweep cannot train: a weight is used in a block and outside the blocks."""
    for index in range(len(chain)):
        for name in chain.block_parameters(index):
            outside = chain.outside(name)
            if outside is not None:
                raise ModelError(
                    f"{name} is used outside the blocks too, as {outside}, which a sweep cannot train; set passes=0"
                )


@torch.no_grad()
def sweep(task: SweepTask) -> list[SweepPass]:
    """Fits the kept weights, biases and norms of all blocks to the dense model's predictions; zeros stay zero. Returns
    the divergence before the first pass and after each.

    The result is the state with the least divergence on held-out windows, which may be the one at the start. States are
    judged with weights rounded as they will be written. A harmful pass is undone, and later passes take smaller steps.
    The loss is ``KL(dense ‖ pruned)``, averaged over tokens. :func:`check_sweepable` comes before.

    Raises:
        NumericalError: the divergence is not finite at the start.
    """
    assert task.dense is None or not task.fresh, "the dense model's states belong to one set"
    history = task.saved.last.history if task.saved is not None and task.saved.last is not None else []
    masters = _Masters(task)
    if len(history) <= task.passes:  # else all that is left is to write the best
        with _on(task, masters, task.feed.windows, 0, task.passes) as run:
            history = _passes(task, run, history)
    task.feed.progress(Progress("sweep", 1, 1))
    masters.write()
    return history


def _passes(task: SweepTask, run: _Run, history: list[SweepPass]) -> list[SweepPass]:
    """Runs the passes after those of ``history``: each is judged, kept or undone, and saved. Returns all passes."""
    chain, masters = task.feed.chain, run.masters
    train, judges = held_out_of(run.steps())
    history = list(history) or [_start(task, run, train, judges)]
    first = len(history)
    for number in range(first, task.passes + 1):
        done, passes = number - first, task.passes - first + 1  # passes of this process
        with contextlib.ExitStack() as stack:
            trained, steps = run, train
            turn = (number - 1) % (1 + len(task.fresh))  # 0: the first set, without what is held out
            if turn:
                trained = stack.enter_context(_on(task, masters, task.fresh[turn - 1], done, passes))
                steps = trained.steps()
            stack.enter_context(chain.outer())
            mean = _pass(task, trained, steps, history, first)
            history.append(SweepPass(passes=number, held_out=run.judge(judges), train=mean))
        if history[-1].held_out < min(record.held_out for record in history[:-1]):
            masters.keep(number)
        elif number < task.passes and number in harmful_passes(history):
            masters.restart()
        if task.saved is not None:
            state = {"parameters": masters.parameters, "moments": masters.moments}
            task.saved.save(history, masters.best, state, last=number == task.passes)
    return history


def _start(task: SweepTask, run: _Run, train: list[_Step], judges: list[_Step]) -> SweepPass:
    """The state before the first pass, with the learning rate for the sweep: proportional to the square of the
    divergence. Where that is small, it may be far too small for a model whose gradients have little noise. So a few
    steps are tried at rates that rise, each from the start, as long as they lower the held-out divergence further."""
    with task.feed.chain.outer():
        start = run.judge(judges)
        if not math.isfinite(start):
            raise NumericalError(f"the pruned model diverges from the dense one by {start}; prune less")
        if task.learning_rate is not None:
            return SweepPass(passes=0, held_out=start, rate=task.learning_rate)
        chosen, least = RATE * min(1.0, (start / FAR) ** 2), start
        rate = max(chosen, LOWEST_PROBED)
        while start < CAREFUL and rate <= PROBED and len(train) >= 4 * PROBE_STEPS:
            task.feed.progress(Progress("sweep", 0, task.passes, f"trying rate {rate:.1e} · KL {least:.3f}"))
            for number, step in enumerate(train[:PROBE_STEPS], 1):
                run.step(run.piece(step), step.process, rate, number)
            divergence = run.judge(judges)
            run.masters.restart()
            if not divergence < least:
                break
            least, chosen, rate = divergence, rate, rate * FASTER
        return SweepPass(passes=0, held_out=start, rate=chosen)


def _pass(task: SweepTask, run: _Run, steps: list[_Step], history: list[SweepPass], first: int) -> float:
    """Runs the next pass over the steps of all processes, of which ``first`` was the first in this process; returns the
    mean divergence per token before its steps."""
    number, count, total, harmful = history[-1].passes + 1, len(steps), 0.0, harmful_passes(history)
    rate, undone = history[0].rate, harmful[-1] if harmful else 0  # the pass after which Adam's moments began anew
    assert rate is not None, "the state before the first pass has the rate"
    text = f"pass {number}/{task.passes} · KL {history[-1].held_out:.3f}"
    for place, chosen in enumerate(shuffled(count, task.seed + (number - 1) * 1_000_003)):
        task.feed.progress(Progress("sweep", number - first + place / count, task.passes - first + 1, text))
        step = steps[chosen]
        factor = schedule((number - 1) * count + place, task.passes * count)
        since = (number - 1 - undone) * count + place + 1  # steps since Adam's moments began
        total += run.step(run.piece(step), step.process, rate * CUT ** len(harmful) * factor, since)
    return total / sum(step.tokens for step in steps)


@contextlib.contextmanager
def _on(task: SweepTask, masters: _Masters, windows: Tensor, done: int, passes: int) -> Iterator[_Run]:
    """A run over a set of windows, with the dense model's hidden states for them, after ``done`` of ``passes``."""
    feed, chain = replace(task.feed, windows=windows), task.feed.chain
    with contextlib.ExitStack() as stack:
        stream = feed.stream(task.pruned(0), pieces=STEP_TOKENS)
        stack.callback(stream.close)
        goal = task.dense
        if goal is None:
            dense = stream.fork()
            stack.callback(dense.close)
            with chain.unpruned():
                for index in range(len(chain)):
                    task.feed.progress(Progress("sweep", done, passes, f"dense block {index + 1}/{len(chain)}"))
                    with chain.block(index):
                        dense.advance(index)
            goal = dense.hidden
        yield _Run(chain, windows, stream, goal, masters)


def harmful_passes(history: Sequence[SweepPass]) -> list[int]:
    """The numbers of the passes that raised the held-out divergence above :data:`HARM` times the least before."""
    harmful, least = [], history[0].held_out
    for record in history[1:]:
        if not record.held_out <= HARM * least:  # NaN too
            harmful.append(record.passes)
        least = min(least, record.held_out)  # NaN is never less
    return harmful


class _Run:
    """Forward and backward of a few windows through all blocks."""

    def __init__(
        self, chain: Chain, windows: Tensor, stream: Stream, dense: Sequence[Tensor], masters: _Masters
    ) -> None:
        self.chain, self.windows, self.stream, self.dense, self.masters = chain, windows, stream, dense, masters
        self.starts = [0, *itertools.accumulate(map(len, dense))]
        # A call that several batches or blocks share is converted once.
        self._in_fp32: Callable[[Call], Call] = functools.cache(methodcaller("to", torch.float32))

    def steps(self) -> list[_Step]:
        """The steps of a pass over the windows of all processes, in order."""
        tokens = [self.ids(piece).numel() for piece in self.stream.pieces]
        counts = enumerate(parallel.gather(tokens))
        return [_Step(process, number, count) for process, some in counts for number, count in enumerate(some)]

    def piece(self, step: _Step) -> Piece | None:
        """The windows of a step, or None if another process has them."""
        return self.stream.pieces[step.number] if step.process == parallel.rank() else None

    def ids(self, piece: Piece) -> Tensor:
        """Token ids ``(windows, seq)``."""
        start = self.starts[piece.batch]
        return self.windows[start : self.starts[piece.batch + 1]][piece.rows]

    def judge(self, judges: Sequence[_Step]) -> float:
        """The mean divergence per token over the held-out steps of all processes, with the weights as they would be
        written now."""
        pieces = [self.piece(step) for step in judges]
        sums = [self._end(self._forward(x, written=True)[-1], x, gradient=False)[0] for x in pieces if x is not None]
        total = sum(divergence for some in parallel.gather(sums) for divergence in some)
        return total / sum(step.tokens for step in judges)

    def step(self, piece: Piece | None, process: int, rate: float, number: int) -> float:
        """Takes step ``number`` of Adam, from 1, on every block; returns the divergence before it, summed over the
        tokens. ``piece``: the windows, or None if another ``process`` has them."""
        chain, masters = self.chain, self.masters
        loss, inputs, gradient = 0.0, [], None
        waiting: dict[str, Tensor] = {}  # gradients of parameters that later blocks borrow
        if piece is not None:
            inputs = self._forward(piece, written=False)
            loss, gradient = self._end(inputs.pop(), piece, gradient=True)
        for index in reversed(range(len(chain))):
            flat, state = masters.parameters(index), masters.moments(index)
            parameters = used = masters.all_views(flat, index)
            if piece is not None:
                hidden = inputs.pop()
                if masters.integers is not None:
                    used = masters.all_views(flat, index, running=True)
                with running_on(chain, index, used), torch.enable_grad():
                    hidden.requires_grad_(True)
                    chain.apply(index, hidden, self._in_fp32(piece.calls[index])).backward(gradient)
                gradient = hidden.grad
                assert gradient is not None
                for name in used:
                    parameters[name].grad = used[name].grad  # straight through the rounding
            trained = {name: parameters[name] for name in masters.shapes[index]}
            for first, name in [*masters.borrowed(index).items(), *((n, n) for n in trained.keys() & waiting.keys())]:
                if (part := parameters[name].grad) is not None:
                    waiting[first] = waiting[first] + part if first in waiting else part
            for name in trained.keys() & waiting.keys():
                trained[name].grad = waiting.pop(name)
            if piece is not None and masters.integers is not None:
                masters.integers.pull_back(trained, used, chain, index)
            share_gradients(trained.values(), process)
            adam_step(trained, state, rate, number, pruned=masters.pruned, factors=masters.factors)
            masters.store[2 * index], masters.store[2 * index + 1] = flat, state
        return parallel.broadcast(loss, process)

    def _forward(self, piece: Piece, *, written: bool) -> list[Tensor]:
        """The input of every block, and the output of the last."""
        hidden = [self.stream.hidden[piece.batch][piece.rows].float()]
        for index in range(len(self.chain)):
            flat = self.masters.parameters(index)
            parameters = self.masters.all_views(flat, index, running=True, written=written)
            with running_on(self.chain, index, parameters):
                hidden.append(self.chain.run(index, hidden[-1], self._in_fp32(piece.calls[index])))
        return hidden

    def _end(self, hidden: Tensor, piece: Piece, *, gradient: bool) -> tuple[float, Tensor]:
        """The divergence summed over the tokens, and the gradient of its mean at the output of the last block."""
        ids = self.ids(piece)
        loss = divergence_from(self.chain, self.dense[piece.batch][piece.rows], ids)
        total, slope = through_head(self.chain, hidden, ids, loss, gradient=gradient)
        return total, slope / ids.numel() if gradient else slope
