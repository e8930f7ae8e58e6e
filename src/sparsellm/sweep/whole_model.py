"""The chain's end: the kept weights of all blocks against the loss itself, one block in work at a time.

The published objective ends in the last feed-forward unit; the global problem (arXiv 2402.17946, eq. 1) ends in what
the model predicts. Here the pruned model is swept as a whole: forward through the blocks, the divergence of its
predictions from the dense model's at the end, and its gradient back through the blocks, each of which runs again from
what entered it, is corrected by Adam, and is put away. So memory is that of one block, and of the windows of one step;
weights and moments of the others wait in memory or on disk, as there is room. Where there are several processes, the
one that has the windows of a step computes its gradient, and all take the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.chain import Chain, Feed, Stream
from sparsellm.chain.products import bf16_products
from sparsellm.chain.streams import Piece
from sparsellm.errors import ModelError, NumericalError
from sparsellm.progress import Progress
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.scratch import Scratch, TensorStore
from sparsellm.sweep.head import divergence_from, through_head
from sparsellm.sweep.training import (
    Adam,
    Float32Calls,
    Shuffled,
    as_written,
    held_out_of,
    of_all,
    running_on,
    schedule,
    share_gradients,
)

# For a model at KL = 1 nat from the dense one. In steps of 1024 tokens 0.002 diverges there within one pass, and 0.0007
# takes a model at KL = 0.6 further away. What a step gains falls with the square of the distance, what its noise costs
# does not: so the rate follows that square, up to here.
RATE = 0.0007
CUT = 1 / 3  # of the rate, after a pass that did harm
HARM = 1.01  # times the least divergence so far: less is how it wavers near its minimum
STEP_TOKENS = 1024  # of a step; half as many steps of twice the tokens cost as much and go less far


@dataclass(frozen=True)
class Pass:
    """Mean divergence KL(dense ‖ pruned) of a predicted token in nats, after so many passes."""

    passes: int
    held_out: float
    train: float | None


@dataclass(frozen=True)
class _Place:
    """Some windows of a process: the number of the piece there, and its tokens."""

    number: int
    tokens: int


@dataclass(frozen=True)
class Reached:
    """A pass that an earlier process saved.

    Attributes:
        history: every pass so far, the state before the first included.
        best: the pass after which the parameters were the best so far; 0 for those before the first.
    """

    history: list[Pass]
    best: int

    @property
    def passes(self) -> int:
        return len(self.history) - 1


class Parameters(Protocol):
    """The state of a sweep, block by block."""

    def parameters(self, block: int) -> Tensor:
        """Flat, fp32."""

    def moments(self, block: int) -> Tensor:
        """``(2, elements)`` fp32."""


class SavedPasses(Protocol):
    """Where each pass is saved, and the last saved one is found again."""

    @property
    def reached(self) -> Reached | None:
        """The last pass that was saved; None if there is none."""

    def parameters(self, number: int, block: int) -> Tensor:
        """Of a block after pass ``number``: flat, fp32, on the CPU."""

    def moments(self, number: int, block: int) -> Tensor:
        """Of a block after pass ``number``: ``(2, elements)`` fp32, on the CPU."""

    def save(self, history: list[Pass], best: int, state: Parameters, *, last: bool) -> None:
        """Saves the state after the newest pass of ``history``; of the ``last`` pass only the best parameters."""


@dataclass(frozen=True)
class SweepTask:
    """A pruned model to be swept.

    Attributes:
        feed: the pruned chain and this process's calibration windows.
        dense: what leaves the dense model's last block, ``(batch, seq, hidden)`` in the batches of the feed.
        passes: over the calibration windows.
        seed: of the windows' order.
        write_block: called for each block, loaded and final, in order.
        learning_rate: of Adam, relative to the root mean square of each parameter; None for :data:`RATE` by the
            square of the divergence at the start.
        held_out: share of the windows that decides which state is kept.
        blocks: where each pruned block stands, or None for a chain that holds its weights.
        saved: where each pass is saved, and the last saved one is gone on from; None for neither.
    """

    feed: Feed
    dense: Sequence[Tensor]
    passes: int
    seed: int
    write_block: Callable[[int], None]
    learning_rate: float | None = None
    held_out: float = 0.125
    blocks: Sequence[CheckpointReader] | None = None
    saved: SavedPasses | None = None

    def pruned(self, index: int) -> CheckpointReader | None:
        """Where the pruned block ``index`` stands."""
        return self.blocks[index] if self.blocks is not None else None


class _Masters:
    """The fp32 parameters of every block, and Adam's moments, in a store: block i stands at 2i and 2i + 1."""

    def __init__(self, chain: Chain, scratch: Scratch) -> None:
        self.chain = chain
        self.pruned: set[str] = set()  # names of the weights of linears, of which zeros stay
        self.store = scratch.store(chain.device)
        self.shapes: list[dict[str, torch.Size]] = []
        self._dtypes: list[dict[str, tuple[torch.dtype, torch.dtype]]] = []

    def fill(self, task: SweepTask, reached: Reached | None) -> None:
        """From the pruned blocks, or from the last saved pass where another is to follow."""
        for index in range(len(self.chain)):
            with self.chain.block(index, task.pruned(index)):
                own = self.chain.block_parameters(index)
                self.pruned |= {linear.weight_name for linear in self.chain.linears(index)}
                self.shapes.append({name: p.shape for name, p in own.items()})
                self._dtypes.append(self.chain.written_dtypes(index))
                flat = self._flat(index)
            if reached is not None and task.saved is not None and reached.passes < task.passes:
                self.store.append(task.saved.parameters(reached.passes, index))
                self.store.append(task.saved.moments(reached.passes, index))
            else:
                self.store.append(flat)
                self.store.append(torch.zeros(2, len(flat), device=flat.device))

    def restart(self, task: SweepTask, best: _Best) -> None:
        """From the best state again, or from the blocks as they were pruned if there is none; moments are zero."""
        for index in range(len(self.chain)):
            if best.number:
                flat = best[index].clone()
            else:
                with self.chain.block(index, task.pruned(index)):
                    flat = self._flat(index)
            self.store[2 * index] = flat
            self.store[2 * index + 1] = torch.zeros(2, len(flat), device=flat.device)

    def parameters(self, block: int) -> Tensor:
        return self.store[2 * block]

    def moments(self, block: int) -> Tensor:
        return self.store[2 * block + 1]

    def _flat(self, index: int) -> Tensor:
        return torch.cat([p.detach().float().flatten() for p in self.chain.block_parameters(index).values()])

    def views(self, flat: Tensor, index: int) -> dict[str, nn.Parameter]:
        """Views of a block's flat tensor. All take gradients, so that moments and parameters have the same places."""
        views, position = {}, 0
        for name, shape in self.shapes[index].items():
            views[name] = nn.Parameter(flat[position : position + shape.numel()].view(shape))
            position += shape.numel()
        return views

    def written(self, flat: Tensor, index: int) -> dict[str, nn.Parameter]:
        """The same as they would be read again if they were written now."""
        dtypes = self._dtypes[index]
        return {n: nn.Parameter(as_written(p, dtypes[n])) for n, p in self.views(flat, index).items()}


class _Best:
    """The parameters after the best pass so far; none where that is the state before the first."""

    def __init__(self, task: SweepTask, masters: _Masters, reached: Reached | None) -> None:
        self._masters = masters
        self._scratch = task.feed.scratch
        self._store: TensorStore | None = None
        self.number = reached.best if reached is not None else 0
        if self.number:
            assert task.saved is not None
            self._store = self._scratch.store()
            for index in range(len(masters.chain)):
                self._store.append(task.saved.parameters(self.number, index))

    def __getitem__(self, index: int) -> Tensor:
        assert self._store is not None
        return self._store[index]

    def take(self, number: int) -> None:
        """Copies the parameters as they are after pass ``number``."""
        self.number = number
        self._store = self._store or self._scratch.store()
        for index in range(len(self._masters.chain)):
            flat = self._masters.parameters(index).clone()
            if len(self._store) > index:
                self._store[index] = flat
            else:
                self._store.append(flat)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()


def check_sweepable(chain: Chain) -> None:
    """Refuses a model that no sweep can train; nothing need be loaded.

    Raises:
        ModelError: a weight stands in two blocks, or in a block and outside.
    """
    for index in range(len(chain)):
        shared = next((name for name in chain.block_parameters(index) if chain.is_shared(name)), None)
        if shared is not None:
            raise ModelError(
                f"{shared} stands in several places of the model, which a sweep cannot train; set passes=0"
            )


@torch.no_grad()
def sweep(task: SweepTask) -> list[Pass]:
    """Fits the kept weights, biases and norms of all blocks to the dense model's predictions; zeros stay zero.

    The state with the least divergence on held-out windows is kept, which may be the one at the start. States are
    judged as they will be written, rounded. A pass that does harm is undone, and those after it take smaller steps.
    The loss is ``KL(dense ‖ pruned)``, in its mean over tokens.

    Returns:
        The divergence before the first pass and after each.

    Raises:
        NumericalError: the divergence is not finite at the start.
        ModelError: blocks share weights.
    """
    check_sweepable(task.feed.chain)
    reached = task.saved.reached if task.saved is not None else None
    masters = _Masters(task.feed.chain, task.feed.scratch)
    masters.fill(task, reached)
    best = _Best(task, masters, reached)
    stream = task.feed.stream(task.blocks[0] if task.blocks is not None else None, pieces=STEP_TOKENS)
    with task.feed.chain.outer():
        history = _passes(task, _Run(task, stream, masters), best, reached)
    stream.close()
    masters.store.close()
    _write(task, masters, best)
    best.close()
    return history


def _passes(task: SweepTask, run: _Run, best: _Best, reached: Reached | None) -> list[Pass]:
    """All passes that are left to do, each judged, kept or undone, and saved."""
    places = [_Place(number, run.tokens(piece)) for number, piece in enumerate(run.stream.pieces)]
    train, judges = held_out_of(of_all(places), task.held_out)
    history = list(reached.history) if reached is not None else [Pass(0, run.judge(judges), None)]
    if not math.isfinite(history[0].held_out):
        raise NumericalError(f"the pruned model diverges from the dense one by {history[0].held_out}; prune less")
    rate = task.learning_rate
    if rate is None:
        rate = RATE * min(1.0, history[0].held_out ** 2)
    order = Shuffled(len(train), task.seed)
    done, steps = (len(history) - 1) * len(train), task.passes * len(train)
    for _ in range(done):
        next(order)
    for number in range(len(history), task.passes + 1):
        total, harmful = 0.0, harmful_passes(history)
        trusted, fresh = rate * CUT ** len(harmful), harmful[-1] * len(train) if harmful else 0
        for _ in range(len(train)):
            said = f"sweep {number}/{task.passes} · KL {history[-1].held_out:.3f}"
            task.feed.progress(Progress("sweep", done, steps, said))
            process, place = train[next(order)]
            piece = run.stream.pieces[place.number] if process == parallel.rank() else None
            total += run.step(piece, process, trusted * schedule(done, steps), done - fresh + 1)
            done += 1
        history.append(Pass(number, run.judge(judges), total / sum(place.tokens for _, place in train)))
        if history[-1].held_out < min(record.held_out for record in history[:-1]):
            best.take(number)
        elif number < task.passes and number in harmful_passes(history):
            run.masters.restart(task, best)
        if task.saved is not None:
            task.saved.save(history, best.number, run.masters, last=number == task.passes)
    task.feed.progress(Progress("sweep", steps, steps))
    return history


def _write(task: SweepTask, masters: _Masters, best: _Best) -> None:
    """Hands every block, loaded, final and rounded as it is written, to the task's ``write_block``."""
    chain = task.feed.chain
    for index in range(len(chain)):
        with chain.block(index, task.pruned(index)):
            if best.number:
                for name, value in masters.views(best[index].to(chain.device), index).items():
                    chain.block_parameters(index)[name].copy_(value)
            chain.settle_block(index)
            task.write_block(index)


def harmful_passes(history: Sequence[Pass]) -> list[int]:
    """The numbers of the passes that took the held-out divergence above the least before, and not by a little."""
    found, least = [], history[0].held_out
    for record in history[1:]:
        if not record.held_out <= HARM * least:  # NaN too
            found.append(record.passes)
        least = min(least, record.held_out)  # which NaN is never less than
    return found


class _Run:
    """Forward and backward of a few windows through all blocks."""

    def __init__(self, task: SweepTask, stream: Stream, masters: _Masters) -> None:
        self.chain, self.stream, self.dense, self.masters = task.feed.chain, stream, task.dense, masters
        self.starts = [0]
        for batch in task.dense:
            self.starts.append(self.starts[-1] + len(batch))
        self.windows = task.feed.windows
        self._in_fp32 = Float32Calls()

    def ids(self, piece: Piece) -> Tensor:
        """Token ids ``(windows, seq)``."""
        start = self.starts[piece.batch]
        return self.windows[start : self.starts[piece.batch + 1]][piece.rows]

    def tokens(self, piece: Piece) -> int:
        return self.ids(piece).numel()

    def judge(self, judges: Sequence[tuple[int, _Place]]) -> float:
        """Mean divergence of a token over the held-out pieces of all processes."""
        own = [self.stream.pieces[place.number] for process, place in judges if process == parallel.rank()]
        sums = of_all([self.divergence(piece) for piece in own])
        return sum(divergence for _, divergence in sums) / sum(place.tokens for _, place in judges)

    def divergence(self, piece: Piece) -> float:
        """Summed over the tokens, of the weights as they would be written now."""
        return self._end(self._forward(piece, written=True)[-1], piece, gradient=False)[0]

    def step(self, piece: Piece | None, process: int, rate: float, number: int) -> float:
        """One step of Adam on every block; returns the divergence before it, summed over the tokens.

        Args:
            piece: the windows of the step, or None where they are in another process.
            process: the one that has them.
            rate: of the step.
            number: of the step, from 1.
        """
        loss, entering, gradient = 0.0, [], None
        if piece is not None:
            entering = self._forward(piece, written=False)
            loss, gradient = self._end(entering.pop(), piece, gradient=True)
        for index in reversed(range(len(self.chain))):
            flat, state = self.masters.parameters(index), self.masters.moments(index)
            parameters = self.masters.views(flat, index)
            if piece is not None:
                hidden = entering.pop()
                with running_on(self.chain, index, parameters), torch.enable_grad():
                    hidden.requires_grad_(True)
                    leaving = self.chain.apply(index, hidden, self._in_fp32(piece.calls[index]))
                    with bf16_products(self.chain.products_in_bf16):
                        leaving.backward(gradient)
                gradient = hidden.grad
                assert gradient is not None
            share_gradients(parameters.values(), process)
            Adam(parameters, self.masters.pruned, state).step(rate, number)
            self.masters.store[2 * index] = flat
            self.masters.store[2 * index + 1] = state
        return parallel.broadcast(loss, process)

    def _forward(self, piece: Piece, *, written: bool) -> list[Tensor]:
        """What enters every block, and what leaves the last."""
        hidden = [self.stream.hidden[piece.batch][piece.rows].float()]
        for index in range(len(self.chain)):
            flat = self.masters.parameters(index)
            parameters = self.masters.written(flat, index) if written else self.masters.views(flat, index)
            with running_on(self.chain, index, parameters):
                hidden.append(self.chain.run(index, hidden[-1], self._in_fp32(piece.calls[index])))
        return hidden

    def _end(self, hidden: Tensor, piece: Piece, *, gradient: bool) -> tuple[float, Tensor]:
        """The divergence summed over the tokens, and the gradient of its mean in what left the last block."""
        ids, wanted = self.ids(piece), self.dense[piece.batch][piece.rows]
        loss = divergence_from(self.chain, wanted, ids)
        total, found = through_head(self.chain, hidden, ids, loss, gradient=gradient)
        return total, found / ids.numel() if gradient else found
